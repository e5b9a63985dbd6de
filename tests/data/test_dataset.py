"""The contract of a data set: what is refused, to the letter; how one is found; and what it has by default."""

import re
from pathlib import Path

import numpy as np
import pytest
from support import tiny

from minidiff.data.dataset import DATASETS, Dataset, DatasetEntry, check_dataset, load_dataset
from minidiff.data.pixels import to_float
from minidiff.errors import UserError


class Spots(Dataset):
    """Image i is of the grey level 10 i; its captions count up."""

    name, source, fingerprint, shape = "spots", "a test", "x", (2, 3, 1)

    def __init__(self, count: int = 4):
        self.count, self.said = count, 0

    def __len__(self):
        return self.count

    def images(self, indices):
        levels = (10 * np.asarray(indices)).astype(np.uint8)
        return to_float(np.broadcast_to(levels[:, None, None, None], (len(levels), *self.shape)))

    def caption(self, i, rng):
        self.said += 1
        rng.random()                                        # of several possible captions it draws one
        return f"{i} {self.said}"


def changed(**attributes) -> Spots:
    data = Spots()
    vars(data).update(attributes)
    return data


SHAPE = "the data set 'spots' must have images of shape (H, W, C) with 1 channel (grey) or 3 (RGB), not "
FLOATS = "the data set 'spots' must give images as float32 arrays (1, 2, 3, 1) in [-1, 1]"
EIGHT_BITS = ("the data set 'spots' must give images of 8-bit values u / 127.5 - 1, as to_float(to_uint8(x)) of "
              "minidiff.data.pixels does")
ONE = np.zeros((1, 2, 3, 1), np.float32)
REFUSED = [
    (lambda: Spots(0), "the data set 'spots' has no images"),
    *[(lambda shape=shape: changed(shape=shape), f"{SHAPE}{shape}")
      for shape in ((2, 3), (2, 3, 1, 1), (0, 3, 1), (2, 0, 1), (2, 3, 0), (2, 3, 2), (2, 3, 4))],
    *[(lambda x=x: changed(images=lambda indices: x), FLOATS)
      for x in (ONE.tolist(), ONE[0], np.zeros((1, 2, 3, 3), np.float32), ONE.astype(np.float64), ONE + 1.01,
                ONE * np.nan, ONE - 1.01)],
    (lambda: changed(images=lambda indices: ONE + np.float32(1 / 127.5 + 2e-5) - 1 + 1), EIGHT_BITS),
]


@pytest.mark.parametrize("make, sentence", REFUSED)
def test_a_data_set_that_breaks_the_contract_is_refused(make, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        check_dataset(make())


def test_data_sets_at_the_limits_are_taken():
    for data in (Spots(1), changed(shape=(1, 1, 1)), changed(shape=(1, 1, 3))):
        check_dataset(data)
    for level in (0, 255):
        check_dataset(changed(images=lambda indices, level=level: to_float(np.full((1, 2, 3, 1), level, np.uint8))))
    check_dataset(changed(images=lambda indices: to_float(np.full((1, 2, 3, 1), 7, np.uint8)) + np.float32(5e-6)))


def test_a_data_set_is_found_by_its_name_or_reads_a_folder_of_its_own(monkeypatch, tmp_path):
    asked = []

    def load(folder, split):
        asked.append((folder, split))
        return Spots()
    DATASETS.register("spots", DatasetEntry(load, reads=lambda path: path == tmp_path))
    monkeypatch.setattr("minidiff.data.dataset.DEFAULT", "spots")
    try:
        load_dataset("spots"), load_dataset(None, "test"), load_dataset(tmp_path, "test"), load_dataset(str(tmp_path))
        assert asked == [(None, "train"), (None, "test"), (tmp_path, "test"), (Path(tmp_path), "train")]
        with pytest.raises(UserError, match="^'dots' is neither a folder or file, nor a data set: the data sets are "
                                            "digits, emoji, spots$"):
            load_dataset("dots")
        with pytest.raises(UserError, match="'spots' has no images"):
            asked.clear()
            monkeypatch.setattr(Spots, "__len__", lambda self: 0)
            load_dataset("spots")
        (tmp_path / "other").mkdir()
        with pytest.raises(UserError, match="other' holds no pictures"):            # no entry reads it
            load_dataset(tmp_path / "other")
    finally:
        DATASETS.unregister("spots")


def test_the_default_has_its_name_in_messages_and_what_a_loader_raises_is_named():
    with pytest.raises(UserError, match="^'digits' takes no option x: its options are none$"):
        load_dataset(None, options={"x": 1})

    def fail(folder, split):
        raise RuntimeError("no luck")
    DATASETS.register("luckless", DatasetEntry(fail))
    try:
        with pytest.raises(UserError, match="^the data set 'luckless' cannot be loaded: RuntimeError: no luck"):
            load_dataset("luckless")
    finally:
        DATASETS.unregister("luckless")


def test_what_a_data_set_has_by_default():
    """Captions of its first eleven images, and none, for previews; five captions of one random image as a text."""
    assert [p.split()[0] for p in Spots(20).prompts[:-1]] == [str(i) for i in range(11)] and Spots(20).prompts[-1] == ""
    assert [p.split()[0] for p in Spots(3).prompts[:-1]] == ["0", "1", "2"]
    assert Spots(3).prompts == Spots(3).prompts and Spots().test() is None and Spots().labels is None
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):                                     # one of four is missing with probability 4 x 0.75^60
        captions = Spots().text(rng).split(". ")
        assert len(captions) == 5 and len({c.split()[0] for c in captions}) == 1 and len(set(captions)) == 5
        seen.add(captions[0].split()[0])
    assert seen == {"0", "1", "2", "3"}


@pytest.mark.parametrize("call, method", [(lambda d: len(d), "__len__"), (lambda d: d.images([0]), "images"),
                                          (lambda d: d.caption(0, None), "caption")])
def test_what_a_subclass_must_define_says_its_name(call, method):
    with pytest.raises(NotImplementedError, match=f"^Dataset has no {method}$"):
        call(Dataset())


def test_an_entry_may_be_the_function_that_loads():
    """As an entry point of a package may name it."""
    data = tiny.digits(3)
    DATASETS.register("of-a-function", lambda folder, split: data)
    try:
        assert load_dataset("of-a-function") is data
    finally:
        DATASETS.unregister("of-a-function")
