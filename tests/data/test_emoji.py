"""Emoji: each picture has its own name, and the held-out compositions are never trained on."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from minidiff import load_dataset
from minidiff.data import emoji
from minidiff.data.emoji import PACKED, over, read_names
from minidiff.data.pixels import to_uint8
from minidiff.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "emoji"
HEADER = "code,base,name,category\n"


@pytest.fixture
def folder(tmp_path):
    """Four emoji in two styles: picture i of style s is of the level 50 s + 10 i; the third is held out."""
    rows = [f"C{i},C,thing: tone {i},People" for i in range(4)]
    (tmp_path / "names.csv").write_text(HEADER + "\n".join(rows) + "\n", encoding="utf-8")
    (tmp_path / "held_out.txt").write_text("C2\n", encoding="utf-8")
    for s, style in enumerate(("noto", "twemoji")):
        rgba = np.full((4, 32, 32, 4), 255, np.uint8)
        rgba[..., :3] = 50 * s + 10 * np.arange(4)[:, None, None, None]
        np.savez(tmp_path / f"{style}-32.npz", rgba=rgba)
    return tmp_path


def described(data) -> dict:
    levels = to_uint8(data.images(np.arange(len(data))))[:, 0, 0, 0].tolist()
    return dict(zip(levels, [data.caption(i) for i in range(len(data))], strict=True))


def test_both_styles_with_their_names_and_without_the_held_out_ones(folder):
    data = load_dataset(folder)
    assert described(data) == {0: "noto, thing: tone 0", 10: "noto, thing: tone 1", 30: "noto, thing: tone 3",
                               50: "twemoji, thing: tone 0", 60: "twemoji, thing: tone 1", 80: "twemoji, thing: tone 3"}
    assert described(data.test()) == {20: "noto, thing: tone 2", 70: "twemoji, thing: tone 2"}
    assert described(load_dataset(folder, "test")) == described(data.test())
    assert data.prompts[0] == "noto, grinning face" and data.prompts[-1] == ""


def test_one_style_is_not_named(folder):
    (folder / "twemoji-32.npz").unlink()
    data = load_dataset(folder)
    assert described(data) == {0: "thing: tone 0", 10: "thing: tone 1", 30: "thing: tone 3"}
    assert data.prompts[0] == "grinning face"


def test_the_fingerprint_tells_names_pictures_and_what_is_held_out(folder):
    seen = {load_dataset(folder).fingerprint}
    (folder / "held_out.txt").write_text("C1\n", encoding="utf-8")
    seen.add(load_dataset(folder).fingerprint)
    (folder / "names.csv").write_text((folder / "names.csv").read_text().replace("tone 0", "tone 9"), encoding="utf-8")
    seen.add(load_dataset(folder).fingerprint)
    with np.load(folder / "noto-32.npz") as arrays:
        rgba = arrays["rgba"]
    rgba[0, 0, 0, 0] += 1
    np.savez(folder / "noto-32.npz", rgba=rgba)
    seen.add(load_dataset(folder).fingerprint)
    assert len(seen) == 4


def test_no_emoji_have_prompts_without_a_style():
    assert emoji.Emoji(np.zeros((0, 2, 2, 3), np.uint8), [], [], "x").prompts[0] == "grinning face"


def test_the_training_emoji_are_the_default(folder):
    assert described(emoji.load(folder)) == described(emoji.load(folder, "train"))


def test_a_folder_of_emoji_has_both_lists(folder):
    assert emoji.holds(folder)
    for name in ("names.csv", "held_out.txt"):
        (folder / name).rename(folder / "away")
        assert not emoji.holds(folder)
        (folder / "away").rename(folder / name)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_names_end_at_the_line_breaks_of_any_system(tmp_path, end):
    (tmp_path / "names.csv").write_bytes((HEADER + "1,1,a,x\n2,2,b,x\n").replace("\n", end).encode())
    assert [name.name for name in read_names(tmp_path / "names.csv")] == ["a", "b"]


def test_transparent_is_white_and_half_transparent_half():
    rgba = np.array([[[[100, 0, 200, 0], [100, 0, 200, 255], [100, 0, 201, 128]]]], np.uint8)
    # y = (a x + (255 - a) 255) / 255
    assert over(rgba)[0, 0].tolist() == [[255, 255, 255], [100, 0, 200], [177, 127, 228]]
    assert over(rgba, 0)[0, 0].tolist() == [[0, 0, 0], [100, 0, 200], [50, 0, 101]]
    # (127 x 1 + 128 x 255) / 255 = 128.498 is the nearest to a half that there is
    assert over(np.array([1, 1, 1, 127], np.uint8)).tolist() == [128, 128, 128]


def test_what_comes_with_minidiff():
    data = load_dataset("emoji")
    assert (len(data), len(data.test()), data.shape) == (3598, 188, (32, 32, 3))
    names = {data.caption(i) for i in range(len(data))}
    unseen = {data.test().caption(i) for i in range(188)}
    assert {"grinning face", "flag: Brazil", "red apple"} <= names and not names & unseen
    assert len(names) == 3598 and all("skin tone" in name for name in unseen)
    # each held-out composition is made of parts that are seen: the thing in another tone, and the tone on another thing
    of_base = {n.base for n in data.names}
    base_of = {n.code: n.base for n in data.test().names}
    assert base_of["1F3C2-1F3FD"] == "1F3C2" and base_of["1F3C3-1F3FC-200D-2640"] == "1F3C3-200D-2640"
    assert all(n.base in of_base for n in data.test().names)
    assert sum(path.stat().st_size for path in PACKED.glob("*") if "idx" not in path.name) < 5.1e6
    assert "Apache License" in (PACKED / "EMOJI_LICENSE.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(not SHARED.exists(), reason="the emoji in both styles are not here")
def test_the_packed_files_are_the_shared_ones():
    for name in ("names.csv", "held_out.txt", "noto-32.npz"):
        assert (SHARED / name).read_bytes() == (PACKED / name).read_bytes()
    assert len(load_dataset(SHARED)) == 2 * 3598


@pytest.mark.parametrize("name, content, words", [
    ("names.csv", b"code,name\nx,y\n", "must have the columns code, base, name and category"),
    ("names.csv", b"\xff", "is not text in UTF-8"), ("names.csv", HEADER.encode(), "a row for each of names.csv"),
    ("noto-32.npz", b"x", "is no .npz with the array rgba")])
def test_damaged_files_are_refused(folder, name, content, words):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_dataset(folder)


def test_a_folder_without_pictures_or_with_other_arrays(folder):
    np.savez(folder / "noto-32.npz", rgba=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"rgba must be \(4, H, W, 4\) uint8"):
        load_dataset(folder)
    for style in emoji.STYLES.values():
        (folder / style).unlink()
    with pytest.raises(UserError, match=f"^'{folder}' has names.csv, and none of noto-32.npz, twemoji-32.npz"):
        load_dataset(folder)


def test_names_with_commas(tmp_path):
    (tmp_path / "n.csv").write_text(HEADER + 'A,B,"kiss: man, man",P\n', encoding="utf-8")
    assert read_names(tmp_path / "n.csv")[0].name == "kiss: man, man"
    shutil.rmtree(tmp_path)
