"""Any model of open_clip, with its own preprocessing and tokenizer, as a model that embeds sets."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct import distributed
from modstruct.checkpoints import require_finite
from modstruct.config import ViewsConfig
from modstruct.data.tokenizers import load_tokenizer
from modstruct.data.transforms.image_views import ImageViews
from modstruct.errors import others, refuse, require
from modstruct.evaluation.embeddings.model import EmbeddingModel, weights_fingerprint
from modstruct.models.towers import pretrained_tags

OPTION = "--open_clip"
LOCAL = "local-dir:"
SCHEMES = ("hf-hub:", LOCAL)
"""Of open_clip's names; what they name brings its weights along."""
PROJECTIONS = {"VisionTransformer": "proj", "HFTextEncoder": "proj"}
PROJECTIONS |= {"TextTransformer": "text_projection", "CLIP": "text_projection"}
"""Attribute of a tower that is its last step."""


class OpenClipViews:
    """open_clip's preprocessing; augmented views are those of our recipes' defaults, and then preprocessed."""

    def __init__(self, preprocess: Callable[[Image.Image], Tensor], image_size: int):
        self._preprocess = preprocess
        self.image_size = image_size
        self._augmented = ImageViews(ViewsConfig(), image_size)

    def evaluation_image(self, image: Image.Image) -> Tensor:
        """(3, image_size, image_size) float32."""
        return self._preprocess(image)

    def augmented_image(self, image: Image.Image, seed: int) -> Tensor:
        pixels = self._augmented.augmented_image(image, seed).permute(1, 2, 0).numpy()
        return self._preprocess(Image.fromarray(pixels))


def create_open_clip(spec: str, random_weights: bool = False, option: str = OPTION) -> tuple[Any, Callable, Any]:
    """A model of open_clip in evaluation mode on this process's device, its preprocessing and its tokenizer.

    spec: NAME:TAG with a pretrained tag, NAME:FILE with a local .pt or .safetensors, or hf-hub:… and local-dir:… as
    in open_clip, exports of ours among them; NAME alone only with random_weights, which are the same at every call.
    option: that named it, for the error. Every process calls it. Raises ValueError that lists what can be given, also
    where weights cannot be fetched.
    """
    import open_clip

    architecture, weights = _parts(spec, random_weights, option)
    own = Path(architecture.removeprefix(LOCAL)) / "tokenizer" if architecture.startswith(LOCAL) else None

    def build() -> tuple[nn.Module, Callable, Callable]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, weights, load_weights=not random_weights, pretrained_text=False, weights_only=True
            )
        tokenizer = load_tokenizer(own) if own and own.is_dir() else None
        if tokenizer is None or tokenizer.kind == "clip_bpe":  # an export has no row for our padding token of that
            tokenizer = open_clip.get_tokenizer(architecture)
        return model, preprocess, tokenizer

    try:
        # The first process of a host may download what the others then find.
        model, preprocess, tokenizer = distributed.main_first(build)
    except distributed.FailedElsewhere:
        raise
    except Exception as error:  # the libraries behind it have a type of error each
        cause = textwrap.shorten(str(error), 300, placeholder=" …")
        remedy = f"give NAME:FILE with a local file, or one of the tags {pretrained_tags(architecture)}, which are"
        refuse(option, spec, f"cannot be loaded ({cause}); {remedy} downloaded once and kept in open_clip's cache")
    require_finite(model.state_dict(), option, spec)
    return model.to(distributed.device()).eval(), preprocess, tokenizer


def pixels_of(model: Any) -> int:
    """Width and height of the images that a model of open_clip takes; of unequal ones the larger."""
    size = model.visual.image_size
    return max(size) if isinstance(size, (list, tuple)) else size


