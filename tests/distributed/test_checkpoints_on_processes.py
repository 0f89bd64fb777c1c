"""What all processes write is what DeepSpeed itself says of the engine, at every stage on any number of processes; what
is read back is what was written; nobody holds more than its share; an error of one is an error of all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from processes import run_on_processes
from safetensors.torch import load_file
from tiny_run import ds_config, tiny_recipe
from torch import Tensor

from modstruct import checkpoints, distributed
from modstruct.checkpoints import StoredTensors

STAGES = ["zero0", "zero1", "zero2", "zero3"]
SAVED = {1: ["zero2"], 2: STAGES, 3: ["zero0", "zero3"]}
"""Stages by number of processes."""
SLACK = 16
"""Elements of a tensor that a process may have beyond its share, which is rounded up."""


def built(output: str, cache: str, stage: str, steps: int, resume: str | None = None):
    from modstruct.training.pretrain import Pretraining

    return Pretraining(tiny_recipe(output, cache, steps), ds_config(stage), resume).build()


def of_deepspeed(engine) -> dict[str, Tensor]:
    """Whole weights and moments as DeepSpeed gathers them, or as torch's optimizer has them where it is bare."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in engine.parameters():
        if engine.stage == 0:
            found |= {name: parameter} | {f"{key}.{name}": engine.inner.state[parameter][key] for key in MOMENTS}
        else:
            found[name] = safe_get_full_fp32_param(parameter)
            found |= {f"{key}.{name}": safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
    return {name: value.detach().clone() for name, value in found.items()}


MOMENTS = ("exp_avg", "exp_avg_sq")


def save_stages(folder: str, cache: str, stages: list[str]) -> dict[str, dict]:
    from modstruct.training import checkpoint

    found = {}
    for stage in stages:
        run = built(f"{folder}/{stage}", cache, stage, 2)
        run.train()
        found[stage] = {"values": of_deepspeed(run.engine)}
        if distributed.is_main():  # alone: a collective would wait for the others
            written = checkpoint.collect(run.engine, run.state, run.recipe, checkpoint.HostCopies())
            pieces = [piece for section in ("weights", "moments") for piece in written.pieces[section].values()]
            found[stage]["kept"] = sum(len(piece.values) for piece in pieces)
            found[stage]["pieces"] = len(pieces)
        distributed.barrier()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[tuple[str, int], dict]:
    """By stage and number of processes: the folder, and what each process found."""
    folder = tmp_path_factory.mktemp("saved")
    made = {}
    for processes, stages in SAVED.items():
        output = folder / str(processes)
        found = run_on_processes(save_stages, processes, str(output), str(folder / "cache"), stages)
        for stage in stages:
            path = checkpoints.step_folder(output / stage, 2)
            made[stage, processes] = {"path": path, "cache": str(folder / "cache"), "main": found[0][stage]}
    return made


CASES = [(stage, processes) for processes, stages in SAVED.items() for stage in stages]


@pytest.mark.parametrize(("stage", "processes"), CASES)
def test_what_is_written_is_what_deepspeed_has(saved, stage, processes):
    case = saved[stage, processes]
    read, values = checkpoints.read(case["path"]), case["main"]["values"]
    stored = {**read.weights, **read.moments}
    assert len(values) > 50
    assert stored.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(stored[name], value), name
    assert read.rng.keys() == {f"cpu.{rank}" for rank in range(processes)}


@pytest.mark.parametrize(("stage", "processes"), CASES)
def test_each_process_writes_its_share(saved, stage, processes):
    case = saved[stage, processes]
    total = sum(value.numel() for value in case["main"]["values"].values())
    files = sorted(case["path"].glob("*.safetensors"))
    assert len(files) == processes
    for file in files:
        elements = sum(v.numel() for v in load_file(file).values() if v.dtype == torch.float32)
        assert abs(elements - total / processes) <= SLACK * case["main"]["pieces"] / 3
    assert case["main"]["kept"] <= total / processes + SLACK * case["main"]["pieces"] / 3


def counting(restore: Callable, read: list[int]) -> Callable:
    """The product's `restore`, with the elements of each range of weights and moments that it reads noted in `read`."""
    whole_range = StoredTensors.range

    def noting(self, name, start, end):
        if not name.startswith("cpu."):
            read.append(end - start)
        return whole_range(self, name, start, end)

    def restored(*arguments):
        with mock.patch.object(StoredTensors, "range", noting):
            restore(*arguments)

    return restored


def restore_stages(folder: str, sources: dict[str, str], cache: str) -> dict[str, dict]:
    from modstruct.training import trainer

    found = {}
    for stage, source in sources.items():
        read: list[int] = []
        with mock.patch.object(trainer, "restore", counting(trainer.restore, read)):
            run = built(f"{folder}/{stage}", cache, stage, 2, source)
        found[stage] = {"values": of_deepspeed(run.engine), "read": sum(read), "of": len(read)}
    return found


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_any_stage_on_any_number_of_processes_reads_it(saved, tmp_path, processes):
    """Each stage from another checkpoint, on each number of processes from others."""
    sources = {stage: CASES[(2 * number + processes) % len(CASES)] for number, stage in enumerate(STAGES)}
    paths = {stage: str(saved[source]["path"]) for stage, source in sources.items()}
    cache = next(iter(saved.values()))["cache"]
    for found in run_on_processes(restore_stages, processes, str(tmp_path), paths, cache):
        for stage, source in sources.items():
            values = saved[source]["main"]["values"]
            assert found[stage]["values"].keys() == values.keys()
            for name, value in found[stage]["values"].items():
                assert torch.equal(value, values[name]), (stage, source, name)
            total = sum(value.numel() for value in values.values())
            share = total if stage == "zero0" else total / processes
            assert found[stage]["read"] <= share + SLACK * found[stage]["of"], stage


def train_with_a_full_disk(output: str, cache: str, where: str, asynchronous: bool) -> dict[str, str | int]:
    import errno

    from modstruct.checkpoints import folders

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    failing = {"main process": ("_publish", 0), "other process": ("save_pieces", 1)}[where]
    run = built(output, cache, "zero2", 30)
    run.recipe.checkpoints.asynchronous = asynchronous
    patched = mock.patch.object(folders, failing[0], full if distributed.rank() == failing[1] else None)
    if distributed.rank() == failing[1]:
        patched.start()
    try:
        run.train()
    except RuntimeError as error:
        return {"kind": type(error).__name__, "error": str(error), "step": run.state.step}
    return {"kind": "none"}


@pytest.mark.parametrize("where", ["main process", "other process"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_cannot_be_written_ends_the_run_on_every_process(tmp_path, where, asynchronous):
    main, other = run_on_processes(
        train_with_a_full_disk, 2, str(tmp_path / "run"), str(tmp_path / "cache"), where, asynchronous
    )
    assert (main["kind"], other["kind"]) == ("RunError", "FailedElsewhere")
    assert main["error"] == other["error"]
    assert "step-00000002 was not written: No space left on device" in main["error"]
    # At the next step that knows of it, or at the next checkpoint.
    assert main["step"] == other["step"] <= (4 if asynchronous else 2)
    assert checkpoints.list_checkpoints(tmp_path / "run") == []
    assert not list(Path(tmp_path / "run" / "checkpoints").glob("*.part"))


def train_without_a_moment(output: str, cache: str) -> str:
    import json

    built(output, cache, "zero1", 2).train()
    path = checkpoints.step_folder(output, 2)
    if distributed.is_main():
        index = json.loads((path / "index.json").read_text())
        del index["tensors"]["moments"]["exp_avg_sq.logit_scale"]
        (path / "index.json").write_text(json.dumps(index))
    distributed.barrier()
    try:
        built(output, cache, "zero1", 4, "latest")
    except ValueError as error:
        return str(error)
    return ""


def test_a_missing_moment_is_refused_by_name(tmp_path):
    for error in run_on_processes(train_without_a_moment, 2, str(tmp_path / "run"), str(tmp_path / "cache")):
        assert "lacks moments of trained weights, or has them in another shape: exp_avg_sq.logit_scale; use" in error


def read_damaged(path: str, cache: str) -> str:
    from modstruct.training.pretrain import Pretraining

    try:
        Pretraining(tiny_recipe(str(Path(path).parents[1]), cache, 4), ds_config("zero2"), path).build()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def test_a_flipped_bit_is_refused_on_every_process(saved):
    case = saved["zero2", 2]
    for file in sorted(case["path"].glob("*.safetensors")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 16]) + whole[-2:])
        for error in run_on_processes(read_damaged, 2, str(case["path"]), case["cache"]):
            assert f"is damaged ({file.name}: rng/cpu." in error
            assert "differs from its checksum); use another folder" in error
        file.write_bytes(whole)
