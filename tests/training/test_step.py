"""Batches are sent to a GPU a step ahead, each part once, and arrive as they were."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from PIL import Image

from modstruct import distributed
from modstruct.config import ViewsConfig
from modstruct.data.shards.image_rows import FinishedRows, RowsForDevice
from modstruct.data.shards.loader import TrainBatch
from modstruct.data.shards.workers import OutgoingRows
from modstruct.data.transforms.decoding import Whole
from modstruct.data.transforms.image_views import ImageViews
from modstruct.training.step import sent_ahead


class Rows:
    """Stands for a tensor; notes what is done to it."""

    def __init__(self, name: str, log: list[str], where: str = "host"):
        self.name, self.log, self.where = name, log, where

    def pin_memory(self) -> Rows:
        assert self.where == "host"
        pinned = Rows(self.name, self.log, "pinned")
        PINNED.add(pinned)
        assert len(PINNED) <= 4, "two parts of two steps"
        return pinned

    def to(self, device: torch.device, non_blocking: bool) -> Rows:
        assert (self.where, non_blocking) == ("pinned", True)
        self.log.append(f"copy {self.name} on {STREAMS[-1]}")
        return Rows(self.name, self.log, "device")

    def record_stream(self, stream: SimpleNamespace) -> None:
        assert self.where == "device"
        self.log.append(f"{self.name} used on {stream.name}")


STREAMS = ["main"]
PINNED: WeakSet[Rows] = WeakSet()


def gpu_of(log: list[str], monkeypatch) -> None:
    """A GPU whose streams note what they do."""
    events = iter(range(9))

    def stream(name: str) -> SimpleNamespace:
        waits = lambda event: log.append(f"{name} waits for {event}")  # noqa: E731
        return SimpleNamespace(name=name, wait_event=waits, record_event=lambda: f"event {next(events)}")

    @contextmanager
    def within(chosen: SimpleNamespace):
        STREAMS.append(chosen.name)
        yield
        STREAMS.pop()

    monkeypatch.setattr(distributed, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream(STREAMS[-1]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", {3: None}.get)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))


def test_each_part_is_copied_once_while_the_step_before_it_is_computed(monkeypatch):
    log: list[str] = []
    gpu_of(log, monkeypatch)
    steps = [[TrainBatch({"image": Rows(f"{step}{part}", log)}, tried=step) for part in "ab"] for step in range(6)]
    before: list[TrainBatch] = []
    for number, parts in enumerate(sent_ahead(iter(steps))):
        log.append(f"step {number}")
        assert [part.tried for part in parts] == [number] * 2, "what else a batch holds goes with it"
        assert all(part.tensors for part in parts)
        assert not any(part.tensors for part in before), "a step's memory is free before another's batch takes some"
        before = parts
    use = [["main waits for event 0", "0a used on main", "0b used on main", "step 0"]]
    use += [[line.replace("0", str(step)) for line in use[0]] for step in range(1, 6)]
    copy = [[f"copy {step}{part} on side" for part in "ab"] for step in range(6)]
    turns = zip([*copy[1:], []], use, strict=True)
    assert log == copy[0] + [line for turn in turns for lines in turn for line in lines]


def test_without_a_gpu_batches_are_taken_as_they_come(monkeypatch):
    monkeypatch.setattr(distributed, "on_gpu", lambda: False)
    taken: list[int] = []

    def steps():
        for step in range(3):
            taken.append(step)
            yield [TrainBatch({"image": torch.tensor([step])})]

    for number, (batch,) in enumerate(sent_ahead(steps())):
        assert (batch.tensors["image"].item(), len(taken)) == (number, number + 1)


def test_a_step_begins_with_the_views_that_the_device_makes(monkeypatch):
    monkeypatch.setattr(distributed, "on_gpu", lambda: False)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    views, image = ImageViews(ViewsConfig(on="device"), 8), Image.effect_noise((9, 13), 50).convert("RGB")
    finished, sent = (kind(views, ["image"], 1, OutgoingRows()) for kind in (FinishedRows, RowsForDevice))
    for rows in (finished, sent):
        rows.add(image, Whole(image.size), 0, None)
    ((batch,),) = sent_ahead([[TrainBatch(sent.tensors() | {"text": torch.tensor([[1]])}, tried=1)]])
    assert (batch.tensors.keys(), batch.tried) == ({"image", "text"}, 1)
    assert torch.equal(batch.tensors["image"], finished.tensors()["image"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_arrive_whole():
    """Copies of 64 MiB beside a computation that keeps the GPU busy, whose memory is taken again and again."""
    assert distributed.on_gpu()
    steps = ([TrainBatch({"image": torch.full((1 << 24,), step).int()})] for step in range(8))
    busy, sums = torch.randn(4096, 4096, device="cuda"), []
    for (batch,) in sent_ahead(steps):
        for _ in range(4):
            busy = torch.nn.functional.normalize(busy @ busy)
        image = batch.tensors["image"]
        assert image.is_cuda
        sums.append(image.sum())
    assert torch.stack(sums).tolist() == [step << 24 for step in range(8)]
