"""Where pictures and their captions stand: the layouts that people have, found by looking.

    a folder    metadata.jsonl, metadata.csv    a picture and its text in each row        Hugging Face's imagefolder
                0000.tar, 0001.tar              shards
                a.png, a.txt                    a caption in each line of the text
                red apple/1.png                 the folder's name is the caption          torchvision's ImageFolder
    a file      .csv, .jsonl                    a picture and its text in each row
                .tar                            a.png, a.txt or a.json                    webdataset
                .npz                            images (N, H, W, C), captions (N,)

The first that fits is taken, in this order.  `listing` opens no picture; each `Captioned` reads its own when it is
asked.  Names that begin with a dot are left out.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from minidiff.data.image_file import LARGEST_FILE
from minidiff.errors import UserError
from minidiff.input_files import open_file, parse_json, read_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp")
TEXTS, TABLES, SHARDS = (".txt", ".caption"), (".csv", ".jsonl"), (".tar",)
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image", "image_path")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "description")
PICTURE, TEXTS_IN_TAR = "picture", (*TEXTS, ".text", ".json")
LONGEST_CAPTION = 1000                                      # characters; what is longer is cut
MOST_CAPTIONS = 100                                         # of one picture
LARGEST_TEXT = 1 << 20                                      # bytes, of one picture's captions
LARGEST_TABLE = 1 << 30
LARGEST_ARRAY = 8 << 30
MOST_FILES = 5_000_000
OF_SYSTEMS = "__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN"


@dataclass(frozen=True)
class Captioned:
    """A picture that has not been read yet, and its captions, at least one."""

    name: str                               # unique in its listing
    captions: tuple[str, ...]
    stamp: tuple[int, ...]                  # differs where the file has changed
    read: Callable[[], bytes | np.ndarray]  # the picture's file, or its pixels (H, W) or (H, W, 3) uint8


@dataclass
class Listing:
    """The captioned pictures in a folder or file, and what is odd there."""

    items: list[Captioned] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)
    without_picture: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)        # (a picture or text in a .tar, why)
    cut: int = 0                            # pictures with a caption that was too long


def listing(path: Path, captions: Path | None = None) -> Listing:
    """The captioned pictures in a folder or file.  captions: a .csv or .jsonl that is elsewhere.

    UserError where there is nothing that is captioned, or a table that cannot be read.
    """
    if captions is not None:
        return of_table(captions, path)
    if not path.is_dir():
        return of_file(path)
    files = list(walk(path))
    tables = [path / name for name in files if Path(name).name in ("metadata.jsonl", "metadata.csv")]
    shards = [name for name in files if name.lower().endswith(SHARDS)]
    pictures = [name for name in files if name.lower().endswith(SUFFIXES)]
    texts = [name for name in files if name.lower().endswith(TEXTS)]
    if len({table.parent for table in tables}) < len(tables):
        raise UserError(f"{_shown(path)} has a metadata.csv and a metadata.jsonl in one folder: remove one of them")
    if tables:
        return joined([of_table(table) for table in tables])
    if shards and not pictures:
        return joined([of_tar(path / name) for name in shards])
    if not pictures:
        raise UserError(f"{_shown(path)} holds no pictures ({', '.join(SUFFIXES)}), and no .tar with some")
    stems = {os.path.splitext(name)[0] for name in texts}
    if stems & {os.path.splitext(name)[0] for name in pictures}:
        return of_texts(path, pictures, texts)
    if any(os.path.dirname(name) for name in pictures):
        return of_folders(path, pictures)
    raise UserError(f"{_shown(path)} has no captions: put a.txt beside a.png, a metadata.csv with the columns "
                    "file_name and text into the folder, or pictures into folders that are named by what they show")


def of_file(path: Path) -> Listing:
    readers = {".tar": of_tar, ".npz": of_npz} | {suffix: of_table for suffix in TABLES}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        packed = path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zip", ".tgz", ".rar", ".7z")
        remedy = ": unpack it first" if packed else f"; it takes a folder, or a file of {', '.join(readers)}"
        raise UserError(f"{_shown(path)} is no data set{remedy}")
    return reader(path)


def walk(folder: Path) -> Iterator[str]:
    """The names of the files below a folder, in order; links to folders are not followed."""
    def refuse(error: OSError):
        raise UserError(f"the folder {_shown(error.filename)} cannot be read ({error.strerror}): allow yourself to "
                        "read it, or move it away") from error
    count = 0
    for here, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith((".", *OF_SYSTEMS)))
        for name in sorted(names):
            if not name.startswith("."):
                count += 1
                if count > MOST_FILES:
                    raise UserError(f"{_shown(folder)} holds more than {MOST_FILES:,} files")
                yield os.path.relpath(os.path.join(here, name), folder)


# --- pictures in files of their own ---------------------------------------------------------------------------

def of_texts(folder: Path, pictures: list[str], texts: list[str]) -> Listing:
    """a.png and a.txt: each line that is not empty is a caption."""
    found, text_of = Listing(), {os.path.splitext(name)[0]: name for name in texts}
    for name in pictures:
        text = text_of.get(os.path.splitext(name)[0])
        lines = [] if text is None else lines_of(text_in(folder / text, LARGEST_TEXT))
        add(found, name, lines, *of_disk(folder / name))
    stems = {os.path.splitext(name)[0] for name in pictures}
    found.without_picture = [name for stem, name in text_of.items() if stem not in stems]
    return found


def of_folders(folder: Path, pictures: list[str]) -> Listing:
    """red_apple/1.png: the name of the folder is the caption, with spaces for _."""
    found = Listing()
    for name in pictures:
        add(found, name, [os.path.basename(os.path.dirname(name)).replace("_", " ")], *of_disk(folder / name))
    return found


def of_disk(path: Path) -> tuple[tuple[int, int], Callable[[], bytes]]:
    """The stamp and the reader of a picture's file."""
    return stamp_of(path), partial(read_file, path, LARGEST_FILE, ": save the picture in a smaller size")


