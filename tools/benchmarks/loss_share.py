"""The share of a training step that all losses together take, at ViT-B/32's sizes.

python tools/benchmarks/loss_share.py                       # two CPU cores: about 5 minutes
python tools/benchmarks/loss_share.py --device cuda --precision bf16

One process of many: --local_batch of its own pairs against --global_batch of all processes, whose rows are stand-ins;
the collectives are left out. All losses are on (contrastive with in-modal terms, separation, bridge, geometry), with
their gradients. The towers, of ViT-B/32's sizes, forward and backward over both views, are timed on --tower_batch pairs
at a time and counted for the local batch. Data, optimizer and communication would only lower the share.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from modstruct import distributed
from modstruct.config import BridgeConfig, ContrastiveConfig, GeometryConfig, LossesConfig, SeparationConfig
from modstruct.losses.objective import Objective, build_objective
from modstruct.losses.protocol import LossSettings

DIMENSION = 512
EVERYTHING = LossesConfig(
    contrastive=ContrastiveConfig(weight=1.0, in_modal=True),
    separation=SeparationConfig(weight=1.0),
    bridge=BridgeConfig(weight=1.0),
    geometry=GeometryConfig(weight=0.25),
)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    objective = build_objective(EVERYTHING, LossSettings(options.precision))
    with one_of_many(options.global_batch // options.local_batch, options.local_batch, device):
        losses = median_seconds(losses_step(objective, options.local_batch, device), options.rounds, device)
    towers = median_seconds(towers_step(options.tower_batch, device), options.rounds, device)
    towers *= options.local_batch / options.tower_batch
    print(f"{options.local_batch} pairs of a global batch of {options.global_batch:,}, D = {DIMENSION}, {device}")
    print(f"all losses, forward and backward   {losses:9.4f} s")
    print(f"towers of ViT-B/32's sizes         {towers:9.4f} s   (timed on {options.tower_batch} pairs at a time)")
    print(f"share of the losses                {losses / (losses + towers):9.2%}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="Where to measure.")
    parser.add_argument("--local_batch", type=int, default=256, help="Pairs of one process (default: %(default)s).")
    parser.add_argument("--global_batch", type=int, default=32_768, help="Pairs of all (default: %(default)s).")
    parser.add_argument(
        "--tower_batch", type=int, default=8, help="Pairs the towers are timed on (default: %(default)s)."
    )
    parser.add_argument(
        "--precision", default="tf32", choices=["float32", "tf32", "bf16"], help="Of the losses' products."
    )
    parser.add_argument("--rounds", type=int, default=5, help="Repetitions that the median is taken of (default: 5).")
    options = parser.parse_args(arguments)
    for name in ("local_batch", "tower_batch", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give at least 1")
    if options.global_batch % options.local_batch or options.global_batch < options.local_batch:
        parser.error(f"--global_batch {options.global_batch}: give a multiple of --local_batch {options.local_batch}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


@contextlib.contextmanager
def one_of_many(processes: int, local_batch: int, device: torch.device) -> Iterator[None]:
    """Lets the losses see this process as the first of `processes`; what the others bring are stand-ins."""

    others = normalize(torch.randn((processes - 1) * local_batch, DIMENSION, device=device), dim=1)

    def gather(rows: Tensor) -> Tensor:
        return torch.cat((rows, others if rows.ndim == 2 else others[:, None].expand(-1, rows.shape[1], -1)))

    with mock.patch.multiple(
        distributed,
        world_size=lambda: processes,
        gather=gather,
        all_sum=lambda values: values,
        max_over_processes=lambda values: values.clone(),
        sum_over_processes=lambda values: values.clone(),
        require_equal_rows=lambda rows, name: None,
    ):
        yield


def losses_step(objective: Objective, batch: int, device: torch.device) -> Callable[[], None]:
    names = sorted(frozenset().union(*(loss.needs for loss in objective.losses.values())) - {"logit_scale"})

    def step() -> None:
        made = {name: normalize(torch.randn(batch, DIMENSION, device=device), dim=1) for name in names}
        made["logit_scale"] = torch.tensor([20.0], device=device)
        total, _ = objective({name: z.requires_grad_() for name, z in made.items()}, step=0)
        total.backward()

    return step


def towers_step(batch: int, device: torch.device) -> Callable[[], None]:
    image = transformer(width=768, layers=12, heads=12).to(device)  # 49 patches of 32 x 32 pixels and a class token
    patches = nn.Conv2d(3, 768, kernel_size=32, stride=32).to(device)
    text = transformer(width=512, layers=12, heads=8).to(device)
    tokens = nn.Embedding(49_408, 512).to(device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            for _ in range(2):  # the plain and the augmented view
                images = torch.randn(batch, 3, 224, 224, device=device)
                embedded = patches(images).flatten(2).mT
                class_token = embedded.mean(1, keepdim=True)
                image(torch.cat((class_token, embedded), 1))[:, 0].sum().backward()
                text(tokens(torch.randint(49_408, (batch, 77), device=device)))[:, -1].sum().backward()

    return step


def transformer(width: int, layers: int, heads: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def median_seconds(step: Callable[[], None], rounds: int, device: torch.device) -> float:
    seconds = []
    for _ in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
