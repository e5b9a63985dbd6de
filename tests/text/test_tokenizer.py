"""The tokenizer: exact round trips, the textbook's merges, bounded cost, and checks of untrusted state."""

import json
import random
import time
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiff.errors import UserError
from minidiff.text.tokenizer import BOS, EOS, FIRST_BYTE, FIRST_MERGE, MAX_PIECE_BYTES, PAD, SPLIT, Tokenizer

CAPTIONS = [
    "7", "the digit seven", "a handwritten 7", "a thin, upright three", "a bold seven leaning left",
    "the number three, written small", "a bold three leaning right", "a thin seven", "it's a seven",
]  # fmt: skip
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # every code point, lone surrogates too
TOKENIZER = Tokenizer.train(CAPTIONS * 3, 318)


@settings(deadline=None, max_examples=200)
@given(ANY_TEXT)
def test_round_trip_is_exact_for_any_unicode(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None, max_examples=30)
@given(st.lists(ANY_TEXT, max_size=5), st.lists(ANY_TEXT, min_size=1, max_size=3), st.integers(259, 300))
def test_round_trip_whatever_it_was_trained_on(corpus, texts, vocab_size):
    tokenizer = Tokenizer.train(corpus * 2, vocab_size)
    assert tokenizer.vocab_size <= vocab_size
    for text in [*corpus, *texts]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(FIRST_BYTE <= i < tokenizer.vocab_size for i in ids)  # no text spells a special id


def test_the_pieces_lose_no_character():
    for code in range(0x110000):  # every code point, alone and between letters
        if code % 64 == 0:
            text = "".join(f"a{chr(c)} {chr(c)}" for c in range(code, code + 64))
            assert "".join(SPLIT.findall(text)) == text


def test_pieces_are_words():
    pieces = ["it", "'s", " a", " thin", ",", " upright", " 7", " ", " now"]
    assert SPLIT.findall("it's a thin, upright 7  now") == pieces
    assert max(map(len, SPLIT.findall("a" * 1000 + " " * 1000 + "7" * 1000 + "!" * 1000))) <= 33


def learn_plainly(texts: list[str], merges: int) -> list[bytes]:
    """Sennrich et al. 2016, algorithm 1, on tuples of bytes, with all counts recomputed in each round."""
    pieces = (piece for text in texts for piece in SPLIT.findall(text))
    words = Counter(tuple(bytes([b]) for b in piece.encode()) for piece in pieces)
    age = {bytes([b]): b for b in range(256)}  # ties go to the oldest symbols
    learned = []
    for _ in range(merges):
        counts = Counter()
        for word, n in words.items():
            for j in range(len(word) - 1):
                counts[word[j], word[j + 1]] += n
        top = max(counts.values(), default=0)
        if top < 2:
            break
        a, b = min((p for p in counts if counts[p] == top), key=lambda p: (age[p[0]], age[p[1]]))
        new_words = Counter()
        for word, n in words.items():
            out, j = [], 0
            while j < len(word):
                if word[j : j + 2] == (a, b):
                    out.append(a + b)
                    j += 2
                else:
                    out.append(word[j])
                    j += 1
            new_words[tuple(out)] += n
        words = new_words
        age[a + b] = 256 + len(learned)
        learned.append(a + b)
    return learned


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text("ab c", max_size=12), min_size=1, max_size=6))
def test_merges_are_those_of_the_textbook(texts):
    # Two merges may spell the same bytes (ab+c, a+bc), one to the plain version: few merges avoid it.
    tokenizer = Tokenizer.train(texts, FIRST_MERGE + 4)
    assert tokenizer._bytes[FIRST_MERGE:] == learn_plainly(texts, 4)


def test_the_example_of_the_paper():
    """The dictionary of Sennrich et al. 2016, algorithm 1: low x5, lower x2, newest x6, widest x3."""
    texts = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    tokenizer = Tokenizer.train(texts, FIRST_MERGE + 3)
    assert [tokenizer._bytes[FIRST_MERGE + i] for i in range(3)] == [b"es", b"est", b"lo"]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("lowest")] == ["lo", "w", "est"]


def test_training_does_not_depend_on_the_order_of_texts():
    texts = CAPTIONS * 5
    shuffled = random.Random(0).sample(texts, len(texts))
    assert Tokenizer.train(shuffled, 400).merges == Tokenizer.train(texts, 400).merges