def stamp_of(path: Path) -> tuple[int, int]:
    """The size and the time of a file's last change; (-1, -1) where there is none, which is refused when it is read."""
    try:
        there = os.stat(path)
        return there.st_size, there.st_mtime_ns
    except (OSError, ValueError):
        return -1, -1


# --- tables ---------------------------------------------------------------------------------------------------

def of_table(table: Path, folder: Path | None = None) -> Listing:
    """A picture's file and its text in each row; the files' names are relative to the folder (else the table's)."""
    found, captions, name_of = Listing(), defaultdict(list), {}
    folder = table.parent if folder is None else folder
    for number, (name, texts) in enumerate(rows(table), start=1):
        if not name:
            raise UserError(f"{_shown(table)}: row {number} names no picture; it takes a column {FILE_COLUMNS[0]}")
        captions[name_of.setdefault(os.path.normpath(name), name)] += texts
    for name, texts in captions.items():
        path = folder / name
        if os.path.lexists(path):
            add(found, name, texts, *of_disk(path))
        else:
            found.without_picture.append(name)
    return found


def rows(table: Path) -> Iterator[tuple[str, list[str]]]:
    """(the picture's name, its texts) of each row of a .csv or .jsonl."""
    text = text_in(table, LARGEST_TABLE)
    values = of_jsonl(table, text) if table.suffix.lower() == ".jsonl" else of_csv(table, text)
    for row in values:
        name = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
        yield (name if isinstance(name, str) else ""), texts_in(row)


def texts_in(row: dict) -> list[str]:
    """The texts of the first of TEXT_COLUMNS that holds something, which may be one or a list."""
    texts = next((row[column] for column in TEXT_COLUMNS if row.get(column)), None)
    return [t for t in (texts if isinstance(texts, list) else [texts]) if isinstance(t, str)]


def of_jsonl(table: Path, text: str) -> Iterator[dict]:
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{_shown(table)}: line {number} is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{_shown(table)}: line {number} is no object such as "
                            '{"file_name": "a.png", "text": "a red apple"}')
        yield row


