"""Checkpoints of a run: written by all processes, complete or not there; found, read, kept and removed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modstruct import distributed
from modstruct.checkpoints.tensors import (
    Files,
    Piece,
    StoredTensors,
    check_all,
    described,
    merged,
    not_finite,
    read_file,
    read_index,
    save_pieces,
)
from modstruct.distributed import run_lock
from modstruct.distributed.side_channel import SideChannel
from modstruct.errors import RunError, refuse, require
from modstruct.files import atomic_write, disk_error, naming, read_yaml, sync_folder

log = logging.getLogger(__name__)

FORMAT = 2
SECTIONS = ("weights", "moments", "rng", "momentum")
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
class Written:
    """What a process writes of a checkpoint."""

    pieces: dict[str, dict[str, Piece]]
    """By section (SECTIONS) and name; together the processes write every element once."""
    state: TrainState
    optimizer: dict
    """Steps taken, settings of each group, loss scaler; and, for a reader, processes and ZeRO stage."""
    recipe: dict
    """The recipe as nested dictionaries."""


@dataclass
class Checkpoint:
    """What a checkpoint holds; tensors are read when they are asked for."""

    weights: StoredTensors
    """float32, by parameter and buffer name."""
    moments: StoredTensors
    """exp_avg.NAME and exp_avg_sq.NAME, float32."""
    rng: StoredTensors
    """cpu.RANK and cuda.RANK, uint8."""
    momentum: StoredTensors
    """EMA weights and queues; empty for two towers."""
    state: TrainState
    optimizer: dict
    recipe: dict


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


def write(target: Path, written: Written, tokenizer: Saved, keep_last: int, channel: SideChannel) -> None:
    """Write the folder `target`, whole or not at all, and remove what is too old; every process calls it.

    It may run beside training: it calls no collective. Raises RunError on the main process, naming the folder and the
    cause, and FailedElsewhere on the others, if it cannot be written; what was there before is untouched.
    """
    aside = target.with_name(f"{target.name}.part")
    indices: list[dict] = []

    def publish() -> None:
        _publish(aside, target, merged(indices), written, tokenizer, keep_last)

    main = distributed.is_main()
    error = channel.from_main(_failing(lambda: _begin(aside), target) if main else None)
    if error is None:
        failed = _failing(lambda: indices.append(save_pieces(written.pieces, aside)), target)
        parts = channel.gather({"failed": failed, "index": indices})
        indices = [index for part in parts for index in part["index"]]
        failed = next((part["failed"] for part in parts if part["failed"]), None)
        error = channel.from_main(failed or _failing(publish, target) if main else None)
    if error is not None:
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        raise RunError(error) if main else distributed.FailedElsewhere(error)


def _failing(work: Callable[[], object], target: Path) -> str | None:
    """Do some work of writing; why it failed, for the user."""
    try:
        work()
    except run_lock.LostLock as error:
        return str(error)
    except Exception as error:  # whatever it is, the other processes wait for the word
        return (
            f"checkpoint {target} was not written: {disk_error(error, target)}. Free space or choose another --output"
        )
    return None


def _begin(aside: Path) -> None:
    run_lock.require_held()
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _publish(aside: Path, target: Path, index: dict, written: Written, tokenizer: Saved, keep_last: int) -> None:
    """Once every process has written its pieces."""
    read_index(index, aside, Files())  # which refuses pieces that leave something out
    state = json.dumps({"format": FORMAT, "train": vars(written.state), "optimizer": written.optimizer}, indent=1)
    with naming(aside):
        (aside / "state.json").write_text(state)
        (aside / "recipe.yaml").write_text(yaml.safe_dump(written.recipe, sort_keys=False))
        tokenizer.save(aside / "tokenizer")
        (aside / "index.json").write_text(json.dumps({"state": zlib.crc32(state.encode()), "tensors": index}))
    run_lock.require_held()
    replace_folder(aside, target)  # the same step may be there, from before a resume
    remove_old(target.parents[1], keep_last, _step(target))


def read(path: Path, number: int = 0, of: int = 1) -> Checkpoint:
    """Open a checkpoint and check share `number` of `of` shares of its tensors, which processes have one each.

    Raises ValueError that names the folder, and the file and the tensor, if it is damaged.
    """
    with _sound(path):
        state = (path / "state.json").read_bytes()
        described = json.loads(state)
        sections = _sections(path, described["format"], state)
        checkpoint = Checkpoint(
            **sections,
            state=TrainState(**described["train"]),
            optimizer=described["optimizer"],
            recipe=dict(cast(dict, read_yaml(path / "recipe.yaml"))),
        )
        _check_state(checkpoint)
        check_all(sections, number, of)
    return checkpoint


def _sections(path: Path, version: object, state: bytes) -> dict[str, StoredTensors]:
    files = Files()
    if version == 1:  # a file for each section, of whole tensors
        there = {section: path / f"{section}.safetensors" for section in SECTIONS}
        there = {section: file for section, file in there.items() if section != "momentum" or file.exists()}
        return _EMPTY | {section: read_file(file, files) for section, file in there.items()}
    if version != FORMAT:
        raise _OtherFormat(f"has format {version}, this version reads 1 to {FORMAT}")
    index = json.loads((path / "index.json").read_bytes())
    if index["state"] != zlib.crc32(state):
        raise ValueError("state.json differs from its checksum")
    return _EMPTY | read_index(
        {section: index["tensors"][section] for section in SECTIONS if section in index["tensors"]}, path, files
    )


class _OtherFormat(Exception):
    """Of another version of modstruct."""


_EMPTY = {section: StoredTensors({}, Files()) for section in SECTIONS}


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Refuse a folder that cannot be read as a checkpoint, by its name."""
    try:
        yield
    except _OtherFormat as error:
        refuse("checkpoint", str(path), str(error))
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError, SafetensorError) as error:
        refuse("checkpoint", str(path), f"is damaged ({error}); use another folder of {path.parent}")


def _check_state(checkpoint: Checkpoint) -> None:
    """Refuse values of kinds that a run cannot resume from."""
    state, steps = checkpoint.state, checkpoint.optimizer["step"]
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in (state.step, state.skipped_in_a_row, steps)):
        raise ValueError("state.json: steps are whole numbers of 0 or more")
    if type(state.data_fingerprint) is not str:
        raise ValueError("state.json: data_fingerprint is a text")
    if any(value.dtype != torch.uint8 or value.ndim != 1 for value in checkpoint.rng.described().values()):
        raise ValueError("random states (rng) are bytes")


def read_weights(path: Path, section: str = "weights") -> StoredTensors:
    """The weights alone, or another section's tensors, all checked."""
    with _sound(path):
        state = (path / "state.json").read_bytes()
        tensors = _sections(path, json.loads(state)["format"], state)[section]
        check_all({section: tensors})
    return tensors


def require_finite(tensors: Mapping[str, Tensor], option: str, value: str) -> None:
    """Refuse complex weights, and NaN or infinity, which no later step would mend, naming the first such tensor.

    option, value: what named the file, for the error.
    """
    remedy = "give other weights"
    complex_ones = [name for name, tensor in tensors.items() if tensor.is_complex()]
    if complex_ones:
        refuse(option, value, f"{complex_ones[0]} has complex numbers; {remedy}")
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        more = f", and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        refuse(option, value, f"{not_finite(bad[0], tensors[bad[0]])}{more}; {remedy}")


def require_same_names(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of other names or shapes than a model's. path: where they came from, for the error."""
    given = described(given)
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
