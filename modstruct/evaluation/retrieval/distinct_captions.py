"""Equal captions as one text with several images, so that none of them counts as a wrong answer for another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

DIGEST = np.dtype([("high", np.uint64), ("low", np.uint64)])


class DistinctCaptions:
    """Text rows and pairs of captions that come image by image; keeps 24 bytes a caption, not the texts.

    Texts are told apart by 128 bits of BLAKE2b: of 10^9 texts, two would share them once in 10^20 sets.
    """

    def __init__(self):
        self._digests: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []

    def add(self, captions: Iterable[Sequence[str]]) -> None:
        """The captions of each of the next images."""
        captions = list(captions)
        texts = (text.encode(errors="surrogatepass") for of_image in captions for text in of_image)
        digests = b"".join(hashlib.blake2b(text, digest_size=DIGEST.itemsize).digest() for text in texts)
        self._digests.append(np.frombuffer(digests, dtype=DIGEST))
        self._counts.append(np.array([len(of_image) for of_image in captions], dtype=np.int64))

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Places and pairs.

        places: (m,) int64, the place, among all captions added, at which each distinct one came first, in this order.
        pairs: (p, 2) int64, (image, text row) of each image and each of its captions, sorted, without repetition.
        """
        digests = np.concatenate([np.empty(0, dtype=DIGEST), *self._digests])
        counts = np.concatenate([np.empty(0, dtype=np.int64), *self._counts])
        _, first, distinct = np.unique(digests, return_index=True, return_inverse=True)
        order = np.argsort(first)
        row = np.empty(len(first), dtype=np.int64)
        row[order] = np.arange(len(first))
        pairs = np.stack([np.repeat(np.arange(len(counts)), counts), row[distinct.reshape(-1)]], axis=1)
        return first[order].astype(np.int64), np.unique(pairs, axis=0).reshape(-1, 2).astype(np.int64)


def at_places(texts: Iterable[str], places: np.ndarray) -> Iterator[str]:
    """Of texts one after the other those at places, which rise."""
    wanted = iter(places.tolist())
    place = next(wanted, None)
    for number, text in enumerate(texts):
        if number == place:
            yield text
            place = next(wanted, None)
