"""A tokenizer's files in each of the forms that checkpoints have: the ids are the same, or it is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support import budget

from minidiff.errors import UserError
from minidiff.pretrained.clip_tokenizer import END, START, ClipTokenizer
from minidiff.pretrained.tokenizer_files import MOST_ADDED

HERE = Path(__file__).parent / "checkpoints"
PROMPTS = ["a red cube!", "It's naïve — 3.14 日本", "A <cat-toy> and a red<CAT-TOY>cube", "Hello <TAG> <tag>",
           "x" * 200]


def parts(kind: str) -> tuple[dict, list[list[str]], dict]:
    """vocab.json, the pairs of merges.txt and tokenizer_config.json of a tiny checkpoint."""
    folder = HERE / kind / "tokenizer"
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return (json.loads((folder / "vocab.json").read_text(encoding="utf-8")), [line.split() for line in merges],
            json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))


def written(folder: Path, name: str, value) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


NORMALIZER = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Replace"}, {"type": "Lowercase"}]}
PRE_TOKENIZER = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}


def one_file(folder: Path, kind: str = "eps", added=(), settings=None, normalizer=NORMALIZER,
             pre_tokenizer=PRE_TOKENIZER, **model) -> Path:
    """A tokenizer as transformers 5 writes it: tokenizer.json, and its settings."""
    vocab, merges, config = parts(kind)
    special = [{"id": vocab[symbol], "content": symbol, "special": True} for symbol in (START, END)]
    written(folder, "tokenizer.json", {"added_tokens": [*special, *added], "normalizer": normalizer,
                                       "pre_tokenizer": pre_tokenizer, "model": {
        "type": "BPE", "end_of_word_suffix": "</w>", "vocab": vocab, "merges": merges} | model})
    written(folder, "tokenizer_config.json", config | (settings or {}))
    return folder


def ids(tokenizer: ClipTokenizer) -> list:
    return tokenizer.ids(PROMPTS)[0].tolist()


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("older", [False, True])
def test_one_file_is_as_good_as_two(kind, older, tmp_path):
    """Older ones have a pair of merges as one text."""
    _, merges, _ = parts(kind)
    more = {"merges": [" ".join(pair) for pair in merges]} if older else {}
    found = ClipTokenizer.load(one_file(tmp_path, kind, **more))
    assert ids(found) == ids(ClipTokenizer.load(HERE / kind / "tokenizer"))


@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_added_words_are_read_wherever_they_are_listed(form, tmp_path):
    """<cat-toy> in upper and lower case, and <TAG>, which is special, as it is written."""
    vocab, _, config = parts("eps")
    toy, tag = len(vocab), len(vocab) + 1
    added = [{"id": toy, "content": "<cat-toy>", "special": False}, {"id": tag, "content": "<TAG>", "special": True}]
    if form == "tokenizer.json":
        one_file(tmp_path, added=added)
    else:
        shutil.copytree(HERE / "eps" / "tokenizer", tmp_path, dirs_exist_ok=True)
        if form == "added_tokens.json":                     # which does not tell special ones
            written(tmp_path, form, {"<cat-toy>": toy})
        else:
            written(tmp_path, form, config | {"added_tokens_decoder": {
                str(entry["id"]): {"content": entry["content"], "special": entry["special"]} for entry in added}})
    tokenizer, plain = ClipTokenizer.load(tmp_path), ClipTokenizer.load(HERE / "eps" / "tokenizer")
    a, red, cube, d = (plain.encode(word) for word in ("a", "red", "cube", "and"))
    assert tokenizer.encode(PROMPTS[2]) == [*a, toy, *d, *a, *red, toy, *cube]
    if form != "added_tokens.json":
        assert tokenizer.encode(PROMPTS[3]) == [*plain.encode("hello"), tag, *plain.encode("<tag>")]
    assert tokenizer.largest == (toy if form == "added_tokens.json" else tag)


def test_the_symbol_for_the_unknown(tmp_path):
    """é is two bytes, of which this vocabulary lacks the second."""
    vocab, _, _ = parts("eps")
    del vocab["©</w>"]
    found = ClipTokenizer.load(one_file(tmp_path, vocab=vocab, settings={"unk_token": "!"})).encode("é")
    assert found[1] == vocab["!"] != vocab[END]


@pytest.mark.parametrize("given, words", [
    ({"type": "WordPiece"}, "not of a tokenizer like CLIP's"), ({"end_of_word_suffix": ""}, "words end with </w>"),
    ({"merges": "a b"}, "is no list of merges"), ({"merges": [[1, 2]]}, "is no list of merges"),
    ({"vocab": ["a"]}, "is no vocabulary"), ({"settings": {"bos_token": "<s>"}}, "a text is between '<s>' and"),
    ({"settings": {"eos_token": {"content": "</s>"}}}, "and '</s>', and CLIP's is between"),
    ({"settings": {"unk_token": 3}}, "unk_token takes a symbol of vocab.json, not '3'"),
    ({"added": [{"content": "x"}]}, "takes content and id"), ({"added": [7]}, "takes content and id"),
    ({"added": [{"content": "<x>", "id": 600, "single_word": True}]}, "'<x>' is a single_word"),
    ({"added": [{"content": "<x>", "id": "9" * 5000}]}, "takes content and id"),
    ({"added": [{"content": f"<{i}>", "id": 700 + i} for i in range(501)]}, "503 tokens were added, .* at most 500"),
    ({"added": [{"content": "x" * 101, "id": 700}]}, "at most 100 characters, and 'x+'... has 101"),
    ({"added": [{"content": END, "id": 3, "special": True}]}, "'<|endoftext|>' has two numbers"),
    ({"added": [{"content": "a</w>", "id": 3}]}, "'a</w>' has two numbers"),
    ({"added": [{"content": "<x>", "id": 700}, {"content": "<x>", "id": 701}]}, "'<x>' has two numbers, 700 and 701"),
    ({"added": [{"content": "<X>", "id": 700}, {"content": "<x>", "id": 701}]}, "added token '<x>' cannot be read"),
    ({"dropout": 0.1}, "dropout takes None"), ({"byte_fallback": True}, "byte_fallback takes False"),
    ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix takes ''"),
    ({"ignore_merges": True}, "ignore_merges takes False"),
    ({"normalizer": {"type": "NFKC"}}, "its normalizer is NFKC, and that of CLIP's tokenizer is NFC, Replace, Low"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Space"}]}}, "its pre_tokenizer is Space, ")])
def test_what_is_of_another_kind_is_refused(given, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        ClipTokenizer.load(one_file(tmp_path, **given))
    assert "\n" not in str(caught.value)


def test_a_word_of_the_vocabulary_may_be_listed_again(tmp_path):
    """As transformers lists the symbol for padding, "!" in some checkpoints."""
    vocab, _, _ = parts("eps")
    again = [{"id": vocab["!"], "content": "!", "special": special} for special in (False, True)]
    for entry in again:
        assert ClipTokenizer.load(one_file(tmp_path, added=[entry])).encode("a!")[-1] == vocab["!"]


@pytest.mark.parametrize("special", [(False,), (True,), (False, True)])
def test_as_many_added_words_as_are_taken_are_read_within_the_budget(special, tmp_path):
    """Long ones that begin alike; the fastest of three, since other work on the machine costs time, too."""
    added = [{"id": 1000 + i, "content": f"<{'q' * 60}{i:030}>", "special": special[i % len(special)]}
             for i in range(MOST_ADDED - 2)]                # start and end are two more
    folder = one_file(tmp_path, added=added)

    def load() -> ClipTokenizer:
        re.purge()                                          # patterns that an earlier load compiled
        return ClipTokenizer.load(folder)
    assert min(budget.measured(load).seconds for _ in range(3)) < budget.SECONDS
    assert ClipTokenizer.load(folder).encode(f"a {added[-1]['content']}")[-1] == added[-1]["id"]


def test_no_vocabulary_at_all(tmp_path):
    with pytest.raises(UserError, match=r"vocab\.json does not exist"):
        ClipTokenizer.load(tmp_path)
    written(tmp_path, "tokenizer.json", [])
    with pytest.raises(UserError, match="not of a tokenizer like CLIP's"):
        ClipTokenizer.load(tmp_path)
