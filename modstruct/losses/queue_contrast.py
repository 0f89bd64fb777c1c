"""Image-text contrast of the fusion model: embeddings against momentum embeddings and queues of them (ALBEF's ITC)."""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import Precision, QueueContrastConfig
from modstruct.embeddings import FusionOutputs
from modstruct.pairwise import soft_contrastive
from modstruct.pairwise.global_batch import global_mean


def ramped(alpha: float, step: int, ramp_steps: int) -> float:
    """alpha, risen in a straight line from 0 at step 0 (Li et al. 2021, code: over the first epoch)."""
    return alpha * min(1.0, step / ramp_steps) if ramp_steps > 0 else alpha


class QueueContrast:
    """L_ITC of Li et al. 2021, equations 1 and 6: 1/2 (image to text + text to image), over the global batch.

      image to text:  -1/N sum_j sum_k T_jk log softmax_k(s <zV_j, c_k>),  c = [zT_m of the global batch; text queue]
      T_j = alpha softmax_k(s <zV_m_j, c_k>) + (1 - alpha) U_j

    and the other way round. U_j is one at pair j, or, with `positives: image`, spread evenly over all columns of the
    same image (as ALBEF's retrieval fine-tuning has it). epoch_steps: steps over which alpha rises by default.
    """

    needs = frozenset({"image", "text", "image_augmented", "text_augmented", "image_queue", "text_queue"})

    def __init__(self, config: QueueContrastConfig, precision: Precision = "float32", epoch_steps: int = 0):
        self.precision = precision
        self.alpha = config.alpha
        self.ramp_steps = epoch_steps if config.ramp_steps is None else config.ramp_steps
        self.by_image = config.positives == "picture"

    def __call__(self, outputs: FusionOutputs, step: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the global batch, a scalar, and its two terms."""
        alpha = ramped(self.alpha, step, self.ramp_steps)
        o, scale = outputs, outputs.logit_scale

        def one_way(x: Tensor, x_momentum: Tensor, pairs: Tensor, queue: Tensor) -> Tensor:
            columns = torch.cat([distributed.gather(pairs.detach()), queue])
            loss = soft_contrastive(x, x_momentum.detach(), columns, scale, alpha, self.precision)
            if not self.by_image:
                return loss
            # Of the cross entropy, U enters through <z_j, sum_k U_jk c_k> alone: move it from the pair to the mean.
            ids = torch.cat([distributed.gather(o.pair_ids), o.queue_ids])
            shift = pairs.detach() - mean_of_same(columns, ids, o.pair_ids)
            return loss + (1 - alpha) * scale * global_mean((x * shift).sum(1))

        terms = {
            "image_to_text": one_way(o.image, o.image_augmented, o.text_augmented, o.text_queue),
            "text_to_image": one_way(o.text, o.text_augmented, o.image_augmented, o.image_queue),
        }
        # The scale has the same value as a scalar and as (1,).
        terms = {name: value.reshape(()) for name, value in terms.items()}
        return sum(terms.values()) / 2, terms


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
