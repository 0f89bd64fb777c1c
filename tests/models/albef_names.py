"""ALBEF's models (salesforce/ALBEF) in plain float64: their names and shapes, and their forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Weights = dict[str, Tensor]
COPIED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")


@dataclass
class Sizes:
    """Small ones; ALBEF's own: 256, 16, 768, 12, 12; 768, 12, 12 of which 6 fuse; 30,522, 512; 256; 65,536."""

    image: int = 16
    patch: int = 8
    image_width: int = 16
    image_layers: int = 2
    image_heads: int = 2
    text_width: int = 12
    text_layers: int = 1
    layers: int = 3
    text_heads: int = 2
    vocabulary: int = 14
    positions: int = 12
    embed_dim: int = 8
    queue: int = 10


def albef_weights(sizes: Sizes, seed: int = 0) -> Weights:
    """Random weights by ALBEF's names; EMA weights of other values."""
    generator = torch.Generator().manual_seed(seed)
    made: Weights = {}

    def put(name: str, *shape: int) -> None:
        made[name] = torch.randn(shape, generator=generator) / math.sqrt(shape[-1] if len(shape) > 1 else 4)

    def linear(name: str, inputs: int, outputs: int) -> None:
        put(f"{name}.weight", outputs, inputs)
        put(f"{name}.bias", outputs)

    def norm(name: str, width: int) -> None:
        made[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        put(f"{name}.bias", width)

    s = sizes
    for copy in ("", "_m"):
        image, text = f"visual_encoder{copy}", f"text_encoder{copy}"
        put(f"{image}.cls_token", 1, 1, s.image_width)
        put(f"{image}.pos_embed", 1, 1 + (s.image // s.patch) ** 2, s.image_width)
        put(f"{image}.patch_embed.proj.weight", s.image_width, 3, s.patch, s.patch)
        put(f"{image}.patch_embed.proj.bias", s.image_width)
        for block in (f"{image}.blocks.{n}" for n in range(s.image_layers)):
            norm(f"{block}.norm1", s.image_width)
            norm(f"{block}.norm2", s.image_width)
            linear(f"{block}.attn.qkv", s.image_width, 3 * s.image_width)
            linear(f"{block}.attn.proj", s.image_width, s.image_width)
            linear(f"{block}.mlp.fc1", s.image_width, 4 * s.image_width)
            linear(f"{block}.mlp.fc2", 4 * s.image_width, s.image_width)
        norm(f"{image}.norm", s.image_width)
        embeddings = f"{text}.bert.embeddings"
        made[f"{embeddings}.position_ids"] = torch.arange(s.positions)[None]
        put(f"{embeddings}.word_embeddings.weight", s.vocabulary, s.text_width)
        put(f"{embeddings}.position_embeddings.weight", s.positions, s.text_width)
        put(f"{embeddings}.token_type_embeddings.weight", 2, s.text_width)
        norm(f"{embeddings}.LayerNorm", s.text_width)
        for number in range(s.layers):
            layer = f"{text}.bert.encoder.layer.{number}"
            for attention in ("attention", "crossattention")[: 2 if number >= s.text_layers else 1]:
                seen = s.text_width if attention == "attention" else s.image_width
                linear(f"{layer}.{attention}.self.query", s.text_width, s.text_width)
                linear(f"{layer}.{attention}.self.key", seen, s.text_width)
                linear(f"{layer}.{attention}.self.value", seen, s.text_width)
                linear(f"{layer}.{attention}.output.dense", s.text_width, s.text_width)
                norm(f"{layer}.{attention}.output.LayerNorm", s.text_width)
            linear(f"{layer}.intermediate.dense", s.text_width, 4 * s.text_width)
            linear(f"{layer}.output.dense", 4 * s.text_width, s.text_width)
            norm(f"{layer}.output.LayerNorm", s.text_width)
        predictions = f"{text}.cls.predictions"
        put(f"{predictions}.bias", s.vocabulary)
        linear(f"{predictions}.transform.dense", s.text_width, s.text_width)
        norm(f"{predictions}.transform.LayerNorm", s.text_width)
        made[f"{predictions}.decoder.weight"] = made[f"{embeddings}.word_embeddings.weight"].clone()
        made[f"{predictions}.decoder.bias"] = made[f"{predictions}.bias"].clone()
        linear(f"vision_proj{copy}", s.image_width, s.embed_dim)
        linear(f"text_proj{copy}", s.text_width, s.embed_dim)
    linear("itm_head", s.text_width, 2)
    made["temp"] = torch.tensor(0.05)
    for name in ("image_queue", "text_queue"):
        made[name] = torch.nn.functional.normalize(torch.randn(s.embed_dim, s.queue, generator=generator), dim=0)
    made["queue_ptr"] = torch.tensor([4])
    return made


TASKS = ("retrieval", "snli_ve", "nlvr2", "text_assignment", "vqa")


def task_sizes(task: str) -> Sizes:
    """Text assignment and NLVR2 have each fusion layer twice."""
    doubled = task in ("nlvr2", "text_assignment")
    return replace(Sizes(), layers=5) if doubled else Sizes()


def task_weights(task: str, seed: int = 0) -> Weights:
    """The file of a fine-tuned model: BERT's names without `bert`, no head of masked language modelling."""
    s, generator = task_sizes(task), torch.Generator().manual_seed(seed + 1)
    made = {n.replace(".bert.", "."): w for n, w in albef_weights(s, seed).items() if ".cls.predictions." not in n}
    if task == "retrieval":
        return made | {"idx_queue": torch.tensor([[3, 0, 3, 7, -100, -100, 2, 1, -100, 5]])}
    kept = ("visual_encoder", "text_encoder")
    if task == "text_assignment":
        kept = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.", "temp")
    made = {n: w for n, w in made.items() if n.startswith(kept)}

    def linear(name: str, inputs: int, outputs: int) -> None:
        made[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)
        made[f"{name}.bias"] = torch.randn(outputs, generator=generator)

    for copy in ("", "_m"):
        if task in ("nlvr2", "snli_ve"):
            linear(f"cls_head{copy}.0", s.text_width, s.text_width)
            linear(f"cls_head{copy}.2", s.text_width, 2 if task == "nlvr2" else 3)
        for name in [n for n in made if f"text_encoder{copy}." in n and ".crossattention.self." in n]:
            number = int(name.split(".")[3])
            if s.layers == 5 and (number - s.text_layers) % 2 and (".key." in name or ".value." in name):
                made[name] = made[name.replace(f"layer.{number}.", f"layer.{number - 1}.")]
    if task == "text_assignment":
        linear("ta_head", s.text_width, 3)
    if task == "vqa":  # a BERT of its own, all of whose layers look at the question
        decoder = albef_weights(replace(s, image_width=s.text_width, text_layers=0, layers=2), seed + 2)
        made |= {
            n.replace("text_encoder", "text_decoder", 1): w for n, w in decoder.items() if n.startswith("text_encoder")
        }
    return made


class PlainAlbef:
    """ALBEF's encoders and heads, one equation after the other, in float64. copy: `_m` for its EMA model."""

    def __init__(self, weights: Weights, sizes: Sizes, copy: str = ""):
        named = {n: n.replace("text_encoder.", "text_encoder.bert.", 1) for n in weights if ".bert." not in n}
        named |= {n: n for n in weights if ".cls." in n}
        self.weights = {named.get(n, n): w.double() if w.is_floating_point() else w for n, w in weights.items()}
        self.sizes, self.copy = sizes, copy

    def image(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised -> tokens: a pre-norm ViT."""
        s, name = self.sizes, f"visual_encoder{self.copy}"
        side = s.image // s.patch
        patches = pixels.double().reshape(len(pixels), 3, side, s.patch, side, s.patch).permute(0, 2, 4, 1, 3, 5)
        kernel = self.weights[f"{name}.patch_embed.proj.weight"].reshape(s.image_width, -1)
        x = patches.reshape(len(pixels), side * side, -1) @ kernel.T + self.weights[f"{name}.patch_embed.proj.bias"]
        start = self.weights[f"{name}.cls_token"].expand(len(x), -1, -1)
        x = torch.cat([start, x], dim=1) + self.weights[f"{name}.pos_embed"]
        for block in (f"{name}.blocks.{n}" for n in range(s.image_layers)):
            y = self.norm(x, f"{block}.norm1", 1e-6)
            q, k, v = self.linear(y, f"{block}.attn.qkv").chunk(3, dim=-1)
            x = x + self.linear(attend(q, k, v, s.image_heads), f"{block}.attn.proj")
            y = gelu(self.linear(self.norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
            x = x + self.linear(y, f"{block}.mlp.fc2")
        return self.norm(x, f"{name}.norm", 1e-6)

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        name = f"text_encoder{self.copy}.bert.embeddings"
        x = self.weights[f"{name}.word_embeddings.weight"][ids]
        x = x + self.weights[f"{name}.token_type_embeddings.weight"][0]
        x = x + self.weights[f"{name}.position_embeddings.weight"][: ids.shape[1]]
        return self.layers(self.norm(x, f"{name}.LayerNorm", 1e-12), mask, range(self.sizes.text_layers))

    def fuse(self, text: Tensor, mask: Tensor, *images: Tensor) -> Tensor:
        """Of two images the layers look at each in turn."""
        return self.layers(text, mask, range(self.sizes.text_layers, self.sizes.layers), images)

    def first_word(self, start_id: int, question: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, vocabulary) of an answer's first token."""
        name = f"text_decoder{self.copy}.bert.embeddings"
        x = (
            self.weights[f"{name}.word_embeddings.weight"][start_id]
            + self.weights[f"{name}.token_type_embeddings.weight"][0]
        )
        x = self.norm(x + self.weights[f"{name}.position_embeddings.weight"][0], f"{name}.LayerNorm", 1e-12)
        x = x.expand(len(question), 1, -1)
        seen = torch.ones(len(question), 1, dtype=torch.bool)
        x = self.layers(x, seen, range(2), (question,), mask, f"text_decoder{self.copy}")
        return self.words_of(x[:, 0], f"text_decoder{self.copy}.cls.predictions")

    def classes(self, fused: Tensor) -> Tensor:
        return self.linear(self.linear(fused[:, 0], f"cls_head{self.copy}.0").relu(), f"cls_head{self.copy}.2")

    def layers(
        self,
        x: Tensor,
        mask: Tensor,
        numbers: range,
        seen: tuple[Tensor, ...] = (),
        seen_mask: Tensor | None = None,
        stack: str = "",
    ) -> Tensor:
        """BERT's post-norm layers, those of the fusion encoder with cross attention between the two."""
        for number in numbers:
            layer = f"{stack or f'text_encoder{self.copy}'}.bert.encoder.layer.{number}"
            x = self.attention(x, x, f"{layer}.attention", mask)
            if seen:
                x = self.attention(x, seen[(number - numbers[0]) % len(seen)], f"{layer}.crossattention", seen_mask)
            y = self.linear(gelu(self.linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
            x = self.norm(x + y, f"{layer}.output.LayerNorm", 1e-12)
        return x

    def attention(self, x: Tensor, seen: Tensor, name: str, mask: Tensor | None = None) -> Tensor:
        q = self.linear(x, f"{name}.self.query")
        k, v = (self.linear(seen, f"{name}.self.{part}") for part in ("key", "value"))
        y = self.linear(attend(q, k, v, self.sizes.text_heads, mask), f"{name}.output.dense")
        return self.norm(x + y, f"{name}.output.LayerNorm", 1e-12)

    def embed(self, tokens: Tensor, head: str) -> Tensor:
        """head: vision_proj or text_proj."""
        made = self.linear(tokens[:, 0], head + self.copy)
        return made / made.norm(dim=-1, keepdim=True)

    def match(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        return self.linear(self.fuse(text, mask, image)[:, 0], "itm_head")

    def fill(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Logits (B, L, vocabulary) at every token."""
        return self.words_of(self.fuse(self.text(ids, mask), mask, image), f"text_encoder{self.copy}.cls.predictions")

    def words_of(self, hidden: Tensor, name: str) -> Tensor:
        hidden = gelu(self.linear(hidden, f"{name}.transform.dense"))
        hidden = self.norm(hidden, f"{name}.transform.LayerNorm", 1e-12)
        return hidden @ self.weights[f"{name}.decoder.weight"].T + self.weights[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str, epsilon: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return centred / deviation * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """mask: (B, M), true for tokens that are seen."""
    parts = []
    for queries, keys, values in zip(*(x.chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
        scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        parts.append(scores.softmax(-1) @ values)
    return torch.cat(parts, dim=-1)
