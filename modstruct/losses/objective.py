"""The training objective: the weighted sum of the losses that a recipe turns on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import LossesConfig
from modstruct.embeddings import EMBEDDINGS, Outputs
from modstruct.errors import refuse, require
from modstruct.losses.alignment import Alignment
from modstruct.losses.bridge import Bridge
from modstruct.losses.contrastive import Contrastive
from modstruct.losses.geometry import Geometry
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, SharedScalar, Sums
from modstruct.losses.queue_contrast import QueueContrast
from modstruct.losses.row_losses import MaskedLanguage, Matching
from modstruct.losses.separation import Separation
from modstruct.losses.sigmoid import Sigmoid
from modstruct.pairwise.global_batch import checked_number, require_same_shape

UNIT_NORM_TOLERANCE = 0.05  # of half precision, too

LOSSES = {  # by the name of their section in the recipe
    "contrastive": Contrastive,
    "separation": Separation,
    "bridge": Bridge,
    "geometry": Geometry,
    "sigmoid": Sigmoid,
    "alignment": Alignment,
    "queue_contrast": QueueContrast,
    "matching": Matching,
    "masked_language": MaskedLanguage,
}
Terms = dict[str, Tensor]
"""Unweighted value of each loss and of its components, without gradient, as `geometry` and `geometry/per_pair`."""


def build_objective(config: LossesConfig, settings: LossSettings | None = None) -> Objective:
    """Of the losses whose weight in the recipe is above 0."""
    weights = {name: getattr(config, name).weight for name in LOSSES}
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    made = {name: LOSSES[name](getattr(config, name), settings or LossSettings()) for name in weights}
    return Objective(made, weights)


class Objective:
    """Sum of weight x loss.

    views: the augmented views that the losses need, out of {"image_augmented", "text_augmented"}.
    independent: whether they need the independent embeddings, and so their heads.
    scalars: learnt numbers that the model must own.
    row_losses: names of those that are means over labelled rows.
    comparing: names of those that compare the pairs of a batch with each other.
    """

    def __init__(self, losses: Mapping[str, Loss], weights: Mapping[str, float]):
        self.losses, self.weights = losses, weights
        needs = frozenset[str]().union(*(loss.needs for loss in losses.values()))
        self.views = frozenset(name.split("_")[0] + "_augmented" for name in needs if name.endswith("_augmented"))
        self.independent = any("independent" in name for name in needs)
        self.scalars: tuple[SharedScalar, ...] = tuple(s for loss in losses.values() for s in loss.scalars)
        self.numbers = {"logit_scale", *(scalar.name for scalar in self.scalars)}
        self.row_losses = frozenset(name for name, loss in losses.items() if loss.row_labels is not None)
        self.comparing = [name for name, loss in losses.items() if loss.compares]
        self.checked = False

    def require_pairs(self, global_batch: int) -> None:
        """Refuse a batch of a single pair for losses that compare pairs with each other."""
        named = ", ".join(f"losses.{name}" for name in self.comparing)
        remedy = f"at least 2, since of a single pair nothing is learnt by what compares the pairs of a batch ({named})"
        require(global_batch > 1 or not self.comparing, "train.global_batch", global_batch, remedy)

    def __call__(self, outputs: Outputs, step: int, without: frozenset[str] = frozenset()) -> tuple[Tensor, Terms]:
        """The objective of the global batch, a scalar with a gradient, and its terms; the same on every process.

        outputs: this process's rows; half precision is taken to float32, whatever autocast says. step: of the run,
        from 0, and None is as if it were missing. without: names of losses to leave out. Raises ValueError where an
        output that a loss needs is missing or its embeddings are not of one shape, and, at the first call only, where
        embeddings have no unit norm or the processes bring unlike numbers of rows; FailedElsewhere at that call where
        another process raises it (all wait for one another).
        """
        losses = {name: loss for name, loss in self.losses.items() if name not in without}
        outputs = {name: z for name, z in outputs.items() if z is not None}
        self._check(outputs, losses)
        with torch.autocast(distributed.device().type, enabled=False):
            rows = in_float32(outputs)
            for name in self.numbers & rows.keys() if "image" in rows else ():
                rows[name] = checked_number(rows["image"], **{name: rows[name]})
            batch = _global_batch(rows, losses, step)
            sums = _sum_over_processes({name: loss.partial(rows, batch) for name, loss in losses.items()})
            values = {name: loss.value(sums[name], batch) for name, loss in losses.items()}
        # Without any loss here, a zero that has a backward all the same.
        return self._weighted(values, rows["logit_scale"].sum() * 0 if not losses else None)

    def over_part(self, outputs: Outputs, step: int, counts: Mapping[str, Tensor]) -> tuple[Tensor, Terms]:
        """A micro-batch's part of the losses over rows, which adds up over micro-batches and processes.

        counts: by loss, the labelled rows of the global batch, as `row_counts` has them. Returns the weighted sum and
        the terms' parts.
        """
        with torch.autocast(distributed.device().type, enabled=False):
            rows = in_float32(outputs)
            batch = GlobalBatch({}, 0, 0, step, torch.float32)
            values = {}
            for name, count in counts.items():
                sums = self.losses[name].partial(rows, batch)
                values[name] = self.losses[name].value(sums | {"count": count}, batch)
        return self._weighted(values, None)

    def row_counts(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By loss over rows, the labelled rows of the global batch. batch: holds this process's labels."""
        labels = {name: self.losses[name].row_labels for name in self.row_losses}
        found = {name: (batch[of] >= 0).sum() for name, of in labels.items() if of is not None}
        return {name: distributed.sum_over_processes(count) for name, count in found.items()}

    def _weighted(
        self, values: Mapping[str, tuple[Tensor, dict[str, Tensor]]], total: Tensor | None
    ) -> tuple[Tensor, Terms]:
        terms = {}
        for name, (value, components) in values.items():
            weighted = self.weights[name] * value
            total = weighted if total is None else total + weighted
            terms[name] = value.detach()
            terms |= {f"{name}/{component}": term.detach() for component, term in components.items()}
        assert total is not None
        return total, terms

    def _check(self, outputs: Outputs, losses: Mapping[str, Loss]) -> None:
        if self.checked:
            _checked_embeddings(outputs, losses)
            return
        error = None
        try:
            for name, z in _checked_embeddings(outputs, losses).items():
                _require_unit_norm(name, z)
        except ValueError as refused:
            error = refused
        distributed.fail_together(error, str(error))  # or the others would wait in a gather
        if "image" in outputs:
            distributed.require_equal_rows(outputs["image"], "rows of embeddings.image")
        self.checked = True


