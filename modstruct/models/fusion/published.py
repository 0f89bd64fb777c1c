"""The published files of BERT and ALBEF: their names and ours, both ways."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from modstruct.config import refuse, require
from modstruct.distributed import main_first
from modstruct.models.fusion.momentum import MOMENTUM
from modstruct.models.fusion.vision import interpolate_positions
from modstruct.weight_files import read_weight_file

QUEUE = "queue."

# ALBEF's prefixes -> ours. Its momentum copies have `_m` after the first word.
PREFIXES = {
    "visual_encoder.": "backbone.image.",
    "text_encoder.bert.embeddings.": "backbone.words.",
    "text_encoder.bert.encoder.layer.": "backbone.layer.",
    "text_encoder.cls.predictions.transform.": "language_head.transform.",
    "text_encoder.cls.predictions.bias": "language_head.bias",
    "vision_proj.": "image_head.",
    "text_proj.": "text_head.",
    "itm_head.": "matching_head.",
}
# Held twice in ALBEF's files, or no weights: tied to the word vectors and to the bias; numbers of positions.
LEFT_OUT = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "embeddings.position_ids", "queue_ptr")
_MOMENTUM_NAME = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.")
_LAYER = re.compile(r"backbone\.(?:text|fusion)\.layer\.")


def from_albef(weights: dict[str, Tensor], text_layers: int) -> dict[str, Tensor]:
    """Weights of ALBEF's pre-training model, named and shaped as ours.

    text_layers: layers of BERT that read the text alone. The temperature becomes the log of the logit scale; queues
    (D, Q) become (Q, D). Names that ours has no counterpart of raise ValueError.
    """
    ours = {}
    for name, value in weights.items():
        if name.endswith(LEFT_OUT):
            continue
        if name == "temp":
            ours["logit_scale"] = -value.reshape(1).log()
        elif name in ("image_queue", "text_queue"):
            ours[QUEUE + name.removesuffix("_queue")] = value.T.contiguous()
        else:
            momentum = _MOMENTUM_NAME.match(name)
            plain = _MOMENTUM_NAME.sub(r"\1.", name)
            ours[(MOMENTUM if momentum else "") + _ours(plain, text_layers)] = value
    return ours


def _ours(name: str, text_layers: int) -> str:
    if name.startswith("text_encoder.") and not name.startswith(("text_encoder.bert.", "text_encoder.cls.")):
        name = name.replace("text_encoder.", "text_encoder.bert.", 1)  # as its fine-tuned files have it
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    require(prefix is not None, "ALBEF's weights", name, "no such weight in our model")
    name = PREFIXES[prefix] + name.removeprefix(prefix)
    if not name.startswith("backbone.layer."):
        return name
    number = int(name.split(".")[2])
    return name.replace("backbone.layer.", f"backbone.{'text' if number < text_layers else 'fusion'}.layer.", 1)


def to_albef(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_albef`; independent heads, which ALBEF has not, are left out."""
    theirs = {}
    for name, value in weights.items():
        if "independent_head" in name or name.startswith(QUEUE + "ids") or name == MOMENTUM + "logit_scale":
            continue
        if name == "logit_scale":
            theirs["temp"] = (-value).exp().reshape(())
        elif name in (f"{QUEUE}image", f"{QUEUE}text"):
            theirs[f"{name.removeprefix(QUEUE)}_queue"] = value.T.contiguous()
        elif not name.startswith(QUEUE) and not name.startswith(f"{MOMENTUM}matching_head."):
            plain = _theirs(name.removeprefix(MOMENTUM))
            copied = re.sub(r"^(\w+)\.", r"\1_m.", plain) if name.startswith(MOMENTUM) else plain
            theirs[copied] = value
    for suffix in ("", "_m"):
        encoder = f"text_encoder{suffix}"
        if f"{encoder}.cls.predictions.bias" in theirs:
            theirs[f"{encoder}.cls.predictions.decoder.bias"] = theirs[f"{encoder}.cls.predictions.bias"]
            words = theirs[f"{encoder}.bert.embeddings.word_embeddings.weight"]
            theirs[f"{encoder}.cls.predictions.decoder.weight"] = words
    return theirs


def _theirs(name: str) -> str:
    name = _LAYER.sub("backbone.layer.", name)
    theirs, ours = next((theirs, ours) for theirs, ours in PREFIXES.items() if name.startswith(ours))
    return theirs + name.removeprefix(ours)


def load_bert(backbone: nn.Module, source: str) -> None:
    """A BERT's weights into words, text and fusion layers; cross attention stays as it is.

    source: a file, or a name on transformers' hub. Raises ValueError, naming fusion.text.pretrained.
    """
    weights = read_weight_file(source, "fusion.text.pretrained") if Path(source).expanduser().exists() else _hub(source)
    found = {}
    for name, value in weights.items():
        name = name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")
        if name.startswith("embeddings.") and not name.endswith("position_ids"):
            found[name.replace("embeddings.", "words.", 1)] = value
        elif name.startswith("encoder.layer."):
            number = name.split(".")[2]
            part = "text" if number in backbone.text.layer else "fusion"
            found[name.replace("encoder.", f"{part}.", 1)] = value
    positions = backbone.words.position_embeddings.weight
    if "words.position_embeddings.weight" in found:
        found["words.position_embeddings.weight"] = found["words.position_embeddings.weight"][: len(positions)]
    own = backbone.words.word_embeddings.weight
    words = found.get("words.word_embeddings.weight")
    if words is not None and len(words) < len(own):  # a mask or padding id of our tokenizer's own
        found["words.word_embeddings.weight"] = torch.cat([words, own.detach()[len(words) :]])
    expected = {name: value for name, value in backbone.state_dict().items() if not name.startswith("image.")}
    expected = {name: value for name, value in expected.items() if ".crossattention." not in name}
    wrong = sorted(expected.keys() - found.keys())
    wrong += [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
    remedy = "belongs to another BERT: check fusion.text's sizes and the tokenizer's vocabulary; it differs in"
    require(not wrong, "fusion.text.pretrained", source, f"{remedy} {wrong[:5]}")
    backbone.load_state_dict({name: found[name] for name in expected}, strict=False)


def _hub(name: str) -> dict[str, Tensor]:
    from transformers import AutoModel

    def fetch() -> dict[str, Tensor]:
        try:
            return AutoModel.from_pretrained(name, use_safetensors=True).state_dict()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            refuse("fusion.text.pretrained", name, f"neither a file nor on transformers' hub ({reason})")

    return main_first(fetch)


def fit_positions(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same weights with the positions of the image encoder, momentum's too, interpolated to the model's grid."""
    encoder = model.backbone.image
    fitted = dict(weights)
    for name in ("backbone.image.pos_embed", f"{MOMENTUM}backbone.image.pos_embed"):
        if name in fitted and fitted[name].shape != encoder.pos_embed.shape:
            fitted[name] = interpolate_positions(fitted[name], encoder)
    return fitted
