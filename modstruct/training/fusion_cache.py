"""The gradient cache of the fusion model: a large batch in the memory of a micro-batch, hard negatives included.

Embeddings go the way of gradient_cache.py. Matching and masked language modelling are means over rows, so each
micro-batch brings its part of them in the second pass. A hard negative may lie in another micro-batch or on another
process; its tokens would have to be kept with their graph, so its image or caption travels instead and is encoded
anew beside the rows that want it. The gradient is the same, a sum over all places where an image's tokens are used;
but for dropout, which is drawn twice for a negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.distributed import RowExchange
from modstruct.losses.objective import Objective
from modstruct.training.gradient_cache import Batch, CachedBatch, on_device


class CachedFusionBatch(CachedBatch):
    """Embeddings of a fusion model's batch in parts; `backward` adds the losses over rows."""

    shared = frozenset({"logit_scale", "image_queue", "text_queue", "queue_ids"})

    def __init__(self, engine, parts: list[Batch], objective: Objective, step: int):
        self.objective, self.step = objective, step
        self.constants = engine.module.constants
        super().__init__(engine, parts)
        by_row = [name for name in parts[0] if name != "masked_places"]  # these are places in a part
        self.batch = on_device({name: torch.cat([part[name] for part in parts]) for name in by_row})

    def embed_part(self, part: Batch) -> Batch:
        return self.engine(part, embed_only=True)

    def backward(self, total: Tensor) -> dict[str, Tensor]:
        """Gradients to the engine. Returns the losses over rows by name, unweighted, with their components."""
        drawn = self._draw_negatives()
        self.start_backward(total)  # meanwhile the exchange's splits come to the host
        negatives = self._exchange(*drawn) if drawn else {}
        counts = self._counts(negatives)
        sums: dict[str, Tensor] = {}
        with self.parts_again() as parts:
            for part, first, end in parts:
                wanted = {name: rows[first:end] for name, rows in negatives.items()}
                made = self.engine(part | wanted)
                rows, terms = self.objective.over_rows(self.engine.module.outputs(**made), self.step, counts)
                # As distributed.py has it: W times this process's share of the gradient of the global value.
                self.engine.backward(self.carrier(made, first, end) + distributed.world_size() * rows)
                for name, value in terms.items():
                    sums[name] = sums.get(name, 0) + value.detach()
        return {name: distributed.sum_over_processes(value) for name, value in sums.items()}

    def _draw_negatives(self) -> tuple[RowExchange, Tensor, RowExchange, Tensor] | None:
        model = self.engine.module
        return model.draw_negatives(self.leaves, self.batch) if model.matches else None

    def _exchange(self, pictures: RowExchange, has_image: Tensor, captions: RowExchange, has_caption: Tensor) -> Batch:
        """For every row a wrong image and a wrong caption, and whether there is one."""
        return {
            "wrong_image": pictures(self.batch["image"]),
            "wrong_text": captions(self.batch["text"]),
            "has_wrong_image": has_image,
            "has_wrong_text": has_caption,
        }

    def _counts(self, negatives: Batch) -> dict[str, Tensor]:
        """Rows of the global batch that each loss over rows is the mean of."""
        local = {}
        if negatives:
            found = torch.cat([negatives["has_wrong_image"], negatives["has_wrong_text"]])
            local["matching"] = len(found) // 2 + found.sum()
        if "masked_labels" in self.batch:
            local["masked_language"] = (self.batch["masked_labels"] >= 0).sum()
        return {name: distributed.sum_over_processes(count).clamp(min=1) for name, count in local.items()}
