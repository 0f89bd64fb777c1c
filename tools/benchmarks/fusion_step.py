"""Where the time of a step of fusion pre-training goes: towers, fusion encoder, EMA model, losses.

python tools/benchmarks/fusion_step.py --recipe albef_scenes                     # a minute on two cores

Each part runs forward and backward by itself, on what the parts before it made, and the whole step beside them; parts
take turns, and medians are shown. The fusion encoder sees four times the batch: the pairs, two wrong ones of each, and
the masked captions. Left out: the optimizer, reading, and the processes' collectives.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.cli import parse, recipe_parser
from modstruct.config import Recipe
from modstruct.data.tokenizers import ClipTokenizer
from modstruct.data.transforms.text_views import mask_tokens, masked_places
from modstruct.losses.objective import Objective, build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.models.fusion.pretraining import FusionModel


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="albef_scenes", help="Whose sizes to take (default: %(default)s).")
    parser.add_argument("--pairs", type=int, default=64, help="Pairs of a step (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds that medians are taken of (default: 7).")
    options, words = parser.parse_known_args(arguments)
    recipe, _ = parse(recipe_parser(__doc__, "%(prog)s"), ["--recipe", options.recipe, *words])
    seconds = measure(recipe, options.pairs, options.rounds)
    whole = seconds.pop("whole step")
    for name, value in seconds.items():
        print(f"{name:<22}{1000 * value:>9.1f} ms {100 * value / whole:>6.1f} %")
    print(f"{'whole step':<22}{1000 * whole:>9.1f} ms {options.pairs / whole:>8.1f} pairs/s")


def measure(recipe: Recipe, pairs: int, rounds: int) -> dict[str, float]:
    """Median seconds of each part and of the whole step."""
    tokenizer = ClipTokenizer(ClipTokenizer.shipped_model(), recipe.tokenizer.context_length)
    objective = build_objective(recipe.losses, LossSettings(recipe.train.pairwise_precision))
    model = FusionModel(recipe, tokenizer, objective).to(distributed.device()).train()
    model.ema_to(distributed.device())
    parts = parts_of(model, objective, batch_of(recipe, tokenizer, pairs))
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(rounds + 1):  # the first warms up
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if distributed.on_gpu():
                torch.cuda.synchronize()
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def batch_of(recipe: Recipe, tokenizer: ClipTokenizer, pairs: int) -> dict[str, Tensor]:
    """Noise for images, captions of twenty words, every pair another."""
    generator = torch.Generator().manual_seed(0)
    side = recipe.fusion.vision.image_size
    text = tokenizer(["a " * 20 + str(number) for number in range(pairs)])
    masked, labels = mask_tokens(text, list(range(pairs)), recipe.losses.masked_language.rate, tokenizer)
    batch = {
        "image": torch.randint(256, (pairs, 3, side, side), dtype=torch.uint8, generator=generator),
        "text": text,
        "text_masked": masked,
        "masked_labels": labels,
        "masked_places": masked_places(labels),
        **{name: torch.arange(pairs) for name in ("image_id", "text_id", "slot")},
    }
    return {name: rows.to(distributed.device()) for name, rows in batch.items()}


def parts_of(model: FusionModel, objective: Objective, batch: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """Each part as a function that runs it forward and, where it learns, backward."""
    backbone, mask = model.backbone, model.backbone.mask(batch["text"])
    with torch.no_grad():
        image, text = backbone.encode_image(batch["image"]), backbone.encode_text(batch["text"])
        made = model(batch)
    leaf_names = {name for name in made if name not in model.constants and made[name].is_floating_point()}

    def towers() -> None:
        both = torch.cat([batch["text"], batch["text_masked"]])
        (backbone.encode_image(batch["image"]).sum() + backbone.encode_text(both).sum()).backward()

    def fusion() -> None:
        tokens, seen = (rows.repeat(4, 1, 1).requires_grad_() for rows in (text, image))
        backbone.fuse(tokens, mask.repeat(4, 1), seen).sum().backward()

    def ema() -> None:
        model._ema_outputs(batch, model.masks)

    def losses() -> None:
        leaves = {n: v.detach().requires_grad_() if n in leaf_names else v for n, v in made.items()}
        objective(leaves, 0)[0].backward()

    def whole() -> None:
        objective(model(batch), 0)[0].backward()

    parts = {"towers": towers, "fusion": fusion, "EMA model": ema, "losses": losses, "whole step": whole}
    return {name: _cleared(model, part) for name, part in parts.items()}


def _cleared(model: FusionModel, part: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        part()

    return run


if __name__ == "__main__":
    main()