def test_merges_shorten_and_do_not_cross_words():
    assert len(TOKENIZER.encode("a bold seven leaning left")) < 12
    for i in range(FIRST_MERGE, TOKENIZER.vocab_size):
        assert " " not in TOKENIZER.decode([i])[1:]
    whole = TOKENIZER.encode("a bold seven")
    assert whole == TOKENIZER.encode("a") + TOKENIZER.encode(" bold") + TOKENIZER.encode(" seven")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text("abc", min_size=5, max_size=30), min_size=1, max_size=4), st.text("abc", max_size=32))
def test_encoding_replays_the_merges_in_the_order_learned(corpus, piece):
    """Independent calculation: all merges applied to the piece one after the other, as training did."""
    tokenizer = Tokenizer.train(corpus * 2, FIRST_MERGE + 20)
    word = [FIRST_BYTE + b for b in piece.encode()]
    for rank, pair in enumerate(tokenizer.merges):
        j = 0
        while j < len(word) - 1:
            if (word[j], word[j + 1]) == pair:
                word[j : j + 2] = [FIRST_MERGE + rank]
            j += 1
    assert tokenizer.encode(piece) == word


def test_a_piece_of_the_most_bytes_is_read():
    merges = [(FIRST_BYTE, FIRST_BYTE), *((FIRST_MERGE + i, FIRST_MERGE + i) for i in range(6))]      # 2, 4, ... 128
    merges.append((FIRST_MERGE + 6, FIRST_MERGE + 1))                                                 # 132
    tokenizer = Tokenizer.from_state({"kind": "byte-level BPE", "merges": merges})
    assert len(tokenizer.decode([FIRST_MERGE + 7]).encode()) == MAX_PIECE_BYTES == 132


def test_the_cache_of_pieces_is_bounded(monkeypatch):
    monkeypatch.setattr("minidiff.text.tokenizer.MAX_CACHED_PIECES", 3)
    tokenizer = Tokenizer(TOKENIZER.merges)
    for word in ("a", "bold", "seven", "leaning", "left", "a", "bold"):
        assert tokenizer.encode(word) == TOKENIZER.encode(word) and 1 <= len(tokenizer._cache) <= 3


@pytest.mark.parametrize("letters", ["a", "seven ", "🙂", "\ud800", "é̀", "\n", "'", "ab🙂c7_ "])
def test_a_prompt_of_ten_thousand_characters_is_quick(letters):
    """Repeated letters, learned as long merges, not cached: below half a second of processor time."""
    tokenizer = Tokenizer.train([letters * 40] * 3, 420)
    text = (letters * 10_000)[:10_000]
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 0.5
    assert tokenizer.decode(ids) == text


def test_ten_thousand_different_characters_are_quick():
    rng = random.Random(0)
    text = "".join(map(chr, rng.choices([*range(0x4E00, 0x9FFF), *range(0x1F300, 0x1F9FF)], k=10_000)))
    tokenizer = Tokenizer.train([text, text], 500)
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 0.5
    assert tokenizer.decode(ids) == text


def test_batch_is_framed_padded_and_masked():
    ids, mask = TOKENIZER.batch(["", "7", "a thin seven"], 8)
    assert ids.shape == mask.shape == (3, 8)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids[0].tolist() == [BOS, EOS] + [PAD] * 6  # the null caption
    assert ids[1].tolist() == [BOS, *TOKENIZER.encode("7"), EOS] + [PAD] * 5
    for row, shown in zip(ids, mask, strict=True):
        length = row.tolist().index(EOS) + 1
        assert shown.tolist() == [True] * length + [False] * (8 - length)
    assert [TOKENIZER.decode(row) for row in ids] == ["", "7", "a thin seven"]


def test_a_caption_that_just_fits_is_not_cut():
    tokens = TOKENIZER.encode("a bold seven leaning left")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids, mask = TOKENIZER.batch(["a bold seven leaning left"], len(tokens) + 2)
    assert ids[0].tolist() == [BOS, *tokens, EOS] and mask.all()


def test_a_caption_that_is_too_long_is_cut_with_a_warning():
    text = "a bold seven leaning left " * 3
    tokens = TOKENIZER.encode(text)
    with pytest.warns(UserWarning, match=rf"the first 6 of its {len(tokens)} tokens were kept\.") as caught:
        ids, mask = TOKENIZER.batch(["7", text], 8)
    assert len(caught) == 1
    assert ids[1].tolist() == [BOS, *tokens[:6], EOS] and mask[1].all()
    longest = text + "!!!"
    count = len(TOKENIZER.encode(longest))
    with pytest.warns(UserWarning, match=rf"{count} tokens were kept \(of 3 captions 2 were cut") as caught:
        TOKENIZER.batch([text, "7", longest], 8)
    assert len(caught) == 1


