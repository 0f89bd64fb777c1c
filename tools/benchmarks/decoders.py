"""One training view of a JPEG by each decoder that is installed: milliseconds of one core, and how far pixels move.

python tools/benchmarks/decoders.py                                        # 256x256, 500x375, 1024x768: minutes
python tools/benchmarks/decoders.py --sizes 500x375 --images 64
python tools/benchmarks/decoders.py --shards '../shared/data/emoji/train-*.tar'    # what shards hold, of any kind

Every form takes the bytes of an image to the same random crop (views.crop_scale of the default recipe) at --side pixels
as a tensor uint8. `scaled`: decoded at 1/2, 1/4 or 1/8 of its size where the crop stays as large as the view. `torch
resize`: torchvision's resize of the cut-out uint8 pixels, bicubic with antialiasing, instead of Pillow's. Forms take
turns; times are medians of rounds of this process's processor time, ratios medians of those of a round. Pixels move
against the first form; of 255, mean and largest. Decoders that are not installed, or refuse an image, are named.
simplejpeg and PyTurboJPEG are no dependencies: pip install simplejpeg PyTurboJPEG (which needs libturbojpeg; its path:
--turbojpeg).
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from loader import decoded, write_photographs
from PIL import Image, features
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from tqdm import tqdm

from modstruct.config import ViewsConfig
from modstruct.data.shards.sources import expand_pattern
from modstruct.data.transforms.decoding import Whole
from modstruct.data.transforms.image_views import ImageViews

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class Coded:
    """An image, and the crop that all forms take of it."""

    content: bytes
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    """Left, top, right and bottom."""
    factor: int
    """By which it can be decoded smaller."""


Decode = Callable[[Coded, int], "Image.Image | np.ndarray"]
"""An image and a factor -> RGB, as Pillow's image or an array (H, W, 3)."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["256x256", "500x375", "1024x768"], metavar="WxH")
    parser.add_argument("--shards", help="Take the images of these shards instead.")
    parser.add_argument("--images", type=int, default=48, help="Of each size (default: %(default)s).")
    parser.add_argument("--side", type=int, default=224, help="Of a view, in pixels (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=5, help="That medians are taken of (default: %(default)s).")
    parser.add_argument("--turbojpeg", help="Path of libturbojpeg.so.0, where the system has none.")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    decoders = installed(options.turbojpeg)
    results = {}
    for name in [options.shards] if options.shards else options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            made = (
                None if options.shards else write_photographs(Path(folder), *map(int, name.split("x")), options.images)
            )
            images = coded([str(made)] if made else expand_pattern(name, False, "--shards"), options)
        print(f"\n{name}: {len(images)} images of {np.mean([len(image.content) for image in images]):,.0f} bytes")
        results[name] = compare(decoders, images, options)
    if options.out:
        options.out.write_text(json.dumps({"command": " ".join(sys.argv), "results": results}, indent=1))


def coded(shards: Sequence[str], options: argparse.Namespace) -> list[Coded]:
    """The first images of the shards, each with a crop."""
    views, found = ImageViews(ViewsConfig(), options.side), []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                if not member.name.endswith(IMAGES):
                    continue
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                with Image.open(io.BytesIO(content)) as image:
                    size, jpeg = image.size, image.format == "JPEG"
                seeds = 0, len(found)
                box = views.drawn(Whole(size), *seeds)[1].box
                found.append(Coded(content, size, box, views.reduction(size, *seeds) if jpeg else 1))
                if len(found) == options.images:
                    return found
    return found


# --- the decoders ---


def installed(turbojpeg: str | None) -> dict[str, Decode]:
    """Each decoder that is there; those that are not are named."""
    found: dict[str, Decode] = {"Pillow": lambda image, factor: decoded(image.content, factor)}
    makers = {"simplejpeg": by_simplejpeg, "turbojpeg": lambda module: by_turbojpeg(module.TurboJPEG(turbojpeg))}
    print(f"Pillow {Image.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}; torch {torch.__version__}")
    for name, make in makers.items():
        try:
            module = import_module(name)
            found[name] = make(module)
            print(f"{name} {module.__version__}")
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{name} is left out: {error}")
    found["torchvision.io"] = by_torchvision
    return found


def by_simplejpeg(module) -> Decode:
    def decode(image: Coded, factor: int) -> np.ndarray:
        if factor == 1:
            return module.decode_jpeg(image.content, "RGB")
        width, height = (-(-side // factor) for side in image.size)
        return module.decode_jpeg(image.content, "RGB", min_height=height, min_width=width, min_factor=factor)

    return decode


def by_turbojpeg(library) -> Decode:
    rgb = import_module("turbojpeg").TJPF_RGB
    return lambda image, factor: library.decode(
        image.content, pixel_format=rgb, scaling_factor=(1, factor) if factor > 1 else None
    )


def by_torchvision(image: Coded, factor: int) -> np.ndarray:
    if factor > 1:
        raise NotImplementedError("it decodes whole images only")
    pixels = torch.frombuffer(bytearray(image.content), dtype=torch.uint8)
    return decode_image(pixels, ImageReadMode.RGB).permute(1, 2, 0).numpy()


# --- the views ---


def by_pillow_resize(pixels: Image.Image | np.ndarray, image: Coded, factor: int, side: int) -> Tensor:
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(np.ascontiguousarray(pixels))
    left, top, right, bottom = (at / factor for at in image.box)
    view = pixels.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
    return torch.from_numpy(np.asarray(view).transpose(2, 0, 1).copy())


def by_torch_resize(pixels: Image.Image | np.ndarray, image: Coded, factor: int, side: int) -> Tensor:
    left, top, right, bottom = (round(at / factor) for at in image.box)
    if isinstance(pixels, np.ndarray):
        cut = pixels[top:bottom, left:right]
    else:
        cut = np.array(pixels.crop((left, top, right, bottom)))
    return v2.functional.resize(
        torch.from_numpy(cut).permute(2, 0, 1), [side, side], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    ).contiguous()


def compare(decoders: dict[str, Decode], images: list[Coded], options: argparse.Namespace) -> list[dict]:
    scaled = any(image.factor > 1 for image in images)
    resizes = {"": by_pillow_resize, ", torch resize": by_torch_resize}
    forms = {
        f"{name}{', scaled' if smaller else ''}{how}": (decode, resize, smaller)
        for how, resize in resizes.items()
        for smaller in ((False, True) if scaled else (False,))
        for name, decode in decoders.items()
    }

    def view(form: str, image: Coded) -> Tensor:
        decode, resize, smaller = forms[form]
        factor = image.factor if smaller else 1
        return resize(decode(image, factor), image, factor, options.side)

    base, seconds = next(iter(forms)), {form: list[float]() for form in forms}
    differences: dict[str, list[Tensor]] = {}
    for form in list(forms):
        try:
            made = [(view(form, image).int() - view(base, image).int()).abs().float() for image in images]
            differences[form] = made
        except Exception as error:  # each library has errors of its own
            print(f"{form} is left out: {str(error) or type(error).__name__}")
            del forms[form], seconds[form]
    for _ in tqdm(range(options.rounds), desc="rounds", leave=False):
        for form in forms:
            start = time.process_time()
            for image in images:
                view(form, image)
            seconds[form].append((time.process_time() - start) / len(images))
    print(f"{'form':40}{'ms a view':>10}{'ratio':>8}{'moved, mean':>13}{'most':>6}")
    rows = []
    for form, found in seconds.items():
        ratio = statistics.median(one / other for one, other in zip(found, seconds[base], strict=True))
        mean = float(torch.stack([d.mean() for d in differences[form]]).mean())
        most = int(max(d.max() for d in differences[form]))
        rows.append({"form": form, "ms": 1000 * statistics.median(found), "ratio": ratio, "moved": mean, "most": most})
        print(f"{form:40}{rows[-1]['ms']:>10.2f}{ratio:>8.2f}{mean:>13.3f}{most:>6}")
    return rows


if __name__ == "__main__":
    main()
