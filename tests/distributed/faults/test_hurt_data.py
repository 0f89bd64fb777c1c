"""Shards that vanish, are cut off or replaced under a run, storage that fails, loader processes that are killed."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from hurt_run import HurtRun, errors_on, losses, whole_checkpoints, write_recipe
from small_runs import weights_of

sys.path.insert(0, str(Path(__file__).parents[2] / "data" / "shards"))
sys.path.insert(0, str(Path(__file__).parents[3] / "tools" / "benchmarks"))
from crafted_shards import write_shards
from object_server import ObjectServer

pytestmark = pytest.mark.slow
STEPS = 40
CAUSES = {"delete": "missing shard", "truncate": "shard changed since it was indexed"}


def made(folder: Path, address: str = "") -> tuple[str, Path]:
    """A recipe over twelve shards of its own, and one of them to hurt."""
    pattern = write_shards(folder / "shards", [8, 9, 7] * 4)
    more = {"max_bad_share": 0.3, "shuffle_block": 4, "shuffle_window": 6, "read_ahead_mib": 1}  # or nothing is noticed
    if address:
        pattern = f"{address}/shards/shard-{{000..011}}.tar"
    return write_recipe(folder, steps=STEPS, every_steps=5, train=pattern, **more), folder / "shards" / "shard-004.tar"


@pytest.mark.parametrize("kind", ["delete", "truncate"])
def test_a_shard_is_hurt_in_mid_run(tmp_path, tried, kind):
    """What has been read ahead is still trained on, then its samples are substituted, by the same in every resume."""
    with tried(f"shard: {kind}d in mid-run"):
        recipe, shard = made(tmp_path)
        run = HurtRun(recipe, tmp_path / "run", faults=f"{kind}:9:{shard}")
        run.wait_for_step(18)
        run.signal_group(signal.SIGKILL)
        run.end()
        assert run.left_over() == []
        assert whole_checkpoints(run.output)[-1] >= 15
        again = shutil.copytree(run.output, tmp_path / "again")
        for output in (run.output, again):
            status, screen = HurtRun(recipe, output, "--resume", "latest").end()
            assert status == 0, screen[-3000:]
            assert str(shard) in screen
        assert losses(run.output) == losses(again)
        assert (weights_of(run.output) == weights_of(again)).all()

        recipe, shard = made(tmp_path / "whole")
        status, screen = HurtRun(recipe, tmp_path / "whole" / "run", faults=f"{kind}:9:{shard}").end()
        assert status == 0, screen[-3000:]
        assert CAUSES[kind] in screen
        assert str(shard) in screen
        assert errors_on(screen) == []


class FailingServer(ObjectServer):
    failing = False

    def hurt(self, handler) -> bool:
        if self.failing:
            handler.answer(503, b"")
        return self.failing


def test_an_object_store_fails_for_a_minute_and_an_object_is_replaced(tmp_path, tried):
    recipe, _ = made(tmp_path / "here")
    status, screen = HurtRun(recipe, tmp_path / "here" / "run").end()
    assert status == 0, screen[-3000:]
    with FailingServer(tmp_path / "there") as server:
        recipe, shard = made(tmp_path / "there", server.url)
        with tried("object store: fails for a minute"):
            run = HurtRun(recipe, tmp_path / "there" / "run")
            run.wait_for_step(9)
            server.failing = True
            time.sleep(60)
            server.failing = False
            status, screen = run.end()
            assert status == 0, screen[-3000:]
            assert f"{server.url} did not answer for" in screen
            assert errors_on(screen) == []
            assert losses(run.output) == losses(tmp_path / "here" / "run")
        with tried("object store: an object is replaced in mid-run"):
            run = HurtRun(recipe, tmp_path / "there" / "replaced")
            run.wait_for_step(9)
            shutil.copy(shard.with_name("shard-000.tar"), shard)
            status, screen = run.end()
            assert status == 0, screen[-3000:]
            assert "shard changed since it was indexed" in screen
            assert f"{server.url}/shards/shard-004.tar" in screen
            assert errors_on(screen) == []


def test_loader_workers_are_killed(tmp_path, tried):
    recipe, _ = made(tmp_path)
    status, screen = HurtRun(recipe, tmp_path / "unhurt").end()
    assert status == 0, screen[-3000:]
    run = HurtRun(recipe, tmp_path / "run", "--data.workers", "2")
    for step in (5, 20):
        with tried("loader worker killed"):
            run.wait_for_step(step)
            workers = run.workers()
            assert len(workers) == 4
            workers[step % 4].kill()
            run.wait_until(lambda: "a loader process was lost" in run.screen, "a lost loader process was noticed")
    status, screen = run.end()
    assert status == 0, screen[-3000:]
    assert errors_on(screen) == []
    assert run.left_over() == []
    assert losses(run.output) == losses(tmp_path / "unhurt")
