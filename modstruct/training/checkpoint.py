"""Between a DeepSpeed engine and a checkpoint folder: what each process keeps, by name and range, and back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from modstruct import checkpoints, distributed
from modstruct.checkpoints import Checkpoint, Piece, TrainState, Written
from modstruct.config import FinetuneRecipe, Recipe
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.tokenizers import Tokenizer
from modstruct.distributed.side_channel import SideChannel
from modstruct.errors import LostProcess, refuse
from modstruct.training.deepspeed_adapter import MOMENTS, Engine

POLL_SECONDS = 0.02
SECONDS_TO_FINISH = 60.0
"""For a checkpoint that is being written when an error ends the training."""


class CheckpointWriter:
    """Writes checkpoints in a thread beside training, one at a time. Collective, but for `failed`."""

    def __init__(self) -> None:
        self._channel = SideChannel()
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, engine: Engine, state: TrainState, recipe: Recipe | FinetuneRecipe, tokenizer: Tokenizer) -> Path:
        """Copy what this process keeps into the memory of its host, and begin to write a checkpoint of `state.step`.

        Waits for the one before first. Returns the folder, which is there after `wait`.
        """
        self.wait()
        written = collect(engine, state, recipe, self._copies)
        target = checkpoints.step_folder(recipe.output, state.step)
        arguments = (target, written, tokenizer, recipe.checkpoints.keep_last)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        return target

    @property
    def failed(self) -> bool:
        """Whether this process knows that the checkpoint could not be written; then `wait` raises why, on all."""
        return self._error is not None

    def wait(self) -> None:
        """Until all processes have written. Raises RunError, on every process, naming the folder and the cause, if it
        cannot be written; what was there before is untouched."""
        if self._thread is None:
            return
        # A collective, which fails at once where another process has ended; the thread would wait for it for ever.
        while distributed.max_over_processes(torch.tensor([int(self._thread.is_alive())], device=distributed.device())):
            self._thread.join(POLL_SECONDS)
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def wait_for_last(self) -> None:
        """Wait for the last checkpoint, and let go of the memory of its copy."""
        self.wait()
        self._copies = HostCopies()

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Training, whose error does not end the process before what is being written is there, if it is soon."""
        try:
            yield
        except Exception as error:
            if self._thread is not None and LostProcess.if_it_is(error) is None:  # without it nobody can finish
                self._thread.join(SECONDS_TO_FINISH)
            raise

    def _write(self, target: Path, written: Written, tokenizer: Tokenizer, keep_last: int) -> None:
        try:
            checkpoints.write(target, written, tokenizer, keep_last, self._channel)
        except Exception as error:  # raised by the training thread
            self._error = error


class HostCopies:
    """Copies in memory of the host, which the next checkpoint takes over: to get it from the system and fill it for the
    first time takes several times as long as to copy."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str, piece: Piece, dtype: torch.dtype | None = None) -> Piece:
        """The piece with a copy of its values; the one of this name before is overwritten."""
        shape, dtype, kept = piece.values.shape, dtype or piece.values.dtype, self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype) != (shape, dtype):
            kept = self._kept[name] = torch.empty(shape, dtype=dtype)
        return replace(piece, values=kept.copy_(piece.values))


def collect(engine: Engine, state: TrainState, recipe: Recipe | FinetuneRecipe, copies: HostCopies) -> Written:
    """This process's pieces, copied, and what else a checkpoint says."""
    weights: dict[str, Piece] = {}
    moments: dict[str, Piece] = {}
    for name, parameter in engine.parameters():
        pieces_of = engine.pieces(parameter)
        of_parameter = {kind: copies.of(f"{kind}.{name}", piece, torch.float32) for kind, piece in pieces_of.items()}
        weights[name] = of_parameter.pop("weight")
        moments |= {f"{kind}.{name}": piece for kind, piece in of_parameter.items()}
    module = engine.model
    persistent = module.state_dict(keep_vars=True)
    buffers = {name: Piece.share(value) for name, value in module.named_buffers() if name in persistent}
    weights |= {name: copies.of(f"buffer.{name}", piece) for name, piece in buffers.items()}
    ema = module.ema_pieces() | (engine.ema.pieces() if engine.ema else {})
    momentum = {name: copies.of(f"ema.{name}", piece) for name, piece in ema.items()}
    pieces = {"weights": weights, "moments": moments, "rng": _rng(), "momentum": momentum}
    return Written(pieces, replace(state), _optimizer(engine), recipe_to_dict(recipe))


def require_moments(model: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Refuse a checkpoint that lacks a moment of a trained parameter. path: where it is, for the error."""
    there, shapes = checkpoint.moments.described(), {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    expected = {f"{kind}.{name}": shape for name, shape in shapes.items() for kind in MOMENTS}
    bad = sorted(name for name, shape in expected.items() if name not in there or there[name].shape != shape)
    if bad:
        lacks = f"lacks moments of trained weights, or has them in another shape: {', '.join(bad[:5])}"
        refuse("checkpoint", str(path), f"{lacks}; use another folder of {path.parent}")


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Master weights, moments, optimizer step, loss scaler and random state into the engine.

    Each process reads what it keeps. The model must have been given the checkpoint's weights before DeepSpeed took it
    over, so that its working copies hold them.
    """
    for name, parameter in engine.parameters():
        if parameter.requires_grad:
            span = engine.span(parameter)
            values = {kind: checkpoint.moments.range(f"{kind}.{name}", *span) for kind in MOMENTS}
            engine.write(parameter, {"weight": checkpoint.weights.range(name, *span)} | values)
    engine.steps_taken = checkpoint.optimizer["step"]
    scaler = engine.loss_scaler
    if scaler is not None:
        vars(scaler).update(checkpoint.optimizer["loss_scaler"])
    if engine.ema:
        engine.ema.load(checkpoint.momentum)
    rank = distributed.rank()
    if f"cpu.{rank}" in checkpoint.rng:
        torch.set_rng_state(checkpoint.rng[f"cpu.{rank}"])
    else:  # there are more processes now; each must draw for itself
        torch.manual_seed((torch.initial_seed() + checkpoint.state.step * 1_000_003 + rank) % 2**64)
    if distributed.on_gpu() and f"cuda.{rank}" in checkpoint.rng:
        torch.cuda.set_rng_state(checkpoint.rng[f"cuda.{rank}"])


def _optimizer(engine: Engine) -> dict:
    keys = ("name", "lr", "betas", "eps", "weight_decay")
    return {
        "step": engine.steps_taken,
        "groups": [{key: group[key] for key in keys} for group in engine.inner.param_groups],
        "loss_scaler": _loss_scaler_state(engine),
        "processes": distributed.world_size(),
        "zero_stage": engine.stage,
    }


def _rng() -> dict[str, Piece]:
    """Random state of torch on this process: the only generator that training itself draws from (dropout)."""
    states = {f"cpu.{distributed.rank()}": torch.get_rng_state()}
    if distributed.on_gpu():
        states[f"cuda.{distributed.rank()}"] = torch.cuda.get_rng_state()
    return {name: Piece.whole(value) for name, value in states.items()}


def _loss_scaler_state(engine: Engine) -> dict:
    scaler = engine.loss_scaler
    values = vars(scaler) if scaler is not None else {}
    return {key: value for key, value in values.items() if isinstance(value, (bool, int, float))}
