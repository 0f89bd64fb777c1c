"""Class names as a caption would have them, and prompt templates: the paper's single one and CLIP's ensembles.

The names are for sets whose files have none or have file names. The ensembles are those of Radford et al. 2021 as
released (prompts of the openai/CLIP repository), ImageNet's from open_clip; SVHN, on which CLIP was not evaluated,
has that of MNIST.
"""

from __future__ import annotations

from functools import lru_cache

PAPER_TEMPLATE = "a photo of the {}"
"""Jiang et al. 2023; without a full stop, unlike all of CLIP's."""

_PHOTOS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
_OF_SMALL_IMAGES = tuple(
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
    "cifar10": _OF_SMALL_IMAGES,
    "cifar100": _OF_SMALL_IMAGES,
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
    """The paper's template and, behind it, CLIP's ensemble for a set; imagenet_* share ImageNet's."""
    return (PAPER_TEMPLATE, *(_of_imagenet() if name.startswith("imagenet") else ENSEMBLES.get(name, ())))


def _of_imagenet() -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


# Flowers102 as torchvision lists it, but for names that are not English (Radford et al. 2021 corrected the same).
FLOWERS_CORRECTED = {
    "globe-flower": "globe flower",
    "pink-yellow dahlia?": "pink and yellow dahlia",
    "ball moss": "air plant",
}
# Folders of Caltech101 whose names do not say what their images show.
CALTECH101_CORRECTED = {
    "Faces": "off-center face",
    "Faces_easy": "centered face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
    "airplanes": "airplane",
    "car_side": "side of a car",
    "cougar_body": "body of a cougar cat",
    "cougar_face": "face of a cougar cat",
    "crocodile_head": "head of a crocodile",
    "flamingo_head": "head of a flamingo",
    "snoopy": "snoopy (cartoon beagle)",
    "water_lilly": "water lily",
    "yin_yang": "yin and yang symbol",
}
# The signs of GTSRB in order of ClassId (Stallkamp et al. 2012); its files only number them.
GTSRB = (
    *(f"speed limit {limit} km/h" for limit in (20, 30, 50, 60, 70, 80)),
    "end of speed limit 80 km/h",
    *(f"speed limit {limit} km/h" for limit in (100, 120)),
    "no passing",
    "no passing for trucks",
    "right of way at the next intersection",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "general caution",
    "dangerous curve to the left",
    "dangerous curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road work",
    "traffic signals",
    "pedestrians",
    "children crossing",
    "bicycles crossing",
    "beware of ice and snow",
    "wild animals crossing",
    "end of all speed and passing limits",
    "turn right ahead",
    "turn left ahead",
    "ahead only",
    "go straight or right",
    "go straight or left",
    "keep right",
    "keep left",
    "roundabout mandatory",
    "end of no passing",
    "end of no passing for trucks",
)


def readable(name: str) -> str:
    """A file's or a folder's name as words."""
    return " ".join(name.replace("_", " ").split())


def flowers() -> tuple[str, ...]:
    """The 102 flowers by label."""
    from torchvision.datasets import Flowers102

    return tuple(FLOWERS_CORRECTED.get(name, name) for name in Flowers102.classes)


def imagenet() -> tuple[str, ...]:
    """CLIP's names of ImageNet's 1,000 classes by label. Two names occur twice: missile and sunglasses."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


@lru_cache(maxsize=1)
def imagenet_labels() -> dict[str, int]:
    """The label of each of ImageNet's 1,000 WordNet ids, such as n01440764."""
    from timm.data import ImageNetInfo

    return {wnid: label for label, wnid in enumerate(ImageNetInfo().label_names())}
