"""Checkpoints beside training: one at a time, errors told at the next one, an error of training waited for."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import word_tokenizer

from modstruct import checkpoints
from modstruct.checkpoints import Piece, TrainState, Written, folders
from modstruct.config import CheckpointConfig
from modstruct.errors import RunError
from modstruct.training import checkpoint
from modstruct.training.checkpoint import CheckpointWriter, HostCopies


class Run:
    """A writer of small checkpoints, each of which waits for the gate before it takes its name."""

    def __init__(self, output, monkeypatch):
        self.output, self.writer, self.gate = output, CheckpointWriter(), threading.Event()
        self.there_at_copies: list[list[str]] = []
        self.recipe = SimpleNamespace(output=str(output), checkpoints=CheckpointConfig(keep_last=9))
        publish = folders.replace_folder

        def waiting(aside, target):
            assert self.gate.wait(60)
            publish(aside, target)

        monkeypatch.setattr(folders, "replace_folder", waiting)
        monkeypatch.setattr(checkpoint, "collect", self.collect)

    def collect(self, engine, state, recipe, copies) -> Written:
        self.there_at_copies.append(self.there())
        pieces = {"weights": {"a": Piece.whole(torch.full((3,), float(state.step)))}}
        return Written(pieces, state, {"step": state.step}, {})

    def there(self) -> list[str]:
        return [path.name for path in checkpoints.list_checkpoints(self.output)]

    def save(self, step: int) -> Path:
        return self.writer.save(None, TrainState(step), self.recipe, word_tokenizer())

    def train(self, error: Exception) -> None:
        with self.writer.finishing():
            self.save(1)
            raise error


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_training_goes_on_while_one_is_written_and_waits_for_it_before_the_next(run):
    first = run.save(1)
    assert run.there() == []
    assert not run.writer.failed
    threading.Timer(0.1, run.gate.set).start()
    run.save(2)
    assert run.there_at_copies == [[], [first.name]]
    run.writer.wait()
    assert run.there() == ["step-00000001", "step-00000002"]
    assert checkpoints.read_weights(first)["a"].tolist() == [1.0] * 3
    run.writer.wait()  # nothing is left to wait for


def test_the_memory_of_a_copy_is_kept_until_the_last_checkpoint(run):
    run.gate.set()
    copies = run.writer._copies
    run.save(1)
    run.writer.wait()
    assert run.writer._copies is copies
    run.writer.wait_for_last()
    assert run.writer._copies is not copies


def test_an_error_is_told_once_and_the_next_checkpoint_is_written(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run.gate.set()
    with monkeypatch.context() as patched:
        patched.setattr(folders, "save_pieces", full)
        run.save(1)
        while not run.writer.failed:
            pass
        with pytest.raises(RunError, match="step-00000001 was not written: No space left"):
            run.save(2)
    assert run.there_at_copies == [[]]
    run.save(3)
    run.writer.wait()
    assert run.there() == ["step-00000003"]


def test_an_error_of_training_waits_for_what_is_being_written(run):
    threading.Timer(0.1, run.gate.set).start()
    with pytest.raises(RunError, match="too many steps skipped"):
        run.train(RunError("too many steps skipped"))
    assert run.there() == ["step-00000001"]


def test_a_lost_process_is_not_waited_for(run):
    with pytest.raises(RuntimeError, match="Connection closed"):
        run.train(RuntimeError("[gloo] Connection closed by peer"))
    assert run.there() == []
    run.gate.set()
    run.writer.wait()


def test_copies_take_over_the_memory_of_those_before():
    copies, weight = HostCopies(), torch.arange(4.0, dtype=torch.bfloat16)
    first = copies.of("weight.a", Piece.whole(weight), torch.float32)
    weight += 1
    assert first.values.tolist() == [0, 1, 2, 3]
    second = copies.of("weight.a", Piece.whole(weight), torch.float32)
    assert second.values.tolist() == [1, 2, 3, 4]
    assert second.values.dtype == torch.float32
    assert second.values.data_ptr() == first.values.data_ptr()
    for other in (weight[:2], weight.double()):  # of another length, of another kind
        assert copies.of("weight.a", Piece.whole(other)).values.tolist() == other.tolist()
