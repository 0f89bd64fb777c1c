"""A class for a text with one image (SNLI-VE) or with two (NLVR2 and its text assignment)."""

from __future__ import annotations

import copy
import re
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modstruct.config import FinetuneRecipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.models.fusion.backbone import Backbone
from modstruct.models.fusion.bert import Layers, initialise
from modstruct.models.fusion.ema import EmaModel

SHARED = ("key", "value")
"""Projections of the cross attention that the two blocks of a layer have in common."""
_SINGLE = re.compile(r"backbone\.fusion\.layer\.(\d+)\.(.+)")
_DOUBLED = "backbone.fusion.left."


def classification_head(width: int, classes: int) -> nn.Sequential:
    """ALBEF's head of NLVR2 and SNLI-VE, on the fused [CLS]."""
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
    initialise(head, width)
    return head


class Classifier(EmaModel):
    """Fused [CLS] -> classes. The EMA model softens the labels where task.alpha is above 0."""

    def __init__(self, recipe: FinetuneRecipe, tokenizer: Tokenizer, classes: int):
        super().__init__()
        self.backbone = self.make_backbone(recipe, tokenizer)
        self.head = classification_head(self.backbone.text_width, classes)
        self.distils = recipe.task.alpha > 0
        if self.distils:
            self.start_ema(recipe.task.momentum)

    @staticmethod
    def make_backbone(recipe: FinetuneRecipe, tokenizer: Tokenizer) -> Backbone:
        return Backbone(recipe.fusion, recipe.views, tokenizer)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: image (B, 3, H, W) uint8, text (B, L) ids, in training label (B,). Returns Outputs' fields."""
        made = {"logits": self.classify(batch)}
        if "label" not in batch:
            return made
        labels = batch["label"]
        # Filled on the device: a number copied from the host would make it wait for the GPU.
        made |= {"labels": labels, "entries": labels.new_full((1,), len(labels))}
        if self.distils:
            with torch.no_grad(), self.autocast(batch["text"].device):
                made["logits_ema"] = self.ema_model.classify(batch)
        return made

    def classify(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, classes), float32."""
        text = self.backbone.encode_text(batch["text"])
        image = self.backbone.encode_image(batch["image"])
        fused = self.backbone.fuse(text, self.backbone.mask(batch["text"]), image)
        return self.head(fused[:, 0]).float()


class PairLayers(nn.Module):
    """Fusion layers, each of them two blocks: the first attends to the left image, the second to the right.

    Both start from the layer's weights, and both use its key and value projections of the cross attention, which are
    the first's; the rest is each block's own (Li et al. 2021, section 3.5).
    """

    def __init__(self, layers: Layers):
        super().__init__()
        self.grad_checkpointing = False
        self.left = layers.layer
        self.right = copy.deepcopy(layers.layer)
        for number in self.left:
            shared, attention = (_cross_attention(side[number]) for side in (self.left, self.right))
            for name in SHARED:
                delattr(attention, name)
                # Past nn.Module, so that this is no part of the second block: names, checkpoints and ZeRO-3's hooks
                # meet the projection once, and a copy of the whole still has the two blocks share one.
                object.__setattr__(attention, name, getattr(shared, name))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The switch of open_clip's and timm's towers."""
        self.grad_checkpointing = enable

    def forward(self, tokens: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Text tokens (B, L, width), their mask (B, L), true for real ones; tokens of the left and of the right
        image (B, M, image_width) each. Returns (B, L, width)."""
        visible = mask[:, None, None, :]
        for pair in zip(self.left.values(), self.right.values(), strict=True):
            for block, image in zip(pair, (left, right), strict=True):
                if self.grad_checkpointing and torch.is_grad_enabled():
                    tokens = checkpoint(block, tokens, visible, image, None, use_reentrant=False)
                else:
                    tokens = block(tokens, visible, image, None)
        return tokens


def _cross_attention(block: nn.Module) -> nn.Module:
    return block.get_submodule("crossattention.self")


class PairClassifier(Classifier):
    """[CLS] fused with two images -> classes. Its batches' image is (B, 2, 3, H, W) uint8, left and right."""

    @staticmethod
    def make_backbone(recipe: FinetuneRecipe, tokenizer: Tokenizer) -> Backbone:
        backbone = Classifier.make_backbone(recipe, tokenizer)
        backbone.fusion = PairLayers(cast(Layers, backbone.fusion))
        return backbone

    def classify(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, classes), float32."""
        text = self.backbone.encode_text(batch["text"])
        images = self.backbone.encode_image(batch["image"].flatten(0, 1))  # (2 B, M, image_width)
        left, right = images.unflatten(0, (-1, 2)).unbind(dim=1)
        fused = self.backbone.fusion(text, self.backbone.mask(batch["text"]), left, right)
        return self.head(fused[:, 0]).float()

    def starting_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A pre-trained fusion layer becomes both blocks.

        A run of text assignment or of NLVR2 has them already, and its head is kept if it has as many classes as this
        model's; any other head is dropped.
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
