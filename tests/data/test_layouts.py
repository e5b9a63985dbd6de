"""Every layout of captioned pictures gives the right captions to the right pictures, and bad ones a sentence."""

import errno
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from minidiff.data import layouts
from minidiff.data.layouts import listing
from minidiff.errors import UserError


def png(level: int) -> bytes:
    """A picture of 2 x 2 pixels of one grey level, by which it is known again."""
    buffer = io.BytesIO()
    Image.new("L", (2, 2), level).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder, files: dict) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def found(path, **options) -> dict:
    """grey level -> captions."""
    def level(item):
        data = item.read()
        return int(data[0, 0]) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data)).getpixel((0, 0))
    return {level(item): item.captions for item in listing(path, **options).items}


def tar(path, members: dict, links=()) -> None:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            file.addfile(info)


# --- what people have ----------------------------------------------------------------------------------------

def test_a_text_beside_each_picture(tmp_path):
    put(tmp_path, {"a.png": png(1), "a.txt": "a red  apple\n\nan apple\n", "deep/b.PNG": png(2),
                   "deep/b.caption": "\ufeffb", "c.png": png(3), "d.txt": "nothing", "e.png": png(5), "e.txt": " \n",
                   ".f.png": png(6), ".f.txt": "f", "__MACOSX/a.png": png(7)})
    assert found(tmp_path) == {1: ("a red apple", "an apple"), 2: ("b",)}
    seen = listing(tmp_path)
    assert (seen.without_caption, seen.without_picture) == (["c.png", "e.png"], ["d.txt"])


def test_metadata_of_hugging_face(tmp_path):
    put(tmp_path, {"a.png": png(1), "sub/b.png": png(2), "x.txt": "not read", "metadata.csv":
                   'file_name,split,text\na.png,x,"one, two"\nsub/b.png,y,two\na.png,z,again\ngone.png,z,gone\n'})
    assert found(tmp_path) == {1: ("one, two", "again"), 2: ("two",)}
    assert listing(tmp_path).without_picture == ["gone.png"]
    (tmp_path / "metadata.csv").unlink()
    rows = [{"file_name": "a.png", "text": ["one", "uno"]}, {"file_name": "sub/b.png", "caption": "two"},
            {"file_name": "sub/b.png", "text": 5}]
    put(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows)) + "\n\n"})
    assert found(tmp_path) == {1: ("one", "uno"), 2: ("two",)}


