"""BERT (Devlin et al. 2019) cut in two: its first layers read the text, the others look from text to image as well.

The layers are transformers' own. Weights are named as in its BertModel (`embeddings.…`, `layer.N.…`), so that
published files fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer, BertPredictionHeadTransform

from modstruct.config import FusionTextConfig


def bert_config(config: FusionTextConfig, vocabulary: int, positions: int, padding_id: int) -> BertConfig:
    """transformers' description of the BERT that a recipe sizes."""
    made = BertConfig(
        vocab_size=vocabulary,
        hidden_size=config.width,
        num_hidden_layers=config.text_layers + config.fusion_layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        max_position_embeddings=positions,
        pad_token_id=padding_id,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        is_decoder=False,
    )
    made._attn_implementation = "sdpa"
    return made


class Words(BertEmbeddings):
    """BERT's input embeddings, whose word vectors are the output layer of masked language modelling too."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.word_embeddings = TiedEmbedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)


class TiedEmbedding(nn.Embedding):
    """Word vectors, input and output layer in one forward, since ZeRO-3 gathers weights at a call only."""

    def forward(self, ids: Tensor | None = None, hidden: Tensor | None = None) -> Tensor:
        """ids: (…) -> vectors (…, D). hidden: (…, D) -> products with every vector (…, vocabulary)."""
        if hidden is not None:
            return F.linear(hidden, self.weight)
        assert ids is not None
        return super().forward(ids)


class Layers(nn.Module):
    """Some of BERT's layers, numbered from `first`; with `seen_width` each has cross attention to tokens of that width.

    causal: each token sees itself and those before it (a decoder).
    """

    def __init__(self, config: BertConfig, first: int, count: int, seen_width: int | None = None, causal: bool = False):
        super().__init__()
        self.causal = causal
        self.grad_checkpointing = False
        self.layer = nn.ModuleDict({str(first + i): _layer(config, seen_width) for i in range(count)})

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As open_clip's and timm's towers have it."""
        self.grad_checkpointing = enable

    def forward(
        self, tokens: Tensor, mask: Tensor, seen: Tensor | None = None, seen_mask: Tensor | None = None
    ) -> Tensor:
        """tokens (B, L, width), mask (B, L) true for real ones; seen (B, M, seen_width), seen_mask likewise, or None
        for all. Returns (B, L, width)."""
        visible = mask[:, None, None, :]
        if self.causal:
            visible = visible & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
        visible_seen = None if seen_mask is None else seen_mask[:, None, None, :]
        for layer in self.layer.values():
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(layer, tokens, visible, seen, visible_seen, use_reentrant=False)
            else:
                tokens = layer(tokens, visible, seen, visible_seen)
        return tokens


def _layer(config: BertConfig, seen_width: int | None) -> BertLayer:
    if seen_width is None:
        return BertLayer(config)
    described = BertConfig.from_dict(config.to_dict() | {"is_decoder": True, "add_cross_attention": True})
    described._attn_implementation = config._attn_implementation
    layer = BertLayer(described)
    # transformers has keys and values as wide as the text.
    attention = layer.crossattention.self
    attention.key = nn.Linear(seen_width, attention.all_head_size)
    attention.value = nn.Linear(seen_width, attention.all_head_size)
    return layer


class LanguageHead(nn.Module):
    """BERT's head of masked language modelling; the last product is with the word vectors."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, words: TiedEmbedding) -> Tensor:
        """hidden (M, width) -> logits (M, vocabulary)."""
        return words(hidden=self.transform(hidden)) + self.bias


def initialise(module: nn.Module, width: int) -> None:
    """BERT's initialisation: normal weights, zero biases, norms that change nothing.

    width: of the transformer. At BERT-base's 768 the standard deviation is BERT's 0.02; narrower layers get larger
    weights, so that activations keep their scale.
    """
    deviation = 0.02 * math.sqrt(768 / width)
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=deviation)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
