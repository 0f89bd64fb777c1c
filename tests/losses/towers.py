"""Outputs as a two-tower model would make them, drawn at random, for the tests of the losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from modstruct.embeddings import Outputs

NAMES = (
    "image",
    "text",
    "image_augmented",
    "text_augmented",
    "image_independent",
    "text_independent",
    "image_independent_augmented",
    "text_independent_augmented",
)


def random_embeddings(pairs: int, width: int, seed: int, scale: float = 14.0) -> Outputs:
    """All eight embeddings, float64, unit norm; augmented ones near the plain ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(pairs, width, dtype=torch.float64, generator=generator)

    rows = {name: draw() for name in NAMES}
    for name in NAMES:
        if name.endswith("_augmented"):
            rows[name] = rows[name.removesuffix("_augmented")] + 0.3 * rows[name]
    rows = {name: normalize(z) for name, z in rows.items()}
    return dict(**rows, logit_scale=torch.tensor([scale], dtype=torch.float64))


def transformed(embeddings: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """`change` done to each of the eight embeddings."""
    return replace(embeddings, **{name: change(getattr(embeddings, name)) for name in NAMES})


def modalities_exchanged(embeddings: Outputs) -> Outputs:
    swap = {"image": "text", "text": "image"}
    renamed = {name: "_".join([swap[name.split("_")[0]], *name.split("_")[1:]]) for name in NAMES}
    return replace(embeddings, **{name: getattr(embeddings, other) for name, other in renamed.items()})


def value_and_gradients(function: Callable[[Outputs], Tensor], embeddings: Outputs) -> dict[str, Tensor]:
    """The value, and its gradient with respect to every embedding (0 where it is not used) and the logit scale."""
    names = (*NAMES, "logit_scale")
    leaves = {name: getattr(embeddings, name).detach().clone().requires_grad_() for name in names}
    value = function(dict(**leaves))
    gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return {"value": value.detach(), **dict(zip(names, gradients, strict=True))}


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
