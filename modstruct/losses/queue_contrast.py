"""Image-text contrast of the fusion model: embeddings against EMA embeddings and queues of them (ALBEF's ITC)."""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct.config import QueueContrastConfig
from modstruct.embeddings import Outputs
from modstruct.losses.distillation import ramped
from modstruct.losses.protocol import GlobalBatch, Loss, LossSettings, Sums
from modstruct.pairwise.contrast import row_contrast_sum


class QueueContrast(Loss):
    """L_ITC of Li et al. 2021, equations 1 and 6: 1/2 (image to text + text to image), over the global batch.

    With `in_modal`: 1/4 (… + image to image + text to text), as in TCL (Yang et al. 2022, section 3.2), whose EMA
    encoders read a second view.

      image to text:  -1/N sum_j sum_k T_jk log softmax_k(s <zV_j, c_k>),  c = [zT_m of the global batch; text queue]
      T_j = alpha softmax_k(s <zV_m_j, c_k>) + (1 - alpha) U_j

    and the other way round; image to image takes the image queue and columns zV_m, and T_j = U_j. U_j is one at pair j,
    or, with `positives: image`, spread evenly over all columns of the same image (as ALBEF's retrieval fine-tuning has
    it).
    """

    needs = frozenset(
        {"image", "text", "logit_scale", "image_augmented", "text_augmented", "image_queue", "text_queue"}
        | {"pair_ids", "queue_ids"}
    )
    compares = True

    def __init__(self, config: QueueContrastConfig, settings: LossSettings):
        self.precision = settings.precision
        self.alpha = config.alpha
        self.ramp_steps = settings.epoch_steps if config.ramp_steps is None else config.ramp_steps
        self.by_image = config.positives != "pair"
        modalities = ("image", "text")
        self.ways = [(of, to) for of in modalities for to in modalities if of != to or config.in_modal]

    def columns(self, pairs: int, dimension: int) -> frozenset[str]:
        return frozenset({"image_augmented", "text_augmented"} | ({"pair_ids"} if self.by_image else set()))

    def partial(self, rows: Outputs, batch: GlobalBatch) -> Sums:
        alpha = ramped(self.alpha, batch.step, self.ramp_steps)
        scale = rows["logit_scale"]

        def one_way(of: str, to: str) -> Tensor:
            x, x_ema, soft = rows[of], rows[f"{of}_augmented"].detach(), alpha if of != to else 0.0
            columns = torch.cat([batch.columns[f"{to}_augmented"].detach(), rows[f"{to}_queue"]])
            total = row_contrast_sum(x, x_ema, columns, scale, batch.first, soft, self.precision)
            if not self.by_image:
                return total
            # Of the cross entropy, U enters through <z_j, sum_k U_jk c_k> alone: move it from the pair to the mean.
            ids = torch.cat([batch.columns["pair_ids"], rows["queue_ids"]])
            shift = rows[f"{to}_augmented"].detach() - mean_of_same(columns, ids, rows["pair_ids"])
            return total + ((1 - soft) * scale * (x * shift).sum(1).sum()).squeeze()

        return {f"{of}_to_{to}": one_way(of, to) for of, to in self.ways}

    def value(self, sums: Sums, batch: GlobalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its two or four terms, of which it is the mean."""
        terms = {name: total / batch.pairs for name, total in sums.items()}
        return torch.stack(list(terms.values())).mean(), terms


def mean_of_same(columns: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
    """Mean of the columns (M, D) whose id is wanted[j], for each j, (B, D). ids: (M,). Every wanted id occurs."""
    ids, order = ids.sort(stable=True)
    # Equal ids stand together and have one number. As many places as columns, whatever the ids: how many distinct ones
    # there are, a GPU would have to be waited for.
    numbers = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).cumsum(0)])
    sums = torch.zeros_like(columns).index_put_((numbers,), columns[order], accumulate=True)
    counts = columns.new_zeros(len(columns)).index_put_((numbers,), columns.new_ones(len(columns)), accumulate=True)
    found = numbers[torch.searchsorted(ids, wanted)]
    return sums[found] / counts[found][:, None]
