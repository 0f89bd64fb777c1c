"""Loader processes: the same batches, what they survive, and that none is left behind."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from multiprocessing import active_children, forkserver
from pathlib import Path

import pytest
from crafted_shards import (
    BOTH,
    LengthTokenizer,
    assert_same,
    config,
    load,
    opened,
    sample,
    views,
    write_shards,
    write_tar,
)

from modstruct.config import ViewsConfig
from modstruct.data.faults import TooManyBadSamples
from modstruct.data.shards import workers as workers_module
from modstruct.data.shards.loader import BatchContents, BatchPlan, train_loader
from modstruct.data.transforms.augment import Views
from modstruct.errors import RunError


def test_workers_do_not_change_the_batches(damaged):
    samples, data = damaged
    alone = load(samples, data)
    for workers in (1, 2):
        data.workers = workers
        assert_same(alone, load(samples, data))
    assert_same(load(samples, replace(data, workers=0), micro_batch=5), load(samples, data, micro_batch=5))


def test_no_worker_is_left_when_the_loop_ends_early(tmp_path):
    data = config(tmp_path, workers=1)
    samples = opened(write_shards(tmp_path, [20]), data)
    before = set(active_children())
    loader = train_loader(samples, data, BatchContents(views(), LengthTokenizer(), BOTH), BatchPlan(4, 0, 0, 10_000))
    for _ in loader:
        break
    assert set(active_children()) == before


def test_others_take_up_the_work_of_killed_workers(damaged, caplog):
    samples, data = damaged
    loader = train_loader(
        samples, replace(data, workers=2), BatchContents(views(), LengthTokenizer(), BOTH), BatchPlan(12, 3, 0, 12)
    )
    before = set(active_children())
    batches = []
    for batch in loader:
        if len(batches) in (2, 7):
            for worker in set(active_children()) - before:
                worker.kill()
        batches.append(batch)
    assert_same(batches, load(samples, data, stop=12))
    assert "a loader process was lost" in caplog.text
    assert set(active_children()) == before


def test_workers_that_die_again_and_again_end_the_run_with_a_clear_error(tmp_path):
    data = config(tmp_path, workers=1)
    samples = opened(write_shards(tmp_path, [20]), data)
    loader = train_loader(samples, data, BatchContents(DeadlyViews(8), LengthTokenizer()), BatchPlan(4, 0, 0, 9))
    with pytest.raises(RunError, match=r"^data\.workers = 1: a loader process was lost .*, 4 in a row; give fewer"):
        list(loader)


class DeadlyViews(Views):
    """Kills the process that makes a view."""

    def __init__(self, image_size: int):
        super().__init__(ViewsConfig(), image_size)

    def plain_text(self, caption):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_tells_what_went_wrong(tmp_path):
    write_tar(tmp_path / "x.tar", [m for n in range(4) for m in sample(n, png=b"bad")])
    data = config(tmp_path, max_bad_share=1.0, workers=1)
    with pytest.raises(
        TooManyBadSamples, match=r"201 samples in a row cannot be used, the last: undecodable image: .*x\.tar"
    ):
        load(opened(tmp_path / "x.tar", data), data)


def test_workers_outlive_the_signals_that_end_a_run(damaged):
    # Workers inherit the blocked signals from the server that their loader starts: not one of an earlier test.
    forkserver._forkserver._stop()
    samples, data = damaged
    alone = load(samples, data, stop=12)
    data.workers = 2
    before = set(active_children())
    loader = train_loader(samples, data, BatchContents(views(), LengthTokenizer(), BOTH), BatchPlan(12, 3, 0, 12))
    batches = iter(loader)
    workers = set(active_children()) - before
    assert len(workers) == 2

    def signal_all():
        for worker in workers:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(worker.pid, number)

    signal_all()  # while they start
    found = [next(batches)]
    signal_all()
    assert_same(alone, found + list(batches))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_batches_of_loader_processes_need_nothing_in_the_shared_memory(damaged):
    """A container's /dev/shm often has 64 MiB, and what lies there when everything is killed stays."""
    samples, data = damaged
    data.workers = 2
    loader = train_loader(samples, data, BatchContents(views(), LengthTokenizer(), BOTH), BatchPlan(12, 3, 0, 12))
    named_before = workers_module._named_semaphores()
    batches = iter(loader)
    found = [next(batches), next(batches)]
    assert workers_module._named_semaphores() == named_before
    mapped = Path("/proc/self/maps").read_text()
    assert "memfd:modstruct-batch" in mapped
    for batch in found:
        for name, tensor in batch.tensors.items():
            place = next(line for line in mapped.splitlines() if _holds(line, tensor.data_ptr()))
            assert "/dev/shm" not in place, (name, place)
            assert tensor.data_ptr() % 64 == 0
        # One file a batch: each is open on both sides, and handed over by a connection of its own.
        assert len({tensor.untyped_storage().data_ptr() for tensor in batch.tensors.values()}) == 1
    assert_same(load(samples, replace(data, workers=0), stop=12), found + list(batches))


def _holds(line: str, address: int) -> bool:
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    return start <= address < end


def runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, and waiting for its parent to notice


@pytest.mark.parametrize(
    ("last_act", "status"), [("raise RuntimeError('as planned')", 1), ("os.kill(os.getpid(), signal.SIGKILL)", -9)]
)
def test_workers_end_with_the_process_however_it_ends(tmp_path, last_act, status):
    write_shards(tmp_path, [50])
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, os, signal
        from pathlib import Path
        from crafted_shards import LengthTokenizer, config, opened, views
        from modstruct.data.shards.loader import BatchContents, BatchPlan, train_loader

        if __name__ == "__main__":
            data = config(Path({str(tmp_path)!r}), workers=1)
            samples = opened({str(tmp_path / "shard-*.tar")!r}, data)
            loader = train_loader(samples, data, BatchContents(views(), LengthTokenizer()), BatchPlan(8, 0, 0, 100_000))
            unstarted, batches = iter(loader), iter(loader)
            next(batches)
            print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
            {last_act}
        """)
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parents[2]}:{here}"}
    with open(tmp_path / "said", "w") as said, open(tmp_path / "errors", "w") as errors:
        done = subprocess.run([sys.executable, script], env=environment, stdout=said, stderr=errors, timeout=240)
    assert done.returncode == status, (tmp_path / "errors").read_text()
    workers = (tmp_path / "said").read_text().split()
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, "a worker outlives the process it works for"
        time.sleep(0.1)


def test_a_loader_can_be_sent_to_a_worker(damaged):
    samples, data = damaged
    loader = train_loader(samples, data, BatchContents(views(), LengthTokenizer(), BOTH), BatchPlan(12, 3, 0, 1))
    assert len(pickle.dumps(loader.dataset)) < 20_000
