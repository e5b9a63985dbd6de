"""A person's own pictures as a data set: which picture has which caption, what is cached, and what is said."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from data.test_layouts import png, put, tar
from PIL import Image

from minidiff.data import own_pictures, picture_cache
from minidiff.data.dataset import check_dataset, load_dataset
from minidiff.data.layouts import listing
from minidiff.data.own_pictures import OwnPictures, PictureOptions
from minidiff.data.picture_cache import Fit, decoded
from minidiff.data.pixels import to_uint8
from minidiff.errors import UserError
from minidiff.files import cache_folder


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    """Picture i has the grey level 10 i; its right half is one level brighter."""
    for i in range(5):
        x = np.full((4, 4, 3), 10 * i, np.uint8)
        x[:, 2:] += 1
        Image.fromarray(x).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"level {i}\n{i}")
    return tmp_path


def load(folder, **options) -> OwnPictures:
    return load_dataset(folder, options={"size": (4, 4)} | options)


def levels(data, i=None) -> list:
    return to_uint8(data.images(np.arange(len(data)) if i is None else i))[:, 0, 0, 0].tolist()


def test_each_picture_keeps_its_own_captions(folder):
    data, rng = load(folder), np.random.default_rng(0)
    check_dataset(data)
    assert len(data) == 5 and data.shape == (4, 4, 1) and levels(data) == [0, 10, 20, 30, 40]
    assert levels(data, [3, 1, 3]) == [30, 10, 30]
    for i in range(5):
        assert {data.caption(i, rng) for _ in range(60)} == {f"level {i}", f"{i}"}   # misses one with chance 2^-59


def test_an_unreadable_picture_takes_no_caption_with_it(folder, capsys):
    """The captions of the later pictures must not move up."""
    (folder / "1.png").write_bytes(b"no picture")
    data, rng = load(folder), np.random.default_rng(0)
    assert levels(data) == [0, 20, 30, 40] and data.caption(1, rng) in ("level 2", "2")
    said = capsys.readouterr().err
    assert "skipped pictures that cannot be read: 1, 1.png" in said
    assert load(folder).fingerprint == data.fingerprint     # from the cache, too, with the same message
    assert "1.png" in capsys.readouterr().err


def test_too_many_unreadable_pictures_are_an_error(folder):
    for i in (1, 2):
        (folder / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        load(folder)
    says = f"2 of the 5 pictures in {ascii(str(folder))} cannot be read: '1.png' is not a readable picture"
    assert str(error.value).startswith(says)


def test_colour_is_decided_by_the_data(folder):
    assert load(folder).shape == (4, 4, 1)
    Image.new("RGB", (4, 4), (9, 9, 10)).save(folder / "0.png")
    data = load(folder)
    assert data.shape == (4, 4, 3) and (to_uint8(data.images([0]))[0] == (9, 9, 10)).all()
    assert levels(data, [4]) == [40]


def test_mirror_images_follow_the_pictures(folder):
    plain, data = load(folder), load(folder, flip=True)
    assert len(data) == 10 and np.array_equal(data.images(range(5)), plain.images(range(5)))
    assert np.array_equal(data.images([5])[0], plain.images([0])[0, :, ::-1])       # the first mirror image
    assert np.array_equal(data.images([7, 2]), np.stack([plain.images([2])[0, :, ::-1], plain.images([2])[0]]))
    assert data.caption(7, np.random.default_rng(0)) in ("level 2", "2") and data.fingerprint != plain.fingerprint


def test_indices_are_those_of_numpy(folder):
    """They were taken modulo the number of pictures: -1 was no mirror image, and no index was out of range."""
    data = load(folder, flip=True)
    every, N = data.images(range(len(data))), len(data)
    chosen = np.arange(N) % 3 == 0
    for indices in ([-1], [-N, N - 1], chosen, [], slice(1, 3)):
        assert np.array_equal(data.images(indices), every[indices])
    rng = np.random.default_rng(0)
    assert data.caption(-1, rng) in data.captions[-1]
    for call in (lambda i: data.images([i]), lambda i: data.caption(i, rng)):
        for i in (N, -N - 1):
            with pytest.raises(IndexError):
                call(i)


def test_the_digest_is_that_of_the_pixels_when_they_are_read_first_and_again(folder):
    for _ in range(2):
        found = decoded(listing(folder).items, Fit(4, 4))
        assert found.sha256 == hashlib.sha256(found.pixels.tobytes()).hexdigest()


def test_the_fingerprint_tells_pictures_captions_and_sizes_apart(folder):
    seen = {load(folder).fingerprint, load(folder, size=(4, 2)).fingerprint, load(folder, size=(2, 4)).fingerprint}
    (folder / "0.txt").write_text("another")
    seen.add(load(folder).fingerprint)
    Image.new("L", (4, 4), 3).save(folder / "0.png")
    seen.add(load(folder).fingerprint)
    assert len(seen) == 5
    copy = folder.parent / "copy"
    shutil.copytree(folder, copy)
    assert load(copy).fingerprint in seen                   # a run may go on beside a copy of its data


def test_the_fingerprint_of_given_pixels_tells_them_apart():
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    of = [OwnPictures(x, [("a",), ("b",)], "x").fingerprint for x in (pixels, pixels + 1, pixels.copy())]
    assert of[0] != of[1] and of[0] == of[2]


def test_the_bar_is_gone_when_the_pictures_are_read(folder, monkeypatch):
    asked, bar = [], picture_cache.progress
    monkeypatch.setattr(picture_cache, "progress", lambda **given: asked.append(given) or bar(**given))
    load(folder)
    assert asked == [{"title": "reading the pictures", "total": 5, "unit": "picture", "leave": False}]


def test_nothing_is_mirrored_unless_it_is_asked_for():
    assert len(OwnPictures(np.zeros((2, 2, 2, 1), np.uint8), [("a",), ("b",)], "x")) == 2


def test_a_model_s_shape_is_the_size_and_arrays_are_pictures(folder, tmp_path):
    assert load_dataset(folder, shape=(2, 6, 3)).shape == (2, 6, 1)                 # height, width; grey stays grey
    assert load_dataset(folder, options={"size": (4, 5)}, shape=(2, 6, 3)).shape == (5, 4, 1)
    images = np.arange(2, dtype=np.uint8)[:, None, None] + np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, captions=["zero", "one"])
    assert levels(load(tmp_path / "a.npz")) == [0, 1]


@pytest.mark.parametrize("fit, shown", [("crop", [200] * 4), ("pad", [7, 200, 200, 7])])
def test_pictures_are_fitted_over_the_background_as_asked(tmp_path, fit, shown):
    put(tmp_path, {"a.txt": "a"})
    Image.new("L", (8, 4), 200).save(tmp_path / "a.png")
    data = load(tmp_path, fit=fit, background=(7, 7, 7))
    assert to_uint8(data.images([0]))[0, :, 1, 0].tolist() == shown


def test_a_tenth_of_the_pictures_may_be_unreadable(tmp_path):
    put(tmp_path, {f"{i:02}.png": png(i) for i in range(20)} | {f"{i:02}.txt": "a" for i in range(20)})
    for count in (1, 2, 3):
        (tmp_path / f"{count:02}.png").write_bytes(b"x")
        if count < 3:
            assert len(load(tmp_path)) == 20 - count
        else:
            with pytest.raises(UserError, match="^3 of the 20 pictures in "):
                load(tmp_path)


def test_a_picture_is_enlarged_if_it_is_smaller_each_way(tmp_path):
    sizes = [(3, 3), (3, 9), (9, 3), (4, 3), (3, 4), (4, 4)]
    for i, size in enumerate(sizes):
        put(tmp_path, {f"{i}.txt": "a"})
        Image.new("L", size).save(tmp_path / f"{i}.png")
    assert decoded(listing(tmp_path).items, Fit(4, 4)).enlarged == 1


def test_whatever_a_picture_raises_is_a_reason(folder, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("by zero")
    monkeypatch.setattr(picture_cache, "fitted", fail)
    found = decoded(listing(folder).items, Fit(4, 4))
    assert found.skipped[3] == ("3.png", "'3.png' cannot be read as a picture (ZeroDivisionError: by zero)")
    assert found.kept == [] and found.pixels.shape == (0, 4, 4, 1)


def test_train_and_test_folders(tmp_path):
    put(tmp_path, {"train/a.png": png(1), "train/a.txt": "a", "test/b.png": png(2), "test/b.txt": "b"})
    data = load_dataset(tmp_path)
    assert levels(data) == [1] and levels(data.test()) == [2] and levels(load_dataset(tmp_path, "test")) == [2]
    (tmp_path / "test").rename(tmp_path / "validation")
    assert levels(load_dataset(tmp_path).test()) == [2]
    shutil.rmtree(tmp_path / "validation")
    data = load_dataset(tmp_path)
    assert levels(data) == [1] and data.test() is None
    with pytest.raises(UserError, match=f"^'{tmp_path}' has no test pictures: put them into a folder test"):
        load_dataset(tmp_path, "test")


def test_the_folder_train_is_no_caption(tmp_path):
    """Alone in a folder it is not taken for what its pictures show; a hidden file beside it does not count."""
    put(tmp_path, {"train/1.png": png(1), "train/2.png": png(2)})
    for _ in range(2):
        with pytest.raises(UserError, match=f"^'{tmp_path}/train' has no captions"):
            load_dataset(tmp_path)
        (tmp_path / ".DS_Store").touch()
    put(tmp_path, {"plane/3.png": png(3)})
    assert sorted(load_dataset(tmp_path).captions) == [("plane",), ("train",), ("train",)]


def test_prompts_are_spread_over_the_pictures(folder):
    assert load(folder).prompts == ("level 0", "level 1", "level 2", "level 3", "level 4", "")
    data = OwnPictures(np.zeros((101, 2, 2, 1), np.uint8), [(str(i),) for i in range(101)], "x")
    assert data.prompts == (*(str(10 * i) for i in range(11)), "")


def test_what_is_odd_is_said_once(folder, capsys):
    put(folder, {"alone.png": png(1), "gone.txt": "gone", "2.txt": "x" * 5000})
    load(folder, size=(8, 8))
    said = capsys.readouterr().err
    for words in ("skipped pictures without a caption: 1, alone.png",
                  "skipped captions without a picture: 1, gone.txt",
                  "shortened captions to 1,000 characters: those of 1 of the 5 ",
                  "enlarged smaller pictures to 8x8: 5 of"):
        assert said.count(words) == 1


def test_what_is_odd_in_a_tar_is_said_once(tmp_path, capsys):
    tar(tmp_path / "a.tar", {"0.1.png": png(1), "0.2.png": png(2), "0.txt": b"zero"}, links=[("1.png", "0.1.png")])
    assert len(load_dataset(tmp_path / "a.tar")) == 1
    assert capsys.readouterr().err.count("skipped in a .tar: 2, a.tar/0.2.png (named like another up to its first dot),"
                                         " a.tar/1.png (a link)\n") == 1
    tar(tmp_path / "b.tar", {"1.txt": b"one"}, links=[("1.png", "0.1.png")])
    with pytest.raises(UserError, match=r"has a caption; captions without a picture: b.tar/1; skipped in a .tar: "
                                        r"b.tar/1.png \(a link\)"):
        load_dataset(tmp_path / "b.tar")


def test_one_picture_is_enough_and_said(tmp_path, capsys):
    put(tmp_path, {"a.png": png(1), "a.txt": "a"})
    assert len(load_dataset(tmp_path)) == 1 and "there is one picture" in capsys.readouterr().err


@pytest.mark.parametrize("options, words", [
    ({"size": (0, 4)}, "1 to 256 pixels"), ({"size": (257, 4)}, "1 to 256 pixels"), ({"fit": "squeeze"}, "crop, pad"),
    ({"colour": 1}, "takes no option colour: its options are size, fit, background, flip, captions")])
def test_options_that_are_refused(folder, options, words):
    with pytest.raises(UserError, match=words):
        load_dataset(folder, options=options)


def test_digits_take_no_options():
    with pytest.raises(UserError, match="^'emoji' takes no option size: its options are none"):
        load_dataset("emoji", options={"size": (4, 4)})
    with pytest.raises(UserError, match="'digits' takes no option size: its options are none"):
        load_dataset("digits", options={"size": (4, 4)})


def test_nothing_captioned(tmp_path):
    put(tmp_path, {"a.png": png(1), "t.csv": "file_name,text\nb.png,b\n"})
    with pytest.raises(UserError, match="holds no picture that has a caption; captions without a picture: b.png"):
        load_dataset(tmp_path / "t.csv")


def test_pictures_with_captions_that_are_elsewhere_have_not_changed(folder, tmp_path_factory):
    """The folder's own texts, which are not read, are no sign of a change."""
    table = tmp_path_factory.mktemp("elsewhere") / "t.csv"
    table.write_text("file_name,text\n0.png,zero\n3.png,three\n", encoding="utf-8")
    data = load(folder, captions=table)
    assert levels(data) == [0, 30] and data.captions == [("zero",), ("three",)]


