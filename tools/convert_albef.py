"""Convert the weights of a fusion model, pre-trained or fine-tuned, to ALBEF's names or from them.

python tools/convert_albef.py --to albef --weights runs/albef_scenes --out albef.pth
python tools/convert_albef.py --to ours --weights ALBEF.pth --out albef.safetensors

--weights is a run, a checkpoint, an export, or a file of weights by either names (ALBEF's of pre-training, retrieval,
VQA, SNLI-VE, text assignment and NLVR2 are known); nothing in it is unpickled. A recipe reads either file by
`--fusion.init FILE`, or `--init FILE` where it fine-tunes. ALBEF's code reads `albef.pth` where its settings say the
same sizes, also its BERT's `max_position_embeddings`: ours has as many as tokenizer.context_length. An export holds
neither momentum copies nor queue: the copies then start from the weights, and ALBEF's queue is to be left as it starts
(`load_state_dict(…, strict=False)`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from modstruct.cli import run_tool
from modstruct.config.migrations import is_fine_tuning
from modstruct.errors import require
from modstruct.files import atomic_write
from modstruct.models.fusion.initial_weights import read_everything, recipe_of
from modstruct.models.fusion.published import to_albef

ENDINGS = {"ours": ".safetensors", "albef": ".pth"}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, choices=sorted(ENDINGS), help="Whose names to write.")
    parser.add_argument("--weights", required=True, metavar="PATH", help="Run, checkpoint, export, or file of weights.")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="File to write: .safetensors for ours, .pth for ALBEF's.",
    )
    return parser.parse_args(arguments)


def convert(options: argparse.Namespace) -> None:
    """Read, rename, write. Raises ValueError naming the option that is wrong."""
    ending = ENDINGS[options.to]
    require(options.out.suffix == ending, "--out", str(options.out), f"must end in {ending}")
    require(not options.out.exists(), "--out", str(options.out), "is there already; delete it or name another file")
    require(options.out.parent.is_dir(), "--out", str(options.out), f"make the folder {options.out.parent} first")
    weights = read_everything(options.weights, "--weights")
    if options.to == "albef":
        recipe = recipe_of(options.weights)  # a file of weights has none
        weights = to_albef(weights, is_fine_tuning(recipe) if recipe else None)
    weights = {name: value.contiguous() for name, value in weights.items()}
    with atomic_write(options.out) as file:
        if options.to == "albef":
            torch.save({"model": weights}, file)
        else:
            file.write(save(weights))
    print(f"{len(weights)} tensors, {sum(value.numel() for value in weights.values()):,} numbers: {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run_tool(lambda: convert(parse(arguments)), (ValueError, OSError))


if __name__ == "__main__":
    sys.exit(main())
