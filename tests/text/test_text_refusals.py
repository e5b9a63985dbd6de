"""Every refusal of the text floor, whole: which exception, and the sentence to the last letter; and what lies just
within the limits is taken."""

import numpy as np
import pytest
from support.refusals import check_message, zeros

from minidiff.engine.tensor import Tensor
from minidiff.errors import UserError
from minidiff.text.clip import clip_loss, recall_at, unit
from minidiff.text.encoder import TextEncoder, TextEncoderConfig
from minidiff.text.span_corruption import corrupt, random_spans, restore
from minidiff.text.t5 import EncoderDecoder
from minidiff.text.tokenizer import FIRST_BYTE, FIRST_MERGE, MAX_MERGES, MAX_PIECE_BYTES, Tokenizer

SMALL = TextEncoderConfig(vocab=20, length=5, width=4, layers=1, heads=1)
RNG = np.random.default_rng(0)
SENTINELS = [19, 18, 17]
PLAIN = Tokenizer([])
PAIRS = "clip_loss takes image_embeddings and text_embeddings (N, D), row for row and not empty, not "


def encoder() -> TextEncoder:
    return TextEncoder(SMALL, np.random.default_rng(0))


def state(**changes) -> dict:
    return {"kind": "byte-level BPE", "merges": []} | changes


def doubling(times: int) -> list:
    """Merges that double a piece's bytes."""
    return [(FIRST_BYTE, FIRST_BYTE), *((FIRST_MERGE + i, FIRST_MERGE + i) for i in range(times - 1))]


