"""The three encoders of the fusion model; what pre-training and every downstream task start from."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from modstruct.config import FusionConfig, ViewsConfig
from modstruct.data.tokenizers import Tokenizer
from modstruct.models.fusion.bert import Layers, Words, bert_config, initialise
from modstruct.models.fusion.published import load_bert
from modstruct.models.fusion.vision import build_image_encoder
from modstruct.models.towers import standardised


class Backbone(nn.Module):
    """Images and texts -> tokens; text tokens and image tokens -> fused tokens.

    The first token of each is the summary: the ViT's class token, BERT's [CLS] (our tokenizers' start id).
    """

    def __init__(self, config: FusionConfig, views: ViewsConfig, tokenizer: Tokenizer):
        super().__init__()
        text = config.text
        self.bert = bert_config(text, tokenizer.ids_with_mask, tokenizer.context_length, tokenizer.padding_id)
        self.padding_id = tokenizer.padding_id
        self.mean, self.std = views.mean, views.std
        self.image = build_image_encoder(config.vision)
        self.image_width: int = self.image.embed_dim
        self.image_size = config.vision.image_size
        self.words = Words(self.bert)
        self.text = Layers(self.bert, 0, text.text_layers)
        self.fusion = Layers(self.bert, text.text_layers, text.fusion_layers, seen_width=self.image_width)
        for part in (self.words, self.text, self.fusion):
            initialise(part, text.width)
        if text.pretrained is not None:
            load_bert(self, text.pretrained)

    @property
    def text_width(self) -> int:
        return self.bert.hidden_size

    def trunks(self) -> dict[str, nn.Module]:
        """The three encoders."""
        return {"image": self.image, "text": self.text, "fusion": self.fusion}

    def mask(self, ids: Tensor) -> Tensor:
        """True where ids are no padding."""
        return ids != self.padding_id

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 1 + patches, image_width)."""
        dtype = self.words.LayerNorm.weight.dtype
        return self.image(standardised(images, self.mean, self.std).to(dtype))

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L) token ids -> (B, L, text_width), the text alone. mask: true for real tokens; None takes the ids'."""
        return self.text(self.words(ids), self.mask(ids) if mask is None else mask)

    def fuse(self, text: Tensor, mask: Tensor, image: Tensor, image_mask: Tensor | None = None) -> Tensor:
        """Text tokens (B, L, text_width) with their mask (B, L), image tokens (B, M, image_width) -> as the text's."""
        return self.fusion(text, mask, image, image_mask)


def without_files(config: FusionConfig) -> FusionConfig:
    """The same sizes with no weights read: for a model whose weights come from a checkpoint."""
    vision, text = replace(config.vision, pretrained=None), replace(config.text, pretrained=None)
    return replace(config, init=None, vision=vision, text=text)
