"""Seconds of all metrics of a large set but the probes, by part, and of CLIP_benchmark's beside ours.

python tools/benchmarks/evaluation.py                       # 50,000 images, 1,000 classes, 25,000 captions, D = 512
python tools/benchmarks/evaluation.py --images 5000 --captions 5000 --rounds 1

The embeddings are drawn: captions near their images, class prompts near the images of the class. CLIP_benchmark's
zero-shot and retrieval functions (`pip install --no-deps clip-benchmark`) run on the same embeddings, through a model
and a loader that only hand them out, on the captioned images alone, since it takes every image to have captions.
Neither gives intervals there. Medians of --rounds, alternating; rows off by ties are named with both numbers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).parent))
from pairwise import machine, timed

from modstruct.evaluation.classification import zero_shot
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval import measure as retrieval
from modstruct.evaluation.structure import measure as structure

CPU = torch.device("cpu")
CAPTIONS_OF_AN_IMAGE = 5


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    made = drawn_set(options)
    print(f"{machine(CPU)}; {options.images:,} images, {options.captions:,} captions, {options.classes:,} classes")
    parts = {
        "retrieval": lambda: retrieval.measure(made, retrieval.RetrievalConfig()),
        "zero-shot": lambda: zero_shot.measure(made, zero_shot.ZeroShotConfig()),
        "structure": lambda: structure.measure(made, structure.StructureConfig()),
    }
    seconds = {name: timed(part, CPU) for name, part in parts.items()}
    print("\n".join(f"  {name:<10} {taken:6.1f} s, with intervals" for name, taken in seconds.items()))
    print(f"  together   {sum(seconds.values()):6.1f} s")
    try:
        compare_with_clip_benchmark(made, options)
    except ImportError as error:
        print(f"CLIP_benchmark is not here ({error}): nothing to compare with")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 50_000), ("captions", 25_000), ("classes", 1_000), ("dimension", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=3, help="Of the comparison.")
    options = parser.parse_args(arguments)
    if options.captions > CAPTIONS_OF_AN_IMAGE * options.images:
        parser.error(f"--captions {options.captions}: at most {CAPTIONS_OF_AN_IMAGE} an image")
    return options


def near(rows: Tensor, apart: float, seed: int) -> Tensor:
    """Unit rows at a distance of about `apart` from these."""
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed))
    return normalize(rows + apart * normalize(noise, dim=1), dim=1)


def drawn_set(options: argparse.Namespace) -> EmbeddedSet:
    centres = near(torch.zeros(options.classes, options.dimension), 1.0, seed=0)
    labels = torch.arange(options.images) % options.classes
    image = near(centres[labels], 3.0, seed=1)
    image_of = torch.arange(options.captions) // CAPTIONS_OF_AN_IMAGE
    return EmbeddedSet(
        "drawn",
        {"name": "drawn", "fingerprint": "drawn"},
        {"image": image.numpy(), "text": near(image[image_of], 5.0, seed=2).numpy()},
        pairs=torch.stack([image_of, torch.arange(options.captions)], dim=1).numpy(),
        labels=labels.numpy(),
        class_names=[f"class {n}" for n in range(options.classes)],
        templates=["a photo of a {}"],
        class_prompts=near(centres, 1.0, seed=3)[:, None].numpy(),
    )


class HandsOut:
    """CLIP_benchmark's model: what it is given to encode is the embedding."""

    def encode_image(self, rows: Tensor) -> Tensor:
        return rows

    encode_text = encode_image


class Loader:
    """CLIP_benchmark's loader: (images, labels), or (images, numbers of each one's captions)."""

    def __init__(self, made: EmbeddedSet, images: int, labelled: bool, size: int = 64):
        rows = torch.from_numpy(made.rows("image")[:images])
        given = torch.from_numpy(np.asarray(made.labels)) if labelled else range(CAPTIONS_OF_AN_IMAGE * images)
        step = 1 if labelled else CAPTIONS_OF_AN_IMAGE
        self.dataset = SimpleNamespace(classes=made.class_names)
        self._batches = [
            (rows[start : start + size], given[start * step : (start + size) * step])
            for start in range(0, images, size)
        ]
        if not labelled:
            self._batches = [(image, list(batched(numbers, step))) for image, numbers in self._batches]

    def __iter__(self) -> Iterator[tuple[Tensor, object]]:
        return iter(self._batches)


def batched(numbers: range, size: int) -> Iterator[range]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def compare_with_clip_benchmark(made: EmbeddedSet, options: argparse.Namespace) -> None:
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    captioned = options.captions // CAPTIONS_OF_AN_IMAGE
    text, prompts = torch.from_numpy(made.rows("text")), torch.from_numpy(made.class_prompts[:, 0])
    image, pairs = made.rows("image"), np.asarray(made.pairs)
    found: dict[str, dict[str, float]] = {}

    def our_retrieval() -> None:
        ours = retrieval.measure_retrieval(image[:captioned], made.rows("text"), pairs, [1, 5, 10])
        found["ours"] = {d: ours[d]["recall_at_5"]["value"] for d in retrieval.DIRECTIONS}

    def their_retrieval() -> None:
        loader = Loader(made, captioned, labelled=False)
        theirs = zeroshot_retrieval.evaluate(
            HandsOut(), loader, lambda numbers: text[numbers], "cpu", amp=False, recall_k_list=[1, 5, 10]
        )
        names = ("image_retrieval_recall@5", "text_retrieval_recall@5")
        found["theirs"] = dict(zip(retrieval.DIRECTIONS, (theirs[name] for name in names), strict=True))

    def our_zero_shot() -> None:
        classes, rows = zero_shot.class_embeddings(made.class_prompts, [0]), np.arange(len(image))
        ahead = zero_shot.images_ahead(image, rows, made.labels, classes, made.class_names)
        found["ours"] = {f"top_{k}": float((ahead < k).mean()) for k in (1, 5)}

    def their_zero_shot() -> None:
        number = {name: n for n, name in enumerate(made.class_names)}
        classifier = zeroshot_classification.zero_shot_classifier(
            HandsOut(),
            lambda texts: torch.stack([prompts[number[name]] for name in texts]),
            list(made.class_names),
            ["{c}"],
            "cpu",
            amp=False,
        )
        loader = Loader(made, options.images, labelled=True)
        scores, truth = zeroshot_classification.run_classification(HandsOut(), classifier, loader, "cpu", amp=False)
        # Its `accuracy` turns an array into a number as NumPy 2 no longer does; its `evaluate` would call it here.
        right = scores.topk(5).indices == truth[:, None]
        found["theirs"] = {f"top_{k}": float(right[:, :k].any(1).double().mean()) for k in (1, 5)}

    for title, ours, theirs in (
        (f"retrieval, {captioned:,} x {options.captions:,}", our_retrieval, their_retrieval),
        (f"zero-shot, {options.images:,} x {options.classes:,}", our_zero_shot, their_zero_shot),
    ):
        rounds = [(timed(ours, CPU), timed(theirs, CPU)) for _ in range(options.rounds)]
        own, others = (statistics.median(column) for column in zip(*rounds, strict=True))
        same = ", ".join(f"{name} {found['ours'][name]:.4f} and {found['theirs'][name]:.4f}" for name in found["ours"])
        print(f"{title}: ours {own:.2f} s, CLIP_benchmark {others:.2f} s, {own / others:.3f} of it; {same}")


if __name__ == "__main__":
    sys.exit(main())