def of_csv(table: Path, text: str) -> Iterator[dict]:
    """Rows by the names in the first line; without such names the first column is the picture, the second its text."""
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)

    def named(row: list[str]) -> dict:
        if any(cell.strip() for cell in row[len(names):]):
            raise UserError(f"{_shown(table)}: line {reader.line_num} has more cells than there are columns: put a "
                            "text that holds a comma between quotation marks")
        return dict(zip(names, row, strict=False))
    try:
        first = next(reader, [])
        names = [name.strip().lower() for name in first]
        if not set(names) & set(FILE_COLUMNS):
            if len(first) < 2 or not first[0].lower().endswith(SUFFIXES):
                raise UserError(f"{_shown(table)} names no columns {FILE_COLUMNS[0]} and {TEXT_COLUMNS[0]} in its "
                                "first line")
            names = [FILE_COLUMNS[0], TEXT_COLUMNS[0]]
            yield named(first)
        for row in reader:
            if row:
                yield named(row)
    except csv.Error as error:
        raise UserError(f"{_shown(table)}: line {reader.line_num} is no line of a .csv ({error}); a text is between "
                        'two quotation marks, and one within it is written ""') from error


def text_in(path: Path, largest: int) -> str:
    """The text of a file; UserError where it has more than `largest` bytes, or is no text."""
    return decoded(read_file(path, largest), _shown(path))


def decoded(data: bytes, shown: str) -> str:
    """A text in UTF-8, or in UTF-16 with its mark at the beginning; shown: its file's name, for messages."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{shown} is not text in UTF-8 (byte {error.start}): save it as UTF-8") from error


def lines_of(text: str) -> list[str]:
    """The lines of a text; str.splitlines would also end one at U+0085 and U+2028, which a caption may hold."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


# --- many pictures in one file ----------------------------------------------------------------------------------

def of_tar(path: Path) -> Listing:
    """a.png and a.txt or a.json in a .tar: what has the same name before its first dot belongs together.

    Of several pictures, or texts of one suffix, that belong together the first is taken.
    """
    found, parts = Listing(), defaultdict(dict)
    stamp = stamp_of(path)
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for count, member in enumerate(tar, 1):
                if count > MOST_FILES:
                    raise UserError(f"{_shown(path)} holds more than {MOST_FILES:,} files")
                folder, name = os.path.split(member.name)
                stem, suffix = name.partition(".")[0], os.path.splitext(name)[1].lower()
                kind = PICTURE if suffix in SUFFIXES else suffix
                if member.isdir() or kind not in (PICTURE, *TEXTS_IN_TAR) or not stem:
                    continue
                part, why = parts[os.path.join(folder, stem)], why_skipped(member)
                if not why and kind in part:
                    why = "named like another up to its first dot"
                if why:
                    found.skipped.append((f"{path.name}/{member.name}", why))
                else:
                    part[kind] = member.offset_data, member.size
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{_shown(path)} is no .tar that can be read ({error})") from error
    for key, part in parts.items():
        texts = []
        for suffix in TEXTS_IN_TAR:
            if suffix in part:
                try:
                    texts += texts_of(path, suffix, *part[suffix])
                except UserError as error:
                    found.skipped.append((f"{path.name}/{key}{suffix}", str(error)))
        if PICTURE in part:
            picture = part[PICTURE]
            add(found, f"{path.name}/{key}", texts, (*stamp, *picture), partial(read_part, path, *picture))
        elif texts:
            found.without_picture.append(f"{path.name}/{key}")
    return found


def why_skipped(member: tarfile.TarInfo) -> str:
    """Why a member of a .tar cannot be read where it stands; "" where it can."""
    if member.issym() or member.islnk():
        return "a link"
    return "" if member.isreg() and not member.issparse() else "no plain file"


def texts_of(path: Path, suffix: str, offset: int, size: int) -> list[str]:
    """The captions in a text or a JSON of a .tar; UserError where it cannot be read."""
    text = decoded(read_part(path, offset, size, LARGEST_TEXT), "it")
    if suffix != ".json":
        return lines_of(text)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise UserError(f"it is no JSON ({error})") from error
    return texts_in(values) if isinstance(values, dict) else []


