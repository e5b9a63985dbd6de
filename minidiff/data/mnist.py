"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 x 28, white on black.

Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", CC BY-SA 3.0. Looked for in

    1. the folder that the caller or $MINIDIFF_DATA names; a missing or broken file there is an error
    2. the cache, $XDG_CACHE_HOME/minidiff/mnist or ~/.cache/minidiff/mnist; a broken file there is one, too
    3. the public mirrors, which fill the cache
    4. the package itself, which carries the first 10,000 training images

What comes from 2 and 3 is compared with the SHA-256 of the official files.
"""

import gzip
import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minidiff.data import idx
from minidiff.data.download import fetch
from minidiff.errors import UserError

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://raw.githubusercontent.com/fgnt/mnist/master/",
)
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
SHA256 = {  # of the unpacked files; gzip may pack them differently anywhere
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
PACKED = Path(__file__).parent / "packed"
_LARGEST_DOWNLOAD = 1 << 24  # bytes; the largest packed file has 10 million


@dataclass(frozen=True, eq=False)
class Images:
    """Digits and their values, in the files' order. The arrays are read only."""

    images: np.ndarray  # (N, 28, 28) uint8, 0 black, 255 white
    labels: np.ndarray  # (N,) uint8, 0..9
    source: str  # where they come from, for people

    def __len__(self) -> int:
        return len(self.labels)


def load(
    data_dir: str | Path | None = None, split: str = "train", *, download: bool = True, quiet: bool = False
) -> Images:
    """MNIST's "train" or "test" images, from the first of the places above that has them.

    download=False never uses the network; quiet=True shows neither the progress bar nor the line that
    tells of the packed subset. Raises UserError for a folder or file that is missing, damaged or of another
    kind, and for test images that neither a folder nor the network provides.
    """
    if split not in FILES:
        raise ValueError(f"split is {split!r}, but load takes 'train' or 'test'")
    data_dir = data_dir or os.environ.get("MINIDIFF_DATA")
    if data_dir:
        return _read(Path(data_dir).expanduser(), split, f"MNIST in {data_dir}")
    try:
        _fill_cache(split, download, quiet)
    except UserError as error:
        if split == "test":
            remedy = "put MNIST's four files into a folder and name it with --data or MINIDIFF_DATA"
            raise UserError(f"{error}, and minidiff carries no test images: {remedy}") from error
        if not quiet:
            instead = "using the 10,000 training images that minidiff carries"
            print(f"minidiff: {error}; {instead}", file=sys.stderr)
        return packed()
    return _read(cache_dir(), split, f"MNIST in {cache_dir()}", SHA256)


def packed() -> Images:
    """The first 10,000 training images, which minidiff carries."""
    return _read(PACKED, "train", "the first 10,000 training images of MNIST, carried by minidiff")


def cache_dir() -> Path:
    """The folder that downloads are kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minidiff" / "mnist"


def _fill_cache(split: str, download: bool, quiet: bool) -> None:
    """Fetch what the cache lacks of a split; raises UserError where that is not possible."""
    for name in FILES[split]:
        path = cache_dir() / f"{name}.gz"
        if os.path.exists(path):
            continue
        if not download:
            raise UserError(f"MNIST is not in {cache_dir()}, and no download was asked for")

        def verify(data: bytes, name: str = name) -> None:
            _check(idx.unpack(data, "what was sent"), SHA256[name], "what was sent")

        urls = [f"{mirror}{name}.gz" for mirror in MIRRORS]
        fetch(urls, path, verify, largest=_LARGEST_DOWNLOAD, quiet=quiet)


def _check(data: bytes, sha256: str, source: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{source} is not the official file (its SHA-256 differs)")


def _read(folder: Path, split: str, source: str, sha256: dict[str, str] | None = None) -> Images:
    """The images and labels of a split in a folder, both of them checked before either is given out."""
    paths, arrays = [], []
    for name in FILES[split]:
        path = next(filter(os.path.exists, (folder / name, folder / f"{name}.gz")), None)
        if path is None:
            raise UserError(f"{folder} has neither {name} nor {name}.gz, the {split} files of MNIST")
        try:
            data = idx.read_bytes(path)
            if sha256 is not None:
                _check(data, sha256[name], str(path))
        except UserError as error:
            if sha256 is None:
                raise
            raise UserError(f"{error}; delete it, and it is fetched again") from error
        paths.append(path)
        arrays.append(idx.parse(data, str(path)))
    images, labels = arrays
    if images.shape[1:] != (28, 28):
        raise UserError(f"{paths[0]} holds an array of shape {images.shape}, not images of 28 x 28")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{paths[1]} has the shape {labels.shape}, but there are {len(images)} images")
    if labels.max() > 9:
        raise UserError(f"{paths[1]} holds the label {labels.max()}, but digits are 0 to 9")
    return Images(images, labels, source)


def pack(source: Images, folder: str | Path, count: int = 10_000) -> None:
    """Write the first `count` images and labels as training files into `folder`.

    This made the packed subset, and `mnist.pack(mnist.load(), mnist.PACKED)` makes it again. The same images
    give the same bytes.
    """
    for name, array in zip(FILES["train"], (source.images, source.labels), strict=True):
        packed = gzip.compress(idx.encode(array[:count]), 9, mtime=0)
        (Path(folder) / f"{name}.gz").write_bytes(packed)
