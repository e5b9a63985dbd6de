"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 x 28, white on black.

Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", CC BY-SA 3.0.  `load` looks in

    1. the folder that the caller or $MINIDIFF_DATA names; a missing or damaged file there is an error
    2. the cache, $XDG_CACHE_HOME/minidiff/mnist or ~/.cache/minidiff/mnist; a damaged file there is an error too
    3. the public mirrors, from which it fills the cache
    4. the package itself, which contains the first 10,000 training images

The SHA-256 of files from 2 and 3 must be that of the official ones.
"""

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff.data import idx
from minidiff.data.download import fetch
from minidiff.errors import UserError
from minidiff.files import cache_folder, user_path, write_whole
from minidiff.terminal import say

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SHA256 = {                                                  # of the uncompressed files: gzip's bytes may differ
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
PACKED = Path(__file__).parent / "packed"
LARGEST_DOWNLOAD = 1 << 24                                  # bytes; the largest compressed file has 10 million


@dataclass(frozen=True, eq=False)
class Images:
    """Images and which digits they are, in the files' order.  The arrays are read-only."""

    images: np.ndarray                      # (N, 28, 28) uint8, 0 black, 255 white
    labels: np.ndarray                      # (N,) uint8, 0..9
    source: str                             # where they come from, for people

    def __len__(self) -> int:
        return len(self.labels)


class NotThere(UserError):
    """There are no such images; where there are, but damaged, the error is a plain UserError."""


def load(data_dir: str | Path | None = None, split: str = "train", *, download: bool = True, quiet: bool = False
         ) -> Images:
    """MNIST's "train" or "test" images, from the first of the places above that has them.

    download=False never uses the network; quiet=True shows neither the progress bar nor the message that the packed
    images are used.  Raises UserError for a folder or file that is missing, damaged or of another kind, and for test
    images that are neither in a folder nor on the network.
    """
    if split not in FILES:
        raise ValueError(f"split is {split!r}, but load takes 'train' or 'test'")
    data_dir = data_dir or os.environ.get("MINIDIFF_DATA")
    if data_dir:
        return _read(user_path(data_dir), split, f"MNIST in {data_dir}")
    try:
        _fill_cache(split, download, quiet)
    except UserError as error:
        if split == "test":
            remedy = "put MNIST's four files into a folder and name it with --data or MINIDIFF_DATA"
            raise NotThere(f"{error}, and minidiff contains no test images: {remedy}") from error
        if not quiet:
            instead = "using the 10,000 training images that minidiff contains"
            say(f"{error}; {instead}")
        return packed()
    return _read(cache_dir(), split, f"MNIST in {cache_dir()}", SHA256)


def holds_any(folder: Path) -> bool:
    """Whether the folder holds at least one of MNIST's four files, under one of their common names."""
    try:
        return any(_plain_name(path) in names for names in FILES.values() for path in folder.iterdir())
    except OSError:                                         # a file, or a folder that may not be listed
        return False


def packed() -> Images:
    """The first 10,000 training images, which are part of minidiff."""
    return _read(PACKED, "train", "the first 10,000 training images of MNIST, part of minidiff")


def cache_dir() -> Path:
    """The folder for downloads.  UserError where it is unknown."""
    return cache_folder("minidiff", "mnist")


def _fill_cache(split: str, download: bool, quiet: bool) -> None:
    """Downloads the files of a split that are not in the cache.  Raises UserError if that is impossible."""
    for name in FILES[split]:
        path = cache_dir() / f"{name}.gz"
        if os.path.exists(path):
            continue
        if not download:
            raise UserError(f"MNIST is not in {cache_dir()}, and downloading is switched off")

        def verify(data: bytes, name: str = name) -> None:
            _check_sha256(idx.unpack(data, "the file sent"), SHA256[name], "the file sent")

        urls = [f"{mirror}{name}.gz" for mirror in MIRRORS]
        fetch(urls, path, verify, largest=LARGEST_DOWNLOAD, quiet=quiet)


def _read(folder: Path, split: str, source: str, sha256: dict[str, str] | None = None) -> Images:
    """The images and labels of a split in a folder; the files must have these hashes.  UserError."""
    paths = [_path(folder, name, split) for name in FILES[split]]
    images, labels = (idx.parse(_read_file(path, sha256 and sha256[name]), str(path))
                      for path, name in zip(paths, FILES[split], strict=True))
    _check_arrays(images, labels, *paths)
    return Images(images, labels, source)


def _path(folder: Path, name: str, split: str) -> Path:
    """The file of this name, compressed or not; else of another common name.  UserError if there is none.

    Others write train-images.idx3-ubyte or TRAIN-IMAGES-IDX3-UBYTE.GZ; some folders hold folders of these names, too.
    """
    usual = [folder / name, folder / f"{name}.gz"]
    try:
        others = sorted(path for path in folder.iterdir() if _plain_name(path) == name)
    except OSError:                                         # no folder, or one that may not be listed
        others = []
    found = sorted((path for path in (*usual, *others) if os.path.exists(path)), key=os.path.isdir)    # files first
    if not found:
        raise NotThere(f"{folder} has neither {name} nor {name}.gz, the {split} files of MNIST")
    return found[0]


def _plain_name(path: Path) -> str:
    """A file's name as the official files have theirs: in lower case, with "-" for "." and "_", and without .gz."""
    return path.name.lower().removesuffix(".gz").replace(".", "-").replace("_", "-")


def _read_file(path: Path, sha256: str | None) -> bytes:
    if sha256 is None:
        return idx.read_bytes(path)
    try:
        data = idx.read_bytes(path)
        _check_sha256(data, sha256, str(path))
    except UserError as error:
        raise UserError(f"{error}; delete it, and it will be downloaded again") from error
    return data


def pack(source: Images, folder: str | Path, count: int = 10_000) -> None:
    """Writes the first `count` images and labels as training files into `folder`.  Equal images give equal bytes.

    `mnist.pack(mnist.load(), mnist.PACKED)` made the images that are part of minidiff.
    """
    for name, array in zip(FILES["train"], (source.images, source.labels), strict=True):
        packed = gzip.compress(idx.encode(array[:count]), 9, mtime=0)
        write_whole(Path(folder) / f"{name}.gz", packed)


# --- checks -----------------------------------------------------------------------------------------------

def _check_sha256(data: bytes, sha256: str, source: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{source} is not the official file (its SHA-256 differs)")


def _check_arrays(images: np.ndarray, labels: np.ndarray, images_path: Path, labels_path: Path) -> None:
    if images.shape[1:] != (28, 28):
        raise UserError(f"{images_path} holds an array of shape {images.shape}, not images of 28 x 28")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{labels_path} has the shape {labels.shape}, but there are {len(images)} images")
    if labels.max() > 9:
        raise UserError(f"{labels_path} holds the label {labels.max()}, but digits are 0 to 9")
