"""A class for two images with a text: the model of NLVR2 and of its text assignment."""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modstruct.config import FinetuneRecipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.models.fusion.backbone import Backbone
from modstruct.models.fusion.bert import Layers
from modstruct.models.fusion.classifier import Classifier

SHARED = ("key", "value")
"""Projections of the cross attention that the two blocks of a layer have in common."""
_SINGLE = re.compile(r"backbone\.fusion\.layer\.(\d+)\.(.+)")
_DOUBLED = "backbone.fusion.left."


class PairLayers(nn.Module):
    """Fusion layers, each made two blocks: the first looks at the left image, the second at the right.

    Both start from the layer's weights, and both use its key and value projections of the cross attention, which are
    the first's; the rest is each block's own (Li et al. 2021, section 3.5).
    """

    def __init__(self, layers: Layers):
        super().__init__()
        self.grad_checkpointing = False
        self.left = layers.layer
        self.right = copy.deepcopy(layers.layer)
        for number, block in self.left.items():
            shared, attention = block.crossattention.self, self.right[number].crossattention.self
            for name in SHARED:
                delattr(attention, name)
                # Past nn.Module, so that this is no part of the second block: names, checkpoints and ZeRO-3's hooks
                # meet the projection once, and a copy of the whole still has the two blocks share one.
                object.__setattr__(attention, name, getattr(shared, name))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As open_clip's and timm's towers have it."""
        self.grad_checkpointing = enable

    def forward(self, tokens: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Text tokens (B, L, width), their mask (B, L), true for real ones; tokens of the left and of the right
        image (B, M, image_width) each. Returns (B, L, width)."""
        visible = mask[:, None, None, :]
        for pair in zip(self.left.values(), self.right.values(), strict=True):
            for block, picture in zip(pair, (left, right), strict=True):
                if self.grad_checkpointing and torch.is_grad_enabled():
                    tokens = checkpoint(block, tokens, visible, picture, None, use_reentrant=False)
                else:
                    tokens = block(tokens, visible, picture, None)
        return tokens


class PairClassifier(Classifier):
    """[CLS] fused with two images -> classes. Its batches' image is (B, 2, 3, H, W) uint8, left and right."""

    @staticmethod
    def make_backbone(recipe: FinetuneRecipe, tokenizer: Tokenizer) -> Backbone:
        backbone = Classifier.make_backbone(recipe, tokenizer)
        backbone.fusion = PairLayers(backbone.fusion)
        return backbone

    def classify(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, classes), float32."""
        text = self.backbone.encode_text(batch["text"])
        pictures = self.backbone.encode_image(batch["image"].flatten(0, 1))  # (2 B, M, image_width)
        left, right = pictures.unflatten(0, (-1, 2)).unbind(dim=1)
        fused = self.backbone.fusion(text, self.backbone.mask(batch["text"]), left, right)
        return self.head(fused[:, 0]).float()

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights by our names -> the same by this model's.

        A pre-trained fusion layer becomes both blocks. A run of text assignment or of NLVR2 has them already; its
        head stays if it has as many classes as this one, any other goes.
        """
        ours = {}
        for name, value in weights.items():
            single = _SINGLE.fullmatch(name)
            if single is None:
                ours[name] = value
                continue
            number, rest = single.groups()
            ours[f"backbone.fusion.left.{number}.{rest}"] = value
            if not rest.startswith(tuple(f"crossattention.self.{shared}." for shared in SHARED)):
                ours[f"backbone.fusion.right.{number}.{rest}"] = value
        head = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        fits = all(name in weights and weights[name].shape == value.shape for name, value in head.items())
        if not (fits and any(name.startswith(_DOUBLED) for name in weights)):
            ours = {name: value for name, value in ours.items() if not name.startswith("head.")}
        return ours
