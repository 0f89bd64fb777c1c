"""Checkpoint folders: whole or not there, found by name, read back as written, never unpickled."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import injected
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_models import word_tokenizer
from torch import nn
from whole_checkpoint import Whole
from whole_checkpoint import write as write_whole

from modstruct import checkpoints
from modstruct.checkpoints import TrainState, tensors
from modstruct.config import Recipe
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.tokenizers import load_tokenizer
from modstruct.distributed import run_lock
from modstruct.distributed.run_lock import LostLock
from modstruct.errors import RunError
from modstruct.models.protocol import load_weights

OLD = Path(__file__).parent / "written_by_0.1.0" / "two_tower" / "checkpoints" / "step-00000002"
PIECES = "pieces-00000.safetensors"
FILES = (PIECES, "index.json", "state.json", "recipe.yaml")


def checkpoint(step: int = 500, seed: int = 0) -> Whole:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Whole(
        weights={"head.weight": rows(3, 4), "bn.num_batches_tracked": torch.tensor(7), "logit_scale": rows(1)},
        moments={"exp_avg.head.weight": rows(3, 4), "exp_avg_sq.head.weight": rows(3, 4) ** 2},
        rng={"cpu.0": torch.get_rng_state()},
        state=TrainState(step=step, skipped_in_a_row=1, data_fingerprint="f"),
        optimizer={"step": step, "groups": [{"name": "decay", "lr": 1e-3, "betas": [0.9, 0.98]}], "loss_scaler": {}},
        recipe=recipe_to_dict(Recipe()),
    )


def write(output: Path, step: int, seed: int = 0) -> Path:
    target = checkpoints.step_folder(output, step)
    write_whole(target, checkpoint(step, seed), word_tokenizer())
    return target


def steps(output: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.folder(output).glob("*"))


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_read_is_what_was_written(tmp_path):
    written = checkpoint()
    path = write(tmp_path, 500)
    read = checkpoints.read(path)
    assert same(read.weights, written.weights)
    assert same(read.moments, written.moments)
    assert same(read.rng, written.rng)
    assert (read.state, read.optimizer, read.recipe) == (written.state, written.optimizer, written.recipe)
    assert same(checkpoints.read_weights(path), written.weights)
    texts = ["a red square", "star"]
    assert torch.equal(load_tokenizer(path / "tokenizer")(texts), word_tokenizer()(texts))


def test_a_folder_holds_no_pickle(tmp_path):
    files = [path for path in write(tmp_path, 500).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml", ".txt"}
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        elif path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".yaml":
            yaml.safe_load(content)


@pytest.mark.parametrize("failing", ["pieces", "tokenizer", "sync", "lock"])
@pytest.mark.parametrize("before", [False, True])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failing, before):
    if before:
        write(tmp_path, 500, seed=1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    def half(tensors, path):
        Path(path).write_bytes(b"half a file")
        fail()

    def lost():
        raise LostLock("another run took it over")

    monkeypatch.setattr(
        *{
            "pieces": (tensors, "save_tensors", half),
            "tokenizer": (type(word_tokenizer()), "save", fail),
            "sync": (os, "fsync", fail),
            "lock": (run_lock, "require_held", lost),
        }[failing]
    )
    with pytest.raises(RunError) as refusal:
        write_whole(checkpoints.step_folder(tmp_path, 500), checkpoint(), word_tokenizer())
    monkeypatch.undo()
    told = r"checkpoint .*step-00000500 was not written: No space left on device.*\. Free space or choose another"
    assert re.match("another run took it over" if failing == "lock" else told, str(refusal.value))
    assert steps(tmp_path) == (["step-00000500"] if before else [])
    if before:
        read = checkpoints.read(checkpoints.step_folder(tmp_path, 500))
        assert same(read.weights, checkpoint(seed=1).weights)


def test_a_step_written_again_replaces_the_first(tmp_path):
    write(tmp_path, 500, seed=1)
    path = write(tmp_path, 500, seed=2)
    assert same(checkpoints.read(path).weights, checkpoint(seed=2).weights)
    assert steps(tmp_path) == ["step-00000500"]


def test_what_a_killed_run_leaves_is_no_checkpoint_and_is_cleaned(tmp_path):
    whole = write(tmp_path, 500)
    for name in ("step-00001000.part", "step-00000400.old"):
        (checkpoints.folder(tmp_path) / name).mkdir()
        (checkpoints.folder(tmp_path) / name / "weights.safetensors").write_bytes(b"half")
    (checkpoints.folder(tmp_path) / "best.part").write_text("{")
    assert checkpoints.list_checkpoints(tmp_path) == [whole]
    assert checkpoints.find("latest", tmp_path) == whole
    checkpoints.clean(tmp_path)
    assert steps(tmp_path) == ["step-00000500"]
    checkpoints.clean(tmp_path / "no run yet")


def test_a_leftover_does_not_stop_the_next_write(tmp_path):
    leftover = checkpoints.folder(tmp_path) / "step-00000500.part"
    leftover.mkdir(parents=True)
    (leftover / "stale").write_text("")
    path = write(tmp_path, 500)
    assert not (path / "stale").exists()
    assert steps(tmp_path) == ["step-00000500"]


def test_checkpoints_are_ordered_by_step_beyond_eight_digits(tmp_path):
    for step in (200_000_000, 99_999_999, 5):
        checkpoints.step_folder(tmp_path, step).mkdir(parents=True)
    found = [path.name for path in checkpoints.list_checkpoints(tmp_path)]
    assert found == ["step-00000005", "step-99999999", "step-200000000"]


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [2, 5]), (2, [2, 4, 5]), (4, [2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_last_ones_and_the_best_are_kept(tmp_path, keep_last, kept):
    for step in range(1, 6):
        path = write(tmp_path, step)
        if step == 2:
            checkpoints.note_score(path, score=0.5)
    checkpoints.remove_old(tmp_path, keep_last, step=5)
    assert steps(tmp_path) == ["best.json", *(f"step-{step:08d}" for step in kept)]


def test_a_better_checkpoint_takes_the_place_of_the_best(tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    checkpoints.note_score(first, score=0.5)
    checkpoints.note_score(second, score=0.6)
    write(tmp_path, 3)
    checkpoints.remove_old(tmp_path, 1, step=3)
    assert steps(tmp_path) == ["best.json", "step-00000002", "step-00000003"]
    assert checkpoints.find("best", tmp_path) == second


def test_a_worse_checkpoint_does_not(tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert checkpoints.note_score(first, score=0.5)
    assert not checkpoints.note_score(second, score=0.5)
    assert checkpoints.find("best", tmp_path) == first


def test_a_resume_from_an_earlier_step_drops_the_branch_it_left(tmp_path):
    paths = {step: write(tmp_path, step) for step in (100, 200, 300, 150)}
    checkpoints.note_score(paths[300], score=0.9)
    checkpoints.remove_old(tmp_path, 2, step=150)
    assert checkpoints.list_checkpoints(tmp_path) == [paths[100], paths[150]]
    assert checkpoints.find("latest", tmp_path) == paths[150]
    assert checkpoints.note_score(paths[150], score=0.1)  # what was best is gone


def test_a_checkpoint_is_found_by_word_and_by_path(tmp_path):
    paths = [write(tmp_path, step) for step in (10, 20, 30)]
    checkpoints.note_score(paths[1], score=0.5)
    assert checkpoints.find("latest", tmp_path) == paths[2]
    assert checkpoints.find("best", tmp_path) == paths[1]
    assert checkpoints.find(str(paths[0]), "runs/elsewhere") == paths[0]
    assert checkpoints.find(str(tmp_path), "runs/elsewhere") == paths[2]


def test_a_run_without_checkpoints_has_no_latest(tmp_path):
    assert checkpoints.find("latest", tmp_path) is None
    checkpoints.folder(tmp_path).mkdir()
    assert checkpoints.find("latest", tmp_path) is None
    assert checkpoints.find(str(tmp_path), "runs/elsewhere") is None


def test_what_is_no_checkpoint_is_refused_by_option_and_value(tmp_path):
    for which in (str(tmp_path), str(tmp_path / "missing"), "lates"):
        with pytest.raises(ValueError, match=rf"--resume = '{which}': is no checkpoint"):
            checkpoints.find(which, tmp_path)
    write(tmp_path, 5)
    with pytest.raises(ValueError, match=r"--from = 'best': .* has no best checkpoint; it needs data.validation"):
        checkpoints.find("best", tmp_path, "--from")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "scrambled"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_folder_is_refused_by_name(tmp_path, name, damage):
    path = write(tmp_path, 500)
    whole = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    elif name == "recipe.yaml" and damage == "cut":
        (path / name).write_bytes(whole[: whole.index(b": ")])  # text, but no mapping
    else:
        (path / name).write_bytes(
            {"empty": b"", "cut": whole[: len(whole) // 2], "scrambled": b"\xff\x00" * 40}[damage]
        )
    with pytest.raises(ValueError, match="is damaged") as refusal:
        checkpoints.read(path)
    assert str(path) in str(refusal.value)
    if name == PIECES:
        with pytest.raises(ValueError, match="is damaged"):
            checkpoints.read_weights(path)


def test_another_format_is_refused_as_such(tmp_path):
    path = write(tmp_path, 500)
    described = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(described | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1 to 2"):
        checkpoints.read(path)


def test_a_recipe_that_asks_for_code_is_damaged_and_does_not_run(tmp_path):
    path = write(tmp_path, 500)
    (path / "recipe.yaml").write_text(f"output: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoints.read(path)
    assert not (tmp_path / "ran").exists()


def test_weights_go_into_the_model_they_belong_to_and_no_other(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    weights = {name: torch.full_like(value, 3) for name, value in model.state_dict().items()}
    load_weights(model, weights, tmp_path)
    assert same(model.state_dict(), weights)
    others = [
        {name: value for name, value in weights.items() if name != "1.running_mean"},
        weights | {"2.weight": torch.zeros(1)},
        weights | {"0.weight": torch.zeros(2, 4)},
    ]
    for other, name in zip(others, ("1.running_mean", "2.weight", "0.weight"), strict=True):
        with pytest.raises(ValueError, match=rf"belongs to another model; they differ in {name}"):
            load_weights(model, other, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["weights", "moments", "momentum"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, part, value):
    written = checkpoint()
    written.momentum = {"queue": torch.ones(3, 4)}
    named = getattr(written, part)
    name = next(iter(named))
    named[name][1, 2] = value
    target = checkpoints.step_folder(tmp_path, 500)
    write_whole(target, written, word_tokenizer())
    reason = rf"{PIECES}: {part}/{name} has 1 of 12 values that are NaN or infinite\); use another folder"
    with pytest.raises(ValueError, match=rf"checkpoint = '{target}': is damaged \({reason}"):
        checkpoints.read(target)
    with pytest.raises(ValueError, match=reason):
        checkpoints.read_weights(target, part)
    with pytest.raises(ValueError, match=rf"--init = .*: {part}/{name} has 1 of 12 values"):
        checkpoints.read_weight_file(target / PIECES, "--init")


def test_complex_numbers_are_refused_by_name(tmp_path):
    weights = {"a": torch.ones(3, dtype=torch.complex64)}
    with pytest.raises(RunError, match=r"not written: weights/a is of kind torch\.complex64; a checkpoint holds real"):
        write_whole(tmp_path / "step-00000001", replace(checkpoint(), weights=weights), word_tokenizer())
    old = tmp_path / "checkpoints" / "step-00000002"
    shutil.copytree(OLD, old)
    save_file(weights, old / "weights.safetensors")
    with pytest.raises(ValueError, match=r"is damaged \(weights.safetensors: a is of kind C64; .*use another folder"):
        checkpoints.read(old)
    with pytest.raises(ValueError, match=r"--init = .*: a has complex numbers; give other weights"):
        checkpoints.read_weight_file(old / "weights.safetensors", "--init")


def flip_a_bit(path: Path, content: torch.Tensor) -> None:
    """In the middle of a tensor's bytes, found in a file by what they are."""
    data, wanted = bytearray(path.read_bytes()), content.reshape(-1).view(torch.uint8).numpy().tobytes()
    assert data.count(wanted) == 1
    data[data.index(wanted) + len(wanted) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["weights", "moments", "rng", "momentum"])
