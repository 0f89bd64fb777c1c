"""Geometric consistency in open_clip's own training loop, which has no augmented views:

python docs/examples/open_clip_loop.py
"""

import logging
from types import SimpleNamespace

import torch
from open_clip.model import CLIP
from open_clip_train.train import train_one_epoch
from torch import nn

import modstruct

PAIRS, BATCHES = 32, 10
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}


class StructureLoss(nn.Module):
    """Stands in for open_clip.ClipLoss: what open_clip_train.main calls `loss`."""

    def __init__(self):
        super().__init__()
        options = {"contrastive.in_modal": False, "geometry.augmented": False}  # the plain views alone
        self.objective = modstruct.objective("gc", options)
        self.step = 0

    def forward(self, image_features, text_features, logit_scale, output_dict=True):
        rows = {"image": image_features, "text": text_features, "logit_scale": logit_scale.reshape(1)}
        total, _ = self.objective(rows, self.step)
        self.step += 1
        return {"structure_loss": total}


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    model = CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, output_dict=True)
    batches = [(torch.randn(PAIRS, 3, 32, 32), torch.randint(1, 99, (PAIRS, 8))) for _ in range(2)] * (BATCHES // 2)
    loader = Batches(batches)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
    options = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True, grad_clip_norm=None,
        horovod=False, rank=0, local_rank=0, world_size=1, log_every_n_steps=1, batch_size=PAIRS, log_local=False,
        wandb=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_one_epoch(model, data, StructureLoss(), 0, optimizer, None, None, None, options)


class Batches(list):
    """As many batches as a loader of open_clip has."""

    @property
    def num_batches(self):
        return len(self)

    @property
    def num_samples(self):
        return PAIRS * len(self)


if __name__ == "__main__":
    main()
