"""The files of a checkpoint's tokenizer: its vocabulary, its merges, and which words stand for themselves.

    vocab.json, merges.txt      symbol -> id; a pair of symbols on each line
    tokenizer.json              both, and the added words: transformers 5 writes it alone
    tokenizer_config.json       the names of the symbols for padding and for the unknown, and how many tokens are made
    special_tokens_map.json     the same names, in older checkpoints
    added_tokens.json           words that were added to a vocabulary, as textual inversion does, in older checkpoints
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from minidiff.errors import UserError
from minidiff.input_files import parse_json, read_file
from minidiff.pretrained.config import Config

LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_BYTES = 16 << 20                                        # of vocab.json, and of merges.txt; CLIP's have 1 MB
MOST_ADDED, LONGEST_ADDED = 500, 100                        # words, and characters of each
# what else a BPE's JSON may say, and what it says here
PLAIN = {"continuing_subword_prefix": ("", None), "dropout": (None, 0.0), "byte_fallback": (False, None),
         "ignore_merges": (False, None)}
NORMALIZER, WORDS = ["NFC", "Replace", "Lowercase"], ["Split", "ByteLevel"]


@dataclass(frozen=True)
class TokenizerFiles:
    """What they say, checked."""

    vocab: dict[str, int]                   # symbol -> id
    merges: list[tuple[str, str]]           # the most frequent first
    added: dict[str, tuple[int, bool]]      # word -> (id, whether it is special: matched as it is written)
    pad: str
    unknown: str                            # stands for what the vocabulary lacks
    length: int                             # tokens of a prompt


def read(folder: Path, single: Set[str]) -> TokenizerFiles:
    """The files in a folder; UserError where they are damaged, or of another kind.  single: symbols of one byte."""
    settings = folder / "tokenizer_config.json"
    config = Config.load(settings) if settings.exists() else Config({}, folder)
    pad, unknown = _pad_and_unknown(folder, settings, config)
    length = min(config.whole("model_max_length", LENGTH), LENGTH)
    if length < 3:
        raise UserError(f"{settings}: model_max_length takes at least 3, of start, text and end, not {length}.")
    vocab, merges, added = _vocabulary(folder)
    check_complete(vocab, merges, single, folder)
    if added is None:
        added = config.values.get("added_tokens_decoder")
    return TokenizerFiles(vocab, merges, _added_words(folder, added, vocab), pad, unknown, length)


def _pad_and_unknown(folder: Path, settings: Path, config: Config) -> tuple[str, str]:
    """The symbols for padding and for the unknown; those for start and end must be CLIP's."""
    names, special = dict(config.values), folder / "special_tokens_map.json"
    # transformers reads the older file last, unless the newer one lists all added tokens
    if special.exists() and "added_tokens_decoder" not in names:
        names |= Config.load(special).values
    start, end, pad, unknown = (_content(names.get(f"{name}_token"), default) for name, default in (
        ("bos", START), ("eos", END), ("pad", END), ("unk", END)))
    for name, symbol in (("pad", pad), ("unk", unknown)):
        if not isinstance(symbol, str):
            raise UserError(f"{settings}: {name}_token takes a symbol of vocab.json, not {str(symbol)[:40]!r}.")
    if (start, end) != (START, END):
        raise UserError(f"{settings}: a text is between {str(start)[:40]!r} and {str(end)[:40]!r}, and CLIP's is "
                        f"between {START!r} and {END!r}.")
    return pad, unknown


