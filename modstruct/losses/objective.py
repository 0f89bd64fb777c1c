"""The training objective: the weighted sum of the losses that a recipe turns on."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import FUSION_LOSSES, LossesConfig, Precision
from modstruct.embeddings import Embeddings, FusionOutputs
from modstruct.errors import require
from modstruct.losses.bridge import Bridge
from modstruct.losses.contrastive import Contrastive
from modstruct.losses.geometry import Geometry
from modstruct.losses.masked_language import MaskedLanguage
from modstruct.losses.matching import Matching
from modstruct.losses.queue_contrast import QueueContrast
from modstruct.losses.separation import Separation

# By the name of their section in the recipe. A loss is made from that section and the precision, names the
# embeddings it needs, and maps (embeddings, step, seed) to its value and its named components. A new one is a file, a
# line here, a section there.
LOSSES = {
    "contrastive": Contrastive,
    "separation": Separation,
    "bridge": Bridge,
    "geometry": Geometry,
    "queue_contrast": QueueContrast,
    "matching": Matching,
    "masked_language": MaskedLanguage,
}


class Objective:
    """Sum of weight x loss over the losses whose weight is above 0; the others are not computed.

    views: the augmented views that those losses need, out of {"image_augmented", "text_augmented"}.
    independent: whether they need the independent embeddings, and so their heads.
    epoch_steps: length of an epoch, over which the distillation of the fusion model's losses rises by default.
    """

    def __init__(self, config: LossesConfig, precision: Precision = "float32", epoch_steps: int = 0):
        sections = {name: getattr(config, name) for name in LOSSES}
        self.weights = {name: section.weight for name, section in sections.items() if section.weight > 0}
        more = {name: {"epoch_steps": epoch_steps} if name in FUSION_LOSSES else {} for name in self.weights}
        self.losses = {name: LOSSES[name](sections[name], precision, **more[name]) for name in self.weights}
        needs = frozenset().union(*(loss.needs for loss in self.losses.values()))
        self.views = frozenset(name.split("_")[0] + "_augmented" for name in needs if name.endswith("_augmented"))
        self.independent = any("independent" in name for name in needs)
        self.rows_agree = False

    def __call__(
        self, embeddings: Embeddings, step: int, seed: int, pairs_only: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective of the global batch and its terms.

        embeddings: this process's rows; half precision is taken to float32, whatever autocast says.
        step, seed: what random draws depend on, the same on every process. pairs_only: without the losses that are
        means over rows, which `over_rows` makes. Returns the weighted sum, a scalar with a gradient, and each loss's
        unweighted value and components, scalars without one, under names such as `geometry` and `geometry/per_pair`.
        All are the same on every process. Raises ValueError where an embedding that a loss needs is missing, and, on
        every process, where the processes do not bring the same number of rows (asked at the first call only: it makes
        the processes wait for each other).
        """
        losses = {name: loss for name, loss in self.losses.items() if not (pairs_only and hasattr(loss, "over_rows"))}
        for name, loss in losses.items():
            for needed in sorted(loss.needs):
                remedy = f"losses.{name} needs it: let the model make it, or set losses.{name}.weight to 0"
                require(getattr(embeddings, needed) is not None, f"embeddings.{needed}", None, remedy)
        if not self.rows_agree:
            distributed.require_equal_rows(embeddings.image, "rows of embeddings.image")
            self.rows_agree = True
        # Without any loss here, a zero that can go backward all the same.
        total, terms = 0 if losses else embeddings.logit_scale.sum() * 0, {}
        with torch.autocast(embeddings.image.device.type, enabled=False):
            embeddings = _in_float32(embeddings)
            for name, loss in losses.items():
                value, components = loss(embeddings, step, seed)
                total = total + self.weights[name] * value
                terms[name] = value.detach()
                terms |= {f"{name}/{component}": term.detach() for component, term in components.items()}
        return total, terms

    def over_rows(
        self, outputs: FusionOutputs, step: int, counts: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's part of the losses that are means over rows, which adds up over micro-batches and processes.

        counts: by loss, the labelled rows of the global batch. Returns the weighted sum, and each loss's unweighted
        part and components by name.
        """
        total, terms = 0, {}
        with torch.autocast(outputs.image.device.type, enabled=False):
            outputs = _in_float32(outputs)
            for name, count in counts.items():
                value, components = self.losses[name].over_rows(outputs, step)
                total = total + self.weights[name] * value / count
                terms[name] = value.detach() / count
                terms |= {f"{name}/{component}": term.detach() / count for component, term in components.items()}
        return total, terms


def _in_float32(embeddings: Embeddings) -> Embeddings:
    """The same with half precision taken to float32; float64 stays, for checks, and so do labels."""
    given = {field.name: getattr(embeddings, field.name) for field in fields(embeddings)}
    floating = {name: z for name, z in given.items() if z is not None and z.is_floating_point()}
    widened = {name: z.to(torch.promote_types(z.dtype, torch.float32)) for name, z in floating.items()}
    return replace(embeddings, **widened)
