"""Checkpoint folders: whole or not there, found by name, read back as written, never unpickled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import word_tokenizer
from torch import nn

from modstruct import checkpoints
from modstruct.checkpoints import Checkpoint, TrainState
from modstruct.config import Recipe
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.tokenizers import load_tokenizer
from modstruct.models.protocol import load_weights

FILES = ("weights.safetensors", "moments.safetensors", "rng.safetensors", "state.json", "recipe.yaml")


def checkpoint(step: int = 500, seed: int = 0) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)

    def rows(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return Checkpoint(
        weights={"head.weight": rows(3, 4), "bn.num_batches_tracked": torch.tensor(7), "logit_scale": rows(1)},
        moments={"exp_avg.head.weight": rows(3, 4), "exp_avg_sq.head.weight": rows(3, 4) ** 2},
        rng={"cpu.0": torch.get_rng_state()},
        state=TrainState(step=step, skipped_in_a_row=1, data_fingerprint="f"),
        optimizer={"step": step, "groups": [{"name": "decay", "lr": 1e-3, "betas": [0.9, 0.98]}], "loss_scaler": {}},
        recipe=recipe_to_dict(Recipe()),
    )


def write(output: Path, step: int, seed: int = 0) -> Path:
    target = checkpoints.step_folder(output, step)
    checkpoints.write(target, checkpoint(step, seed), word_tokenizer())
    return target


def steps(output: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.folder(output).iterdir())


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


@pytest.mark.parametrize("failing", ["first file", "last file", "tokenizer", "sync"])
@pytest.mark.parametrize("before", [False, True])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failing, before):
    if before:
        write(tmp_path, 500, seed=1)
    calls = []

    def save_file(tensors, path):
        calls.append(path)
        Path(path).write_bytes(b"half a file")
        if len(calls) == (1 if failing == "first file" else 3):
            raise OSError(28, "No space left on device")

    def fail(*_):
        raise OSError(5, "Input/output error")

    if failing == "tokenizer":
        monkeypatch.setattr(type(word_tokenizer()), "save", fail)
    elif failing == "sync":
        monkeypatch.setattr(checkpoints.os, "fsync", fail)
    else:
        monkeypatch.setattr(checkpoints, "save_file", save_file)
    with pytest.raises(OSError, match=r"No space left|Input/output"):
        checkpoints.write(checkpoints.step_folder(tmp_path, 500), checkpoint(), word_tokenizer())
    monkeypatch.undo()
    assert steps(tmp_path) == (["step-00000500"] if before else [])
    if before:
        read = checkpoints.read(checkpoints.step_folder(tmp_path, 500))
        assert same(read.weights, checkpoint(seed=1).weights)


def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 500)
    assert steps(tmp_path) == []


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
    if name == "weights.safetensors":
        with pytest.raises(ValueError, match="is damaged"):
            checkpoints.read_weights(path)


def test_another_format_is_refused_as_such(tmp_path):
    path = write(tmp_path, 500)
    described = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(described | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
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
    tensors = getattr(written, part)
    name = next(iter(tensors))
    tensors[name][1, 2] = value
    target = checkpoints.step_folder(tmp_path, 500)
    checkpoints.write(target, written, word_tokenizer())
    reason = rf"{part}\.safetensors: {name} has 1 of 12 values that are NaN or infinite; use another folder"
    with pytest.raises(ValueError, match=rf"checkpoint = '{target}': {reason}"):
        checkpoints.read(target)
    if part == "weights":
        with pytest.raises(ValueError, match=reason):
            checkpoints.read_weights(target)
    with pytest.raises(ValueError, match=rf"--init = .*: {name} has 1 of 12 values"):
        checkpoints.read_weight_file(target / f"{part}.safetensors", "--init")


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