def _added_words(folder: Path, added, vocab: dict[str, int]) -> dict[str, tuple[int, bool]]:
    """word -> (id, whether it is special).  added: a list of entries, or a dict by their ids, or None."""
    listed = folder / "added_tokens.json"
    if added is None and listed.exists():
        added = [{"content": symbol, "id": i} for symbol, i in checked_vocab(_json(listed), listed).items()]
    if isinstance(added, dict):
        added = [{"id": i} | entry if isinstance(entry, dict) else entry for i, entry in added.items()]
    if not isinstance(added or [], list):
        raise UserError(f"{folder}: added tokens are a list, not {str(added)[:60]!r}.")
    if len(added or []) > MOST_ADDED:
        raise UserError(f"{folder}: {len(added)} tokens were added, and minidiff takes at most {MOST_ADDED}.")
    words: dict[str, tuple[int, bool]] = {}
    for symbol, (number, special) in (_added(entry, folder) for entry in added or []):
        other = words[symbol][0] if symbol in words else vocab.get(symbol, number)
        if other != number:
            raise UserError(f"{folder}: the added token {symbol!r} has two numbers, {other} and {number}.")
        words[symbol] = number, special
    return words


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], list | None]:
    """symbol -> id, the merges, and the added words where the same file has them."""
    one, vocab = folder / "tokenizer.json", folder / "vocab.json"
    if vocab.exists() or not one.exists():
        return checked_vocab(_json(vocab), vocab), pairs_of(_text(folder / "merges.txt"), folder / "merges.txt"), None
    whole = _json(one)
    model = whole.get("model") if isinstance(whole, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != "</w>":
        raise UserError(f"{one} is not of a tokenizer like CLIP's: it takes a BPE whose words end with </w>.")
    for name, values in PLAIN.items():
        if model.get(name) not in values:
            raise UserError(f"{one}: {name} takes {values[0]!r}, as in CLIP's tokenizer, not "
                            f"{str(model[name])[:40]!r}.")
    for name, kinds in (("normalizer", NORMALIZER), ("pre_tokenizer", WORDS)):
        if (found := _kinds(whole.get(name))) not in ([], kinds):
            raise UserError(f"{one}: its {name} is {', '.join(found)[:80]}, and that of CLIP's tokenizer is "
                            f"{', '.join(kinds)}.")
    merges = model.get("merges")
    # two symbols, in older files as one text
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair if isinstance(pair, list) else ())
             for pair in (merges if isinstance(merges, list) else [])]
    return checked_vocab(model.get("vocab"), one), checked_pairs(pairs, one), whole.get("added_tokens")


def _kinds(step) -> list[str]:
    """The kinds of a tokenizer's steps, one after another; none where it has no such step."""
    parts = step if not isinstance(step, dict) else next(
        (step[name] for name in ("normalizers", "pretokenizers") if isinstance(step.get(name), list)), [step])
    return [str(part.get("type")) if isinstance(part, dict) else str(part) for part in
            (parts if isinstance(parts, list) else [] if parts is None else [parts])]


def _added(entry, folder: Path) -> tuple[str, tuple[int, bool]]:
    """An added word as transformers lists it."""
    symbol, number = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) <= 7:
        number = int(number)
    if not isinstance(symbol, str) or not symbol or type(number) is not int or not 0 <= number < 1 << 20:
        raise UserError(f"{folder}: an added token takes content and id, not {str(entry)[:60]!r}.")
    if len(symbol) > LONGEST_ADDED:
        raise UserError(f"{folder}: an added token has at most {LONGEST_ADDED} characters, and {symbol[:40]!r}... has "
                        f"{len(symbol)}.")
    if entry.get("single_word"):
        raise UserError(f"{folder}: the added token {symbol[:40]!r} is a single_word, which minidiff does not have.")
    return symbol, (number, bool(entry.get("special")))


def _content(token, default: str):
    """The text of a token, which is given alone or as a dict of its properties."""
    return default if token is None else token.get("content") if isinstance(token, dict) else token


def _json(path: Path):
    text = _text(path)
    try:
        return parse_json(text)
    except ValueError:
        raise UserError(f"{path} is not JSON.") from None


def checked_vocab(vocab, path: Path) -> dict[str, int]:
    if not isinstance(vocab, dict) or any(type(i) is not int or not 0 <= i < 1 << 20 for i in vocab.values()):
        raise UserError(f"{path} is no vocabulary: it takes a dict of symbols and their numbers.")
    return vocab


def check_complete(vocab: dict[str, int], merges: Sequence[tuple[str, str]], single: Set[str], folder: Path) -> None:
    """UserError where merges make what the vocabulary lacks, or where more than a hundredth of it is made by none."""
    made = {a + b for a, b in merges}
    if unknown := next((symbol for symbol in made if symbol not in vocab), None):
        raise UserError(f"{folder}: the merges make {unknown[:40]!r}, which the vocabulary lacks: they are of "
                        "different tokenizers.")
    lost = len(vocab.keys() - made - single - {START, END})
    if lost > len(vocab) / 100:
        raise UserError(f"{folder}: the merges make all but {lost} of the vocabulary's {len(vocab)} symbols: they are "
                        "cut short, or of another tokenizer.")


def pairs_of(text: str, path: Path) -> list[tuple[str, str]]:
    lines = text.split("\n")
    return checked_pairs([tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")],
                         path)


def checked_pairs(pairs: list[tuple[str, ...]], path: Path) -> list[tuple[str, str]]:
    if not pairs or any(len(pair) != 2 or not all(isinstance(symbol, str) for symbol in pair) for pair in pairs):
        raise UserError(f"{path} is no list of merges: it takes lines, each of two symbols.")
    return pairs


def _text(path: Path) -> str:
    try:
        return read_file(path, MAX_BYTES, ": it is no tokenizer's").decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None