REFUSALS = [
    (ValueError, PAIRS + "(2, 3) and (2, 4)", lambda: clip_loss(zeros(2, 3), zeros(2, 4), zeros())),
    (ValueError, PAIRS + "(0, 3) and (0, 3)", lambda: clip_loss(zeros(0, 3), zeros(0, 3), zeros())),
    (ValueError, PAIRS + "(3,) and (3,)", lambda: clip_loss(zeros(3), zeros(3), zeros())),
    (ValueError, "log_scale must be one finite number, of shape (), not shape (1,)",
     lambda: clip_loss(zeros(2, 3), zeros(2, 3), zeros(1))),
    (ValueError, "log_scale must be one finite number, of shape (), not nan",
     lambda: clip_loss(zeros(2, 3), zeros(2, 3), Tensor(np.array(np.nan)))),
    (ValueError, "pictures must have a direction, and row 1 is 0 or not finite",
     lambda: unit("pictures", Tensor(np.array([[1.0, 0.0], [0.0, 0.0]])))),
    (ValueError, "pictures must have a direction, and row 0 is 0 or not finite",
     lambda: unit("pictures", Tensor(np.array([[np.inf, 0.0], [1.0, 0.0]])))),
    (ValueError, "image_embeddings must have a direction, and row 0 is 0 or not finite",
     lambda: clip_loss(zeros(2, 3), Tensor(np.ones((2, 3))), zeros())),
    (ValueError, "text_embeddings must have a direction, and row 0 is 0 or not finite",
     lambda: clip_loss(Tensor(np.ones((2, 3))), zeros(2, 3), zeros())),
    (ValueError, "similarity must be (N, M) with N at most M, and not empty, not (3, 2)",
     lambda: recall_at(1, np.zeros((3, 2)))),
    (ValueError, "similarity must be (N, M) with N at most M, and not empty, not (0, 2)",
     lambda: recall_at(1, np.zeros((0, 2)))),
    (ValueError, "k must be within 1 and 3, not 0", lambda: recall_at(0, np.zeros((2, 3)))),
    (ValueError, "k must be within 1 and 3, not 4", lambda: recall_at(4, np.zeros((2, 3)))),
    *[(ValueError, "TextEncoderConfig: vocab, width, layers and heads must be at least 1, and length 2",
       lambda field=field: TextEncoderConfig(**field))
      for field in ({"vocab": 0}, {"width": 0}, {"layers": 0}, {"heads": 0}, {"length": 1})],
    (ValueError, "TextEncoder: ids and mask must both be (B, N), N at most 5, not (2, 6) and (2, 6)",
     lambda: encoder()(np.zeros((2, 6), int), np.ones((2, 6), bool))),
    (ValueError, "TextEncoder: ids and mask must both be (B, N), N at most 5, not (2, 4) and (2, 3)",
     lambda: encoder()(np.zeros((2, 4), int), np.ones((2, 3), bool))),
    (ValueError, "TextEncoder: ids and mask must both be (B, N), N at most 5, not (4,) and (4,)",
     lambda: encoder()(np.zeros(4, int), np.ones(4, bool))),
    (ValueError, "TextEncoder: mask must be True for at least one token of each caption",
     lambda: encoder()(np.zeros((2, 3), int), np.array([[True, False, False], [False] * 3]))),
    (ValueError, "count must be at least 2, a token to drop and one to keep, not 1", lambda: random_spans(1, RNG)),
    *[(ValueError, f"share must be within 0 and 1 and mean_span at least 1, not {share!r} and {mean!r}",
       lambda share=share, mean=mean: random_spans(9, RNG, share=share, mean_span=mean))
      for share, mean in ((0, 3.0), (1, 3.0), (0.5, 0.9))],
    (ValueError, "dropped must have one entry for each of the 3 tokens, not 2",
     lambda: corrupt([1, 2, 3], np.zeros(2, bool), SENTINELS)),
    (ValueError, "ids must not contain a sentinel", lambda: corrupt([1, 19, 3], np.zeros(3, bool), SENTINELS)),
    (ValueError, "sentinels must be more than the gaps, not 1",
     lambda: corrupt([1, 2, 3], np.array([False, True, False]), SENTINELS[:1])),
    (ValueError, "target must begin with a sentinel", lambda: restore([1, 19, 3], [2, 19, 18], SENTINELS)),
    (ValueError, "target must contain the tokens of each gap", lambda: restore([1, 19, 3], [18, 2, 17], SENTINELS)),
    *[(ValueError, "layers, targets and sentinels must be at least 1, and sentinels at most the 20 rows of the table, "
                   f"not {', '.join(map(str, given[:2]))} and {given[2]}",
       lambda given=given: EncoderDecoder(encoder(), *given, RNG))
      for given in ((0, 4, 3), (1, 0, 3), (1, 4, 0), (1, 4, 21))],
    *[(ValueError, f"vocab_size is {size}; it takes {FIRST_MERGE} (3 special ids and 256 bytes) to "
                   f"{FIRST_MERGE + MAX_MERGES}.", lambda size=size: Tokenizer.train(["a"], size))
      for size in (FIRST_MERGE - 1, FIRST_MERGE + MAX_MERGES + 1)],
    (TypeError, "texts is a single str; it takes a list of them.", lambda: Tokenizer.train("seven", 300)),
    (TypeError, "A caption is a str, got int.", lambda: PLAIN.encode(7)),
    *[(ValueError, f"ids holds {i}; this tokenizer's ids are 0..{FIRST_MERGE - 1}.", lambda i=i: PLAIN.decode([i]))
      for i in (-1, FIRST_MERGE)],
    (TypeError, "texts is a single str; it takes a list of captions.", lambda: PLAIN.batch("seven", 8)),
    (ValueError, "length is 1; it takes at least 2, for BOS and EOS.", lambda: PLAIN.batch(["seven"], 1)),
    *[(UserError, "The tokenizer's state is malformed: it takes a dict of 'kind' and 'merges'.",
       lambda given=given: Tokenizer.from_state(given)) for given in (None, {"kind": "byte-level BPE"}, state(more=1))],
    (UserError, f"The tokenizer's kind is {'k' * 40!r}; it takes 'byte-level BPE'.",
     lambda: Tokenizer.from_state(state(kind="k" * 50))),
    (UserError, "The tokenizer's merges are a dict; they take a list of pairs.",
     lambda: Tokenizer.from_state(state(merges={}))),
    (UserError, f"The tokenizer has {MAX_MERGES + 1} merges; at most {MAX_MERGES} are read.",
     lambda: Tokenizer.from_state(state(merges=[(5, 6)] * (MAX_MERGES + 1)))),
    *[(UserError, "The tokenizer's merge 1 is malformed: it takes a pair of whole numbers.",
       lambda wrong=wrong: Tokenizer.from_state(state(merges=[(5, 6), wrong])))
      for wrong in ((5,), 7, (5, "6"), (5, True))],
    *[(UserError, f"The tokenizer's merge 1 joins an id that does not exist yet: it takes {FIRST_BYTE}..{FIRST_MERGE}.",
       lambda wrong=wrong: Tokenizer.from_state(state(merges=[(5, 6), wrong])))
      for wrong in ((FIRST_BYTE - 1, 5), (5, FIRST_MERGE + 1))],
    (UserError, "The tokenizer's merge 1 joins ids 5 and 6 a second time.",
     lambda: Tokenizer.from_state(state(merges=[(5, 6), (5, 6)]))),
    (UserError, f"The tokenizer's merge {(MAX_PIECE_BYTES).bit_length() - 1} makes {2 ** MAX_PIECE_BYTES.bit_length()} "
                f"bytes; at most {MAX_PIECE_BYTES} are read.",
     lambda: Tokenizer.from_state(state(merges=doubling(MAX_PIECE_BYTES.bit_length() + 1)))),
]


