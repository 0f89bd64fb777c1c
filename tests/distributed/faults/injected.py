"""The pretraining command with a fault put into it, so that the product needs no hook for tests.

The environment variable TEST_FAULTS names faults, separated by commas:
  nan:RANK:STEP      the gradient of one process is not a number, in one step
  hang:RANK:STEP     a process sleeps in the middle of a step
  delete:STEP:FILE   a shard is removed before a step; reads of a loader without workers see it at once
  truncate:STEP:FILE a shard loses its second half
Steps count from 1.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]


def put_in(fault: str) -> None:
    """Wrap the product's step, where it is looked up, in one that does the harm first."""
    from modstruct import distributed
    from modstruct.training import trainer

    kind, *words = fault.split(":")
    harmless = trainer.train_step

    def nan(objective):
        class Hurt:
            weights, row_losses = objective.weights, objective.row_losses

            def __call__(self, outputs, step, without):
                total, terms = objective(outputs, step, without)
                outputs["image"].register_hook(lambda gradient: gradient * float("nan"))
                return total + 0 * outputs["image"].sum(), terms

        return Hurt()

    def train_step(engine, objective, parts, step, *rest):
        if kind in ("nan", "hang"):
            due = distributed.rank() == int(words[0]) and step + 1 == int(words[1])
            if due and kind == "nan":
                objective = nan(objective)
            while due and kind == "hang":
                time.sleep(1)
        elif step + 1 == int(words[0]):
            distributed.barrier()
            if distributed.is_main():
                hurt_file(kind, Path(words[1]))
            distributed.barrier()
        return harmless(engine, objective, parts, step, *rest)

    trainer.train_step = train_step


def hurt_file(kind: str, path: Path) -> None:
    if kind == "delete":
        path.unlink(missing_ok=True)
    elif kind == "truncate":
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
    else:
        raise ValueError(kind)


if __name__ == "__main__":
    for each in filter(None, os.environ["TEST_FAULTS"].split(",")):
        put_in(each)
    sys.argv[0] = str(ROOT / "launch_scripts" / "pretrain.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
