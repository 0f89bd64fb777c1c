"""The published files of ALBEF, of pre-training and of its tasks: their names and ours, both ways."""

from __future__ import annotations

import logging
import re

import torch
from torch import Tensor
from torch.nn import functional as F

from modstruct.errors import refuse, require
from modstruct.models.fusion.backbone import Backbone, interpolate_positions
from modstruct.models.fusion.ema import EMA

log = logging.getLogger("modstruct")
QUEUE = "queue."

# ALBEF's prefixes -> ours, of its pre-training model and of its tasks'. Its EMA weights have `_m` after the first word.
PREFIXES = {
    "visual_encoder.": "backbone.image.",
    "text_encoder.bert.embeddings.": "backbone.words.",
    "text_encoder.bert.encoder.layer.": "backbone.layer.",
    "text_encoder.cls.predictions.transform.": "language_head.transform.",
    "text_encoder.cls.predictions.bias": "language_head.bias",
    "vision_proj.": "image_head.",
    "text_proj.": "text_head.",
    "itm_head.": "matching_head.",
    "text_decoder.bert.embeddings.": "words.",
    "text_decoder.bert.encoder.layer.": "decoder.layer.",
    "text_decoder.cls.predictions.transform.": "head.transform.",
    "text_decoder.cls.predictions.bias": "head.bias",
    "cls_head.": "head.",
    "ta_head.": "ta_head.",  # one layer, where our text assignment has the head of the other tasks: no model takes it
}
# Held twice in ALBEF's files, or no weights: tied to the word vectors and to the bias; numbers of positions.
LEFT_OUT = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "embeddings.position_ids")
# What its models keep EMA weights of.
AVERAGED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "text_decoder", "cls_head")
_ALBEF_EMA = re.compile(rf"^({'|'.join(AVERAGED)})_m\.")
_LAYER = re.compile(r"backbone\.(?:text|fusion)\.layer\.")
# Both blocks of an NLVR2 layer, layers 2 i and 2 i + 1 of ALBEF's, have the first one's keys and values.
_PAIR_BLOCK = re.compile(r"backbone\.fusion\.(left|right)\.(\d+)\.(.+)")
_SHARED = re.compile(r"crossattention\.self\.(?:key|value)\.")
_CROSS_ATTENTION = re.compile(r"^text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.crossattention\.")
# Ours alone: heads of deep feature separation, EMA weights of what ALBEF keeps none of.
_OURS_ALONE = ("independent_head", f"{EMA}logit_scale", f"{EMA}matching_head.")
# Their numbers of images mean nothing in our data: below 0, where no image of ours is; these are places never filled.
_NEVER_FILLED = -(1 << 40)


def is_albef(weights: dict[str, Tensor]) -> bool:
    """Whether weights have ALBEF's names."""
    return any(name.startswith(("visual_encoder.", "text_encoder.")) for name in weights)


def text_layers_of(weights: dict[str, Tensor]) -> int:
    """Layers of ALBEF's BERT below the first one with cross attention."""
    found = [int(match[1]) for match in map(_CROSS_ATTENTION.match, weights) if match]
    require(bool(found), "ALBEF's weights", sorted(weights)[:3], "no layer of text_encoder has cross attention")
    return min(found)


def from_albef(weights: dict[str, Tensor], text_layers: int | None = None) -> dict[str, Tensor]:
    """Weights of ALBEF's pre-training model or of one of its tasks', named and shaped as ours.

    text_layers: layers of BERT that read the text alone, by default those without cross attention. The temperature
    becomes the log of the logit scale; queues (D, Q) become (Q, D), full, of images that occur nowhere else. Two layers
    with the same keys and values become both blocks of one (text assignment, NLVR2). Names without a counterpart raise
    ValueError.
    """
    text_layers = text_layers_of(weights) if text_layers is None else text_layers
    doubled = _is_doubled(weights)
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
            ours.setdefault(f"{QUEUE}ids", -1 - torch.arange(value.shape[1]))
        elif name == "idx_queue":
            ids, places = value.reshape(-1).long(), torch.arange(value.numel())
            ours[f"{QUEUE}ids"] = torch.where(ids >= 0, -1 - ids, _NEVER_FILLED - places)
        else:
            momentum = _ALBEF_EMA.match(name)
            plain = _ours(_ALBEF_EMA.sub(r"\1.", name), text_layers, doubled)
            if plain is not None:
                ours[(EMA if momentum else "") + plain] = value
    return ours


def _is_doubled(weights: dict[str, Tensor]) -> bool:
    """Whether each two fusion layers in a row share the keys and values of their cross attention."""
    keys = {
        int(match[1]): value
        for name, value in weights.items()
        if name.endswith(".crossattention.self.key.weight") and (match := _CROSS_ATTENTION.match(name))
    }
    ordered = [keys[number] for number in sorted(keys)]
    pairs = list(zip(ordered[::2], ordered[1::2], strict=False))
    return len(ordered) == 2 * len(pairs) > 0 and all(torch.equal(left, right) for left, right in pairs)


def _ours(name: str, text_layers: int, doubled: bool) -> str | None:
    """Our name; None for keys and values of a second block, which are the first one's."""
    given = name
    if name.startswith("text_encoder.") and not name.startswith(("text_encoder.bert.", "text_encoder.cls.")):
        name = name.replace("text_encoder.", "text_encoder.bert.", 1)  # as its fine-tuned files have it
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    if prefix is None:
        refuse("ALBEF's weights", name, "no such weight in our model of pre-training, nor in those of the tasks")
    name = PREFIXES[prefix] + name.removeprefix(prefix)
    if not name.startswith("backbone.layer."):
        return name
    written, _, rest = name.removeprefix("backbone.layer.").partition(".")
    require(written.isdecimal(), "ALBEF's weights", given, "no number of a layer stands there")
    number = int(written)
    if number < text_layers:
        return f"backbone.text.layer.{number}.{rest}"
    if not doubled:
        return f"backbone.fusion.layer.{number}.{rest}"
    layer, second = divmod(number - text_layers, 2)
    if second and _SHARED.match(rest):
        return None
    return f"backbone.fusion.{'right' if second else 'left'}.{text_layers + layer}.{rest}"


