"""Geometric consistency in a plain PyTorch trainer, on one process or several:

python docs/examples/plain_ddp.py
torchrun --nproc_per_node 2 docs/examples/plain_ddp.py
"""

import os

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import modstruct

PAIRS, STEPS = 64, 20


class Towers(nn.Module):
    """Any two towers: what counts is the dict of unit-norm embeddings that they return."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(32, 16), nn.Linear(24, 16)
        self.log_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, batch):
        embeddings = {name: F.normalize(getattr(self, name.split("_")[0])(rows), dim=1) for name, rows in batch.items()}
        return embeddings | {"logit_scale": self.log_scale.exp()}


def pairs_of_step(step):
    """64 made-up pairs, two views each; the same on every process."""
    generator = torch.Generator().manual_seed(step)
    image, text = torch.randn(PAIRS, 32, generator=generator), torch.randn(PAIRS, 24, generator=generator)
    text[:, :8] = image[:, :8]  # what both modalities know
    noise = {name: 0.1 * torch.randn(rows.shape, generator=generator) for name, rows in (("i", image), ("t", text))}
    return {"image": image, "text": text, "image_augmented": image + noise["i"], "text_augmented": text + noise["t"]}


def main():
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    model = Towers()
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
        model = DistributedDataParallel(model)
    losses = modstruct.objective("gc", {"geometry.weight": 0.25})  # losses.views says that it needs augmented views
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(STEPS):
        batch = {name: rows.chunk(world_size)[rank] for name, rows in pairs_of_step(step).items()}
        total, terms = losses(model(batch), step)  # of all 64 pairs, on every process
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if rank == 0 and (step + 1) % 10 == 0:
            named = "  ".join(f"{name} {term.item():.6f}" for name, term in terms.items())
            print(f"step {step + 1}: {total.item():.6f}  {named}")
    if world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