def test_a_folder_that_changes_meanwhile_is_refused(folder, monkeypatch):
    whole = picture_cache.decoded
    monkeypatch.setattr(picture_cache, "decoded", lambda *a: (whole(*a), os.utime(folder / "3.png", ns=(5, 5)))[0])
    with pytest.raises(UserError, match=f"^'{folder}' changed while it was read: run the command again$"):
        load(folder)


# --- the cache ----------------------------------------------------------------------------------------------

def cached():
    return sorted(cache_folder("minidiff", "pictures").iterdir())


def test_pictures_are_decoded_once(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(picture_cache, "pixels_of", lambda *a: pytest.fail("decoded again"))
    again = load(folder)
    assert isinstance(again.pixels, np.memmap) and not again.pixels.flags.writeable
    assert np.array_equal(first.pixels, again.pixels) and len(cached()) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "no json", "another shape", "no pixels"])
def test_a_damaged_cache_is_made_again(folder, damage):
    expected = np.array(load(folder).pixels)
    (there,) = cached()
    pixels, about = there / "pixels", there / "cache.json"
    if damage == "cut":
        os.truncate(pixels, 5)
    elif damage == "changed":
        data = bytearray(pixels.read_bytes())
        data[7] ^= 1
        pixels.write_bytes(data)
    elif damage == "no json":
        about.write_text("{")
    elif damage == "another shape":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"shape": [5, 2, 8, 1]}))
    else:
        pixels.unlink()
    assert np.array_equal(load(folder).pixels, expected) and cached() == [there]