def test_a_line_of_json_ends_at_a_line_feed_only(tmp_path):
    """JSON holds U+2028, U+2029 and U+0085 as they are, which str.splitlines takes for ends of lines."""
    rows = [{"file_name": "a.png", "text": "red\u2028apple\x85pie"}, {"file_name": "b.png", "text": "two"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    put(tmp_path, {"a.png": png(1), "b.png": png(2), "metadata.jsonl": lines})
    assert found(tmp_path) == {1: ("red apple pie",), 2: ("two",)}


def test_a_line_of_a_text_ends_at_a_line_break_of_any_system_only(tmp_path):
    text = "one\x85uno\r\ntwo\rthree\nfour\u2028vier"
    expected = {1: ("one uno", "two", "three", "four vier")}
    put(tmp_path, {"a.png": png(1), "a.txt": text})
    assert found(tmp_path) == expected
    tar(tmp_path / "a.tar", {"a.png": png(1), "a.txt": text.encode()})
    assert found(tmp_path / "a.tar") == expected
    np.savez(tmp_path / "a.npz", images=np.ones((1, 2, 2), np.uint8), captions=np.array([text]))
    assert found(tmp_path / "a.npz") == expected


def test_a_row_without_a_text_is_a_picture_without_a_caption(tmp_path):
    rows = [{"file_name": "a.png"}, {"file_name": "b.png", "text": ""}, {"file_name": "c.png", "text": "three"}]
    put(tmp_path, {"a.png": png(1), "b.png": png(2), "c.png": png(3)})
    put(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert found(tmp_path) == {3: ("three",)} and listing(tmp_path).without_caption == ["a.png", "b.png"]


def test_two_names_of_one_picture_are_one_picture(tmp_path):
    put(tmp_path, {"a.png": png(1), "metadata.csv": "file_name,text\na.png,one\n./a.png,uno\n.//a.png,eins\n"})
    assert found(tmp_path) == {1: ("one", "uno", "eins")} and len(listing(tmp_path).items) == 1


def test_metadata_in_each_folder(tmp_path):
    put(tmp_path, {"p/a.png": png(1), "q/a.png": png(2), "p/metadata.csv": "file_name,text\na.png,one",
                   "q/metadata.csv": "file_name,text\na.png,two"})
    assert found(tmp_path) == {1: ("one",), 2: ("two",)}


def test_folders_whose_names_are_the_captions(tmp_path):
    put(tmp_path, {"red_apple/1.png": png(1), "red_apple/2.jpg": png(2), "x/blue sky/1.png": png(3)})
    assert found(tmp_path) == {1: ("red apple",), 2: ("red apple",), 3: ("blue sky",)}


@pytest.mark.parametrize("text", ["path,caption\na.png,one\n", "caption;\n", "a.png,one\n", "FILE , Text\na.png,one"])
def test_a_table_of_paths_and_captions(tmp_path, text):
    put(tmp_path, {"pictures/a.png": png(1), "t.csv": text.replace("a.png", "pictures/a.png")})
    if ";" in text:
        with pytest.raises(UserError, match="names no columns file_name and text in its first line"):
            listing(tmp_path / "t.csv")
    else:
        assert found(tmp_path / "t.csv") == {1: ("one",)}
        assert found(tmp_path / "pictures", captions=tmp_path / "t.csv") == {}      # names are relative to the folder
        put(tmp_path, {"t.csv": text})
        assert found(tmp_path / "pictures", captions=tmp_path / "t.csv") == {1: ("one",)}


def test_a_table_in_utf16_and_with_a_byte_order_mark(tmp_path):
    put(tmp_path, {"a.png": png(1)})
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "t.csv").write_bytes("file_name,text\na.png,naïve 日本\n".encode(encoding))
        assert found(tmp_path / "t.csv") == {1: ("naïve 日本",)}
    (tmp_path / "t.csv").write_bytes("file_name,text\na.png,naïve\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"t.csv' is not text in UTF-8 \(byte 23\): save it as UTF-8"):
        listing(tmp_path / "t.csv")


def test_a_tar_of_webdataset(tmp_path):
    members = {"0.png": png(1), "0.txt": b"one\nuno", "d/1.seg.x": b"?", "d/1.jpg": png(2),
               "d/1.json": b'{"caption": "two", "x": 1}', "2.png": png(3), "3.txt": b"three", "4.png": png(4),
               "4.txt": b"4", "4.json": b"{", "/etc/5.png": png(5), "/etc/5.txt": b"five", "../6.png": png(6),
               "../6.txt": b"six"}
    tar(tmp_path / "a.tar", members, links=[("7.png", "/etc/passwd"), ("7.txt", "0.txt")])
    expected = {1: ("one", "uno"), 2: ("two",), 4: ("4",), 5: ("five",), 6: ("six",)}
    assert found(tmp_path / "a.tar") == expected            # nothing is unpacked, so no path and no link leads out
    seen = listing(tmp_path / "a.tar")
    assert (seen.without_caption, seen.without_picture) == (["a.tar/2"], ["a.tar/3"])
    assert seen.skipped[:2] == [("a.tar/7.png", "a link"), ("a.tar/7.txt", "a link")] and len(seen.skipped) == 3
    (name, why), = [one for one in seen.skipped if one[0] == "a.tar/4.json"]
    assert why.startswith("it is no JSON")
    shards = tmp_path / "shards"
    shards.mkdir()
    tar(shards / "0.tar", {"0.png": png(1), "0.txt": b"one", "p/0.txt": b"of p", "p/0.png": png(3)})
    tar(shards / "1.tar", {"0.png": png(2), "0.txt": b"two"})
    assert found(shards) == {1: ("one",), 2: ("two",), 3: ("of p",)}


def test_texts_in_a_tar_are_decoded_as_those_in_a_folder(tmp_path):
    tar(tmp_path / "a.tar", {"0.png": png(1), "0.txt": "naïve".encode("utf-16"), "1.png": png(2),
                             "1.txt": "naïve".encode("latin-1"), "2.png": png(3),
                             "2.json": json.dumps({"text": "日本"}, ensure_ascii=False).encode("utf-8-sig")})
    assert found(tmp_path / "a.tar") == {1: ("naïve",), 3: ("日本",)}
    seen = listing(tmp_path / "a.tar")
    assert seen.skipped == [("a.tar/1.txt", "it is not text in UTF-8 (byte 2): save it as UTF-8")]
    assert seen.without_caption == ["a.tar/1"]


def test_both_texts_of_a_picture_in_a_tar_are_its_captions(tmp_path):
    tar(tmp_path / "a.tar", {"0.png": png(1), "0.txt": b"one", "0.json": b'{"caption": ["uno", 5, "eins"]}',
                             "1.png": png(2), "1.json": b"[1]", "2.png": png(3), "2.json": b'{"x": 1}', "3.png": png(4),
                             "3.json": b"5"})
    assert found(tmp_path / "a.tar") == {1: ("one", "uno", "eins")}
    assert listing(tmp_path / "a.tar").without_caption == [f"a.tar/{i}" for i in (1, 2, 3)]


def test_a_stamp_tells_that_a_file_of_many_pictures_has_changed(tmp_path):
    tar(tmp_path / "a.tar", {"0.png": png(1), "0.txt": b"one", "1.png": png(2), "1.txt": b"two"})
    np.savez(tmp_path / "a.npz", images=np.ones((2, 2, 2), np.uint8), captions=["a", "b"])
    for name in ("a.tar", "a.npz"):
        before = [item.stamp for item in listing(tmp_path / name).items]
        assert [item.stamp for item in listing(tmp_path / name).items] == before
        os.utime(tmp_path / name, ns=(1, 1))
        assert not set(before) & {item.stamp for item in listing(tmp_path / name).items}
    assert len(set(item.stamp for item in listing(tmp_path / "a.tar").items)) == 2


def test_captions_that_are_cut_are_counted_over_all_tables_and_shards(tmp_path):
    put(tmp_path, {f"{i}/a.png": png(i) for i in range(3)} | {
        f"{i}/metadata.csv": f"file,text\na.png,{'x' * (1001 - (i == 1))}\n" for i in range(3)})
    assert listing(tmp_path).cut == 2


def test_a_table_ends_its_lines_as_any_system_does(tmp_path):
    put(tmp_path, {"a.png": png(1), "b.png": png(2)})
    for end in ("\n", "\r\n", "\r"):
        put(tmp_path, {"t.csv": end.join(("file,text", "a.png,one", "b.png,two", ""))})
        assert found(tmp_path / "t.csv") == {1: ("one",), 2: ("two",)}


def test_arrays_of_the_second_version_of_the_format_are_read(tmp_path):
    """Its header may be longer than 65,535 bytes."""
    import zipfile
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name, array in (("images", np.ones((1, 2, 2), np.uint8)), ("captions", np.array(["a"]))):
            np.lib.format.write_array(file := io.BytesIO(), array, version=(2, 0))
            archive.writestr(f"{name}.npy", file.getvalue())
    assert found(tmp_path / "a.npz") == {1: ("a",)}


def test_what_is_skipped_in_a_tar_is_noted(tmp_path):
    """Names that differ after the first dot only belong to one picture: the first one is taken."""
    members = {"0.1.png": png(1), "0.2.png": png(2), "0.jpg": png(3), "0.txt": b"zero", "0.b.txt": b"nothing",
               ".1.png": png(4), "q/0.png": png(5), "q/0.txt": b"of q", "notes": b"?", "0.x": b"?"}
    path = tmp_path / "a.tar"
    tar(path, members)
    with tarfile.open(path, "a") as file:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("queue.png", tarfile.FIFOTYPE), ("r.png", tarfile.DIRTYPE),
                           ("latest", tarfile.SYMTYPE), ("holes.png", tarfile.GNUTYPE_SPARSE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.1.png"
            file.addfile(info)
    taken, expected = "named like another up to its first dot", {1: ("zero",), 5: ("of q",)}
    skipped = [("a.tar/0.2.png", taken), ("a.tar/0.jpg", taken), ("a.tar/0.b.txt", taken), ("a.tar/hard.png", "a link"),
               ("a.tar/queue.png", "no plain file"), ("a.tar/holes.png", "no plain file")]
    assert found(path) == expected and listing(path).skipped == skipped
    shutil.copy(path, tmp_path / "b.tar")                   # shards
    assert listing(tmp_path).skipped == skipped + [(name.replace("a.tar", "b.tar"), why) for name, why in skipped]


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 2, 4, 1), (3, 2, 4, 3)])
def test_arrays(tmp_path, shape):
    images = np.broadcast_to(np.arange(3, dtype=np.uint8).reshape(3, *[1] * (len(shape) - 1)), shape)
    np.savez_compressed(tmp_path / "a.npz", images=images, captions=np.array(["zero", "one\nuno", ""]))
    seen = listing(tmp_path / "a.npz")
    assert [item.captions for item in seen.items] == [("zero",), ("one", "uno")] and seen.without_caption == ["a.npz/2"]
    for i, item in enumerate(seen.items):
        assert item.read().shape == (shape[1:] if shape[-1] != 1 else shape[1:3]) and (item.read() == i).all()
    captions = np.array([b"zero", "naïve".encode(), b"\xff"])
    np.savez(tmp_path / "b.npz", images=np.asfortranarray(images), captions=captions)
    in_columns = listing(tmp_path / "b.npz").items
    assert [item.captions[0] for item in in_columns] == ["zero", "naïve", "\N{REPLACEMENT CHARACTER}"]
    assert all((item.read() == i).all() for i, item in enumerate(in_columns))


def test_long_captions_are_cut_and_many_are_left_out(tmp_path):
    put(tmp_path, {"a.png": png(1), "a.txt": "x" * 10_000, "b.png": png(2), "b.txt": "\n".join(map(str, range(500)))})
    seen = listing(tmp_path)
    assert seen.items[0].captions == ("x" * 1000,) and seen.cut == 1
    assert seen.items[1].captions == tuple(map(str, range(100)))


def test_a_stamp_tells_that_a_file_has_changed(tmp_path):
    put(tmp_path, {"a.png": png(1), "a.txt": "a"})
    before = listing(tmp_path).items[0].stamp
    assert listing(tmp_path).items[0].stamp == before
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert listing(tmp_path).items[0].stamp != before
    assert layouts.stamp_of(tmp_path / "gone") == (-1, -1)


def test_links_to_folders_are_not_followed(tmp_path):
    put(tmp_path, {"d/a.png": png(1), "d/a.txt": "a"})
    (tmp_path / "d" / "round").symlink_to(tmp_path / "d", target_is_directory=True)
    assert found(tmp_path / "d") == {1: ("a",)}


# --- what is refused -----------------------------------------------------------------------------------------

def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Else its pictures would be left out without a word."""
    put(tmp_path, {"cat/a.png": png(1), "dog/a.png": png(2)})
    scandir = os.scandir

    def of_others(path):
        if os.path.basename(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", of_others)
    for locked in ("dog", tmp_path.name):
        with pytest.raises(UserError, match=f"^the folder '.*{locked}' cannot be read .Permission denied.: allow"):
            listing(tmp_path)


def test_empty_cells_and_spaces_are_no_text(tmp_path):
    put(tmp_path, {"a.png": png(1), "metadata.csv": 'file_name, text\na.png, "one, two", ,\n'})
    assert found(tmp_path) == {1: ("one, two",)}


def test_folders_of_operating_systems_are_left_out(tmp_path):
    put(tmp_path, {f"{name}/a.png": png(i) for i, name in enumerate(("cat", *layouts.OF_SYSTEMS, ".git"))})
    assert found(tmp_path) == {0: ("cat",)}


def test_an_array_that_says_it_is_huge_takes_no_memory(tmp_path):
    import zipfile
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**6,) * 3})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.raises(UserError, match="more than the file or 8 GiB"):
        listing(tmp_path / "a.npz")


def test_an_array_that_ends_before_its_header_says_is_named(tmp_path):
    """The .zip says that the file in it has the length, and what it decompresses to is shorter."""
    import zipfile
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2, 3, 4)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        getinfo = zipfile.ZipFile.getinfo

        def longer(self, name):
            entry = getinfo(self, name)
            entry.file_size += 24
            return entry
        patch.setattr(zipfile.ZipFile, "getinfo", longer)
        with pytest.raises(UserError, match=r"^'.*a\.npz': images\.npy ends too soon$"):
            listing(tmp_path / "a.npz")


def test_what_follows_an_array_in_its_file_is_not_read(tmp_path):
    import zipfile
    images, captions, file = np.arange(8, dtype=np.uint8).reshape(2, 2, 2), np.array(["a", "b"]), io.BytesIO()
    np.save(file, images)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", file.getvalue() + b"more")
        np.save(file := io.BytesIO(), captions)
        archive.writestr("captions.npy", file.getvalue())
    assert [item.read().tolist() for item in listing(tmp_path / "a.npz").items] == images.tolist()


def test_a_picture_in_a_tar_that_ends_too_soon_is_unreadable(tmp_path):
    tar(tmp_path / "a.tar", {"0.txt": b"one", "0.png": png(1) + bytes(2000)})
    items = listing(tmp_path / "a.tar").items
    os.truncate(tmp_path / "a.tar", 1600)
    with pytest.raises(UserError, match="ends within a file"):
        items[0].read()


def test_a_huge_file_in_a_tar_is_not_read(tmp_path):
    tar(tmp_path / "a.tar", {"0.txt": b"one", "0.png": png(1)})
    items = listing(tmp_path / "a.tar").items
    with pytest.raises(UserError, match=r"a\.tar' holds a file of more than 3 MiB, the most that is read$"):
        layouts.read_part(tmp_path / "a.tar", 0, 1 << 40, 3 << 20)
    assert items[0].read() == png(1)


def test_more_files_than_are_read(tmp_path, monkeypatch):
    """In a folder and in a .tar, each at its own limit; names that begin with a dot do not count."""
    files = {f"{i}.{kind}": png(i) if kind == "png" else b"one" for i in range(3) for kind in ("png", "txt")}
    (tmp_path / "in").mkdir()
    put(tmp_path / "in", files | {".hidden": b"", "sub/.hidden": b""})
    tar(tmp_path / "a.tar", files)
    monkeypatch.setattr(layouts, "MOST_FILES", 6)
    assert len(found(tmp_path / "in")) == len(found(tmp_path / "a.tar")) == 3
    monkeypatch.setattr(layouts, "MOST_FILES", 5)
    for name in ("in", "a.tar"):
        with pytest.raises(UserError, match=f"{name}' holds more than 5 files$"):
            listing(tmp_path / name)
