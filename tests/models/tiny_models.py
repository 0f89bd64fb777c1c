"""The smallest towers, tokenizers and batches that the tests of models and exports share."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from modstruct.config import (
    ContrastiveConfig,
    LossesConfig,
    ModelConfig,
    SeparationConfig,
    TextConfig,
    ViewsConfig,
    VisionConfig,
)
from modstruct.data.tokenizers import ClipTokenizer, Tokenizer, WordPieceTokenizer
from modstruct.losses.objective import build_objective
from modstruct.models.two_tower import TwoTower

WORDS = ["a", "red", "blue", "green", "square", "circle", "star", "above", "!"]
VOCABULARY = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]).encode()
CAPTIONS = ["a red square", "a blue circle above a green star", "star!", "a green square above a red circle"]
CONTEXT = 12

_TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
_VIT = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
ARCHITECTURES = {
    "tiny-vit": {"embed_dim": 8, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "tiny-vit-quickgelu": {"embed_dim": 8, "quick_gelu": True, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "tiny-resnet": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4, "head_width": 32, "patch_size": None},
        "text_cfg": _TEXT,
    },
    "tiny-timm": {
        "embed_dim": 8,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        "text_cfg": _TEXT,
    },
    "tiny-bidirectional": {"embed_dim": 8, "vision_cfg": _VIT, "text_cfg": _TEXT | {"no_causal_mask": True}},
}


def register_architectures(folder: Path) -> None:
    """Make ARCHITECTURES known to open_clip."""
    for name, described in ARCHITECTURES.items():
        (folder / f"{name}.json").write_text(json.dumps(described))
    open_clip.add_model_config(folder)


def word_tokenizer(context_length: int = CONTEXT) -> Tokenizer:
    return WordPieceTokenizer(VOCABULARY, context_length)


@cache
def clip_tokenizer(context_length: int = CONTEXT) -> Tokenizer:
    return ClipTokenizer(ClipTokenizer.shipped_model(), context_length)


def tiny_config(architecture: str = "clip", stem: str = "patch", pool: str = "mean", **changes) -> ModelConfig:
    """Towers by explicit sizes."""
    text = TextConfig(architecture=architecture, width=16, layers=2, heads=2)
    vision = VisionConfig(image_size=16, patch_size=8, width=16, layers=2, head_width=8, stem=stem, pool=pool)
    return ModelConfig(**{"embed_dim": 8, "vision": vision, "text": text} | changes)


def tiny_model(config: ModelConfig, tokenizer: Tokenizer, independent: bool = False, seed: int = 0) -> TwoTower:
    torch.manual_seed(seed)
    losses = LossesConfig(
        contrastive=ContrastiveConfig(weight=1.0), separation=SeparationConfig(weight=float(independent))
    )
    return TwoTower(config, ViewsConfig(), tokenizer, build_objective(losses))


def random_images(size: int = 16, count: int = len(CAPTIONS), seed: int = 1) -> Tensor:
    """(count, 3, size, size), uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def batch_of_both_views(tokenizer: Tokenizer, size: int = 16) -> dict[str, Tensor]:
    texts = tokenizer(CAPTIONS)
    return {
        "image": random_images(size, seed=1),
        "image_augmented": random_images(size, seed=2),
        "text": texts,
        "text_augmented": texts.flip(0),
    }
