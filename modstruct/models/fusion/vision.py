"""The image encoder: a ViT of timm's, whose tokens the fusion encoder looks at."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from modstruct.checkpoints.weight_files import read_weight_file
from modstruct.config import FusionVisionConfig
from modstruct.distributed import main_first
from modstruct.errors import refuse, require
from modstruct.models.fusion.bert import initialise

REMEDY = "must be a ViT with one class token, such as deit_base_patch16_224"


def build_image_encoder(config: FusionVisionConfig) -> nn.Module:
    """The ViT that a recipe names or sizes; it gives (B, 1 + patches, width), the class token first.

    Raises ValueError naming the field where timm lacks it, where it has no class token, or weights do not fit.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if config.name is None:
        encoder = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.layers,
            num_heads=config.heads,
            num_classes=0,
            global_pool="",
        )
        initialise(encoder, config.width)
        return encoder
    known = timm.is_model(config.name)
    require(known, "fusion.vision.name", config.name, "not known to timm; `timm.list_models('*vit*')` lists its ViTs")
    fetched = config.pretrained == "timm"
    options = {"img_size": config.image_size, "num_classes": 0, "global_pool": ""}

    def build() -> nn.Module:
        try:
            return timm.create_model(config.name, pretrained=fetched, **options)
        except (AssertionError, OSError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            built_so = f"timm cannot build it for images of {config.image_size} pixels ({reason})"
            refuse("fusion.vision.name", config.name, f"{built_so}; {REMEDY}")

    encoder = main_first(build) if fetched else build()
    fits = isinstance(encoder, VisionTransformer) and encoder.num_prefix_tokens == 1 and encoder.cls_token is not None
    require(fits, "fusion.vision.name", config.name, REMEDY)
    if config.pretrained is not None and not fetched:
        load_image_weights(encoder, read_weight_file(config.pretrained, "fusion.vision.pretrained"), config.pretrained)
    return encoder


def load_image_weights(encoder: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Weights by timm's names into a ViT; positions are interpolated to its grid, a classifier is left out."""
    weights = {name: value for name, value in weights.items() if not name.startswith(("head.", "head_dist."))}
    if "pos_embed" in weights:
        weights |= {"pos_embed": interpolate_positions(weights["pos_embed"], encoder)}
    expected = encoder.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys())
    wrong += [n for n in expected.keys() & weights.keys() if expected[n].shape != weights[n].shape]
    require(not wrong, "fusion.vision.pretrained", str(path), f"belongs to another ViT; it differs in {wrong[:5]}")
    encoder.load_state_dict(weights)


def interpolate_positions(positions: Tensor, encoder: nn.Module) -> Tensor:
    """Positions (1, 1 + patches, width) of a square grid, bicubic, to the encoder's grid; the class token's stays."""
    from timm.layers import resample_abs_pos_embed

    grid = list(encoder.patch_embed.grid_size)
    # Without antialiasing, as DeiT's and ALBEF's code do it; with it, torch takes another cubic.
    options = {"num_prefix_tokens": 1, "interpolation": "bicubic", "antialias": False}
    return resample_abs_pos_embed(positions, new_size=grid, **options)
