"""A class for an image with a text: the head of SNLI-VE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modstruct.config import FinetuneRecipe
from modstruct.data.tokenizers import Tokenizer
from modstruct.models.fusion.backbone import Backbone
from modstruct.models.fusion.bert import initialise
from modstruct.models.fusion.ema import EmaModel


def classification_head(width: int, classes: int) -> nn.Sequential:
    """ALBEF's head of NLVR2 and SNLI-VE, on the fused [CLS]."""
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
    initialise(head, width)
    return head


class Classifier(EmaModel):
    """Fused [CLS] -> classes. An EMA copy softens the labels where task.alpha is above 0."""

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
        # Filled on the device: for a number of the host's a GPU would have to be waited for.
        made |= {"labels": labels, "entries": labels.new_full((1,), len(labels))}
        if self.distils:
            with torch.no_grad(), self.autocast(batch["text"].device):
                made["logits_ema"] = self._ema[0].module.classify(batch)
        return made

    def classify(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, classes), float32."""
        text = self.backbone.encode_text(batch["text"])
        image = self.backbone.encode_image(batch["image"])
        fused = self.backbone.fuse(text, self.backbone.mask(batch["text"]), image)
        return self.head(fused[:, 0]).float()

    def trunks(self) -> dict[str, nn.Module]:
        return self.backbone.trunks()