def test_one_flipped_bit_is_refused_with_file_and_tensor(tmp_path, part):
    written = checkpoint()
    written.momentum = {"queue": torch.rand(3, 4), "queue.ids": torch.arange(5)}
    target = checkpoints.step_folder(tmp_path, 500)
    write_whole(target, written, word_tokenizer())
    for name, tensor in getattr(written, part).items():
        whole = (target / PIECES).read_bytes()
        flip_a_bit(target / PIECES, tensor)
        reason = rf"{PIECES}: {part}/{name}, elements 0 to {tensor.numel()}, differs from its checksum\); use another"
        with pytest.raises(ValueError, match=rf"checkpoint = '{target}': is damaged \({reason}"):
            checkpoints.read(target)
        (target / PIECES).write_bytes(whole)
    checkpoints.read(target)


def test_every_byte_that_is_changed_is_noticed(tmp_path):
    """In the files that decide what a resumed run computes; the recipe is the user's to read and change."""
    target = write(tmp_path, 500)
    for name in (PIECES, "index.json", "state.json"):
        whole = (target / name).read_bytes()
        checkpoints.read(target)
        for place in range(0, len(whole), max(1, len(whole) // 199)):
            (target / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            try:
                read = checkpoints.read(target)
            except ValueError:
                continue
            # A blank that became another, or a name, which is then missing.
            written = checkpoint()
            kinds = ("weights", "moments", "rng")
            assert any({*getattr(read, k)} != {*getattr(written, k)} for k in kinds) or all(
                same(getattr(read, k), getattr(written, k)) for k in kinds
            )
            assert read.state == written.state
        (target / name).write_bytes(whole)


def test_pieces_that_do_not_make_a_tensor_up_are_refused(tmp_path):
    target = write(tmp_path, 500)
    index = json.loads((target / "index.json").read_text())
    piece = index["tensors"]["weights"]["head.weight"]["pieces"][0]
    whole = [*piece]
    for wrong in ([PIECES, 0, 11, 0], [PIECES, 1, 12, 0], ["../x.safetensors", 0, 12, 0], [PIECES, 0, 12.0, 0]):
        piece[:] = wrong
        (target / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"is damaged \(index.json: "):
            checkpoints.read(target)
    piece[:] = whole
    (target / "index.json").write_text(json.dumps(index))
    checkpoints.read(target)


def test_processes_check_every_tensor_between_them(tmp_path, monkeypatch):
    target = write(tmp_path, 500)
    checked = []
    monkeypatch.setattr(tensors.StoredTensors, "check", lambda self, name, place: checked.append(place.key))
    checkpoints.read(target)
    everything = sorted(checked)
    checked.clear()
    for number in range(3):
        checkpoints.read(target, number, 3)
    assert sorted(checked) == everything
    assert len(everything) == 6


@pytest.mark.parametrize("score", ["Infinity", "NaN", "1" + "0" * 400])
def test_a_score_that_is_none_is_replaced_and_named(tmp_path, score, caplog):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    first.with_name("best.json").write_text(f'{{"checkpoint": "{first.name}", "score": {score}}}')
    assert checkpoints.read_best(tmp_path) is None
    with pytest.raises(ValueError, match=r"no best checkpoint; best\.json names none that is there, score"):
        checkpoints.find("best", tmp_path)
    assert checkpoints.note_score(second, score=0.1)
    assert "is none and is replaced by that of step-00000002" in caplog.text
    assert checkpoints.find("best", tmp_path) == second


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_none_is_not_noted(tmp_path, score, caplog):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert not checkpoints.note_score(first, score=score)
    assert f"step-00000001: its score by data.validation is {score}" in caplog.text
    assert checkpoints.note_score(second, score=0.0)


@pytest.mark.parametrize("moment", ["pieces", "piece", "index", "name", "old"])
def test_a_kill_inside_the_writer_leaves_the_last_one_whole(tmp_path, moment):
    """Of one process; tests/distributed/faults/test_kills.py kills one of several."""
    write(tmp_path, 400, seed=1)
    child = os.fork()
    if child == 0:
        try:
            injected.die(moment, 1, 0)
            write(tmp_path, 500)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    whole = [400, 500] if moment == "old" else [400]
    assert [checkpoints.read(path).state.step for path in checkpoints.list_checkpoints(tmp_path)] == whole
    assert same(checkpoints.read(checkpoints.step_folder(tmp_path, 400)).weights, checkpoint(seed=1).weights)
    assert any(name.endswith(".part") for name in steps(tmp_path)) == (moment != "old")
    checkpoints.clean(tmp_path)
    assert steps(tmp_path) == [f"step-{step:08d}" for step in whole]
