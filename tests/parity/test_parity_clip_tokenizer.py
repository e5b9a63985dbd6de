"""CLIP's tokenizer gives the ids of transformers' on 20,000 random texts: all that people paste into prompts."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest

from minidiff.pretrained.clip_tokenizer import END, START, ClipTokenizer

transformers = pytest.importorskip("transformers", reason="the other tokenizer is transformers': pip install it")
tokenizers = pytest.importorskip("tokenizers")

HERE = Path(__file__).parents[1]
TINY, PADDED = (HERE / "pretrained" / "checkpoints" / kind / "tokenizer" for kind in ("eps", "v"))     # "!" is padding
# CLIP's own vocabulary, if it is there
REAL, SECOND = (HERE.parents[1] / "shared" / "data" / "sd" / kind / "tokenizer" for kind in ("sd1", "sd2"))
WORDS = ["a", "photo", "of", "Astronaut", "riding", "HORSE", "oil-painting", "4k", "8K", "trending", "artstation",
         "isn't", "IT'S", "they're", "I'd've", "we'll", "rock'n'roll", "'s", "'", "''re", "e.g.", "(word:1.3)", "...",
         "naïve", "Straße", "ΣΊΣΥΦΟΣ", "İstanbul", "ŒUVRE", "ﬁne", "日本語", "東京タワー", "한국어", "ไทย", "हिन्दी",
         "العربية", "עברית", "&amp;", "&lt;b&gt;", "&#39;", "&nbsp;", "1234", "3.14", "wow!", "!", "!!!", "a!b",
         "½", "Ⅷ", "²", "٣",
         "🙂", "👩‍👩‍👧",
         "🏳️‍🌈", "👍🏽", "🇫🇷", "e\u0301", "A\u030a", "\u1100\u1161", "ﷺ", "Å", "½x", "_under_", "http://a.b/c?d=e",
         "<|startoftext|>", "<|endoftext|>", "<|STARTOFTEXT|>", "<|EndOfText|>", "<|", "|>", "</w>", "cat</w>"]
SPACES = [" ", " ", " ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028",
          "\u2029", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", "\u180e", "\x1c", "\x1f", ""]
RANGES = [(0x00, 0x7f), (0x80, 0xff), (0x100, 0x24f), (0x300, 0x36f), (0x370, 0x5ff), (0x600, 0x10ff), (0x1e00, 0x2bff),
          (0x3040, 0x30ff), (0x4e00, 0x9fff), (0xac00, 0xd7a3), (0xe000, 0xffff), (0x1f300, 0x1faff), (0, 0x10ffff)]


def character(rng: random.Random) -> str:
    """Any that this Python knows: of the others it cannot tell which are letters.  Half a pair is no text."""
    while True:
        c = chr(rng.randint(*rng.choice(RANGES)))
        if unicodedata.category(c) not in ("Cn", "Cs"):
            return c


def text(rng: random.Random) -> str:
    """Words, white space and single characters in any order."""
    pieces = []
    for _ in range(rng.randint(0, 12)):
        pieces.append(rng.choice(WORDS) if rng.random() < 0.6 else "".join(
            character(rng) for _ in range(rng.randint(1, 6))))
        pieces.append(rng.choice(SPACES))
    return "".join(pieces)


@pytest.mark.slow
@pytest.mark.parametrize("folder", [TINY, REAL, PADDED, SECOND], ids=["tiny", "real", "padded", "second"])
def test_20_000_texts(folder, tmp_path):
    if not folder.exists():
        pytest.skip("the real vocabulary is not here")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name, token in (("bos_token", START), ("eos_token", END), ("unk_token", END)):
        settings.setdefault(name, token)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(tmp_path), ClipTokenizer.load(folder)
    rng, nfc = random.Random(13), tokenizers.normalizers.NFC()
    drawn = [text(rng) for _ in range(20_100)]
    # their NFC is Unicode 9's: it leaves a few newer combining marks in the order in which they came
    texts = [t for t in drawn if nfc.normalize_str(t) == unicodedata.normalize("NFC", t)][:20_000]
    assert len(texts) == 20_000 and len(set(texts)) > 18_000
    ids = theirs(texts, add_special_tokens=False)["input_ids"]
    different = [(t, found, expected) for t, expected in zip(texts, ids, strict=True)
                 if (found := ours.encode(t)) != expected]
    assert not different, min(different, key=lambda one: len(one[0]))
    padded = theirs(texts[:200], padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert ours.ids(texts[:200])[0].tolist() == padded


@pytest.mark.parametrize("folder", [TINY, REAL, PADDED, SECOND], ids=["tiny", "real", "padded", "second"])
def test_what_transformers_writes_is_read(folder, tmp_path):
    """transformers 5 writes tokenizer.json alone; with an added word, as textual inversion adds it."""
    if not folder.exists():
        pytest.skip("the real vocabulary is not here")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<cat-toy>"])
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    rng, ours = random.Random(14), ClipTokenizer.load(tmp_path)
    texts = [f"{text(rng)}{rng.choice(['', '<cat-toy>', ' <Cat-Toy> '])}{text(rng)}" for _ in range(300)]
    nfc = tokenizers.normalizers.NFC()
    texts = [t for t in texts if nfc.normalize_str(t) == unicodedata.normalize("NFC", t)]
    padded = theirs(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert len(texts) > 250 and ours.ids(texts)[0].tolist() == padded
    assert any(len(theirs) - 1 in row for row in padded)
