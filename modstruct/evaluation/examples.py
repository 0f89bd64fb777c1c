"""Examples of a source for TensorBoard: images, their captions, and the captions retrieved for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modstruct.data.shards.evaluation_samples import EvaluationSamples
from modstruct.data.transforms.augment import Views
from modstruct.evaluation.embeddings.in_memory import EmbeddedSource
from modstruct.evaluation.example_grid import example_grid


def retrieved_examples(source: EmbeddedSource, samples: EvaluationSamples, views: Views, count: int) -> Tensor:
    """Draw `count` images spread evenly over the source, always the same ones, each with the caption nearest to it.

    For the main process, which holds the rows of `source`; `samples` and `views` are those that it was embedded with.
    Returns (3, H, W) uint8, as `example_grid` draws it.
    """
    rows = np.unique(np.linspace(0, len(source.image) - 1, min(count, len(source.image))).round().astype(np.int64))
    nearest = (source.image[rows] @ source.text.T).argmax(axis=1)
    own, found = [], []
    for row, text in zip(rows, nearest, strict=True):
        positives = source.pairs[source.pairs[:, 0] == row, 1]
        own.append(source.captions[text if text in positives else positives[0]])
        found.append(source.captions[text])
    pictures = [views.evaluation_image(samples[int(index)].picture) for index in source.indices[rows]]
    return example_grid(torch.stack(pictures), own, found)
