"""Exercise 15: byte-pair encoding, judged by an encoder made of texts and `str.replace`, and by cases done by hand."""

from collections import Counter

from minidiff.course.compare import described, stream, unequal
from minidiff.course.exercise import Exercise, Wrong
from minidiff.text import tokenizer


def solution(words, count):
    # minidiff's ids have PAD, BOS and EOS before the bytes; a word of letters is one piece of text there
    merges = tokenizer.Tokenizer.train(words, tokenizer.FIRST_MERGE + count).merges
    return [(a - tokenizer.FIRST_BYTE, b - tokenizer.FIRST_BYTE) for a, b in merges]


# ---- laws --------------------------------------------------------------------------------------------------

def _by_replacing(words, count):
    """The merges, where each id is a character, so that Python itself replaces pairs in a text, from the left."""
    texts = ["".join(chr(0x4E00 + byte) for byte in word.encode()) for word in words]
    merges = []
    for number in range(count):
        pairs = Counter(text[i:i + 2] for text in texts for i in range(len(text) - 1))
        most = max(pairs.values(), default=0)
        if most < 2:
            break
        best = min(pair for pair, seen in pairs.items() if seen == most)
        merges.append(tuple(ord(letter) - 0x4E00 for letter in best))
        texts = [text.replace(best, chr(0x4E00 + 256 + number)) for text in texts]
    return merges


def _random_words(law: int, letters: str = "abc"):
    rng = stream(15, law)
    for count in (1, 3, 6, 20):
        lengths = rng.integers(1, 8, int(rng.integers(3, 25)))
        yield ["".join(rng.choice(list(letters), int(length))) for length in lengths], count


def _differ(learn_merges, words, count, expected):
    got = learn_merges(words, count)
    where = f"for words = {words[:6]}" + " and more" * (len(words) > 6)
    if not isinstance(got, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in got):
        return f"the result should be a list of pairs and is {described(got)}, {where}"
    got = [tuple(pair) for pair in got]
    for i, (a, b) in enumerate(zip(got, expected, strict=False)):
        if a != b:
            return f"merge {i} is {a} and should be {b}, {where}, where the first merges are {expected[:6]}"
    return unequal("the number of merges", len(got), len(expected), f"{where}, with count = {count}")


def by_replacing(learn_merges):
    """the merges are those that come from texts in which each id is a character, replaced by str.replace"""
    for law, letters in ((1, "ab"), (2, "abc"), (3, "ab\u00e9\u6587")):
        for words, count in _random_words(law, letters):
            if (said := _differ(learn_merges, words, count, _by_replacing(words, count))):
                return said


def by_hand(learn_merges):
    """cases done by hand: low low lower, and a word of one letter"""
    low = [(108, 111), (256, 119)]                          # l o, lo w
    for words, count, expected in ((["low", "low", "lower"], 2, low), (["aaaa"], 1, [(97, 97)]),
                                   (["aaaa"], 9, [(97, 97)]), (["aaaa", "aaaa"], 9, [(97, 97), (256, 256)]),
                                   (["ba", "ab", "ba", "ab"], 2, [(97, 98), (98, 97)]), (["abc"], 5, []),
                                   (["a", "a"], 5, []), (["ab", "ab"], 0, [])):
        if (said := _differ(learn_merges, words, count, expected)):
            return said


# ---- known wrong answers -----------------------------------------------------------------------------------

def _merged(word, pair, new, overlap=False):
    done, i = [], 0
    while i < len(word):
        if tuple(word[i:i + 2]) == pair:
            done.append(new)
            i += 1 if overlap and tuple(word[i + 1:i + 3]) == pair else 2
        else:
            done.append(word[i])
            i += 1
    return done


def _learn(words, count, *, key=None, least=2, overlap=False, replace=True, first=256, counted=None, distinct=False):
    """The right answer, or one with a part in another way; key: orders (pair, times seen, place), the smallest wins."""
    words = [list(word.encode()) for word in (dict.fromkeys(words) if distinct else words)]
    merges = []
    for number in range(count):
        pairs = Counter()
        for word in words:
            pairs.update(counted(word) if counted else zip(word, word[1:], strict=False))
        places = {pair: i for i, pair in enumerate(pairs) if pair not in merges or replace}
        best = min(places, key=lambda p: key(p, pairs[p], places[p]) if key else (-pairs[p], p), default=None)
        if best is None or pairs[best] < least:
            break
        merges.append(best)
        words = [_merged(word, best, first + number, overlap) if replace else word for word in words]
    return merges


def _first_seen(words, count):
    return _learn(words, count, key=lambda pair, seen, place: (-seen, place))


def _largest(words, count):
    return _learn(words, count, key=lambda pair, seen, place: (-seen, -pair[0], -pair[1]))


def _no_early_stop(words, count):
    return _learn(words, count, least=1)


def _distinct_words(words, count):
    return _learn(words, count, distinct=True)


def _across_words(words, count):
    return _learn(["".join(words)], count)


def _never_replaced(words, count):
    return _learn(words, count, replace=False)


def _ids_from_257(words, count):
    return _learn(words, count, first=257)


def _overlapping(words, count):
    return _learn(words, count, overlap=True)


def _counts_without_overlap(words, count):
    def counted(word):
        i = 0
        while i < len(word) - 1:
            yield word[i], word[i + 1]
            i += 2 if word[i:i + 1] * 2 == word[i + 1:i + 3] else 1
    return _learn(words, count, counted=counted)


def _rarest(words, count):
    return _learn(words, count, key=lambda pair, seen, place: (seen < 2, seen, pair))


def _one_merge(words, count):
    return _learn(words, min(count, 1))


def probe(learn_merges):
    words = "hug pug hug hugs banana aaab aaab zz ba na bun bun bun aaa aaaa".split()
    return [[list(map(int, pair)) for pair in learn_merges(*arguments)]
            for arguments in ((words, 4), (words, 40), (["aaa", "ab", "ab"], 3))]


EXERCISE = Exercise(
    title="Learning the merges of byte-pair encoding", answer="learn_merges", minutes=45, chapter="06_text",
    hint="Keep each word as a list of ids. collections.Counter counts pairs; min(counts, key=lambda pair: "
         "(-counts[pair], pair)) is the pair that is seen most often, and of equals the smallest.",
    solution=solution, place="minidiff/text/tokenizer.py Tokenizer.train",
    laws=(by_replacing, by_hand), probe=probe,
    wrong=(
        Wrong(_first_seen, "of pairs that are seen equally often it takes the first that it met, so that the result "
                           "depends on the order of the words: take the smallest pair"),
        Wrong(_largest, "of pairs that are seen equally often it takes the largest: take the smallest"),
        Wrong(_no_early_stop, "it goes on when no pair is seen twice: such a merge joins what stood together once"),
        Wrong(_distinct_words, "a word that comes twice counts once: common words must weigh more"),
        Wrong(_across_words, "it joins pairs across two words, as if all words were one text"),
        Wrong(_never_replaced, "it does not replace the pairs that it merged, so that no merge is made of merges"),
        Wrong(_ids_from_257, "new ids begin with 257: the bytes are 0..255, so the first new id is 256"),
        Wrong(_overlapping, "it replaces pairs that overlap: after a a has become one id, go on behind both"),
        Wrong(_counts_without_overlap, "it counts a a a as one pair (a, a): all neighbours are counted, so there are "
                                       "two"),
        Wrong(_rarest, "it merges the pair that is seen least often"),
        Wrong(_one_merge, "it stops after one merge: after each merge, count again"),
    ))
