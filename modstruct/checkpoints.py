"""The folder format of a checkpoint: everything that a run resumes from, complete or not there; and published weights.

    OUTPUT/checkpoints/step-00000500/
        weights.safetensors     float32 weights and buffers by name
        moments.safetensors     exp_avg.NAME and exp_avg_sq.NAME
        rng.safetensors         random state of each process
        momentum.safetensors    EMA weights and queues of a fusion model
        state.json              step, which is the position in the data too; optimizer groups, counters
        recipe.yaml             the run's recipe
        tokenizer/              the tokenizer

Keys are names, not processes, so any number of processes and any ZeRO stage reads it. Nothing is pickled. The folder
is written aside, synced to disk and renamed, so that a name step-… is always a whole checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol, cast

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modstruct.errors import refuse, require
from modstruct.files import atomic_write, naming, read_yaml, sync_folder

log = logging.getLogger(__name__)

FORMAT = 1
MOMENTUM_FILE = "momentum.safetensors"
_COMPLETE = re.compile(r"step-(\d{8,})")


class Saved(Protocol):
    """What writes itself into a folder: the tokenizer."""

    def save(self, folder: Path) -> None: ...


@dataclass
class TrainState:
    """Where a run stands. The position in the data is `step` alone: see data/order.py."""

    step: int = 0
    """Steps done, skipped ones included."""
    skipped_in_a_row: int = 0
    data_fingerprint: str = ""
    """Of the training samples and their weights, to notice that they are others at a resume."""


@dataclass
class Checkpoint:
    """What a checkpoint holds, in the CPU's memory."""

    weights: dict[str, Tensor]
    """float32, by parameter and buffer name."""
    moments: dict[str, Tensor]
    """exp_avg.NAME and exp_avg_sq.NAME, float32."""
    rng: dict[str, Tensor]
    """cpu.RANK and cuda.RANK, uint8."""
    state: TrainState
    optimizer: dict
    """Steps taken, settings of each group, loss scaler; and, for a reader, processes and ZeRO stage."""
    recipe: dict
    """The recipe as nested dictionaries."""
    momentum: dict[str, Tensor] = field(default_factory=dict)
    """Momentum weights and queues; empty for two towers."""


def folder(output: str | Path) -> Path:
    return Path(output) / "checkpoints"


def step_folder(output: str | Path, step: int) -> Path:
    return folder(output) / f"step-{step:08d}"


