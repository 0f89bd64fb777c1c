"""Between a DeepSpeed engine and a checkpoint folder: collect everything by name, and put it back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from modstruct import checkpoints, distributed
from modstruct.checkpoints import Checkpoint, TrainState
from modstruct.config import FinetuneRecipe, Recipe
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.tokenizers import Tokenizer
from modstruct.distributed import run_lock
from modstruct.errors import RunError
from modstruct.files import disk_error
from modstruct.training.deepspeed_adapter import MOMENTS, Engine


def save(engine: Engine, state: TrainState, recipe: Recipe | FinetuneRecipe, tokenizer: Tokenizer) -> Path:
    """Write a checkpoint of `state.step` into recipe.output; every process calls it. Returns its folder.

    Raises RunError on every process, naming the folder and the cause, if it cannot be written; what was there
    before is untouched.
    """
    weights, moments = _collect(engine)
    ema = engine.model.ema_state_dict()
    momentum = {name: value.cpu().contiguous() for name, value in ema.items()} if distributed.is_main() else {}
    checkpoint = Checkpoint(
        weights, moments, _gather_rng(), state, _optimizer(engine), recipe_to_dict(recipe), momentum
    )
    target = checkpoints.step_folder(recipe.output, state.step)
    error: object = None
    if distributed.is_main():
        try:
            run_lock.require_held()
            checkpoints.write(target, checkpoint, tokenizer)
            checkpoints.remove_old(recipe.output, recipe.checkpoints.keep_last, state.step)
        except run_lock.LostLock as e:
            error = e
        except Exception as e:  # whatever it is, the other processes wait below
            error = (
                f"checkpoint {target} was not written: {disk_error(e, target)}. Free space or choose another --output"
            )
    error = distributed.broadcast_object(error and str(error))
    if error:
        raise RunError(str(error)) if distributed.is_main() else distributed.FailedElsewhere(str(error))
    return target


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Master weights, moments, optimizer step, loss scaler and random state into the engine.

    The model must have been given the checkpoint's weights before DeepSpeed took it over, so that its working copies
    hold them.
    """
    for name, parameter in engine.parameters():
        values = {"weight": checkpoint.weights[name]}
        values |= {kind: checkpoint.moments[f"{kind}.{name}"] for kind in MOMENTS if parameter.requires_grad}
        engine.write(parameter, {kind: value.to(distributed.device()) for kind, value in values.items()})
    engine.steps_taken = checkpoint.optimizer["step"]
    scaler = engine.loss_scaler
    if scaler is not None:
        vars(scaler).update(checkpoint.optimizer["loss_scaler"])
    rank = distributed.rank()
    if f"cpu.{rank}" in checkpoint.rng:
        torch.set_rng_state(checkpoint.rng[f"cpu.{rank}"])
    else:  # there are more processes now; each must draw for itself
        torch.manual_seed(torch.initial_seed() + checkpoint.state.step * 1_000_003 + rank)
    if distributed.on_gpu() and f"cuda.{rank}" in checkpoint.rng:
        torch.cuda.set_rng_state(checkpoint.rng[f"cuda.{rank}"])


def _collect(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole weights (with buffers) and moments by name; kept on the main process only."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in engine.parameters():
        values = engine.read(parameter)
        if distributed.is_main():
            weights[name] = values.pop("weight")
            moments |= {f"{kind}.{name}": value for kind, value in values.items()}
    module = engine.model
    persistent = module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers():
        if name in persistent:
            weights[name] = buffer.detach().cpu().clone()
    return weights, moments


def _optimizer(engine: Engine) -> dict:
    keys = ("name", "lr", "betas", "eps", "weight_decay")
    return {
        "step": engine.steps_taken,
        "groups": [{key: group[key] for key in keys} for group in engine.inner.param_groups],
        "loss_scaler": _loss_scaler_state(engine),
        "processes": distributed.world_size(),
        "zero_stage": engine.stage,
    }


def _gather_rng() -> dict[str, Tensor]:
    """Random state of torch on each process: the only generator that training itself draws from (dropout)."""
    states = {f"cpu.{distributed.rank()}": torch.get_rng_state()}
    if distributed.on_gpu():
        states[f"cuda.{distributed.rank()}"] = torch.cuda.get_rng_state()
    return {name: value for part in distributed.gather_objects(states) for name, value in part.items()}


def _loss_scaler_state(engine: Engine) -> dict:
    scaler = engine.loss_scaler
    values = vars(scaler) if scaler is not None else {}
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float))}
