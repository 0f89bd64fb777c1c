"""The layers of the towers, from input to output: which of them learn, and at what rate."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from modstruct.config import ModelConfig
from modstruct.errors import refuse, require
from modstruct.models.norms import BatchNorm
from modstruct.models.protocol import TrainableModel

BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layer)\.(\d+)\.|(?:^|\.)layer([1-4])\.")
"""In the name of a weight of open_clip's or timm's transformer, BERT, or a ResNet of four groups."""


@dataclass(frozen=True)
class Place:
    """Of a weight in its tower: 0 before the first layer, 1 to `layers` in one, layers + 1 after the last."""

    tower: str
    layer: int
    layers: int


def places(model: TrainableModel) -> dict[str, Place]:
    """Of all weights of the towers' trunks, by their names. A weight is before or after the layers as its module is.

    A tower whose numbers fall back, of stages that count their blocks anew (ConvNeXt, Swin), has no layers that are
    known: 0.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, Place] = {}
    for tower, trunk in model.trunks().items():
        layer, of_trunk, in_order = 0, {}, True
        for name, parameter in trunk.named_parameters():
            matched = BLOCK.search(name)
            if matched:
                before, layer = layer, int(matched[1]) + 1 if matched[1] else int(matched[2])
                in_order &= layer >= before
            of_trunk[names[id(parameter)]] = layer if matched or not layer else layer + 1
        if not in_order:
            layer, of_trunk = 0, dict.fromkeys(of_trunk, 0)
        found |= {name: Place(tower, number, layer) for name, number in of_trunk.items()}
    return found


def layers_of(trunk: nn.Module) -> list[nn.Module]:
    """The numbered layers of a trunk, as BLOCK knows them; none of a ResNet, which has groups."""
    found = ((module, BLOCK.search(f"{name}.")) for name, module in trunk.named_modules())
    return [module for module, matched in found if matched and matched[1] and matched.end() == len(matched.string)]


def lock_layers(model: TrainableModel, config: ModelConfig) -> None:
    """Take the locked layers of two towers, and with all of a tower its shared head, out of training.

    Raises ValueError that names the field where a tower has fewer layers, none that are known, or BatchNorm.
    """
    wanted = {"image": config.unlocked_image_layers, "text": config.unlocked_text_layers}
    known, trunks = places(model), model.trunks()
    for tower, unlocked in wanted.items():
        if unlocked is None:
            continue
        field = f"model.unlocked_{tower}_layers"
        if any(isinstance(module, BatchNorm) for module in trunks[tower].modules()):
            refuse(field, unlocked, "BatchNorm's statistics would go on learning in a locked tower; give null")
        layers = max((place.layers for place in known.values() if place.tower == tower), default=0)
        is_known, remedy = layers > 0 or unlocked == 0, "the layers of this architecture are not known; give 0 or null"
        require(is_known, field, unlocked, remedy)
        require(unlocked <= layers, field, unlocked, f"at most {layers}, the layers of the {tower} tower")
        for name, parameter in model.named_parameters():
            place = known.get(name)
            if place is not None and place.tower == tower:
                parameter.requires_grad_(place.layer > layers - unlocked if unlocked else False)
            elif name.startswith(f"{tower}.head."):
                parameter.requires_grad_(unlocked > 0)


def rate_factors(model: TrainableModel, decay: float) -> dict[str, float]:
    """By name of a weight, what multiplies its learning rate: decay for each layer that lies after its own (Bao et al.
    2022, "BEiT"; Fini et al. and EVA-CLIP likewise), 1 for heads and learnt numbers.

    Raises ValueError naming optimizer.layer_decay for a fusion model, and where a tower's layers are not known.
    """
    remedy = "a fusion model's encoders are no rows of layers of their own; give 1"
    require(model.trunks().keys() <= {"image", "text"}, "optimizer.layer_decay", decay, remedy)
    known = places(model)
    unknown = {place.tower for place in known.values() if place.layers == 0}
    remedy = f"the layers of the {' and '.join(sorted(unknown))} tower are not known; give 1"
    require(not unknown, "optimizer.layer_decay", decay, remedy)
    return {name: decay ** (place.layers + 1 - place.layer) for name, place in known.items()}