def _checked_embeddings(outputs: Outputs, losses: Mapping[str, Loss]) -> Outputs:
    """The embeddings that the losses need, by their names in messages: there, (B, D) and of one shape."""
    for name, loss in losses.items():
        for needed in sorted(loss.needs - outputs.keys()):
            remedy = f"losses.{name} needs it: let the model make it, or set losses.{name}.weight to 0"
            refuse(f"embeddings.{needed}", None, remedy)
    for name, value in outputs.items():
        require(isinstance(value, Tensor), f"embeddings.{name}", type(value).__name__, "must be a tensor")
    needs = frozenset[str]().union(*(loss.needs for loss in losses.values()))
    rows = {f"embeddings.{name}": outputs[name] for name in sorted(needs & EMBEDDINGS)}
    for name, z in rows.items():
        matrix = z.dim() == 2 and z.numel() > 0 and z.is_floating_point()
        require(matrix, name, f"{z.dtype} {tuple(z.shape)}", "must be (B, D), B and D at least 1, floating point")
    if rows:
        require_same_shape(**rows)
    return rows


def _require_unit_norm(name: str, rows: Tensor) -> None:
    """Refuse embeddings (B, D) of another norm, of which some losses would be infinite or mean something else."""
    norms = torch.linalg.vector_norm(rows.detach().float(), dim=1)
    off = (norms - 1).abs() > UNIT_NORM_TOLERANCE  # NaN, which a step that is skipped reports, is none of this
    row = int(off.int().argmax())
    remedy = "must have unit norm: torch.nn.functional.normalize(rows, dim=1)"
    require(not bool(off[row]), name, f"norm {float(norms[row]):.3g} in row {row}", remedy)


def in_float32(outputs: Outputs) -> Outputs:
    """The same with half precision taken to float32, contiguous; float64 stays, for checks, and so do labels."""
    floating = {name: z for name, z in outputs.items() if z.is_floating_point()}
    widened = {name: z.to(torch.promote_types(z.dtype, torch.float32)).contiguous() for name, z in floating.items()}
    return outputs | widened


def _global_batch(rows: Outputs, losses: Mapping[str, Loss], step: int) -> GlobalBatch:
    """One gather of each modality's embeddings for all losses together."""
    if "image" not in rows:  # a downstream task's rows are not paired with one another
        return GlobalBatch({}, 0, 0, step, torch.float32)
    count, dimension = rows["image"].shape
    pairs = count * distributed.world_size()
    wanted = sorted(frozenset[str]().union(*(loss.columns(pairs, dimension) for loss in losses.values())))
    columns: dict[str, Tensor] = {}
    for modality in ("image", "text", "pair"):
        names = [name for name in wanted if name.startswith(modality)]
        if distributed.world_size() == 1 or len(names) < 2:
            columns |= {name: distributed.gather(rows[name]) for name in names}
            continue
        gathered = distributed.gather(torch.stack([rows[name] for name in names], dim=1))  # (N, names, D)
        for i, name in enumerate(names):
            of_all = gathered[:, i].contiguous()
            # Constants (EMA embeddings) stay constant beside others, or the losses would make gradients for nobody.
            columns[name] = of_all if rows[name].requires_grad else of_all.detach()
    return GlobalBatch(columns, count * distributed.rank(), pairs, step, rows["image"].dtype)


def _sum_over_processes(sums: dict[str, Sums]) -> dict[str, Sums]:
    """One reduction for the sums of all losses, in float64."""
    if distributed.world_size() == 1:
        return sums
    parts = [value for of_loss in sums.values() for value in of_loss.values()]
    if not parts:
        return sums
    total = distributed.all_sum(torch.cat([part.double().reshape(-1) for part in parts]))
    summed = iter(total.split([part.numel() for part in parts]))
    return {
        name: {key: next(summed).view(value.shape).to(value.dtype) for key, value in of_loss.items()}
        for name, of_loss in sums.items()
    }