def to_albef(weights: dict[str, Tensor], fine_tuned: bool | None = None) -> dict[str, Tensor]:
    """Weights of ours, named and shaped as ALBEF's models have them: the inverse of `from_albef`.

    fine_tuned: whether they are a task's, whose names are others and which have no head of masked language modelling;
    by default whether they lack that head. Independent heads, which ALBEF lacks, and the head of our text assignment,
    which has a layer more than ALBEF's, are left out, as the log says; missing EMA weights start from the weights; a
    queue that is not full yet is filled with random vectors, as ALBEF's starts. Without a queue, load the file into
    ALBEF's model with strict=False. Names without a counterpart raise ValueError.
    """
    if fine_tuned is None:
        fine_tuned = "language_head.bias" not in weights
    first_fusion = min((int(match[2]) for match in map(_PAIR_BLOCK.match, weights) if match), default=None)
    assignment = first_fusion is not None and len(weights.get("head.2.bias", ())) != 2  # of NLVR2 it is true or false
    without = (*(["head."] if assignment else []), *(["language_head."] if fine_tuned else []))
    theirs, queue, left_out = {}, {}, set()
    for name, value in weights.items():
        plain = name.removeprefix(EMA)
        if any(part in name for part in _OURS_ALONE) or plain.startswith(without):
            left_out.add(".".join(name.split(".")[: 2 if plain != name else 1]))
            continue
        if name == "logit_scale":
            theirs["temp"] = (-value).exp().reshape(())
        elif name.startswith(QUEUE):
            queue[name.removeprefix(QUEUE)] = value
        else:
            for their in _theirs(plain, first_fusion):
                theirs[_ema_name(their) if plain != name else their] = value
    if left_out:
        log.warning("Left out, since ALBEF's model has none: %s", ", ".join(sorted(left_out)))
    for name in [name for name in theirs if name.split(".")[0] in AVERAGED and not assignment]:
        theirs.setdefault(_ema_name(name), theirs[name])
    if queue and len(queue["image"]):
        theirs |= _queue_of_albef(queue, with_ids=fine_tuned)
    for encoder in ("text_encoder", "text_encoder_m", "text_decoder", "text_decoder_m"):
        embeddings, predictions = f"{encoder}.bert.embeddings", f"{encoder}.cls.predictions"
        positions = theirs.get(f"{embeddings}.position_embeddings.weight")
        if positions is not None:
            theirs[f"{embeddings}.position_ids"] = torch.arange(len(positions))[None]
        if f"{predictions}.bias" in theirs:
            theirs[f"{predictions}.decoder.bias"] = theirs[f"{predictions}.bias"]
            theirs[f"{predictions}.decoder.weight"] = theirs[f"{embeddings}.word_embeddings.weight"]
    if not fine_tuned:
        return theirs
    return {re.sub(r"^(text_encoder(?:_m)?)\.bert\.", r"\1.", name): value for name, value in theirs.items()}


def _ema_name(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"{first}_m.{rest}"


def _queue_of_albef(queue: dict[str, Tensor], with_ids: bool) -> dict[str, Tensor]:
    place, filled = queue["counts"].tolist()
    made = {"queue_ptr": torch.tensor([place])}
    generator = torch.Generator().manual_seed(0)
    for modality in ("image", "text"):
        rows = queue[modality].clone()
        rows[filled:] = F.normalize(torch.randn(rows[filled:].shape, generator=generator), dim=1)
        made[f"{modality}_queue"] = rows.T.contiguous()
    if with_ids:
        known = (queue["ids"] < 0) & (queue["ids"] > _NEVER_FILLED) & (torch.arange(len(queue["ids"])) < filled)
        made["idx_queue"] = torch.where(known, -1 - queue["ids"], -100)[None]
    return made


def _theirs(name: str, first_fusion: int | None) -> list[str]:
    """ALBEF's names of a weight of ours: two of keys and values that two blocks share."""
    if block := _PAIR_BLOCK.match(name):
        assert first_fusion is not None  # the smallest number of such a name
        side, number, rest = block.groups()
        layer = 2 * int(number) - first_fusion
        layers = [layer, layer + 1] if _SHARED.match(rest) else [layer + (side == "right")]
        return [f"text_encoder.bert.encoder.layer.{one}.{rest}" for one in layers]
    name = _LAYER.sub("backbone.layer.", name)
    prefix = next((theirs for theirs, ours in PREFIXES.items() if name.startswith(ours)), None)
    if prefix is None:
        refuse("weights", name, "no such weight in ALBEF's models")
    return [prefix + name.removeprefix(PREFIXES[prefix])]


def fit_positions(weights: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The same weights, EMA weights included, with the backbone's positions: those of the image encoder interpolated to
    its grid, those of the text, and of an answer decoder, cut to its context length."""
    encoder, words = backbone.image, backbone.words.position_embeddings.weight
    fitted = dict(weights)
    for prefix in ("", EMA):
        name = f"{prefix}backbone.image.pos_embed"
        if name in fitted:
            fitted[name] = interpolate_positions(fitted[name], encoder)
        for name in (f"{prefix}{part}words.position_embeddings.weight" for part in ("backbone.", "")):
            if name in fitted:
                fitted[name] = fitted[name][: len(words)]
    return fitted