@pytest.mark.parametrize("about", ["[]", "5", "null", "{}", '{"shape": 5, "kept": [0]}',
                                   '{"shape": [5, 4, 4, 1], "kept": 3}', '{"shape": [5, 4, 4, 1], "kept": ["x"]}',
                                   '{"shape": [5, 4, 4, 1], "kept": [0, 1, 2, 3, 5]}',
                                   '{"shape": [5, 4, 4, 1], "kept": [0, 1, 2, 3, -1]}',
                                   '{"shape": [5, 4, 4, 1], "kept": [0, 1, 2, 2, 3]}',
                                   '{"shape": [5, 4, 4, 1], "kept": [1, 0, 2, 3, 4]}',
                                   '{"shape": [5, 4, 4, 1], "kept": [0, 1, 2, 3, "1e999"]}'])
def test_a_cache_that_says_something_odd_is_made_again(folder, about):
    expected = np.array(load(folder).pixels)
    (there,) = cached()
    good = json.loads((there / "cache.json").read_text())
    odd = json.loads(about)
    odd = good | odd if isinstance(odd, dict) and odd else odd
    (there / "cache.json").write_text(json.dumps(odd).replace('"1e999"', "1e999"))   # which is read as infinity
    assert np.array_equal(load(folder).pixels, expected)
    assert json.loads((there / "cache.json").read_text()) == good