def list_checkpoints(output: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in folder(output).glob("step-*") if _COMPLETE.fullmatch(p.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def find(which: str, output: str | Path, option: str = "--resume") -> Path | None:
    """The folder that `latest`, `best`, a checkpoint's or a run's path names; None for a run without one.

    output: the run's folder, for `latest` and `best`. option: where `which` came from, for the error.
    """
    if which == "best":
        best = read_best(output)
        if best is None:
            score = _noted_best(output).get("score")
            noted = (
                "it needs data.validation" if score is None else f"best.json names none that is there, score {score!r}"
            )
            refuse(option, which, f"{output} has no best checkpoint; {noted}")
        return folder(output) / best["checkpoint"]
    if which == "latest" or folder(which).is_dir():
        found = list_checkpoints(output if which == "latest" else which)
        return found[-1] if found else None
    if not (Path(which) / "state.json").is_file():
        refuse(
            option, which, "is no checkpoint; give a folder …/checkpoints/step-…, a run's folder, `latest` or `best`"
        )
    return Path(which)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write safetensors. Raises OSError that names the path, where safetensors has an error of its own."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        with naming(path):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write(target: Path, checkpoint: Checkpoint, tokenizer: Saved) -> None:
    """Write the folder `target`, whole or not at all. Raises OSError or SafetensorError; nothing is left behind."""
    aside = target.with_name(f"{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_tensors(checkpoint.weights, aside / "weights.safetensors")
        save_tensors(checkpoint.moments, aside / "moments.safetensors")
        save_tensors(checkpoint.rng, aside / "rng.safetensors")
        if checkpoint.momentum:
            save_tensors(checkpoint.momentum, aside / MOMENTUM_FILE)
        described = {"format": FORMAT, "train": vars(checkpoint.state), "optimizer": checkpoint.optimizer}
        with naming(aside):
            (aside / "state.json").write_text(json.dumps(described, indent=1))
            (aside / "recipe.yaml").write_text(yaml.safe_dump(checkpoint.recipe, sort_keys=False))
            tokenizer.save(aside / "tokenizer")
        replace_folder(aside, target)  # the same step may be there, from before a resume
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises ValueError that names the folder if it is damaged."""
    try:
        described = json.loads((path / "state.json").read_text())
        version = described["format"]
        checkpoint = version == FORMAT and Checkpoint(
            weights=load_file(path / "weights.safetensors"),
            moments=load_file(path / "moments.safetensors"),
            rng=load_file(path / "rng.safetensors"),
            state=TrainState(**described["train"]),
            optimizer=described["optimizer"],
            recipe=dict(cast(dict, read_yaml(path / "recipe.yaml"))),
            momentum=load_file(path / MOMENTUM_FILE) if (path / MOMENTUM_FILE).exists() else {},
        )
        if checkpoint:
            _check_state(checkpoint)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError, SafetensorError) as e:
        _damaged(path, e)
    if not checkpoint:
        refuse("checkpoint", str(path), f"has format {version}, this version reads {FORMAT}")
    files = {"weights": checkpoint.weights, "moments": checkpoint.moments, "momentum": checkpoint.momentum}
    for name, tensors in files.items():
        require_finite(tensors, "checkpoint", str(path), f"{name}.safetensors: ", _another(path))
    return checkpoint


def _check_state(checkpoint: Checkpoint) -> None:
    """Refuse values of kinds that a run cannot resume from."""
    state, steps = checkpoint.state, checkpoint.optimizer["step"]
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in (state.step, state.skipped_in_a_row, steps)):
        raise ValueError("state.json: steps are whole numbers of 0 or more")
    if type(state.data_fingerprint) is not str:
        raise ValueError("state.json: data_fingerprint is a text")
    if any(value.dtype != torch.uint8 or value.ndim != 1 for value in checkpoint.rng.values()):
        raise ValueError("rng.safetensors: random states are bytes")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights alone."""
    try:
        weights = load_file(path / "weights.safetensors")
    except (OSError, SafetensorError) as e:
        _damaged(path, e)
    require_finite(weights, "checkpoint", str(path), "weights.safetensors: ", _another(path))
    return weights


def require_finite(
    tensors: Mapping[str, Tensor], option: str, value: str, where: str = "", remedy: str = "give other weights"
) -> None:
    """Refuse weights with NaN or infinity, which no later step would mend, naming the first such tensor.

    option, value: what named the file, for the error; where: which part of it.
    """
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        number, total = int((~tensors[bad[0]].isfinite()).sum()), tensors[bad[0]].numel()
        more = f", and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        refuse(
            option, value, f"{where}{bad[0]} has {number} of {total} values that are NaN or infinite{more}; {remedy}"
        )


def _damaged(path: Path, error: Exception) -> NoReturn:
    refuse("checkpoint", str(path), f"is damaged ({error}); {_another(path)}")


def _another(path: Path) -> str:
    return f"use another folder of {path.parent}"


def require_same_names(expected: dict[str, Tensor], given: dict[str, Tensor], path: Path) -> None:
    """Refuse tensors of other names or shapes than a model's. path: where they came from, for the error."""
    names = expected.keys() ^ given.keys()
    names |= {n for n in expected.keys() & given.keys() if expected[n].shape != given[n].shape}
    if names:
        refuse("checkpoint", str(path), f"belongs to another model; they differ in {', '.join(sorted(names)[:5])}")


def read_best(output: str | Path) -> dict | None:
    """{"checkpoint": folder name, "score": …} of the best checkpoint of a run by validation; None without one.

    A score that is NaN or infinite is none: nothing would ever be above it.
    """
    best = _noted_best(output)
    name, score = best.get("checkpoint"), best.get("score")
    # A name and no path: it must not lead out of the run.
    if not isinstance(name, str) or not _COMPLETE.fullmatch(name) or not _is_score(score):
        return None
    return best if (folder(output) / name).is_dir() else None


def _noted_best(output: str | Path) -> dict:
    try:
        best = json.loads((folder(output) / "best.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return best if isinstance(best, dict) else {}


def _is_score(score: object) -> bool:
    return isinstance(score, (int, float)) and abs(score) <= sys.float_info.max  # which holds of no NaN


def note_score(path: Path, score: float) -> bool:
    """Make the checkpoint `path` the best of its run if its score is above the best so far; say whether.

    score: of the validation source, R@1 or a task's accuracy; NaN or infinity is none, which the log says.
    """
    if not _is_score(score):
        log.warning("%s: its score by data.validation is %s, so it is not taken for the best", path.name, score)
        return False
    best, before = read_best(path.parents[1]), _noted_best(path.parents[1]).get("score")
    if best and best["score"] >= score:
        return False
    if before is not None and not _is_score(before):
        log.warning("best.json: the score %r is none and is replaced by that of %s", before, path.name)
    with atomic_write(path.with_name("best.json")) as file:
        file.write(json.dumps({"checkpoint": path.name, "score": score}).encode())
    return True


def remove_old(output: str | Path, keep_last: int, step: int) -> None:
    """Keep the last `keep_last` checkpoints and the best.

    step: of the checkpoint just written; later ones belong to a branch that a resume from an earlier step has left.
    """
    best = read_best(output)
    found = list_checkpoints(output)
    ours = [path for path in found if _step(path) <= step]
    for path in [*found[len(ours) :], *ours[:-keep_last]]:
        if _step(path) > step or best is None or path.name != best["checkpoint"]:
            discard(path)


def clean(output: str | Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for suffix in ("*.part", "*.old"):
        for path in folder(output).glob(suffix):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def replace_folder(aside: Path, target: Path) -> None:
    """Put a folder on the disk and give it the name `target`, whose earlier content goes."""
    sync_tree(aside)
    if target.exists():
        discard(target)
    os.rename(aside, target)
    sync_folder(target.parent)


def discard(path: Path) -> None:
    """Remove a folder."""
    # Renamed first: a kill in the middle must not leave a damaged folder under a whole one's name.
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(path: Path) -> None:
    """Put a folder with all that it holds on the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        else:
            sync_folder(file)
    sync_folder(path)


WRAPPERS = ("model", "state_dict")
"""Keys under which published files keep the weights beside other things (DeiT's and ALBEF's `model`)."""


def read_weight_file(path: str | Path, option: str) -> dict[str, Tensor]:
    """Weights by name. option: the field that named the file, for the error (ValueError)."""
    path = Path(path).expanduser()
    try:
        safe = path.suffix == ".safetensors"
        content = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader has a type of error for each kind of damage
        refuse(
            option, str(path), f"cannot be read as safetensors or weights alone: {' '.join(str(error).split())[:300]}"
        )
    for wrapper in WRAPPERS:
        if not safe and isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    fits = isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())
    require(fits, option, str(path), "holds more than tensors by name; give a file of weights")
    require_finite(content, option, str(path))
    return content
