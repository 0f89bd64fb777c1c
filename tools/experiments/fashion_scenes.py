#!/usr/bin/env python
"""Scenes of real photographs whose captions tell a known share of what an image shows: shards from Fashion-MNIST.

    sudo apt install dataset-fashion-mnist      # Debian's package: 70,000 photographs in ten classes (Xiao et al. 2017)
    python tools/experiments/fashion_scenes.py --out runs/fashion --told 0.5

Each photograph is dyed, scaled and put to a side of a canvas of 64 x 64 pixels: colour (8), scale (3) and side (4) are
drawn uniformly and independently of the class and of each other. Its caption names the class always and each of the
three with probability --told, in one of several wordings. OUT has the folders train (55,000), validation (the last
5,000 of the training file) and eval (10,000), each read as 'OUT/train/*.tar'; the class files zero_shot.yaml and
zero_shot_colour.yaml; and information.json: by factor, in nats, H(Y), I(X_T; Y), I(X_V; Y), I(X_T, X_V; Y), the most
that exactly aligned features keep, and Delta_p, from the probabilities above. Of the class, H(Y) = I(X_T; Y) alone:
what a photograph tells of it is not known. KEY.json has class, colour, scale, side, which of them the caption names
(`named`), and `reworded`, the same in other words.

The same photographs and options write the same bytes; --told changes captions alone.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageColor
from tqdm import tqdm

from modstruct import stopping
from modstruct.cli import run_tool
from modstruct.data.shards.members import Tally
from modstruct.data.shards.writer import AtomicShardWriter, new_folder
from modstruct.data.synthetic.factors import Draws
from modstruct.data.synthetic.information import ExactInformation, entropy
from modstruct.errors import require

PACKAGED = Path("/usr/share/datasets/fashion-mnist")
REMEDY = "apt install dataset-fashion-mnist (or dpkg -x of its file), and give the folder of *-ubyte.gz as --source"
VALIDATION = 12
"""One of so many photographs of the training file is validation's: the last."""
SAMPLES_PER_SHARD = 5_000
SIDE = 64
"""Of the canvas, in pixels."""
CLASSES = {  # in order of label, with what captions call them
    "T-shirt": ("T-shirt", "tee shirt"),
    "trousers": ("pair of trousers", "pair of pants"),
    "pullover": ("pullover", "sweater"),
    "dress": ("dress", "gown"),
    "coat": ("coat", "overcoat"),
    "sandal": ("sandal", "open shoe"),
    "shirt": ("shirt", "button-up shirt"),
    "sneaker": ("sneaker", "running shoe"),
    "bag": ("bag", "handbag"),
    "ankle boot": ("ankle boot", "short boot"),
}
COLOURS = ("red", "green", "blue", "yellow", "purple", "pink", "cyan", "white")
"""By their names in CSS."""
PIXELS = {"small": 20, "medium": 28, "large": 38}
SCALES = {"small": ("small", "little"), "medium": ("medium", "mid-sized"), "large": ("large", "big")}
SIDES = {
    "left": ("on the left", "at the left edge"),
    "right": ("on the right", "at the right edge"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
}
FACTORS: dict[str, Sequence[str]] = {"colour": COLOURS, "scale": tuple(PIXELS), "side": tuple(SIDES)}
FRAMES = ("{thing} {place}", "{place} {thing}", "a photo of {thing} {place}", "there is {thing} {place}")
SHIFT = 6
"""Pixels from the edge, at most, and from the middle of the edge."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder, which must not exist yet")
    parser.add_argument("--told", type=float, default=1.0, help="probability of each factor (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--source", type=Path, default=PACKAGED, help="the package's folder (default: %(default)s)")
    options = parser.parse_args()
    return run_tool(lambda: make(options.source, options.out, options.told, options.seed), (OSError, ValueError))


def make(source: Path, out: Path, told: float, seed: int) -> None:
    """Everything named above. Raises ValueError and OSError."""
    require(0 <= told <= 1, "--told", told, "from 0 to 1")
    images, labels = photographs(source, "train")
    last = len(images) - len(images) // VALIDATION
    parts = {"train": (images[:last], labels[:last]), "validation": (images[last:], labels[last:])}
    parts["eval"] = photographs(source, "t10k")
    with new_folder("--out", out) as folder:
        for split, (images, labels) in parts.items():
            (folder / split).mkdir()
            with AtomicShardWriter(folder / split, SAMPLES_PER_SHARD, Tally()) as shards:
                for index, (image, label) in enumerate(zip(tqdm(images, split), labels, strict=True)):
                    shards.write("png", *sample(image, int(label), told, (seed, split, index)))
        counts = {split: np.bincount(labels, minlength=len(CLASSES)) for split, (_, labels) in parts.items()}
        known = {"unit": "nats", "told": told, "splits": {s: information(told, n / n.sum()) for s, n in counts.items()}}
        (folder / "information.json").write_text(json.dumps(known, indent=1) + "\n")
        things = {kind: with_article(names[0]) for kind, names in CLASSES.items()}
        of_colour = [f"a {{}} {names[0]}" for names in CLASSES.values()]
        write_classes(folder / "zero_shot.yaml", "class", ["a photo of {}", "there is {}"], things)
        write_classes(folder / "zero_shot_colour.yaml", "colour", of_colour, {colour: colour for colour in COLOURS})
    print(f"{', '.join(f'{n.sum():,} {split}' for split, n in counts.items())} in {out}")


def write_classes(path: Path, label: str, templates: list[str], classes: dict[str, str]) -> None:
    path.write_text(yaml.safe_dump({"label": label, "templates": templates, "classes": classes}, sort_keys=False))


def photographs(source: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 28, 28) and (N,) uint8 of a pair of the package's files. Raises ValueError, naming file and remedy."""
    images, labels = (
        idx(source / f"{name}-{kind}-ubyte.gz", n) for kind, n in (("images-idx3", 3), ("labels-idx1", 1))
    )
    fits = len(images) == len(labels) >= VALIDATION and labels.max() < len(CLASSES)
    require(fits, "--source", str(source), f"{name}: {len(images)} photographs, {len(labels)} labels: {REMEDY}")
    return images, labels


def idx(path: Path, axes: int) -> np.ndarray:
    """An array of bytes in the format of LeCun's MNIST: 0, 0, 8, axes; each axis's length; the bytes."""
    require(path.is_file(), "--source", str(path.parent), f"has no {path.name}: {REMEDY}")
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        content = f"{error}".encode()
    shape = (
        np.frombuffer(content, ">i4", min(axes, len(content) // 4 - 1), 4) if len(content) >= 8 else np.zeros(0, int)
    )
    sound = content[:4] == bytes((0, 0, 8, axes)) and len(content) == 4 + 4 * axes + math.prod(shape.tolist())
    require(sound, "--source", str(path), f"damaged, or not in MNIST's format: {REMEDY}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def sample(image: np.ndarray, label: int, told: float, place: tuple[int, str, int]) -> tuple[bytes, bytes, dict]:
    """PNG, caption and record of a photograph. place: seed, split and index, of which all is a function."""
    draws, kind = Draws("fashion", *place), list(CLASSES)[label]
    values = {factor: draws.choice(names) for factor, names in FACTORS.items()}
    canvas = drawn(image, draws, **values)
    named = [factor for factor in FACTORS if draws.chance(told)]
    caption = worded(kind, {factor: values[factor] for factor in named}, draws)
    others = (worded(kind, {factor: values[factor] for factor in named}, draws) for _ in count())
    reworded = next(other for other in others if other != caption)
    record = {"split": place[1], "index": place[2], "caption": caption, "reworded": reworded, "class": kind}
    return canvas, caption.encode(), record | values | {"named": named}


def drawn(image: np.ndarray, draws: Draws, colour: str, scale: str, side: str) -> bytes:
    """The canvas as PNG. The photograph's black ground is dyed too, so that all three factors can be read exactly."""
    pixels, grey = PIXELS[scale], 70 + draws.whole(60)
    light = (
        np.asarray(Image.fromarray(image).resize((pixels, pixels), Image.Resampling.BICUBIC), float)[..., None] / 255
    )
    dyed = np.array(ImageColor.getrgb(colour)) * (0.2 + 0.8 * light)
    from_edge, across = draws.whole(SHIFT + 1), (SIDE - pixels) // 2 + draws.whole(2 * SHIFT + 1) - SHIFT
    near = from_edge if side in ("left", "top") else SIDE - pixels - from_edge
    top, left = (across, near) if side in ("left", "right") else (near, across)
    canvas = np.full((SIDE, SIDE, 3), grey, np.uint8)
    canvas[top : top + pixels, left : left + pixels] = dyed.round().astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(canvas).save(content, "PNG")
    return content.getvalue()


def worded(kind: str, named: dict[str, str], draws: Draws) -> str:
    """A caption that names the class and what is in `named`."""
    words = [draws.choice(SCALES[named["scale"]])] if "scale" in named else []
    words += [named["colour"]] if "colour" in named else []
    words.append(draws.choice(CLASSES[kind]))
    place = draws.choice(SIDES[named["side"]]) if "side" in named else ""
    return draws.choice(FRAMES).format(thing=with_article(" ".join(words)), place=place).strip()


def with_article(thing: str) -> str:
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def information(told: float, of_class: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Of each factor, in nats. of_class: distribution of the classes, (10,)."""
    whole = entropy(of_class)
    found: dict[str, dict[str, float | None]] = {"class": {"entropy": whole, "text": whole, "joint": whole}}
    for factor, values in FACTORS.items():
        whole = math.log(len(values))
        exact = ExactInformation(whole, told * whole, whole, whole, whole if told == 1 else 0.0)
        found[factor] = asdict(exact) | {"delta_p": exact.gap}
    return found


if __name__ == "__main__":
    stopping.listen()
    sys.exit(main())
