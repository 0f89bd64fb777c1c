"""How long training waits for a checkpoint and how much memory it takes, beside DeepSpeed's and PyTorch's own.

python tools/benchmarks/checkpoint.py                             # 100M parameters, 1, 2 and 4 processes, stage 1
python tools/benchmarks/checkpoint.py --millions 100 400 --processes 2 4 --stage 3     # 400M on 4 takes 22 GB
python tools/benchmarks/checkpoint.py --stage 3 --kinds start     # the start alone; --whole beside it
python tools/benchmarks/checkpoint.py --out results.json

Ours with and without checkpoints.asynchronous, the first of a training, which takes the memory of its copies that later
ones have (`peak` leaves it out of theirs), DeepSpeed's save_checkpoint, and torch.distributed.checkpoint's save and
async_save of the same bytes: float32 weights and AdamW's two moments, 12 bytes a parameter, over gloo on the CPU. The
kinds take turns in the same processes, since a disk and its neighbours change. `waits` is until the call returns and
the next step could begin, `ends` until all is written by all; both are the slowest process's. `peak` is how far a
process's memory rises above what it holds with its engine, files mapped into it aside, also as a fraction of its share
of the bytes. Ours and torch.distributed.checkpoint's are on the disk at the end (fsync), DeepSpeed's may be in the
system's cache. `resume` is ours, from the start of reading to an engine that has all. `start` is from nothing to an
engine: at stage 3 of a model whose weights are made one at a time, and with --whole, as at the other stages, of one
that each process makes whole. Its `peak` is beyond a process that has started a tiny one; moments and gradients are
zeros then, which take no memory yet.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing import start_processes

from modstruct import checkpoints, distributed
from modstruct.checkpoints import TrainState
from modstruct.config import CheckpointConfig, Recipe, TrainConfig
from modstruct.data.tokenizers import WordPieceTokenizer
from modstruct.models.deferred import Deferred
from modstruct.models.protocol import TrainableModel
from modstruct.training.checkpoint import CheckpointWriter, restore
from modstruct.training.deepspeed_adapter import MOMENTS, Engine
from modstruct.training.ds_config import read_ds_config, resolve_ds_config
from modstruct.training.first_weights import FirstWeights
from modstruct.training.trainer import build_engine

MIB = 2**20
NAMES = ("waits", "ends", "peak", "parameters")
WIDTH = 1024
BLOCK = 8 * WIDTH * WIDTH + 7 * WIDTH
"""Parameters of a block: two layers and a norm, as in a transformer's."""
VOCABULARY = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n"
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


class Blocks(TrainableModel):
    """Parameters of a transformer's sizes."""

    def __init__(self, parameters: int):
        super().__init__()
        count = max(1, round(parameters / BLOCK))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(count)
        )


class Peak:
    """How far this process's own memory rises, looked at every few milliseconds."""

    def __enter__(self) -> Peak:
        ctypes.CDLL(None).malloc_trim(0)
        self._ended = threading.Event()
        self.before = self.most = _own_bytes()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.005):
            self.most = max(self.most, _own_bytes())

    @property
    def rise(self) -> int:
        return self.most - self.before


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    results = []
    print(f"ZeRO stage {options.stage}, {options.rounds} rounds, {options.folder or tempfile.gettempdir()}\n")
    print(f"{'parameters':>12}{'processes':>11}{'waits, s':>40}{'ends, s':>10}{'peak, MiB':>12}{'of share':>10}")
    for millions in options.millions:
        for processes in options.processes:
            for row in on_processes(processes, millions, options):
                results.append(row)
                share = 12 * row["parameters"] / processes
                print(
                    f"{row['parameters']:12,.0f}{processes:11}  {LABELS[row['kind']]:28}{row['waits']:10.2f}"
                    f"{row['ends']:10.2f}{row['peak'] / MIB:12,.0f}{row['peak'] / share:10.2f}",
                    flush=True,
                )
    if options.out:
        described = {"command": " ".join(sys.argv), "torch": torch.__version__, "cores": os.cpu_count()}
        options.out.write_text(json.dumps(described | {"stage": options.stage, "results": results}, indent=1))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[100], help="Parameters (default: 100).")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="Default: 1 2 4.")
    parser.add_argument("--stage", type=int, default=1, choices=[1, 2, 3], help="ZeRO stage (default: 1).")
    parser.add_argument("--rounds", type=int, default=3, help="Repetitions that medians are taken of (default: 3).")
    parser.add_argument("--kinds", nargs="+", choices=[*LABELS], default=[*LABELS], help="Default: all.")
    parser.add_argument("--whole", action="store_true", help="At stage 3, make the model whole on each process.")
    parser.add_argument("--folder", help="Where to write (default: the system's temporary folder).")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    return parser.parse_args(arguments)