def read_part(path: Path, offset: int, size: int, largest: int = LARGEST_FILE) -> bytes:
    """`size` bytes of a file from `offset` on."""
    if size > largest:
        raise UserError(f"{_shown(path)} holds a file of more than {largest >> 20} MiB, the most that is read")
    with open_file(path) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        raise UserError(f"{_shown(path)} ends within a file")
    return data


def of_npz(path: Path) -> Listing:
    """images (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8 and captions (N,) of texts, as np.savez writes them."""
    images, captions = npz_arrays(path, images="uint8", captions="texts")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.ndim == 4 and images.shape[3] not in (1, 3) \
            or 0 in images.shape:
        raise UserError(f"{_shown(path)}: images must be (N, H, W), (N, H, W, 1) or (N, H, W, 3) uint8, not "
                        f"{images.shape} {images.dtype}")
    if captions.dtype.kind not in "US" or captions.shape != images.shape[:1]:
        raise UserError(f"{_shown(path)}: captions must be {len(images)} texts, one for each image, not "
                        f"{captions.shape} {captions.dtype}")
    texts = np.char.decode(captions, "utf-8", "replace") if captions.dtype.kind == "S" else captions
    found, stamp = Listing(), stamp_of(path)
    images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    for i, text in enumerate(texts.tolist()):
        add(found, f"{path.name}/{i}", lines_of(text), stamp, partial(images.__getitem__, i))
    return found


# what the readers of .zip and .npy raise where a file is damaged
DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError,
           SyntaxError, tokenize.TokenError, struct.error)


def npz_arrays(path: Path, **kinds: str) -> list[np.ndarray]:
    """The arrays of these names in an .npz; kinds: "uint8" or "texts", what each must hold.  UserError."""
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            return [array_in(archive, f"{name}.npy", kind, path) for name, kind in kinds.items()]
    except DAMAGED as error:
        if isinstance(error, UserError):
            raise
        what = f"array{'s'[:len(kinds) > 1]} {' and '.join(kinds)}"
        raise UserError(f"{_shown(path)} is no .npz with the {what} ({error})") from error


def array_in(archive: zipfile.ZipFile, name: str, kind: str, path: Path) -> np.ndarray:
    """An array of an .npz; UserError for one of Python objects, which would be a pickle, or one that is too large."""
    entry = archive.getinfo(name)
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read_header(file)
        size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
        if dtype.hasobject or dtype.kind not in "uUS":
            raise UserError(f"{_shown(path)}: {name} must hold {kind}, not {dtype}")
        if size > min(LARGEST_ARRAY, entry.file_size):
            raise UserError(f"{_shown(path)}: {name} says it has {size:,} bytes, more than the file or "
                            f"{LARGEST_ARRAY >> 30} GiB")
        data = file.read(size)
    if len(data) < size:
        raise UserError(f"{_shown(path)}: {name} ends too soon")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if in_columns else "C")


# --- what all layouts share -------------------------------------------------------------------------------------

def add(found: Listing, name: str, texts: Iterable[str], stamp: tuple[int, ...], read: Callable) -> None:
    """Adds a picture with its captions to the listing; one without captions is noted."""
    captions = tuple(" ".join(text.split()) for text in texts if text.strip())[:MOST_CAPTIONS]
    found.cut += any(len(text) > LONGEST_CAPTION for text in captions)
    if captions:
        found.items.append(Captioned(name, tuple(text[:LONGEST_CAPTION] for text in captions), stamp, read))
    else:
        found.without_caption.append(name)


def joined(listings: list[Listing]) -> Listing:
    """Several listings as one."""
    lists = [sum((getattr(one, name) for one in listings), [])
             for name in ("items", "without_caption", "without_picture", "skipped")]
    return Listing(*lists, cut=sum(one.cut for one in listings))


def _shown(path: Path) -> str:
    return ascii(os.fspath(path))
