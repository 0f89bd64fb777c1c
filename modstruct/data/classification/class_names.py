"""Names of classes as a caption would have them, where the files of a set have none or have file names."""

from __future__ import annotations

from functools import lru_cache

# Flowers102 as torchvision lists it, but for names that are no English (Radford et al. 2021 mended the same).
FLOWERS_MENDED = {
    "globe-flower": "globe flower",
    "pink-yellow dahlia?": "pink and yellow dahlia",
    "ball moss": "air plant",
}
# Folders of Caltech101 whose names do not say what their images show.
CALTECH101_MENDED = {
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
# The signs of GTSRB in order of ClassId (Stallkamp et al. 2012); its files number them only.
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

    return tuple(FLOWERS_MENDED.get(name, name) for name in Flowers102.classes)


def imagenet() -> tuple[str, ...]:
    """CLIP's names of ImageNet's 1,000 classes by label. Two names occur twice: missile and sunglasses."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


@lru_cache(maxsize=1)
def imagenet_labels() -> dict[str, int]:
    """The label of each of ImageNet's 1,000 WordNet ids, such as n01440764."""
    from timm.data import ImageNetInfo

    return {wnid: label for label, wnid in enumerate(ImageNetInfo().label_names())}
