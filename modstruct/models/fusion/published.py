"""The published files of BERT and ALBEF: their names and ours, both ways."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct.checkpoints.weight_files import read_weight_file
from modstruct.distributed import main_first
from modstruct.errors import refuse, require
from modstruct.models.fusion.ema import EMA
from modstruct.models.fusion.vision import interpolate_positions

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
LEFT_OUT = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "embeddings.position_ids")
# What its pre-training model has a momentum copy of.
COPIED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
_EMA_NAME = re.compile(rf"^({'|'.join(COPIED)})_m\.")
_LAYER = re.compile(r"backbone\.(?:text|fusion)\.layer\.")
_CROSS_ATTENTION = re.compile(r"^text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.crossattention\.")
# Ours alone: heads of deep feature separation, momentum copies of what ALBEF keeps none of.
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
    that ours has no counterpart of raise ValueError.
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
            momentum = _EMA_NAME.match(name)
            plain = _EMA_NAME.sub(r"\1.", name)
            ours[(EMA if momentum else "") + _ours(plain, text_layers)] = value
    return ours


def _ours(name: str, text_layers: int) -> str:
    given = name
    if name.startswith("text_encoder.") and not name.startswith(("text_encoder.bert.", "text_encoder.cls.")):
        name = name.replace("text_encoder.", "text_encoder.bert.", 1)  # as its fine-tuned files have it
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    require(prefix is not None, "ALBEF's weights", name, "no such weight in our model of pre-training")
    name = PREFIXES[prefix] + name.removeprefix(prefix)
    if not name.startswith("backbone.layer."):
        return name
    number = name.split(".")[2]
    require(number.isdecimal(), "ALBEF's weights", given, "no number of a layer stands there")
    return name.replace("backbone.layer.", f"backbone.{'text' if int(number) < text_layers else 'fusion'}.layer.", 1)


def to_albef(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ours, named and shaped as ALBEF's pre-training model has them: the inverse of `from_albef`.

    Independent heads, which ALBEF has not, are left out; momentum copies that are not there start from the weights; a
    queue that is not full yet is filled as ALBEF's starts, with random vectors. Without a queue ALBEF's own are to be
    loaded with strict=False. Names that ALBEF has no counterpart of raise ValueError.
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
            theirs[_copied(plain) if name.startswith(EMA) else plain] = value
    for name in [name for name in theirs if name.split(".")[0] in COPIED]:
        theirs.setdefault(_copied(name), theirs[name])
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


def _copied(name: str) -> str:
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
    require(prefix is not None, "weights", name, "no such weight in ALBEF's pre-training model")
    return prefix + name.removeprefix(PREFIXES[prefix])


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
    """The same weights, momentum's too, with the positions of the model: those of the image encoder interpolated to its
    grid, those of the text cut to its context length."""
    encoder, words = model.backbone.image, model.backbone.words.position_embeddings.weight
    fitted = dict(weights)
    for prefix in ("", EMA):
        name = f"{prefix}backbone.image.pos_embed"
        if name in fitted and fitted[name].shape != encoder.pos_embed.shape:
            fitted[name] = interpolate_positions(fitted[name], encoder)
        name = f"{prefix}backbone.words.position_embeddings.weight"
        if name in fitted:
            fitted[name] = fitted[name][: len(words)]
    return fitted
