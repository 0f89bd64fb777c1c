"""Outputs as a two-tower model would make them, drawn at random, for the tests of the losses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from modstruct.embeddings import Outputs
from modstruct.losses.objective import Objective
from modstruct.losses.protocol import Loss

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


class Made(dict):
    """Outputs whose keys are attributes too, to write formulas with."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def replace(embeddings: Outputs, **changes: Tensor | None) -> Made:
    """The same with other values; None takes one away."""
    return Made({name: value for name, value in (embeddings | changes).items() if value is not None})


def computed(loss: Loss, made: Outputs, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of one loss, and its components."""
    total, terms = Objective({"loss": loss}, {"loss": 1.0})(made, step)
    return total, {name.removeprefix("loss/"): term for name, term in terms.items() if name != "loss"}


def random_embeddings(pairs: int, width: int, seed: int, scale: float = 14.0) -> Made:
    """All eight embeddings, float64, unit norm; augmented ones near the plain ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(pairs, width, dtype=torch.float64, generator=generator)

    rows = {name: draw() for name in NAMES}
    for name in NAMES:
        if name.endswith("_augmented"):
            rows[name] = rows[name.removesuffix("_augmented")] + 0.3 * rows[name]
    rows = {name: normalize(z) for name, z in rows.items()}
    numbers = {"logit_scale": scale, "logit_bias": -5.0}
    return Made(rows | {name: torch.tensor([value], dtype=torch.float64) for name, value in numbers.items()})


def transformed(embeddings: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """`change` done to each of the eight embeddings."""
    return replace(embeddings, **{name: change(embeddings[name]) for name in NAMES})


def modalities_exchanged(embeddings: Outputs) -> Outputs:
    swap = {"image": "text", "text": "image"}
    renamed = {name: "_".join([swap[name.split("_")[0]], *name.split("_")[1:]]) for name in NAMES}
    return replace(embeddings, **{name: embeddings[other] for name, other in renamed.items()})


def value_and_gradients(function: Callable[[Outputs], Tensor], embeddings: Outputs) -> dict[str, Tensor]:
    """The value, and its gradient with respect to every embedding (0 where it is not used) and the scalars."""
    names = (*NAMES, "logit_scale", "logit_bias")
    leaves = {name: embeddings[name].detach().clone().requires_grad_() for name in names if name in embeddings}
    value = function(Made(leaves))
    gradients = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return {"value": value.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