def on_processes(count: int, millions: int, options: argparse.Namespace) -> list[dict]:
    """Medians by kind; of times and memory the largest of any process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as answers:
        start_processes(_one, (count, port, millions, options, answers), count, start_method="spawn")
        found = [json.loads(file.read_text()) for file in Path(answers).iterdir()]
    rows = []
    for kind in found[0]:
        of_all = [[one[name] for name in NAMES] for process in found for one in process[kind]]
        largest = torch.tensor(of_all, dtype=torch.float64).view(count, options.rounds, -1).amax(0)
        medians = dict(zip(NAMES, largest.quantile(0.5, dim=0).tolist(), strict=True))
        rows.append({"millions": millions, "processes": count, "kind": kind} | medians)
    return rows


def _one(rank: int, count: int, port: int, millions: int, options: argparse.Namespace, answers: str) -> None:
    torch.set_num_threads(1)
    words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in words.items()} | {"DS_ACCELERATOR": "cpu"})
    distributed.start_processes()
    torch.manual_seed(0)
    run = Run(millions, options.stage, options.whole)
    found: dict[str, list[dict]] = {kind: [] for kind in KINDS if kind in options.kinds}
    for _ in range(options.rounds):
        for kind, measured in found.items():
            made = tempfile.mkdtemp(dir=options.folder) if distributed.is_main() else None
            run.begin(Path(distributed.broadcast_object(made)))
            measured.append(run.measure(KINDS[kind][1]))
            distributed.barrier()
            if made:
                shutil.rmtree(made)
    found |= {"start": [run.start] * options.rounds} if "start" in options.kinds else {}
    Path(answers, str(rank)).write_text(json.dumps(found))
    distributed.barrier()


class Run:
    """An engine with moments that are no zeros, which the system would not keep in memory."""

    folder: Path
    recipe: Recipe

    def __init__(self, millions: int, stage: int, whole: bool):
        self.stage, self.writer = stage, CheckpointWriter()
        small = TrainableModel()
        small.layer = nn.Linear(8, 8)
        self.build(small, None)  # so that everything is imported before memory is measured
        distributed.barrier()
        with Peak() as peak:
            start = time.perf_counter()
            deferred = Deferred() if stage == 3 and not whole else None
            with deferred or nullcontext():
                self.model = Blocks(millions * 1_000_000)
            self.engine = self.build(self.model, FirstWeights(self.model, deferred, None) if deferred else None)
            distributed.barrier()
            seconds = time.perf_counter() - start
        del deferred
        self.start = {"waits": seconds, "ends": seconds, "peak": peak.rise, "parameters": self.engine.element_count}
        for state in self.engine.inner.state.values():
            for key in MOMENTS:
                state[key].uniform_()

    def begin(self, folder: Path) -> None:
        """What is written from here on goes into a folder."""
        self.folder, self.recipe = folder, Recipe(output=str(folder), checkpoints=CheckpointConfig(keep_last=1))

    def build(self, model: TrainableModel, weight: FirstWeights | None) -> Engine:
        recipe = Recipe(train=TrainConfig(global_batch=distributed.world_size(), steps=1))
        config = read_ds_config(str(DS_CONFIGS / f"zero{self.stage}.json"))
        resolved = resolve_ds_config(config, recipe, distributed.world_size())
        return build_engine(model, recipe, resolved, weight)

    def measure(self, save: Callable[[Run], Callable[[], object]]) -> dict:
        """save: begins, and returns what waits for the end."""
        wait = save(self)  # what is set up once a run is not timed
        distributed.barrier()
        with Peak() as peak:
            start = time.perf_counter()
            finish = wait()
            waits = time.perf_counter() - start
            finish()
            distributed.barrier()
            ends = time.perf_counter() - start
        return {"waits": waits, "ends": ends, "peak": peak.rise, "parameters": self.engine.element_count}

    def flat(self) -> dict[str, DTensor]:
        """Weights and moments as torch.distributed.checkpoint takes them: flat, and sharded as they lie."""
        mesh = init_device_mesh("cpu", (distributed.world_size(),))
        found = {}
        for number, (weights, state) in enumerate(self.engine.inner.state.items()):
            for key, values in {"weights": weights, **{key: state[key] for key in MOMENTS}}.items():
                found[f"{number}.{key}"] = DTensor.from_local(values.detach(), mesh, [Shard(0)])
        return found


def nothing() -> None:
    pass


def ours(asynchronous: bool, first: bool = False) -> Callable[[Run], Callable]:
    """first: of a training, whose copies take fresh memory."""

    def prepared(run: Run) -> Callable:
        writer = CheckpointWriter() if first else run.writer
        arguments = run.engine, TrainState(step=1), run.recipe, WordPieceTokenizer(VOCABULARY, 8)

        def save() -> Callable:
            writer.save(*arguments)
            if not asynchronous:
                writer.wait()
            return writer.wait

        return save

    return prepared


def of_deepspeed(run: Run) -> Callable:
    def save() -> Callable:
        run.engine.deepspeed.save_checkpoint(str(run.folder / "deepspeed"))
        return nothing

    return save


def of_torch(asynchronous: bool) -> Callable[[Run], Callable]:
    def prepared(run: Run) -> Callable:
        state, folder = run.flat(), str(run.folder / "torch")

        def save() -> Callable:
            if asynchronous:
                return dcp.async_save(state, checkpoint_id=folder).result
            dcp.save(state, checkpoint_id=folder)
            return nothing

        return save

    return prepared


def resumed(run: Run) -> Callable:
    ours(asynchronous=False)(run)()

    def resume() -> Callable:
        path = checkpoints.step_folder(run.folder, 1)
        saved = checkpoints.read(path, distributed.rank(), distributed.world_size())
        restore(run.engine, saved)
        return nothing

    return resume


KINDS: dict[str, tuple[str, Callable[[Run], Callable]]] = {
    "ours_first": ("ours, the first", ours(asynchronous=True, first=True)),
    "ours": ("ours, asynchronous", ours(asynchronous=True)),
    "ours_sync": ("ours, synchronous", ours(asynchronous=False)),
    "deepspeed": ("DeepSpeed save_checkpoint", of_deepspeed),
    "torch": ("torch.distributed save", of_torch(asynchronous=False)),
    "torch_async": ("torch.distributed async_save", of_torch(asynchronous=True)),
    "resume": ("ours, resume", resumed),
}
"""What each is called, and what prepares it, which returns what begins it, which returns what waits for its end."""
LABELS = {kind: label for kind, (label, _) in KINDS.items()} | {"start": "ours, start"}


if __name__ == "__main__":
    main()
