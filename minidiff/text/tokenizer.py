"""Byte-level byte-pair encoding: from text to numbers (ids) and back.

A caption becomes ids in three steps, each of which can be reversed:

    text    -> pieces   a regular expression splits words, numbers, signs, spaces; "".join(pieces) == text
    piece   -> bytes    UTF-8, so that 256 symbols suffice for every language and no text is unknown
    bytes   -> ids      learned merges, applied in the order in which they were learned

Training is algorithm 1 of Sennrich et al. 2016, arXiv 1508.07909, on bytes as in GPT-2 (Radford et al. 2019):

    repeat:  (a, b) = the pair of neighbours seen most often;  a new id = a b;  replace every a b by it

Merges never cross the border of a piece, so a word is encoded in the same way in every text (and cached).
The ids:  0 PAD, 1 BOS, 2 EOS, 3..258 the bytes, 259.. the merges.
"""

import operator
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from minidiff.errors import UserError

__all__ = ["BOS", "EOS", "PAD", "Tokenizer"]

PAD, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3  # the id of the byte 0x00
FIRST_MERGE = FIRST_BYTE + 256

Pair = tuple[int, int]

# GPT-2's pattern, written for Python's `re`; [^\W\d_] is "a letter". A space belongs to the word after it.
# A piece has at most 32 characters (and that space), which bounds the cost of a piece, and so of a prompt.
SPLIT = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]{1,32}| ?\d{1,32}| ?(?:[^\s\w]|_){1,32}|\s{1,32}(?!\S)|\s{1,32}"
)
MAX_PIECE_BYTES = 33 * 4
MAX_MERGES = 1 << 16
MAX_CACHED_PIECES = 1 << 16