def test_a_cache_that_another_process_made_meanwhile_is_kept(folder, monkeypatch):
    items, fit, write = listing(folder).items, Fit(4, 4), picture_cache.write

    def slow(*given):
        monkeypatch.setattr(picture_cache, "write", write)
        decoded(items, fit)                                 # the other process
        made.append(os.stat(cached()[0]).st_ino)
        write(*given)
    made = []
    monkeypatch.setattr(picture_cache, "write", slow)
    assert len(decoded(items, fit).pixels) == 5
    assert [os.stat(path).st_ino for path in cached()] == made


def test_a_cache_that_cannot_be_read_again_is_a_sentence(folder, monkeypatch):
    monkeypatch.setattr(picture_cache, "opened", lambda *_: None)
    with pytest.raises(UserError) as caught:
        decoded(listing(folder).items, Fit(4, 4))
    assert str(caught.value) == f"the cache {cached()[0]} could not be read again: another process changed it"


def test_the_temporary_folder_is_beside_the_cache(folder, monkeypatch):
    """A folder of another disk cannot be renamed to its place."""
    asked, make = [], picture_cache.tempfile.mkdtemp
    monkeypatch.setattr(picture_cache.tempfile, "mkdtemp", lambda **given: asked.append(given["dir"]) or make(**given))
    load(folder)
    assert asked == [cache_folder("minidiff", "pictures")]


def test_grey_pixels_are_read_back_in_parts(folder, monkeypatch):
    monkeypatch.setattr(picture_cache, "MIB", 1)
    assert levels(load(folder)) == [0, 10, 20, 30, 40]


def test_a_cache_that_cannot_be_written_is_a_sentence(folder, tmp_path_factory, monkeypatch):
    file = tmp_path_factory.mktemp("x") / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    with pytest.raises(UserError, match="the cache .* could not be written .*set XDG_CACHE_HOME to another folder"):
        load(folder)


def test_an_interrupted_cache_leaves_nothing(folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(picture_cache, "pixels_of", stop)
        load(folder)
    assert cached() == []
    assert len(load(folder)) == 5


def test_blocks_do_not_mix_pictures(folder, monkeypatch):
    monkeypatch.setattr(picture_cache, "BLOCK", 2)
    data = load(folder)
    assert levels(data) == [0, 10, 20, 30, 40] and [c[1] for c in data.captions] == ["0", "1", "2", "3", "4"]


def test_each_size_has_a_cache_of_its_own(folder):
    """Else each run would decode again what another one of another size has replaced."""
    for size in ((4, 4), (4, 2), (4, 4)):
        load(folder, size=size)
    assert len(cached()) == 2


def test_the_file_of_another_data_set_is_not_taken_for_pictures(tmp_path):
    with pytest.raises(UserError, match="is no data set; it takes a folder"):
        load_dataset(__file__)
    assert own_pictures.ENTRY.options is PictureOptions
