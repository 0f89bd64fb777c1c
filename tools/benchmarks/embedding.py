"""Embedding beside a loop that only calls the loader and the model, on one process.

python tools/benchmarks/embedding.py                                         # photographs, made for it; a tiny ViT
python tools/benchmarks/embedding.py --shards '…' --open_clip ViT-B-32       # yours, with random weights

The loop reads the same batches with the same loader processes, gives them to the model, and drops what it gives. Rounds
alternate, so that a busy machine slows all alike; a ratio is the median over rounds of loop / embedding: on the wall,
and, where no loader process has a part in it (--workers 0), in processor time. Writes JSON to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))

from modstruct import distributed
from modstruct.config import DataConfig, Source
from modstruct.config.training import EmbeddingConfig
from modstruct.data.shards.evaluation_samples import EvaluationSamples, evaluation_loader
from modstruct.evaluation.embeddings.embed import embed
from modstruct.evaluation.embeddings.model import EmbeddingModel
from modstruct.evaluation.embeddings.open_clip_model import open_clip_model
from modstruct.evaluation.embeddings.source import EmbeddingSource
from tools.benchmarks.loader import write_photographs

TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="Image-text shards; by default photographs are made.")
    parser.add_argument("--images", type=int, default=512, help="Photographs to make (default: %(default)s).")
    parser.add_argument("--open_clip", help="An architecture, with random weights; by default a tiny one.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1, help="Loader processes (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    for name, ratios in results["ratios"].items():
        print(f"{name}: " + ", ".join(f"{ratio:.3f} of the loop's speed ({clock})" for clock, ratio in ratios.items()))
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


def measure(options: argparse.Namespace, folder: Path) -> dict:
    import open_clip

    if options.open_clip is None:
        (folder / "tiny.json").write_text(json.dumps(TINY))
        open_clip.add_model_config(folder / "tiny.json")
    model = open_clip_model(options.open_clip or "tiny", random_weights=True)
    shards = options.shards or str(write_photographs(folder, options.images))
    samples = EvaluationSamples([Source(shards)], DataConfig(cache=str(folder / "cache"), workers=options.workers))
    source = EmbeddingSource.of_samples("photographs", samples)
    config = EmbeddingConfig(batch=options.batch, workers=options.workers)
    numbers = iter(range(10**9))
    forms: dict[str, Callable[[], object]] = {
        "loop": lambda: loop(model, samples, options),
        "in memory": lambda: embed(model, source, config),
        "in a folder": lambda: embed(model, source, config, folder / str(next(numbers)) / source.name),
    }
    clocks = {"wall": time.perf_counter} | ({"processor": time.process_time} if options.workers == 0 else {})
    seconds: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in clocks} for name in forms}
    loop(model, samples, options)  # what the first round alone would pay
    for _ in tqdm(range(options.rounds), desc="rounds", leave=False):
        for name, form in forms.items():
            started = {clock: now() for clock, now in clocks.items()}
            form()
            for clock, now in clocks.items():
                seconds[name][clock].append(now() - started[clock])
    ratios = {
        name: {
            clock: statistics.median(bare / own for bare, own in zip(seconds["loop"][clock], found, strict=True))
            for clock, found in of_form.items()
        }
        for name, of_form in seconds.items()
        if name != "loop"
    }
    return {"images": len(samples), "device": str(distributed.device()), "seconds": seconds, "ratios": ratios}


@torch.no_grad()
def loop(model: EmbeddingModel, samples: EvaluationSamples, options: argparse.Namespace) -> None:
    """Images, and then each caption, through loader and model."""
    device, captions = distributed.device(), dict[str, None]()
    for batch in evaluation_loader(samples, model.views, options.batch, workers=options.workers):
        model.encode({"image": batch.image.to(device)})["image"].cpu()
        captions |= dict.fromkeys(caption for of_image in batch.captions for caption in of_image)
    texts = list(captions)
    for first in range(0, len(texts), options.batch):
        model.encode({"text": model.tokenize(texts[first : first + options.batch]).to(device)})["text"].cpu()


if __name__ == "__main__":
    main()
