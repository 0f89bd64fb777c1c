"""This process's share of the parts: batches read, encoded and written; no collective until the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config.embedding import EmbeddingConfig
from modstruct.data.shards.evaluation_samples import EvaluationBatch, evaluation_loader
from modstruct.errors import require
from modstruct.evaluation.embeddings.model import EmbeddingModel
from modstruct.evaluation.embeddings.parts import Parts
from modstruct.evaluation.embeddings.source import EmbeddingSource
from modstruct.evaluation.embeddings.texts import TextLines, TextList, token_loader
from modstruct.evaluation.embeddings.together import Progress, apart

AUGMENTED = "image_augmented"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def embed_images(
    model: EmbeddingModel,
    source: EmbeddingSource,
    parts: Parts,
    missing: Sequence[int],
    config: EmbeddingConfig,
    arrays: Sequence[str],
) -> None:
    """Make the missing parts of a source's images, with all that is read beside them.

    Notes of a part: keys, captions, metadata of the images; faults, the [cause, where] of those left out. Its arrays
    beside the embeddings: indices, numbers of the images in the source; labels, where it has classes.
    """
    mine = _share(missing)
    ledger = source.ledger(config, distributed.rank())
    encoder = _Encoder(model, config, arrays)

    def work(progress: Progress) -> None:
        numbers = [number for part in mine for number in parts.numbers(part)]
        seed = config.seed if AUGMENTED in arrays else None
        # Parts are whole batches but for the source's last, so a loader of all of them cuts them where they end.
        loader = evaluation_loader(source.samples, model.views, config.batch, numbers, seed, config.workers)
        batches = iter(loader)
        for part in mine:
            made: list[dict[str, np.ndarray]] = []
            notes = {"keys": [], "captions": [], "metadata": [], "faults": []}
            for batch in islice(batches, len(parts.batches(part))):
                rows = {"indices": batch.indices.numpy()}
                if source.class_names:
                    rows["labels"] = source.labels_of(batch.metadata)
                made.append(rows | encoder.pictures(batch))
                for name, found in notes.items():
                    found += getattr(batch, name)
                ledger.add(batch.faults, batch.tried)
                # The others' may all be sound: only what no other can make good is too much already.
                ledger.check(ledger.bad, len(source.samples), fewest=1)
                progress.add(batch.tried)
            parts.write(part, _joined(made), notes)

    total = sum(len(parts.numbers(part)) for part in missing)
    apart(work, f"images of {source.name}", total, "picture")


def embed_texts(
    model: EmbeddingModel,
    texts: TextLines | TextList,
    parts: Parts,
    missing: Sequence[int],
    config: EmbeddingConfig,
    arrays: Sequence[str],
    title: str,
    dtype: str | None = None,
) -> None:
    """Make the missing parts of texts. dtype: of what is written, by default config.dtype."""
    mine = _share(missing)
    encoder = _Encoder(model, config, arrays, dtype)

    def work(progress: Progress) -> None:
        batches = [numbers for part in mine for numbers in parts.batches(part)]
        loader = iter(token_loader(texts, model.tokenize, batches, config.workers))
        for part in mine:
            made = []
            for ids in islice(loader, len(parts.batches(part))):
                made.append(encoder.encoded({"text": ids}))
                progress.add(len(ids))
            parts.write(part, _joined(made))

    apart(work, title, sum(len(parts.numbers(part)) for part in missing), "text")


class _Encoder:
    """The model's encode, in the precision asked for, to arrays of the kind that is written."""

    def __init__(self, model: EmbeddingModel, config: EmbeddingConfig, arrays: Sequence[str], dtype: str | None = None):
        self._encode, self._arrays = model.encode, frozenset(arrays)
        self._dtype = getattr(torch, dtype or config.dtype)
        self._precision, self._device = config.precision, distributed.device()
        fits = self._precision != "fp16" or self._device.type == "cuda"
        require(fits, "embedding.precision", self._precision, "needs a GPU; use fp32 or bf16")

    @torch.no_grad()
    def encoded(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """The arrays asked for of a batch of images or texts, (B, …) each."""
        with self._autocast():
            made = self._encode({name: inputs.to(self._device) for name, inputs in batch.items()})
        return {name: made[name].to(self._dtype).cpu().numpy() for name in made.keys() & self._arrays}

    def pictures(self, batch: EvaluationBatch) -> dict[str, np.ndarray]:
        """The same, augmented images included; nothing of a batch of which no image could be read."""
        if len(batch.indices) == 0:
            return {}
        made = self.encoded({"image": batch.image})
        if batch.image_augmented is not None:
            made[AUGMENTED] = self.encoded({"image": batch.image_augmented})["image"]
        return made

    def _autocast(self) -> AbstractContextManager:
        dtype = AUTOCAST.get(self._precision)
        return nullcontext() if dtype is None else torch.autocast(self._device.type, dtype)


def _share(missing: Sequence[int]) -> Sequence[int]:
    """This process's parts: every so many-th, so that all have equally many but for one."""
    return missing[distributed.rank() :: distributed.world_size()]


def _joined(made: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    names = {name for rows in made for name in rows}
    return {name: np.concatenate([rows[name] for rows in made if name in rows]) for name in sorted(names)}
