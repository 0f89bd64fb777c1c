"""The model that a recipe describes, of either framework, and how its trunks are executed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modstruct import checkpoints, distributed
from modstruct.config import Recipe
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.tokenizers import Tokenizer, load_tokenizer
from modstruct.errors import refuse, require
from modstruct.losses.objective import Objective
from modstruct.models import towers
from modstruct.models.layers import layers_of, lock_layers
from modstruct.models.norms import BatchNorm, Float32BatchNorm, keep_norms_in_float32
from modstruct.models.protocol import TrainableModel, copy_into
from modstruct.models.transformers_clip import is_transformers, own_tokenizer
from modstruct.models.two_tower import TwoTower

log = logging.getLogger("modstruct")
SWITCHES = ("grad_checkpointing", "gradient_checkpointing")  # open_clip's and timm's, transformers'


def build_model(
    recipe: Recipe, tokenizer: Tokenizer, objective: Objective, read_weights: bool = True
) -> TrainableModel:
    """Two towers or the fusion model. objective: decides about independent heads and what else is made of a batch.

    read_weights: False leaves the pretrained files that the recipe names unread, since a checkpoint's weights follow.
    """
    if recipe.framework == "fusion":
        from modstruct.models.fusion.backbone import without_files
        from modstruct.models.fusion.initial_weights import start_pretraining
        from modstruct.models.fusion.pretraining import FusionModel

        described = recipe if read_weights else replace(recipe, fusion=without_files(recipe.fusion))
        model = FusionModel(described, tokenizer, objective)
        if described.fusion.init is not None:
            start_pretraining(model, described.fusion.init)
        return model
    config, ours = recipe.model, _run_of_ours(recipe)
    if read_weights and config.pretrained is not None and config.name is None:
        remedy = "no such folder; without model.name give a run, checkpoint or export of ours, or of transformers"
        known = ours is not None or is_transformers(config.pretrained)
        require(known, "model.pretrained", config.pretrained, remedy)
    of_open_clip = config.pretrained if read_weights and not ours else None
    two_tower = TwoTower(replace(config, pretrained=of_open_clip), recipe.views, tokenizer, objective)
    if ours and read_weights:
        _start_from(two_tower, recipe, ours)
    elif of_open_clip:
        kept = ("image.", "text.", "logit_scale") if config.text.architecture == "clip" else ("image.",)
        names = (name for name, _ in two_tower.named_parameters())
        brought = {name for name in names if name.startswith(kept) and ".independent_head." not in name}
        two_tower.new_weights = _learnt(two_tower) - brought
        new = len(two_tower.new_weights)
        log.info("Started from %s: %d pretrained tensors, %d new ones", of_open_clip, len(brought), new)
    lock_layers(two_tower, config)
    if recipe.train.patch_dropout:
        two_tower.drop_patches(recipe.train.patch_dropout)
    return two_tower


def _run_of_ours(recipe: Recipe) -> str | None:
    """The folder that model.pretrained names, if it is one."""
    init = recipe.model.pretrained
    if init is None or (recipe.model.name is not None and "/" not in init) or not Path(init).expanduser().is_dir():
        return None
    if is_transformers(init):
        return None
    remedy = "an export in open_clip's form: give the run, or its open_clip_model.safetensors with model.name"
    require(not Path(init, "open_clip_config.json").expanduser().is_file(), "model.pretrained", init, remedy)
    return init


def _start_from(model: TwoTower, recipe: Recipe, init: str) -> None:
    """Weights of a run, checkpoint or export of ours by our names. Independent heads and the learnt numbers of losses,
    which other losses do not have, keep their initialisation or are left out, as the log says.

    Raises ValueError naming model.pretrained where they belong to another model.
    """
    from modstruct.models.fusion.initial_weights import read_everything, recipe_of

    made_with, ours = recipe_of(init, "model.pretrained", "two_tower"), recipe_to_dict(recipe)
    given, own = read_everything(init, "model.pretrained"), model.state_dict()
    given = {name: value for name, value in given.items() if not name.startswith(checkpoints.EMA)}
    new, left = ([name for name in one if name not in other] for one, other in ((own, given), (given, own)))
    wrong = [name for name in own if name in given and own[name].shape != given[name].shape]
    wrong += [name for name in (*new, *left) if "." in name and "independent_head" not in name]
    wrong += [  # what shapes do not show
        f"{section}.{field}"
        for section, fields in (("model", ("name", "vision", "text")), ("views", ("mean", "std")))
        for field in fields
        if made_with and made_with.get(section, {}).get(field, ours[section][field]) != ours[section][field]
    ]
    if wrong:
        remedy = (
            "belongs to another model: give model.* the sizes, and tokenizer.* the tokenizer, that it was made with"
        )
        refuse("model.pretrained", init, f"{remedy}; they differ in {', '.join(sorted(wrong)[:5])}")
    copy_into(model, own | {name: value for name, value in given.items() if name in own})
    model.new_weights = _learnt(model) & {*new}
    told = {"; new": new, "; left out": left}
    log.info("Started from %s%s", init, "".join(f"{what}: {', '.join(sorted(n))}" for what, n in told.items() if n))


def _learnt(model: TwoTower) -> frozenset[str]:
    return frozenset(name for name, _ in model.named_parameters())


def initial_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer that fusion.init or model.pretrained brings, if it is a run, checkpoint or export of ours."""
    fusion = recipe.framework == "fusion"
    init = recipe.fusion.init if fusion else _run_of_ours(recipe)
    if init is None:
        folder = None if fusion else own_tokenizer(recipe.model.pretrained)
        return load_tokenizer(folder) if folder else None
    from modstruct.models.fusion.initial_weights import tokenizer_of

    return tokenizer_of(init, "fusion.init" if fusion else "model.pretrained")


