"""A checkpoint's folder: written by all processes, complete or not there, and read; and published weights."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modstruct import distributed
from modstruct.checkpoints.kept import remove_old, replace_folder, step_of
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
from modstruct.distributed.hosts import appears
from modstruct.distributed.side_channel import SideChannel
from modstruct.errors import RunError, refuse, require
from modstruct.files import disk_error, naming, read_yaml

FORMAT = 2
EMA = "momentum."
"""Before the names of EMA weights (ALBEF's word)."""
SECTIONS = ("weights", "moments", "rng", "momentum")


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
    new_weights: list[str] = field(default_factory=list)
    """Names of the weights that pretrained ones did not bring, while optimizer.new_first_steps asks for them."""


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
    """EMA weights and queues."""
    state: TrainState
    optimizer: dict
    recipe: dict


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
    channel.gather(None)  # nobody writes while another, on the same cores, still copies, for whom all would wait
    error = channel.from_main(_failing(lambda: _begin(aside), target) if main else None)
    if error is None:
        appears(aside)  # on this host; if it does not, the next line says so
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
    remove_old(target.parents[1], keep_last, step_of(target))


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
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        refuse("checkpoint", str(path), f"is damaged ({error}); use another folder of {path.parent}")


def _check_state(checkpoint: Checkpoint) -> None:
    """Refuse values of kinds that a run cannot resume from."""
    state, steps = checkpoint.state, checkpoint.optimizer["step"]
    if any(type(n) is not int or not 0 <= n < 1 << 62 for n in (state.step, state.skipped_in_a_row, steps)):
        raise ValueError("state.json: steps are whole numbers of 0 or more")
    names = state.new_weights
    if type(names) is not list or not all(type(name) is str for name in names):
        raise ValueError("state.json: new_weights is a list of names")
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


def read_measured(path: Path, ema: bool) -> StoredTensors:
    """What is measured and exported of a checkpoint: weights and buffers, all checked.

    ema: evaluation.ema of its recipe; each weight that has an EMA is then replaced by it.
    """
    weights = read_weights(path)
    if not ema:
        return weights
    momentum = read_weights(path, "momentum").entries
    averaged = {name.removeprefix(EMA): entry for name, entry in momentum.items() if name.startswith(EMA)}
    return StoredTensors(weights.entries | {n: averaged[n] for n in averaged.keys() & weights.entries.keys()}, Files())


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
