"""The pretraining command with a fault put into it, so that the product needs no hook for tests.

The environment variable TEST_FAULTS names faults, separated by commas:
  nan:RANK:STEP      the gradient of one process is not a number, in one step
  hang:RANK:STEP     a process sleeps in the middle of a step
  delete:STEP:FILE   a shard is removed before a step; reads of a loader without workers see it at once
  truncate:STEP:FILE a shard loses its second half
  hold:STAGE         says "holds in STAGE" and stays there, in a call of C that no signal interrupts; two seconds
                     in a checkpoint, which is finished whatever comes. STAGE: a key of STAGES
  die:MOMENT:NUMBER:RANK
                     a process ends by SIGKILL inside the writer of the run's checkpoint NUMBER. MOMENT: `pieces` before
                     it writes its pieces, `piece` between two of them, `index` when all have written theirs, `name`
                     when all is on the disk and the folder is to take its name, `old` when it has and older ones go
Steps and checkpoints count from 1.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import runpy
import signal
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[3]
STAGES = {
    "data": "modstruct.data.run_data:open_run_data",
    "tokenizer": "modstruct.data.tokenizers:train_sentencepiece",
    "first step": "modstruct.training.trainer:train_step",
    "validation": "modstruct.training.pretrain:Pretraining.validate",
    "checkpoint": "modstruct.checkpoints.folders:replace_folder",
    "finish": "modstruct.training.pretrain:Pretraining.finish",
    "embedding": "modstruct.evaluation.embeddings.embed:_embed_texts",
    "measurement": "modstruct.evaluation.retrieval.measure:measure",
}


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


def hold(stage: str) -> None:
    """Wrap the function at which a stage begins."""
    module, _, name = STAGES[stage].partition(":")
    owner: object = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    harmless = getattr(owner, name)

    def holding(*arguments, **options):
        print(f"holds in {stage}", flush=True)
        if stage == "checkpoint":
            time.sleep(2)
        else:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        return harmless(*arguments, **options)

    setattr(owner, name, holding)
    for user in list(sys.modules.values()):  # who has imported it by name
        if getattr(user, "__name__", "").startswith("modstruct") and vars(user).get(name) is harmless:
            setattr(user, name, holding)


def die(moment: str, number: int, rank: int) -> None:
    """Wrap the function of the writer at which a moment comes."""
    from modstruct import distributed
    from modstruct.checkpoints import folders, kept, tensors

    owner, name, after = {
        "pieces": (folders, "save_pieces", False),
        "piece": (tensors, "save_tensors", False),
        "index": (folders, "_publish", False),
        "name": (kept, "sync_tree", True),
        "old": (folders, "remove_old", False),
    }[moment]
    harmless, calls = getattr(owner, name), []

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(*arguments):
        calls.append(name)
        due = len(calls) == number and distributed.rank() == rank
        if due and moment == "piece":
            tensors.zlib = DeadlyChecksum(len(arguments[0]) // 2, kill)
        elif due and not after:
            kill()
        result = harmless(*arguments)
        if due:
            kill()
        return result

    setattr(owner, name, deadly)


class DeadlyChecksum:
    """zlib, whose checksum kills the process when it was asked for so many."""

    def __init__(self, left: int, kill: Callable[[], None]):
        self.left, self.kill = left, kill

    def crc32(self, content, before: int = 0) -> int:
        self.left -= 1
        if self.left == 0:
            self.kill()
        return zlib.crc32(content, before)


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
        if each.startswith("hold:"):
            import modstruct.training.pretrain  # noqa: F401  # which imports what is wrapped

            hold(each.removeprefix("hold:"))
        elif each.startswith("die:"):
            moment, number, rank = each.split(":")[1:]
            die(moment, int(number), int(rank))
        else:
            put_in(each)
    evaluate = {"embed", "measure"} & set(sys.argv[1:3])  # behind the launcher's --local_rank
    sys.argv[0] = str(ROOT / "launch_scripts" / ("evaluate.py" if evaluate else "pretrain.py"))
    runpy.run_path(sys.argv[0], run_name="__main__")
