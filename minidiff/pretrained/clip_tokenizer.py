"""CLIP's tokenizer: byte-level BPE of words in lower case (Radford et al. 2021; Sennrich et al. 2016 for BPE).

    text      NFC, white space as one space, lower case
    words     's 't 're 've 'm 'll 'd | letters | one digit | other characters; white space divides and is dropped
    symbols   a word's UTF-8 bytes, each shown as a printable character; the last one ends with </w>
    merges    the pair of neighbours that stands first in merges.txt becomes one symbol, again and again
    ids       start, the symbols' numbers in vocab.json, end, padding: 77 in all.  The padding's symbol, "!" in some
              checkpoints, is a word of its own wherever it stands in a text

Which characters are letters is what Python's unicodedata knows: characters that are newer count as others.

text/tokenizer.py has a BPE that is trained here, with a space before each word where this one has </w> after it.
"""

from __future__ import annotations

import gzip
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minidiff.errors import UserError
from minidiff.input_files import read_file
from minidiff.pretrained import tokenizer_files
from minidiff.pretrained.tokenizer_files import END, LENGTH, MAX_BYTES, START

MERGES = Path(__file__).with_name("clip_merges.txt.gz")
# words that other characters beside them do not join; START and END are three where upper case made them plain text
APART = re.compile(r"(<\|)((?:start|end)oftext)(\|>)|('(?:s|t|re|ve|m|ll|d))")
SPACES = re.compile("[\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


class ClipTokenizer:
    """Text -> ids.  vocab: symbol -> id; merges: pairs of symbols, the most frequent first."""

    def __init__(self, vocab: dict[str, int], merges: Sequence[tuple[str, str]], *, pad: str = END, unknown: str = END,
                 length: int = LENGTH, special: Sequence[str] = ()):
        for symbol in (START, END, pad, unknown, *special):
            if symbol not in vocab:
                raise ValueError(f"vocab lacks {symbol!r}")
        self.vocab, self.rank = vocab, {pair: i for i, pair in enumerate(merges)}
        self.start, self.end, self.pad, self.length = vocab[START], vocab[END], vocab[pad], length
        self.unknown = vocab[unknown]                       # stands for what the vocabulary lacks
        # each is a word wherever it stands
        self.special = {symbol: vocab[symbol] for symbol in (START, END, pad, unknown, *special)}
        self.at_special = re.compile(f"({'|'.join(map(re.escape, sorted(self.special, key=len, reverse=True)))})")
        self.added: dict[str, Sequence[int]] = {}           # placeholders of textual inversion -> their ids
        self.known: dict[str, tuple[str, ...]] = {}         # word -> its symbols

    @classmethod
    def load(cls, folder: Path) -> ClipTokenizer:
        """The tokenizer of a checkpoint's folder: vocab.json and merges.txt, or tokenizer.json, and their settings."""
        files = tokenizer_files.read(folder, {c + end for c in BYTES for end in ("", "</w>")})
        own = {symbol: i for symbol, (i, is_special) in files.added.items() if is_special}
        try:
            tokenizer = cls(files.vocab | own, files.merges, pad=files.pad, unknown=files.unknown, length=files.length,
                            special=sorted(own))
        except ValueError as error:
            raise UserError(f"{folder}: {error}.") from None
        for symbol, (i, _) in files.added.items():
            if symbol in files.vocab and symbol not in tokenizer.special:           # a word wherever it stands, too
                tokenizer.added[cleaned(symbol)] = [i]
            elif symbol not in tokenizer.special:
                try:
                    tokenizer.add(symbol, [i])
                except UserError as error:
                    raise UserError(f"{folder}: its added token {symbol!r} cannot be read: {error}") from None
        return tokenizer

    @property
    def largest(self) -> int:
        """The largest id."""
        return max(*self.vocab.values(), *(i for ids in self.added.values() for i in ids))

    @classmethod
    def shipped(cls, *, pad: str = END) -> ClipTokenizer:
        """CLIP's own tokenizer, for checkpoints without one; its merges (OpenAI, MIT) come with minidiff."""
        merges = tokenizer_files.pairs_of(gzip.decompress(read_file(MERGES, MAX_BYTES)).decode("utf-8"), MERGES)
        own = [c for b, c in enumerate(BYTES) if ord(c) == b]
        characters = own + [c for b, c in enumerate(BYTES) if ord(c) != b]
        symbols = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges), START, END]
        return cls({symbol: i for i, symbol in enumerate(symbols)}, merges, pad=pad)

    def ids(self, prompts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """(ids (B, length) int64, how many tokens of each prompt did not fit)."""
        rows, lost = np.full((len(prompts), self.length), self.pad, np.int64), []
        for row, prompt in zip(rows, prompts, strict=True):
            found = self.encode(prompt)
            lost.append(max(0, len(found) - (self.length - 2)))
            found = [self.start, *found[:self.length - 2], self.end]
            row[:len(found)] = found
        return rows, lost

    def add(self, word: str, ids: Sequence[int]) -> None:
        """Makes the word stand for these ids wherever a text has it, in upper or lower case."""
        clean = cleaned(word)
        if not clean.strip() or self.at_special.search(clean):
            raise UserError(f"a placeholder takes a word, such as <my-word>, not {word[:60]!r}.")
        if clean in self.vocab or f"{clean}</w>" in self.vocab or clean in self.added:
            raise UserError(f"the placeholder {word[:60]!r} has a meaning already: choose another, such as <my-word>.")
        self.added[clean] = ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text alone, without start, end and padding."""
        ids = []
        for part in self.at_special.split(text):
            if part in self.special:
                ids.append(self.special[part])
                continue
            for piece in self._pieces(cleaned(part)):
                if piece in self.added:
                    ids += self.added[piece]
                    continue
                for word in words(piece):
                    ids += [self.vocab.get(symbol, self.unknown) for symbol in self.symbols_of(word)]
        return ids

    def _pieces(self, text: str) -> list[str]:
        """The text, split before and after each placeholder."""
        longest_first = sorted(self.added, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if self.added else [text]

    def symbols_of(self, word: str) -> tuple[str, ...]:
        """The symbols of a word, which are kept, of at most 100,000 words."""
        if word not in self.known:
            if len(self.known) >= 100_000:
                self.known.clear()
            self.known[word] = self._symbols(word)
        return self.known[word]

    def _symbols(self, word: str) -> tuple[str, ...]:
        symbols = [BYTES[b] for b in word.encode("utf-8")]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            pair = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if pair not in self.rank:
                break
            symbols = merged(symbols, pair)
        return tuple(symbols)


def cleaned(text: str) -> str:
    """The text in NFC and lower case, each run of white space one space, and U+FFFD for half a pair of UTF-16."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # letter by letter, so that a final sigma is not treated differently
    return "".join(c.lower() for c in SPACES.sub(" ", unicodedata.normalize("NFC", text)))


def words(text: str) -> list[str]:
    """The words of a cleaned text."""
    found, i = [], 0
    kinds = "".join(_kind(c) for c in text)
    while i < len(text):
        match = APART.match(text, i)
        end = match.end() if match else i + 1
        if match:
            found += filter(None, match.groups())
        elif kinds[i] != " ":
            while kinds[i] in "LO" and kinds[end:end + 1] == kinds[i]:              # as many of a kind as there are
                end += 1
            found.append(text[i:end])
        i = end
    return found


def _kind(c: str) -> str:
    """L for a letter, N for a digit or number, " " for white space, O for any other character."""
    if SPACES.match(c):
        return " "
    kind = unicodedata.category(c)[0]
    return kind if kind in "LN" else "O"


def merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with each occurrence of the pair as one symbol, from left to right."""
    result, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i:i + 2]) == pair:
            result.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            result.append(symbols[i])
            i += 1
    return result


def _byte_characters() -> list[str]:
    """A printable character for each byte: its own in Latin-1 if it has one, else the next free one from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    free = iter(range(256, 512))
    return [chr(b if b in own else next(free)) for b in range(256)]


BYTES = _byte_characters()
