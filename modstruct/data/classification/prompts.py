"""The published sets as published_sets.yaml lists them: files, class names, and prompt templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

from modstruct.files import read_yaml

PAPER_TEMPLATE = "a photo of the {}"  # Jiang et al. 2023; without a full stop, unlike all of CLIP's


@dataclass(frozen=True)
class PublishedSet:
    """An entry of published_sets.yaml, whose head explains the keys."""

    download: str
    splits: Any
    torchvision: str = ""
    folder: str = ""
    unread: Sequence[str] = ()
    classes: Sequence[str] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    templates: Sequence[str] = ()

    def named(self, classes: Sequence[str]) -> list[str]:
        """Names of classes by label, as words. classes: as they are published."""
        return [self.renamed.get(name, " ".join(name.replace("_", " ").split())) for name in self.classes or classes]


@cache
def published_sets() -> dict[str, PublishedSet]:
    """Every set that is known by name."""
    content = cast(dict[str, Any], read_yaml(Path(__file__).with_name("published_sets.yaml")))
    return {name: PublishedSet(**fields) for name, fields in content.items()}


def templates_of(name: str) -> tuple[str, ...]:
    """The paper's template and, behind it, CLIP's ensemble for a set; imagenet_* share ImageNet's."""
    if name.startswith("imagenet"):
        from open_clip import OPENAI_IMAGENET_TEMPLATES  # takes seconds

        return (PAPER_TEMPLATE, *(template("{}") for template in OPENAI_IMAGENET_TEMPLATES))
    return (PAPER_TEMPLATE, *(published_sets()[name].templates if name in published_sets() else ()))


@cache
def imagenet() -> dict[str, str]:
    """CLIP's name of each of ImageNet's 1,000 WordNet ids, by label. Two names occur twice: missile and sunglasses."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))
