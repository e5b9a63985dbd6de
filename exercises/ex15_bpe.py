"""Exercise 15: learning the pieces of words.  45 minutes, chapter docs/course/06_text.md.

Byte-pair encoding begins with bytes, and joins what often stands together (Sennrich et al. 2016, algorithm 1):

    repeat:  (a, b) = the pair of neighbours seen most often in all words;  a new id stands for a b;  replace every a b

Ids 0..255 are the bytes of UTF-8, and the merge number i makes the id 256 + i.  Details that decide the result:

    - pairs are counted within words, never across two of them, and a word that comes twice counts twice
    - of the pairs that are seen equally often, the smallest (a, b) is taken: smallest a, and of those smallest b
    - in a word, pairs are replaced from the left, and do not overlap: a a a becomes (aa) a
    - to count, all neighbours are looked at: a a a has the pair (a, a) twice
    - learning stops early when no pair is seen twice

    minidiff check ex15
"""


def learn_merges(words: list[str], count: int) -> list[tuple[int, int]]:
    """The first merges, in the order in which they are learned.

    words: texts, not empty.  count: at most so many merges.
    Returns at most `count` pairs of ids: pair number i became the id 256 + i.
    """
    raise NotImplementedError("your code here")
