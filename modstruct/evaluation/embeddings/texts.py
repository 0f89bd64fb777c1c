"""Texts in a file, read by place and tokenized by loader processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from modstruct.data.shards.workers import WorkerLoader, require_shared_memory

LONGEST_IDS_BYTES = 8 * 1024
"""Memory that a text's ids take at most in any model that there is, for the check of the shared memory."""


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file of one JSON text a line, one after the other."""
    with open(path, "rb") as file:
        yield from map(json.loads, file)


class TextLines:
    """A file of one JSON text a line as a sequence that is read where it is asked for; pickles to loader workers."""

    def __init__(self, path: Path):
        self.path = path
        self._starts: np.ndarray | None = None

    def texts(self, numbers: range) -> list[str]:
        """The texts of some consecutive lines."""
        if self._starts is None:  # 8 bytes a line, found once in each process
            with open(self.path, "rb") as file:
                self._starts = np.cumsum([0, *map(len, file)], dtype=np.int64)
        with open(self.path, "rb") as file:
            file.seek(self._starts[numbers.start])
            return [json.loads(file.readline()) for _ in numbers]


class TextList:
    """Texts in memory, with the interface of TextLines."""

    def __init__(self, texts: Sequence[str]):
        self._texts = texts

    def texts(self, numbers: range) -> list[str]:
        return list(self._texts[numbers.start : numbers.stop])


class _TokenBatches(Dataset):
    """Map from consecutive places to ids (B, L)."""

    def __init__(self, texts: TextLines | TextList, tokenize: Callable[[Sequence[str]], Tensor]):
        self._texts, self._tokenize = texts, tokenize

    def __getitem__(self, numbers: range) -> Tensor:
        return self._tokenize(self._texts.texts(numbers))


def token_loader(
    texts: TextLines | TextList,
    tokenize: Callable[[Sequence[str]], Tensor],
    batches: Sequence[range],
    workers: int,
) -> WorkerLoader:
    """Loader of the ids (B, L) of each batch of consecutive places."""
    workers = min(workers, len(batches))
    require_shared_memory(max(map(len, batches), default=0) * LONGEST_IDS_BYTES, workers)
    return WorkerLoader(_TokenBatches(texts, tokenize), batches, workers, pin_memory=False)