def image_size(recipe: Recipe) -> int:
    """Side in pixels of the square image that the model takes."""
    if recipe.framework == "fusion":
        return recipe.fusion.vision.image_size
    return towers.image_size(recipe.model)


def log_scale_range(recipe: Recipe) -> tuple[float, float]:
    """Limits of the log of the logit scale."""
    return recipe.fusion.log_scale_range if recipe.framework == "fusion" else (0.0, recipe.model.logit_scale_max)


# --- execution: no name of a weight changes, and what is computed by its precision alone ---


@torch.no_grad()
def cast_but_norms(model: TrainableModel, dtype: torch.dtype) -> None:
    """Weights in half precision; norms' parameters and learnt numbers (the logit scale) stay float32.

    One step of a bfloat16 log of the scale is 3 % of a scale of 100.
    """
    kept = {id(parameter) for parameter in keep_norms_in_float32(model)}
    kept |= {id(model.get_parameter(name)) for name in model.scalar_limits}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)


def autocast_forward(model: TrainableModel, dtype: torch.dtype, sharded: bool = False) -> None:
    """Let the model's forward compute in half precision from float32 weights.

    Inside the forward, since DeepSpeed switches an autocast around its engine off, and its own (torch_autocast) makes
    gradients travel in half precision and leaves a mark in the process for every later engine. sharded: at ZeRO stage
    3, where a cache of all weights' half copies would undo the sharding.
    """
    keep_norms_in_float32(model)
    how = torch.autocast(distributed.device().type, dtype, cache_enabled=not sharded)
    model.forward = how(model.forward)  # type: ignore[method-assign]


@contextmanager
def float32_products(tf32: bool | None) -> Iterator[None]:
    """Products and convolutions of float32 tensors on a GPU: in TF32, or not, or (None) as torch has it, which takes
    TF32 for convolutions alone. As before at the end. The losses' kernels have a precision of their own."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings if tf32 is not None else ():
            setting.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        for setting, earlier in zip(settings, before, strict=True):
            setting.fp32_precision = earlier


def lay_channels_last(model: TrainableModel) -> None:
    """Let images enter ResNets with their channels innermost: a GPU's convolutions want them so, and each layer gives
    its output as it gets its input. Weights stay as they are, since DeepSpeed flattens them."""
    for trunk in model.trunks().values():
        if any(isinstance(module, BatchNorm) for module in trunk.modules()):
            trunk.register_forward_pre_hook(_channels_last)


def _channels_last(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(images.contiguous(memory_format=torch.channels_last) for images in inputs)


class Switched(Protocol):
    """A trunk, of open_clip's, timm's or ours."""

    def set_grad_checkpointing(self, enable: bool = True) -> None: ...


def recompute_activations(model: TrainableModel) -> None:
    """Keep the input of each layer only (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").

    Raises ValueError naming the field where a tower cannot do it.
    """
    from open_clip.modified_resnet import ModifiedResNet

    for name, trunk in model.trunks().items():
        if isinstance(trunk, ModifiedResNet):  # open_clip's own switch does nothing here
            for layer in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
                for block in layer:
                    block.forward = _Recomputed(block)
            continue
        if any(isinstance(module, BatchNorm) for module in trunk.modules()):
            remedy = f"the {name} tower's BatchNorm statistics would move twice a step; leave it off"
            refuse("train.activation_checkpointing", True, remedy)
        cast(Switched, trunk).set_grad_checkpointing(True)
        # A timm tower without the switch only writes a warning.
        if not any(getattr(m, switch, False) for m in trunk.modules() for switch in SWITCHES):
            refuse("train.activation_checkpointing", True, f"the {name} tower has no such switch; leave it off")


def compile_trunks(model: TrainableModel, zero_stage: int, backend: str = "inductor") -> None:
    """Compile the trunks at their first call; each new shape of a batch compiles again.

    A transformer's layers are compiled one by one, so that the first is compiled for all of them.

    Raises ValueError naming the field at stage 3, whose hooks fetch the weights of each layer while it runs: a compiled
    trunk would see their empty places; and for a CLIP ResNet whose activations are recomputed.
    """
    if zero_stage == 3:
        refuse("train.compile", True, "ZeRO stage 3 fetches weights inside the towers; use stage 2, or leave it off")
    if any(isinstance(module.forward, _Recomputed) for module in model.modules()):
        refuse("train.compile", True, "torch cannot compile a CLIP ResNet with train.activation_checkpointing; choose")
    # Dropout falls as without compilation, so that the two passes of the gradient cache agree.
    options: dict[str, str | int | bool] | None = {"fallback_random": True} if backend == "inductor" else None
    # Both towers may have layers of one class, each with shapes of its own, with gradients and without.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for trunk in model.trunks().values():
        for module in layers_of(trunk) or [trunk]:
            module.compile(backend=backend, options=options)


class _Recomputed:
    """The forward of a CLIP ResNet's bottleneck, run again for its backward."""

    def __init__(self, block: nn.Module):
        self.block, self.forward = block, block.forward

    def __call__(self, x: Tensor) -> Tensor:
        return checkpoint(self.forward, x, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Of the first run and of the second."""
        return nullcontext(), _statistics_held(self.block)


@contextmanager
def _statistics_held(block: nn.Module) -> Iterator[None]:
    """BatchNorm keeps its running statistics: they moved when the block ran first."""
    layers = [module for module in block.modules() if isinstance(module, Float32BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0  # not another copy of the statistics: autograd would take it for a change of what it saved
        layer.num_batches_tracked.sub_(int(layer.training))
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