def open_clip_model(spec: str, random_weights: bool = False, name: str | None = None) -> EmbeddingModel:
    """A model of open_clip that embeds sets; every process calls it. spec, random_weights, errors: as create_open_clip.

    name: for tables, by default the spec.
    """
    import open_clip

    model, preprocess, tokenizer = create_open_clip(spec, random_weights)
    fingerprint, size = weights_fingerprint(model.state_dict()), pixels_of(model)
    projections = {"image": _take_projection(model.visual), "text": _take_projection(getattr(model, "text", model))}
    encoders = {"image": model.encode_image, "text": model.encode_text}

    def encode(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for modality, inputs in batch.items():
            rows, projection = encoders[modality](inputs), projections[modality]
            if projection is not None:
                made[f"{modality}_features"] = rows.float()
                rows = projection(rows)
            made[f"{modality}_projected"] = rows.float()
            made[modality] = F.normalize(rows.float(), dim=-1)
        return made

    with torch.no_grad():
        inputs = {"image": torch.zeros((1, 3, size, size)), "text": tokenizer([""])}
        made = encode({modality: rows.to(distributed.device()) for modality, rows in inputs.items()})
    return EmbeddingModel(
        name=name or spec,
        fingerprint=fingerprint,
        dimension=made["image"].shape[1],
        arrays=frozenset({*made, "image_augmented"}),
        views=OpenClipViews(preprocess, size),
        tokenize=tokenizer,
        encode=encode,
        preprocessing=f"{model.visual.preprocess_cfg}; tokenizer {type(tokenizer).__name__} of "
        f"{_parts(spec, random_weights, OPTION)[0]}, {tokenizer.context_length} tokens",
        details={
            "open_clip": spec,
            "random_weights": random_weights,
            "version": open_clip.__version__,
            "logit_scale": float(model.logit_scale.detach().exp()),
        },
    )


def _parts(spec: str, random_weights: bool, option: str) -> tuple[str, str | None]:
    """Architecture and weights; refused where they are missing, unknown, or trained with another activation."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if spec.startswith(SCHEMES):
        return spec, None
    architecture, _, weights = spec.partition(":")
    require(not (random_weights and weights), option, spec, "names weights; leave them out, or random weights")
    known = open_clip.list_models()
    require(architecture in known, option, spec, f"not known to open_clip; {others(architecture, known)}")
    if random_weights:
        return architecture, None
    tags, path = pretrained_tags(architecture), Path(weights).expanduser()
    require(bool(weights), option, spec, f"give its weights, {architecture}:FILE or {architecture}:TAG of {tags}")
    if os.sep in weights or path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        require(path.is_file(), option, spec, f"there is no file {path}")
    if path.is_file():
        return architecture, str(path)
    tag = get_pretrained_cfg(architecture, weights)
    require(bool(tag), option, spec, f"{weights} is neither a file nor one of its tags {tags}")
    quick = [bool(about.get("quick_gelu", False)) for about in (tag, open_clip.get_model_config(architecture))]
    base = architecture.removesuffix("-quickgelu")
    remedy = f"{weights} was trained with another activation: use {base}{'-quickgelu' if quick[0] else ''}:{weights}"
    require(quick[0] == quick[1], option, spec, remedy)
    return architecture, weights


def _take_projection(tower: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The tower's last step, which it then leaves out; None for a tower whose last step is not known.

    A CLIP ResNet projects inside its attention pooling: there the pooled output is features and embedding both.
    """
    kind, owner = type(tower).__name__, cast(Any, tower)
    name = PROJECTIONS.get(kind, "")
    if kind == "TimmModel":
        owner = owner.head
        name = "proj" if hasattr(owner, "proj") else "mlp"
    if kind != "ModifiedResNet" and (not name or getattr(tower, "output_tokens", False)):
        return None
    projection = getattr(owner, name, None)
    if projection is None:
        return nn.Identity()
    if isinstance(projection, nn.Module):
        setattr(owner, name, nn.Identity())
        return projection
    setattr(owner, name, None)
    return lambda rows: rows @ projection
