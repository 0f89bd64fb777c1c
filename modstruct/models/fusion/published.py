"""The published files of BERT and ALBEF: their names and ours, both ways."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from modstruct.errors import refuse, require
from modstruct.models.fusion.backbone import Backbone, interpolate_positions
from modstruct.models.fusion.ema import EMA

QUEUE = "queue."

# ALBEF's prefixes -> ours. Its EMA weights have `_m` after the first word.
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
LEFT_OUT = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "embeddings.position_ids")
# What its pre-training model keeps EMA weights of.
AVERAGED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
_ALBEF_EMA = re.compile(rf"^({'|'.join(AVERAGED)})_m\.")
_LAYER = re.compile(r"backbone\.(?:text|fusion)\.layer\.")
_CROSS_ATTENTION = re.compile(r"^text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.crossattention\.")
# Ours alone: heads of deep feature separation, EMA weights of what ALBEF keeps none of.
_OURS_ALONE = ("independent_head", f"{EMA}logit_scale", f"{EMA}matching_head.")


def is_albef(weights: dict[str, Tensor]) -> bool:
    """Whether weights have ALBEF's names."""
    return any(name.startswith(("visual_encoder.", "text_encoder.")) for name in weights)


def text_layers_of(weights: dict[str, Tensor]) -> int:
    """Layers of ALBEF's BERT below the first one with cross attention."""
    found = [int(match[1]) for match in map(_CROSS_ATTENTION.match, weights) if match]
    require(bool(found), "ALBEF's weights", sorted(weights)[:3], "no layer of text_encoder has cross attention")
    return min(found)


def from_albef(weights: dict[str, Tensor], text_layers: int | None = None) -> dict[str, Tensor]:
    """Weights of ALBEF's pre-training model, named and shaped as ours.

    text_layers: layers of BERT that read the text alone, by default those without cross attention. The temperature
    becomes the log of the logit scale; queues (D, Q) become (Q, D), full, of images that occur nowhere else. Names
    without a counterpart raise ValueError.
    """
    text_layers = text_layers_of(weights) if text_layers is None else text_layers
    ours = {}
    for name, value in weights.items():
        if name.endswith(LEFT_OUT):
            continue
        if name == "temp":
            ours["logit_scale"] = -value.reshape(1).log()
        elif name == "queue_ptr":
            both = {"image_queue", "text_queue"} <= weights.keys()
            require(both, "ALBEF's weights", name, "image_queue and text_queue belong to it; give a file that is whole")
            ours[f"{QUEUE}counts"] = torch.cat([value.reshape(1), torch.tensor([weights["image_queue"].shape[1]])])
        elif name in ("image_queue", "text_queue"):
            ours[QUEUE + name.removesuffix("_queue")] = value.T.contiguous()
            ours[f"{QUEUE}ids"] = -1 - torch.arange(value.shape[1])
        else:
            momentum = _ALBEF_EMA.match(name)
            plain = _ALBEF_EMA.sub(r"\1.", name)
            ours[(EMA if momentum else "") + _ours(plain, text_layers)] = value
    return ours


def _ours(name: str, text_layers: int) -> str:
    given = name
    if name.startswith("text_encoder.") and not name.startswith(("text_encoder.bert.", "text_encoder.cls.")):
        name = name.replace("text_encoder.", "text_encoder.bert.", 1)  # as its fine-tuned files have it
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        refuse("ALBEF's weights", name, "no such weight in our model of pre-training")
    name = PREFIXES[prefix] + name.removeprefix(prefix)
    if not name.startswith("backbone.layer."):
        return name
    number = name.split(".")[2]
    require(number.isdecimal(), "ALBEF's weights", given, "no number of a layer stands there")
    return name.replace("backbone.layer.", f"backbone.{'text' if int(number) < text_layers else 'fusion'}.layer.", 1)


def to_albef(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ours, named and shaped as ALBEF's pre-training model has them: the inverse of `from_albef`.

    Independent heads, which ALBEF lacks, are left out; missing EMA weights start from the weights; a
    queue that is not full yet is filled with random vectors, as ALBEF's starts. Without a queue, load the file into
    ALBEF's model with strict=False. Names without a counterpart raise ValueError.
    """
    theirs, queue = {}, {}
    for name, value in weights.items():
        if any(part in name for part in _OURS_ALONE):
            continue
        if name == "logit_scale":
            theirs["temp"] = (-value).exp().reshape(())
        elif name.startswith(QUEUE):
            queue[name.removeprefix(QUEUE)] = value
        else:
            plain = _theirs(name.removeprefix(EMA))
            theirs[_ema_name(plain) if name.startswith(EMA) else plain] = value
    for name in [name for name in theirs if name.split(".")[0] in AVERAGED]:
        theirs.setdefault(_ema_name(name), theirs[name])
    if queue and len(queue["image"]):
        theirs |= _queue_of_albef(queue)
    for encoder in ("text_encoder", "text_encoder_m"):
        embeddings, predictions = f"{encoder}.bert.embeddings", f"{encoder}.cls.predictions"
        theirs[f"{embeddings}.position_ids"] = torch.arange(len(theirs[f"{embeddings}.position_embeddings.weight"]))[
            None
        ]
        if f"{predictions}.bias" in theirs:
            theirs[f"{predictions}.decoder.bias"] = theirs[f"{predictions}.bias"]
            theirs[f"{predictions}.decoder.weight"] = theirs[f"{embeddings}.word_embeddings.weight"]
    return theirs


def _ema_name(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{first}_m.{rest}"


def _queue_of_albef(queue: dict[str, Tensor]) -> dict[str, Tensor]:
    place, filled = queue["counts"].tolist()
    made = {"queue_ptr": torch.tensor([place])}
    generator = torch.Generator().manual_seed(0)
    for modality in ("image", "text"):
        rows = queue[modality].clone()
        rows[filled:] = F.normalize(torch.randn(rows[filled:].shape, generator=generator), dim=1)
        made[f"{modality}_queue"] = rows.T.contiguous()
    return made


def _theirs(name: str) -> str:
    name = _LAYER.sub("backbone.layer.", name)
    prefix = next((theirs for theirs, ours in PREFIXES.items() if name.startswith(ours)), None)
    if prefix is None:
        refuse("weights", name, "no such weight in ALBEF's pre-training model")
    return prefix + name.removeprefix(PREFIXES[prefix])


def fit_positions(weights: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The same weights, EMA weights included, with the backbone's positions: those of the image encoder interpolated to
    its grid, those of the text cut to its context length."""
    encoder, words = backbone.image, backbone.words.position_embeddings.weight
    fitted = dict(weights)
    for prefix in ("", EMA):
        name = f"{prefix}backbone.image.pos_embed"
        if name in fitted:
            fitted[name] = interpolate_positions(fitted[name], encoder)
        name = f"{prefix}backbone.words.position_embeddings.weight"
        if name in fitted:
            fitted[name] = fitted[name][: len(words)]
    return fitted
