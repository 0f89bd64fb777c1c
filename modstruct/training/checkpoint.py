"""Between a DeepSpeed engine and a checkpoint folder: collect everything by name, and put it back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from modstruct import checkpoints, distributed
from modstruct.checkpoints import Checkpoint, TrainState
from modstruct.config import Recipe
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.tokenizers import Tokenizer
from modstruct.errors import RunError
from modstruct.training.full_state import MOMENTS, FullState


def save(full: FullState, state: TrainState, recipe: Recipe, tokenizer: Tokenizer) -> Path:
    """Write a checkpoint of `state.step` into recipe.output; every process calls it. Returns its folder.

    Raises RunError on every process, naming the folder and the cause, if it cannot be written; what was there
    before is untouched.
    """
    weights, moments = _collect(full)
    outside = getattr(full.engine.module, "outside_state", dict)()
    momentum = {name: value.cpu().contiguous() for name, value in outside.items()} if distributed.is_main() else {}
    checkpoint = Checkpoint(weights, moments, _gather_rng(), state, _optimizer(full), recipe_to_dict(recipe), momentum)
    target = checkpoints.step_folder(recipe.output, state.step)
    error = None
    if distributed.is_main():
        try:
            checkpoints.write(target, checkpoint, tokenizer)
            checkpoints.remove_old(recipe.output, recipe.checkpoints.keep_last, state.step)
        except Exception as e:  # whatever it is, the other processes wait below
            error = f"checkpoint {target} was not written: {e}. Free space or choose another --output"
    error = distributed.broadcast_object(error)
    if error:
        raise RunError(error) if distributed.is_main() else distributed.FailedElsewhere(error)
    return target


def restore(full: FullState, checkpoint: Checkpoint) -> None:
    """Master weights, moments, optimizer step, loss scaler and random state into the engine.

    The model must have been given the checkpoint's weights before DeepSpeed took it over, so that its working copies
    hold them.
    """
    for name, parameter in full.parameters():
        values = {"weight": checkpoint.weights[name]}
        values |= {kind: checkpoint.moments[f"{kind}.{name}"] for kind in MOMENTS if parameter.requires_grad}
        full.write(parameter, {kind: value.to(full.engine.device) for kind, value in values.items()})
    full.step = checkpoint.optimizer["step"]
    scaler = _loss_scaler(full.engine)
    if scaler is not None:
        vars(scaler).update(checkpoint.optimizer["loss_scaler"])
    rank = distributed.rank()
    if f"cpu.{rank}" in checkpoint.rng:
        torch.set_rng_state(checkpoint.rng[f"cpu.{rank}"])
    else:  # there are more processes now; each must draw for itself
        torch.manual_seed(torch.initial_seed() + checkpoint.state.step * 1_000_003 + rank)
    if distributed.on_gpu() and f"cuda.{rank}" in checkpoint.rng:
        torch.cuda.set_rng_state(checkpoint.rng[f"cuda.{rank}"])


def _collect(full: FullState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole weights (with buffers) and moments by name; kept on the main process only."""
    weights, moments = {}, {}
    for name, parameter in full.parameters():
        values = full.read(parameter)
        if distributed.is_main():
            weights[name] = values.pop("weight")
            moments |= {f"{kind}.{name}": value for kind, value in values.items()}
    module = full.engine.module
    persistent = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in persistent:
            weights[name] = buffer.detach().cpu().clone()
    return weights, moments


def _optimizer(full: FullState) -> dict:
    keys = ("name", "lr", "betas", "eps", "weight_decay")
    return {
        "step": full.step,
        "groups": [{key: group[key] for key in keys} for group in full.inner.param_groups],
        "loss_scaler": _loss_scaler_state(full.engine),
        "processes": distributed.world_size(),
        "zero_stage": full.engine.zero_optimization_stage(),
    }


def _gather_rng() -> dict[str, Tensor]:
    """Random state of torch on each process: the only generator that training itself draws from (dropout)."""
    states = {f"cpu.{distributed.rank()}": torch.get_rng_state()}
    if distributed.on_gpu():
        states[f"cuda.{distributed.rank()}"] = torch.cuda.get_rng_state()
    return {name: value for part in distributed.gather_objects(states) for name, value in part.items()}


def _loss_scaler(engine):
    """DeepSpeed's loss scaler (fp16 only), under the name each of its optimizers gives it."""
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)


def _loss_scaler_state(engine) -> dict:
    scaler = _loss_scaler(engine)
    values = vars(scaler) if scaler is not None else {}
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float))}