@pytest.mark.parametrize("error, sentence, call", REFUSALS, ids=[sentence[:60] for _, sentence, _ in REFUSALS])
def test_a_refusal_is_its_sentence(error, sentence, call):
    check_message(error, sentence, call)


def test_what_lies_just_within_is_taken():
    assert recall_at(1, np.eye(1)) == recall_at(3, np.zeros((2, 3))) == 1
    TextEncoderConfig(vocab=1, length=2, width=1, layers=1, heads=1)
    assert encoder()(np.zeros((2, 5), int), np.ones((2, 5), bool)).tokens.shape == (2, 5, 4)
    assert random_spans(2, np.random.default_rng(0)).sum() == 1
    assert random_spans(9, np.random.default_rng(0), share=0.999, mean_span=1).sum() == 8
    assert corrupt([1, 2, 3], np.array([False, True, False]), SENTINELS[:2]) == ([1, 19, 3], [19, 2, 18])
    assert len(EncoderDecoder(encoder(), 1, 1, 20, np.random.default_rng(0)).sentinels) == 20
    assert Tokenizer.train(["a"], FIRST_MERGE).vocab_size == FIRST_MERGE
    assert Tokenizer.train(["aa", "aa"], FIRST_MERGE + MAX_MERGES).vocab_size == FIRST_MERGE + 1
    ids, mask = PLAIN.batch([""], 2)
    assert ids.shape == (1, 2) and mask.all()
    assert Tokenizer.from_state(state(merges=[[FIRST_BYTE, FIRST_MERGE - 1]])).vocab_size == FIRST_MERGE + 1


def test_the_warning_about_a_cut_caption_whole():
    """Alone, and among others, of which the longest is shown; up to 40 characters are shown whole."""
    with pytest.warns(UserWarning) as seen:
        PLAIN.batch(["seven", "12"], 6)
        PLAIN.batch(["1234567", "x" * 41, "12"], 6)
        PLAIN.batch(["y" * 40], 6)
    assert [str(w.message) for w in seen] == [
        "The caption 'seven' is too long: the first 4 of its 5 tokens were kept.",
        f"The caption '{'x' * 40}...' is too long: the first 4 of its 41 tokens were kept (of 3 captions 2 were cut, "
        "this one most).",
        f"The caption '{'y' * 40}' is too long: the first 4 of its 40 tokens were kept.",
    ]
    assert all(w.filename == __file__ for w in seen)        # the line of the caller