def test_the_warning_is_printable_whatever_the_caption_holds():
    with pytest.warns(UserWarning) as caught:
        TOKENIZER.batch(["\ud800\x1b[2J🙂" * 50], 8)
    message = str(caught[0].message)
    assert message.isascii() and message.isprintable() and len(message) < 400


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="list of captions"):
        TOKENIZER.batch("seven", 8)
    with pytest.raises(ValueError, match="length is 1; it takes at least 2"):
        TOKENIZER.batch(["seven"], 1)
    with pytest.raises(TypeError, match="A caption is a str, got int"):
        TOKENIZER.batch([7], 8)
    with pytest.raises(TypeError, match="single str"):
        Tokenizer.train("seven", 300)
    for size in (0, 258, 10**9):
        with pytest.raises(ValueError, match=f"vocab_size is {size}"):
            Tokenizer.train(CAPTIONS, size)
    for i in (-1, TOKENIZER.vocab_size, 10**30):
        with pytest.raises(ValueError, match=f"ids holds {i}; this tokenizer's ids are 0..317"):
            TOKENIZER.decode([i])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 317), max_size=20))
def test_any_ids_decode_to_some_text(ids):
    assert isinstance(TOKENIZER.decode(np.array(ids, dtype=np.int32)), str)


def test_state_passes_through_json():
    again = Tokenizer.from_state(json.loads(json.dumps(TOKENIZER.state())))
    assert again.merges == TOKENIZER.merges and again.vocab_size == TOKENIZER.vocab_size
    assert again.encode("a bold seven, très gras 🙂") == TOKENIZER.encode("a bold seven, très gras 🙂")


KIND = "byte-level BPE"


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (None, "takes a dict"),
        ([], "takes a dict"),
        ({}, "takes a dict"),
        ({"kind": KIND}, "takes a dict"),
        ({"kind": KIND, "merges": [], "code": "x"}, "takes a dict"),
        ({"kind": "wordpiece", "merges": []}, "kind is 'wordpiece'"),
        ({"kind": ["x"] * 10**6, "merges": []}, "kind is"),
        ({"kind": KIND, "merges": None}, "merges are a NoneType"),
        ({"kind": KIND, "merges": {"3": 4}}, "merges are a dict"),
        ({"kind": KIND, "merges": "abc"}, "merges are a str"),
        ({"kind": KIND, "merges": [3]}, "merge 0 is malformed"),
        ({"kind": KIND, "merges": [[3, 4, 5]]}, "merge 0 is malformed"),
        ({"kind": KIND, "merges": [[3, 4], [3, 4.0]]}, "merge 1 is malformed"),
        ({"kind": KIND, "merges": [[True, 4]]}, "merge 0 is malformed"),
        ({"kind": KIND, "merges": [["3", "4"]]}, "merge 0 is malformed"),
        ({"kind": KIND, "merges": [[3, -1]]}, "merge 0 joins an id that does not exist"),
        ({"kind": KIND, "merges": [[PAD, 5]]}, "merge 0 joins an id that does not exist"),
        ({"kind": KIND, "merges": [[5, EOS]]}, "merge 0 joins an id that does not exist"),
        ({"kind": KIND, "merges": [[3, 259]]}, "merge 0 joins an id that does not exist"),  # itself
        (
            {"kind": KIND, "merges": [[3, 260], [3, 4]]},
            "merge 0 joins an id that does not exist",
        ),  # a later one
        ({"kind": KIND, "merges": [[3, 10**40]]}, "merge 0 joins an id that does not exist"),
        ({"kind": KIND, "merges": [[3, 4], [3, 4]]}, "a second time"),
        ({"kind": KIND, "merges": [[3, 4]] * 70_000}, "70000 merges; at most 65536"),
        (
            {"kind": KIND, "merges": [[3, 3]] + [[259 + i] * 2 for i in range(20)]},
            "makes 256 bytes",
        ),  # 2^21 in all
    ],
)
def test_hostile_state_is_refused_in_a_sentence(state, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        Tokenizer.from_state(state)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)
