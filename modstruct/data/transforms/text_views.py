"""Easy data augmentation of captions (EDA, Wei & Zou 2019): one small random change of the words."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from modstruct.errors import refuse, require

# Words that EDA never replaces: they carry grammar, and WordNet knows odd senses of them ("in": inch, "a": ampere).
_FUNCTION_WORDS_TEXT = """
a about above after again against all am an and any are as at be because been before being below between both but by
can could did do does doing down during each few for from further had has have having he her here hers him his how i
if in into is it its just me more most my near next no nor not now of off on once only or other our out over own
same she should so some such than that the their them then there these they this those through to too under until up
very was we were what when where which while who whom why will with would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_TEXT.split())

# More of a caption no tokenizer takes in, and a change of each tenth word costs the square of their number.
MOST_CHARACTERS = 20_000

Operation = Callable[[list[str], random.Random], list[str]]


class EasyDataAugmentation:
    """Changes a caption by one of EDA's operations: random swap, deletion, insertion, synonym replacement.

    The operation is drawn for each caption; where it changes nothing, another is. Words are what whitespace separates:
    a caption in a script without spaces is one word. Without WordNet there is no synonym replacement, and insertion,
    which in the paper inserts a synonym of some word of the caption, inserts a word of the caption itself.
    """

    def __init__(self, rate: float, synonyms: bool = False):
        """rate: share of the words that change (at least one), 0 for none. synonyms: use WordNet.

        Raises ValueError if WordNet is asked for and nltk or its data is missing; nothing is downloaded.
        """
        require(0 <= rate <= 1, "views.eda_rate", rate, "a share from 0 to 1")
        if synonyms:
            _require_wordnet()
        self._rate = rate
        self._synonyms = synonyms

    def __call__(self, text: str, seed: int) -> str:
        """The changed caption, never without a word. What cannot change (no words, rate 0) comes back as it is."""
        words = text[:MOST_CHARACTERS].split()
        if not words or self._rate == 0:
            return text
        generator = random.Random(seed)
        operations: list[Operation] = [self._swap, self._delete, self._insert]
        if self._synonyms:
            operations.append(self._replace)
        for operation in generator.sample(operations, len(operations)):
            changed = operation(words, generator)
            if changed != words:
                return " ".join(changed)
        return text

    def _changes(self, words: list[str]) -> int:
        return max(1, int(self._rate * len(words)))

    def _swap(self, words: list[str], generator: random.Random) -> list[str]:
        """Two words change places, several times; the words stay the same, their order does not."""
        if len(words) == 1:
            return words
        swapped = list(words)
        for _ in range(self._changes(words)):
            first, second = generator.sample(range(len(words)), 2)
            swapped[first], swapped[second] = swapped[second], swapped[first]
        return swapped

    def _delete(self, words: list[str], generator: random.Random) -> list[str]:
        """Each word goes with probability rate; at least one goes and at least one stays."""
        if len(words) == 1:
            return words
        kept = [position for position in range(len(words)) if generator.random() >= self._rate]
        if len(kept) == len(words):
            del kept[generator.randrange(len(words))]
        if not kept:
            kept = [generator.randrange(len(words))]
        return [words[position] for position in kept]

    def _insert(self, words: list[str], generator: random.Random) -> list[str]:
        """Words are inserted at random places: synonyms with WordNet, otherwise words of the caption."""
        inserted = list(words)
        for _ in range(self._changes(words)):
            if self._synonyms:
                replaceable = [(word, found) for word in words if (found := wordnet_synonyms(word))]
                if not replaceable:
                    return words
                new = generator.choice(generator.choice(replaceable)[1])
            else:
                new = generator.choice(words)
            inserted.insert(generator.randint(0, len(inserted)), new)
        return inserted

    def _replace(self, words: list[str], generator: random.Random) -> list[str]:
        """Words that have synonyms give way to one of them, everywhere they occur."""
        replaced = list(words)
        candidates = sorted({word for word in words if wordnet_synonyms(word)})
        for old in generator.sample(candidates, min(self._changes(words), len(candidates))):
            new = generator.choice(wordnet_synonyms(old))
            replaced = [new if word == old else word for word in replaced]
        return replaced


def wordnet_synonyms(word: str) -> list[str]:
    """WordNet's synonyms of a word, sorted, with the punctuation around the word kept around each of them.

    Empty for function words and for words that WordNet does not know.
    """
    from nltk.corpus import wordnet

    before, core, after = re.fullmatch(r"(\W*)(.*?)(\W*)", word, flags=re.DOTALL).groups()
    core = core.lower()
    if not core or core in FUNCTION_WORDS:
        return []
    names = {lemma.replace("_", " ") for synset in wordnet.synsets(core) for lemma in synset.lemma_names()}
    return [before + name + after for name in sorted(names) if name.lower() != core]


def _require_wordnet() -> None:
    try:
        import nltk
        from nltk.corpus import wordnet
    except ImportError:
        refuse("views.eda_synonyms", True, "nltk is missing: pip install 'modstruct[synonyms]', or set it to false")
    try:
        wordnet.ensure_loaded()
    except LookupError:
        refuse(
            "views.eda_synonyms",
            True,
            f"WordNet's data is missing: python -m nltk.downloader wordnet (searched: {', '.join(nltk.data.path)}), "
            "or set it to false",
        )
