"""A placeholder is read as the vectors of its file: as words would be whose rows of the table held these vectors."""

import json
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.changed_checkpoint import changed_copy, tensors_of

from minidiff.errors import UserError
from minidiff.pretrained.clip_tokenizer import END, START, ClipTokenizer, words
from minidiff.systems.stable_diffusion import StableDiffusion

HERE = Path(__file__).parent / "checkpoints"
WIDTHS = {"eps": {"text_encoder": 16}, "v": {"text_encoder": 16}, "sdxl": {"text_encoder": 16, "text_encoder_2": 24}}
SDXL_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
WORDS = ("q", "x", "y")                                     # one token each, which the prompts below do not have


def vectors_for(kind: str, n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {part: rng.standard_normal((n, D)).astype(np.float32) for part, D in WIDTHS[kind].items()}


def write(path: Path, vectors: dict[str, np.ndarray], name: str = "<cat-toy>") -> Path:
    save_file(dict(zip([name] if len(vectors) == 1 else SDXL_NAMES.values(), vectors.values(), strict=True)), path)
    return path


def with_words_as(kind: str, copy: Path, vectors: dict[str, np.ndarray]) -> StableDiffusion:
    """The checkpoint in which the first of WORDS have these vectors."""
    vocab = json.loads((HERE / kind / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))

    def replaced(rows):
        def function(table):
            table[[vocab[f"{word}</w>"] for word in WORDS[:len(rows)]]] = rows
            return table
        return function
    changes = {}
    for part, rows in vectors.items():
        name, = (name for name in tensors_of(HERE / kind, part) if name.endswith("token_embedding.weight"))
        changes[part] = {name: replaced(rows)}
    return StableDiffusion.load(changed_copy(HERE / kind, copy, changes))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", WIDTHS)
def test_the_placeholder_is_its_vectors(kind, n, tmp_path):
    vectors = vectors_for(kind, n)
    found = StableDiffusion.load(HERE / kind, embeddings={"<cat-toy>": write(tmp_path / "e.safetensors", vectors)})
    expected = with_words_as(kind, tmp_path / "copy", vectors)
    prompts = ["a photo of <cat-toy>", "<cat-toy>", "red<cat-toy>cube <Cat-Toy>!", "no"]
    by_words = [prompt.replace("<cat-toy>", f" {' '.join(WORDS[:n])} ").replace("<Cat-Toy>", " ".join(WORDS[:n]))
                for prompt in prompts]
    for a, b in zip(found.encode_text(prompts, (32, 32)), expected.encode_text(by_words, (32, 32)), strict=True):
        np.testing.assert_array_equal(a, b)
    states = [m.encoders[-1](m.tokenizers[-1].ids(texts)[0]).pooled.data
              for m, texts in ((found, prompts), (expected, by_words))]
    np.testing.assert_array_equal(*states)                  # the end of the text is found: not the largest id of all
    pictures = [m.sample([text], steps=1, size="32x32", sampler="ddim")
                for m, text in ((found, prompts[0]), (expected, by_words[0]))]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("name", ["emb_params", "<anything>"])
@pytest.mark.parametrize("shape", [(16,), (1, 16)])
def test_one_vector_in_either_shape_and_under_any_name(name, shape, tmp_path):
    row = vectors_for("eps", 1)["text_encoder"]
    save_file({name: row.reshape(shape)}, tmp_path / "e.safetensors")
    model = StableDiffusion.load(HERE / "eps", embeddings={"<mine>": tmp_path / "e.safetensors"})
    encoder, tokenizer = model.encoders[0], model.tokenizers[0]
    i, = tokenizer.encode("<mine>")
    assert i == encoder.known == len(encoder.embedding) - 1
    np.testing.assert_array_equal(encoder.embedding.data[i], row[0])


def test_half_a_pair_of_utf_16_is_the_replacement_character():
    """A command line gives bytes that are no text as such halves."""
    tokenizer = ClipTokenizer.load(HERE / "eps" / "tokenizer")
    for half in ("\ud800", "\udcff"):
        assert tokenizer.encode(f"a {half} b") == tokenizer.encode("a \N{REPLACEMENT CHARACTER} b")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")


@cache
def tokenizer_with_placeholders() -> ClipTokenizer:
    tokenizer = ClipTokenizer.load(HERE / "eps" / "tokenizer")
    tokenizer.add("<cat-toy>", [10_000, 10_001])
    tokenizer.add("<cat-toy>2", [10_002])
    return tokenizer


@given(st.text(max_size=12), st.text(max_size=12))
@settings(max_examples=50)
def test_the_text_around_is_read_as_two_texts(before, after):
    """And of two placeholders that begin alike, the longer one is found."""
    encode = tokenizer_with_placeholders().encode
    assert encode(f"{before} <cat-toy> {after}") == [*encode(before), 10_000, 10_001, *encode(after)]
    assert encode(f"{before} <CAT-toy>2 {after}") == [*encode(before), 10_002, *encode(after)]


def test_two_placeholders(tmp_path):
    files = {f"<{i}>": write(tmp_path / f"{i}.safetensors", vectors_for("eps", n, seed=i))
             for i, n in enumerate((2, 1))}
    model = StableDiffusion.load(HERE / "eps", embeddings=files)
    table, first = model.encoders[0].embedding.data, model.encoders[0].known
    assert model.tokenizers[0].encode("<1><0>") == [first + 2, first, first + 1]
    np.testing.assert_array_equal(table[first:], np.concatenate([vectors_for("eps", n, seed=i)["text_encoder"]
                                                                 for i, n in enumerate((2, 1))]))


def test_special_tokens_in_upper_case_are_text():
    assert words("<|endoftext|>!") == ["<|", "endoftext", "|>", "!"]
    assert words("a'll!<|endoftext|>") == ["a", "'ll", "!<|", "endoftext", "|>"]
    tokenizer = ClipTokenizer.load(HERE / "eps" / "tokenizer")
    assert tokenizer.encode(END) == [tokenizer.end] and tokenizer.end not in tokenizer.encode(END.upper())


BAD = {"another width": {"a": np.ones((2, 24), np.float32)}, "no vector": {"a": np.ones((0, 16), np.float32)},
       "too many": {"a": np.ones((76, 16), np.float32)}, "three axes": {"a": np.ones((1, 1, 16), np.float32)},
       "a number": {"a": np.ones((), np.float32)}, "integers": {"a": np.ones((1, 16), np.int32)},
       "two tensors": {"a": np.ones((1, 16), np.float32), "b": np.ones((1, 16), np.float32)}, "nothing": {},
       "SDXL's": {"clip_l": np.ones((1, 16), np.float32), "clip_g": np.ones((1, 24), np.float32)},
       "NaN": {"a": np.full((1, 16), np.nan, np.float32)}}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_does_not_fit_is_refused(case, tmp_path):
    save_file(BAD[case], tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="e.safetensors is (no embedding for this model|damaged)"):
        StableDiffusion.load(HERE / "eps", embeddings={"<a>": tmp_path / "e.safetensors"})


def test_sdxl_takes_both_tensors(tmp_path):
    save_file({"clip_l": np.ones((1, 16), np.float32)}, tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="clip_l and clip_g"):
        StableDiffusion.load(HERE / "sdxl", embeddings={"<a>": tmp_path / "e.safetensors"})


@pytest.mark.parametrize("word", ["", " ", "a", "A", "th", END, f"x{START}"])
def test_a_word_that_has_a_meaning_is_refused(word, tmp_path):
    write(tmp_path / "e.safetensors", vectors_for("eps", 1))
    with pytest.raises(UserError, match="placeholder.*<my-word>"):
        StableDiffusion.load(HERE / "eps", embeddings={word: tmp_path / "e.safetensors"})


def test_a_word_with_the_padding_s_symbol_is_refused():
    """Where "!" is the padding, it divides a text wherever it stands: <wow!> would never be found."""
    tokenizer = ClipTokenizer.load(HERE / "v" / "tokenizer")
    with pytest.raises(UserError, match="placeholder.*<my-word>"):
        tokenizer.add("<wow!>", [0])


def test_the_same_word_twice_is_refused(tmp_path):
    write(tmp_path / "e.safetensors", vectors_for("eps", 1))
    with pytest.raises(UserError, match="has a meaning already"):
        StableDiffusion.load(HERE / "eps", embeddings={"<a>": tmp_path / "e.safetensors",
                                                       "<A>": tmp_path / "e.safetensors"})


def test_a_pickle_is_not_opened(tmp_path):
    (tmp_path / "learned_embeds.bin").write_bytes(pickle.dumps({"<a>": [1.0]}))
    with pytest.raises(UserError, match="pickle.*convert it"):
        StableDiffusion.load(HERE / "eps", embeddings={"<a>": tmp_path / "learned_embeds.bin"})
