"""Prompt templates: the paper's single one, and the ensembles that CLIP was measured with.

The ensembles are those of Radford et al. 2021 as released (prompts of the openai/CLIP repository), ImageNet's from
open_clip; SVHN, which CLIP was not measured on, has that of MNIST.
"""

from __future__ import annotations

PAPER_TEMPLATE = "a photo of the {}"
"""Jiang et al. 2023, without a full stop, and so in none of CLIP's ensembles."""

_PHOTOS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_OF_SMALL_PICTURES = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {kind}photo of {article} {{}}." for kind in _PHOTOS),
        f"a photo of {article} small {{}}.",
        f"a photo of {article} big {{}}.",
    )
)
_RENDERINGS = ("photo", "painting", "sculpture", "sketch", "tattoo", "rendition", "drawing", "doodle")
_OF_CALTECH101 = tuple(
    template
    for article in ("a", "the")
    for template in (
        *(f"a {kind} of {article} {{}}." for kind in _RENDERINGS),
        *(f"{work} of {article} {{}}." for work in ("art", "graffiti")),
        *(f"{article} {made} {{}}." for made in ("plastic", "toy", "embroidered", "cartoon", "plushie", "origami")),
        f"{article} {{}} in a video game.",
    )
)
_TEXTURES = ("texture", "pattern", "thing", "object")

ENSEMBLES: dict[str, tuple[str, ...]] = {
    "caltech101": _OF_CALTECH101,
    "cifar10": _OF_SMALL_PICTURES,
    "cifar100": _OF_SMALL_PICTURES,
    "dtd": tuple(f"a photo of {article} {{}} {kind}." for article in ("a", "the") for kind in _TEXTURES),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "flowers102": ("a photo of a {}, a type of flower.",),
    "food101": ("a photo of {}, a type of food.",),
    "gtsrb": tuple(f'a {how} photo of a "{{}}" traffic sign.' for how in ("zoomed in", "centered", "close up")),
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "rendered_sst2": ("a {} review of a movie.",),
    "stanford_cars": (
        *(f"a photo of {which} {{}}." for which in ("a", "the", "my")),
        "i love my {}!",
        *(f"a photo of my {state} {{}}." for state in ("dirty", "clean", "new", "old")),
    ),
    "stl10": ("a photo of a {}.", "a photo of the {}."),
    "svhn": ('a photo of the number: "{}".',),
}


def templates_of(name: str) -> tuple[str, ...]:
    """The paper's template and, behind it, CLIP's ensemble for a set; sets called imagenet… share ImageNet's."""
    return (PAPER_TEMPLATE, *(_of_imagenet() if name.startswith("imagenet") else ENSEMBLES.get(name, ())))


def _of_imagenet() -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
