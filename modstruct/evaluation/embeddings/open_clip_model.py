"""Any model of open_clip, with its own preprocessing and tokenizer, as a model that embeds sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct import distributed
from modstruct.checkpoints import require_finite
from modstruct.config import ViewsConfig
from modstruct.data.transforms.image_views import ImageViews
from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings.model import EmbeddingModel, weights_fingerprint

if TYPE_CHECKING:
    from open_clip.model import CLIP, CustomTextCLIP

OPTION = "--open_clip"
SCHEMES = ("hf-hub:", "local-dir:")
"""Of open_clip's names; what they name brings its weights along."""


class OpenClipViews:
    """open_clip's preprocessing. Augmented views: a random crop, a flip and AutoAugment as our recipes make them by
    default, at the model's size, and then its preprocessing."""

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


def open_clip_model(spec: str, random_weights: bool = False, name: str | None = None) -> EmbeddingModel:
    """Build a model of open_clip and read its weights; every process calls it.

    spec: NAME:TAG with a pretrained tag, NAME:FILE with a local .pt or .safetensors, or hf-hub:… and local-dir:… as
    in open_clip; NAME alone only with random_weights, which are the same at every call. name: for tables, by
    default the spec. Raises ValueError that lists what can be given, also where weights cannot be fetched.
    """
    import open_clip

    architecture, weights = _parts(spec)
    if not architecture.startswith(SCHEMES):
        known = open_clip.list_models()
        require(architecture in known, OPTION, spec, f"not known to open_clip; it has {', '.join(known)}")
        _check_weights(spec, architecture, weights, random_weights)
    require(not (random_weights and weights), OPTION, spec, "names weights; leave them out, or random weights")

    def build() -> tuple[nn.Module, Callable, Callable]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, weights, load_weights=not random_weights, pretrained_text=False, weights_only=True
            )
        return model, preprocess, open_clip.get_tokenizer(architecture)

    try:
        # The first process of a host may download what the others then find.
        model, preprocess, tokenizer = distributed.main_first(build)
    except distributed.FailedElsewhere:
        raise
    except Exception as error:  # the libraries behind it have a type of error each
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        cause = " ".join(str(error).split())[:300]
        remedy = f"give NAME:FILE with a local file, or one of the tags {', '.join(tags) or '(it has none)'}, which are"
        refuse(OPTION, spec, f"cannot be loaded ({cause}); {remedy} downloaded once and kept in open_clip's cache")
    require_finite(model.state_dict(), OPTION, spec)
    fingerprint = weights_fingerprint(model.state_dict())
    model.to(distributed.device()).eval()
    size = model.visual.image_size
    size = max(size) if isinstance(size, (list, tuple)) else size
    encode, arrays, dimension = _encoder(model, size)
    return EmbeddingModel(
        name=name or spec,
        fingerprint=fingerprint,
        dimension=dimension,
        arrays=arrays,
        views=OpenClipViews(preprocess, size),
        tokenize=tokenizer,
        encode=encode,
        preprocessing=f"{model.visual.preprocess_cfg}; tokenizer {type(tokenizer).__name__} of {architecture}, "
        f"{tokenizer.context_length} tokens",
        details={"open_clip": spec, "random_weights": random_weights, "version": open_clip.__version__},
    )


def _parts(spec: str) -> tuple[str, str | None]:
    """Architecture and weights."""
    if spec.startswith(SCHEMES):
        return spec, None
    architecture, _, weights = spec.partition(":")
    if weights and (os.sep in weights or Path(weights).suffix in (".pt", ".pth", ".bin", ".safetensors")):
        path = Path(weights).expanduser()
        require(path.is_file(), OPTION, spec, f"there is no file {path}")
        weights = str(path)
    return architecture, weights or None


def _check_weights(spec: str, architecture: str, weights: str | None, random_weights: bool) -> None:
    """Refuse weights that are missing, unknown, or trained with another activation than the architecture's."""
    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "(it has none)"
    missing = weights is None and not random_weights
    require(not missing, OPTION, spec, f"give its weights, {architecture}:FILE or {architecture}:TAG of {tags}")
    if weights is None or Path(weights).is_file():
        return
    tag = get_pretrained_cfg(architecture, weights)
    require(bool(tag), OPTION, spec, f"{weights} is neither a file nor one of its tags {tags}")
    quick = [bool(about.get("quick_gelu", False)) for about in (tag, open_clip.get_model_config(architecture))]
    base = architecture.removesuffix("-quickgelu")
    remedy = f"{weights} was trained with another activation: use {base}{'-quickgelu' if quick[0] else ''}:{weights}"
    require(quick[0] == quick[1], OPTION, spec, remedy)


def _encoder(model: CLIP | CustomTextCLIP, size: int) -> tuple[Callable, frozenset[str], int]:
    """encode of EmbeddingModel, what it can make, and the dimension; the model's projections are taken out of it."""
    project = {"image": _take_image_projection(model.visual), "text": _take_text_projection(model)}
    arrays = {"image", "text", "image_projected", "text_projected", "image_augmented"} | {
        f"{name}_features" for name in project if project[name]
    }
    encoders = {"image": model.encode_image, "text": model.encode_text}

    def encode(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for modality, inputs in batch.items():
            rows, projection = encoders[modality](inputs), project[modality]
            if projection is not None:
                made[f"{modality}_features"] = rows.float()
                rows = projection(rows)
            made[f"{modality}_projected"] = rows.float()
            made[modality] = F.normalize(rows.float(), dim=-1)
        return made

    device = next(model.parameters()).device
    with torch.no_grad():
        dimension = encode({"image": torch.zeros((1, 3, size, size), device=device)})["image"].shape[1]
    return encode, frozenset(arrays), dimension


def _take_image_projection(visual: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The tower's last step, which it then leaves out; None for a tower whose last step is not known.

    A CLIP ResNet projects inside its attention pooling: there the pooled output is features and embedding both.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, VisionTransformer) and not visual.output_tokens:
        return _taken(visual, "proj")
    if isinstance(visual, TimmModel):
        name = "proj" if hasattr(visual.head, "proj") else "mlp"
        return _taken(visual.head, name) if hasattr(visual.head, name) else nn.Identity()
    return nn.Identity() if isinstance(visual, ModifiedResNet) else None


def _take_text_projection(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """As `_take_image_projection`."""
    from open_clip.hf_model import HFTextEncoder
    from open_clip.model import CLIP, CustomTextCLIP
    from open_clip.transformer import TextTransformer

    if type(model) is CLIP:
        return _taken(model, "text_projection")
    if type(model) is CustomTextCLIP and isinstance(model.text, TextTransformer) and not model.text.output_tokens:
        return _taken(model.text, "text_projection")
    if type(model) is CustomTextCLIP and isinstance(model.text, HFTextEncoder) and not model.text.output_tokens:
        return _taken(model.text, "proj")
    return None


def _taken(owner: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    projection = getattr(owner, name)
    if isinstance(projection, nn.Module):
        setattr(owner, name, nn.Identity())
        return projection
    if projection is None:
        return nn.Identity()
    setattr(owner, name, None)
    return lambda rows: rows @ projection