class Tokenizer:
    """A vocabulary of bytes and merges. `merges[i]` is the pair of ids that became id 259 + i."""

    def __init__(self, merges: Sequence[Pair] = ()):
        """merges: pairs of earlier ids, in the order learned; () gives only the bytes. Raises UserError."""
        self.merges: tuple[Pair, ...] = _checked(merges)
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self._bytes = _bytes_of_ids(self.merges)
        self._cache: dict[str, tuple[int, ...]] = {}

    @property
    def vocab_size(self) -> int:
        """Number of ids: 3 special ones, 256 bytes and the merges. Every id is below it."""
        return len(self._bytes)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns merges from `texts`, up to `vocab_size` ids in all (259..65795).

        The result depends on how often each piece occurs, and not on the order of the texts; among equally
        frequent pairs, the one with the smallest ids is merged. Learning stops early when no pair occurs twice,
        so the vocabulary may be smaller than vocab_size. Raises ValueError for a vocab_size out of range.
        """
        if not FIRST_MERGE <= vocab_size <= FIRST_MERGE + MAX_MERGES:
            raise ValueError(
                f"vocab_size is {vocab_size}; it takes {FIRST_MERGE} (3 special ids and 256 bytes) "
                f"to {FIRST_MERGE + MAX_MERGES}."
            )
        if isinstance(texts, str):
            raise TypeError("texts is a single str; it takes a list of them.")
        pieces = Counter(piece for text in texts for piece in _split(text))
        words = [_to_byte_ids(piece) for piece in pieces]
        count_of = list(pieces.values())

        counts: Counter[Pair] = Counter()  # how often a pair occurs in all texts
        where: defaultdict[Pair, set[int]] = defaultdict(set)  # the words that hold it
        for i, word in enumerate(words):
            for pair in zip(word, word[1:], strict=False):
                counts[pair] += count_of[i]
                where[pair].add(i)

        merges: list[Pair] = []
        for new_id in range(FIRST_MERGE, vocab_size):
            # (a, b) = the pair of neighbours seen most often
            best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
            if best is None or counts[best] < 2:
                break
            merges.append(best)
            # replace every a b by it; only the words that hold a b change their counts
            for i in where.pop(best):
                for pair in zip(words[i], words[i][1:], strict=False):
                    counts[pair] -= count_of[i]
                words[i] = _merge(words[i], best, new_id)
                for pair in zip(words[i], words[i][1:], strict=False):
                    counts[pair] += count_of[i]
                    where[pair].add(i)
            del counts[best]
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        """Any str -> ids, without BOS and EOS; decode(encode(text)) == text.

        A lone surrogate, which UTF-8 cannot encode, becomes the three bytes that UTF-8's scheme would give it.
        No text gives a special id. The time is proportional to the length.
        """
        ids: list[int] = []
        for piece in _split(text):
            found = self._cache.get(piece)
            if found is None:
                found = self._encode_piece(piece)
                if len(self._cache) >= MAX_CACHED_PIECES:
                    self._cache.clear()
                self._cache[piece] = found
            ids.extend(found)
        return ids

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        word = _to_byte_ids(piece)
        while len(word) > 1:
            # the pair that was learned first is merged first, as it was in training
            pair = min(zip(word, word[1:], strict=False), key=lambda p: self._rank.get(p, MAX_MERGES))
            if pair not in self._rank:
                break
            word = _merge(word, pair, FIRST_MERGE + self._rank[pair])
        return tuple(word)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> str; PAD, BOS and EOS are left out.

        Bytes that are not valid UTF-8 (from a caption cut within a letter) become U+FFFD.
        Raises ValueError for an id out of range.
        """
        data = bytearray()
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids holds {i}; this tokenizer's ids are 0..{self.vocab_size - 1}.")
            data += self._bytes[operator.index(i)]          # TypeError for 5.5
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def batch(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Captions -> (ids (B, N) int32, mask (B, N) bool) with N = length, the fixed context.

        A row is BOS, tokens, EOS, PAD ...; mask is True up to and including EOS. The null caption '' is
        BOS, EOS. A caption of more than N - 2 tokens is cut to its first N - 2, with one warning for the batch.
        Raises ValueError for length < 2 and TypeError for anything that is not a list of str.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a single str; it takes a list of captions.")
        if length < 2:
            raise ValueError(f"length is {length}; it takes at least 2, for BOS and EOS.")
        ids = np.full((len(texts), length), PAD, dtype=np.int32)  # (B, N)
        room = length - 2
        cut: list[tuple[int, str]] = []
        for row, text in zip(ids, texts, strict=True):
            tokens = self.encode(text)
            if len(tokens) > room:
                cut.append((len(tokens), text))
            tokens = [BOS, *tokens[:room], EOS]
            row[: len(tokens)] = tokens
        if cut:
            count, text = max(cut, key=lambda c: c[0])
            shown = ascii(text if len(text) <= 40 else text[:40] + "...")
            others = f" (of {len(texts)} captions {len(cut)} were cut, this one most)" if len(cut) > 1 else ""
            warnings.warn(
                f"The caption {shown} is too long: the first {room} of its {count} tokens were kept{others}.",
                stacklevel=2,
            )
        return ids, ids != PAD  # no token inside a caption is PAD

    def state(self) -> dict:
        """The tokenizer as plain JSON values; `from_state` gives it back."""
        return {"kind": "byte-level BPE", "merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_state(cls, state: dict) -> "Tokenizer":
        """The tokenizer that `state()` described; a malformed state raises UserError."""
        if not isinstance(state, dict) or set(state) != {"kind", "merges"}:
            raise UserError("The tokenizer's state is malformed: it takes a dict of 'kind' and 'merges'.")
        if state["kind"] != "byte-level BPE":
            raise UserError(
                f"The tokenizer's kind is {str(state['kind'])[:40]!r}; it takes 'byte-level BPE'."
            )
        return cls(state["merges"])


def _split(text: str) -> list[str]:
    if not isinstance(text, str):
        raise TypeError(f"A caption is a str, got {type(text).__name__}.")
    return SPLIT.findall(text)


def _to_byte_ids(piece: str) -> list[int]:
    return [FIRST_BYTE + b for b in piece.encode("utf-8", "surrogatepass")]


def _merge(word: list[int], pair: Pair, new_id: int) -> list[int]:
    """Every `pair` in `word`, read from the left, replaced by new_id."""
    merged: list[int] = []
    for i in word:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new_id
        else:
            merged.append(i)
    return merged


def _checked(merges: object) -> tuple[Pair, ...]:
    """The merges as tuples, or UserError: each joins two earlier ids, once, into at most a piece's length."""
    if not isinstance(merges, (list, tuple)):
        raise UserError(f"The tokenizer's merges are a {type(merges).__name__}; they take a list of pairs.")
    if len(merges) > MAX_MERGES:
        raise UserError(f"The tokenizer has {len(merges)} merges; at most {MAX_MERGES} are read.")
    seen: set[Pair] = set()
    length = [0] * FIRST_BYTE + [1] * 256  # bytes of each id: doubling merges would fill the memory
    for rank, pair in enumerate(merges):
        where = f"The tokenizer's merge {rank}"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or any(type(i) is not int for i in pair):
            raise UserError(f"{where} is malformed: it takes a pair of whole numbers.")
        if not all(FIRST_BYTE <= i < FIRST_MERGE + rank for i in pair):
            last = FIRST_MERGE + rank - 1
            raise UserError(f"{where} joins an id that does not exist yet: it takes {FIRST_BYTE}..{last}.")
        a, b = pair
        if (a, b) in seen:
            raise UserError(f"{where} joins ids {a} and {b} a second time.")
        if length[a] + length[b] > MAX_PIECE_BYTES:
            raise UserError(
                f"{where} makes {length[a] + length[b]} bytes; at most {MAX_PIECE_BYTES} are read."
            )
        seen.add((a, b))
        length.append(length[a] + length[b])
    return tuple((a, b) for a, b in merges)


def _bytes_of_ids(merges: Sequence[Pair]) -> list[bytes]:
    table = [b""] * FIRST_BYTE + [bytes([b]) for b in range(256)]
    for a, b in merges:
        table.append(table[a] + table[b])
    return table
