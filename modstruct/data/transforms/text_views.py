"""Random views of captions: easy data augmentation (EDA, Wei & Zou 2019), and masked tokens for language modelling."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from modstruct.data.tokenizers import Tokenizer
from modstruct.errors import refuse, require

# Words that EDA never replaces: they carry grammar, and WordNet has odd senses of them ("in": inch, "a": ampere).
_FUNCTION_WORDS_TEXT = """
a about above after again against all am an and any are as at be because been before being below between both but by
can could did do does doing down during each few for from further had has have having he her here hers him his how i
if in into is it its just me more most my near next no nor not now of off on once only or other our out over own
same she should so some such than that the their them then there these they this those through to too under until up
very was we were what when where which while who whom why will with would you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS_TEXT.split())

# No tokenizer reads more of a caption, and changing every tenth word costs the square of their number.
MOST_CHARACTERS = 20_000

IGNORED = -100
"""Label of tokens that are not predicted; what torch's cross entropy leaves out."""
MASKED, REPLACED = 0.8, 0.1  # of the chosen tokens; the others stay (Devlin et al. 2019, section 3.1)

Operation = Callable[[list[str], random.Random], list[str]]


class EasyDataAugmentation:
    """Changes a caption by one of EDA's operations: random swap, deletion, insertion, synonym replacement.

    The operation is drawn for each caption; where it changes nothing, another is drawn. Words are separated by
    whitespace: a caption in a script without spaces is one word. Without WordNet there is no synonym replacement, and
    insertion, which in the paper inserts a synonym of some word of the caption, inserts a word of the caption itself.
    """

    def __init__(self, rate: float, synonyms: bool = False):
        """rate: fraction of the words that change (at least one), 0 for none. synonyms: use WordNet.

        Raises ValueError if WordNet is needed and nltk or its data is missing; nothing is downloaded.
        """
        require(0 <= rate <= 1, "views.eda_rate", rate, "a share from 0 to 1")
        if synonyms:
            _require_wordnet()
        self._rate = rate
        self._synonyms = synonyms

    def __call__(self, text: str, seed: int) -> str:
        """The changed caption, never empty. A caption without words, or with rate 0, is returned unchanged."""
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
        """Two words change places, several times."""
        if len(words) == 1:
            return words
        swapped = list(words)
        for _ in range(self._changes(words)):
            first, second = generator.sample(range(len(words)), 2)
            swapped[first], swapped[second] = swapped[second], swapped[first]
        return swapped

    def _delete(self, words: list[str], generator: random.Random) -> list[str]:
        """Each word is deleted with probability rate; at least one is deleted and at least one stays."""
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
        """Words are replaced by one of their synonyms, everywhere they occur."""
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

    match = re.fullmatch(r"(\W*)(.*?)(\W*)", word, flags=re.DOTALL)
    assert match is not None, "any text matches"
    before, core, after = match.groups()
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


def mask_tokens(ids: Tensor, seeds: Sequence[int], rate: float, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Captions (B, L) with some tokens masked, and the labels (B, L): the true id where one was chosen, else IGNORED.

    Each token but the start and padding is chosen with probability `rate`, as in ALBEF's code; of the chosen, 80 %
    become the mask token, 10 % any id of the vocabulary, 10 % stay. seeds: one for each caption.
    """
    tokens = ids.numpy()
    length = tokens.shape[1]
    draws = _uniform(np.array(seeds, dtype=np.uint64)[:, None], 3 * length).reshape(len(tokens), 3, length)
    chosen = (draws[:, 0] < rate) & (tokens != tokenizer.padding_id)
    chosen[:, 0] = False
    kind = draws[:, 1]
    other = np.minimum((draws[:, 2] * tokenizer.vocab_size).astype(np.int64), tokenizer.vocab_size - 1)
    masked = np.where(chosen & (kind < MASKED), tokenizer.mask_id, tokens)
    masked = np.where(chosen & (kind >= MASKED) & (kind < MASKED + REPLACED), other, masked)
    return torch.from_numpy(masked), torch.from_numpy(np.where(chosen, tokens, IGNORED))


def masked_places(labels: Tensor) -> Tensor:
    """Row and column of every masked token, (M, 2), row by row, of labels (B, L). Waits for the GPU."""
    return (labels != IGNORED).nonzero()


def _uniform(seeds: np.ndarray, count: int) -> np.ndarray:
    """(B, count) numbers in [0, 1) that depend on the seeds (B, 1) alone: splitmix64 (Steele et al. 2014)."""
    state = seeds + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
