"""A real run under the real launcher, that a test hurts: its processes, its screen, its curve, its checkpoints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import yaml
from tiny_run import ROOT, ds_config, tiny_recipe

from modstruct import checkpoints
from modstruct.config.recipe_files import recipe_to_dict
from modstruct.data.tokenizers import load_tokenizer

LAUNCHER = str(Path(sys.executable).with_name("deepspeed"))
SECONDS = 600  # for a whole run; a busy machine with two cores starts one in forty, or in two hundred
PRODUCT, INJECTING = "launch_scripts/pretrain.py", "tests/distributed/faults/injected.py"


def write_recipe(folder: Path, steps: int = 60, every_steps: int = 5, **data) -> str:
    """The tiny recipe, every loss of it logged. data: fields of its data section."""
    recipe = recipe_to_dict(tiny_recipe("set by each run", folder / "cache", steps=steps))
    recipe["data"] |= data
    recipe["checkpoints"] |= {"every_steps": every_steps, "keep_last": 2}
    recipe["logging"] |= {"every_steps": 1}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


class HurtCommand:
    """A started command that writes into a folder. words: the script and its options.

    launcher: `deepspeed`, `torchrun` or `python`, which starts one process. faults: for injected.py, if that is it.
    """

    def __init__(self, output: Path, words: list[str], launcher: str = "deepspeed", faults: str = "", processes=2):
        self.output = output
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        port = ["--master_port", str(29_900 + os.getpid() % 1_000)]
        begin = {
            "deepspeed": [LAUNCHER, "--num_gpus", str(processes), *port],
            "torchrun": [str(Path(LAUNCHER).with_name("torchrun")), "--nproc_per_node", str(processes), *port],
            "python": [sys.executable],
        }
        settings = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TEST_FAULTS": faults}
        self.popen = subprocess.Popen(
            [*begin[launcher], *words],
            cwd=ROOT,
            env=os.environ | settings,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own, to be signalled as a scheduler does
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)  # a full pipe would stop the run
        self._reader.start()
        self.seen: dict[int, psutil.Process] = {}

    def _read(self) -> None:
        for line in self.popen.stdout:
            self._lines.append(line)

    @property
    def screen(self) -> str:
        """What the run has shown so far; a redrawn progress bar counts as lines."""
        return "".join(self._lines).replace("\r", "\n")

    def wait_until(self, happened: Callable[[], object], what: str) -> None:
        end = time.monotonic() + SECONDS
        while not happened():
            assert self.popen.poll() is None, f"ended before {what}:\n{self.screen[-4000:]}"
            assert time.monotonic() < end, f"never {what}:\n{self.screen[-4000:]}"
            time.sleep(0.01)

    def wait_for(self, words: str) -> None:
        """Until they are on the screen."""
        self.wait_until(lambda: words in self.screen, f"{words!r} was shown")

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes by rank."""
        found = {}
        for process in self.tree():
            try:
                words = process.cmdline()
                rank = next((w for w in words if w.startswith("--local_rank=")), None)
            except psutil.Error:
                continue
            if rank and words[1:2] == ["-u"] and words[2].endswith(".py"):  # of DeepSpeed's launcher
                found[int(rank.partition("=")[2])] = process
        self.seen |= found
        return found

    def tree(self) -> list[psutil.Process]:
        """Every process of the run that lives, loader workers included."""
        try:
            return psutil.Process(self.popen.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[psutil.Process]:
        """The loader workers: children of the servers that the training processes have started."""
        return [worker for rank in self.ranks().values() for worker in _workers(rank)]

    def signal_group(self, number: int) -> None:
        os.killpg(self.popen.pid, number)

    def end(self) -> tuple[int, str]:
        """Exit status and screen. Whatever the run had started must be gone."""
        try:
            self.popen.wait(timeout=SECONDS)
        finally:
            if self.popen.poll() is None:
                os.killpg(self.popen.pid, signal.SIGKILL)
                self.popen.wait()
            self._reader.join(timeout=30)
        return self.popen.returncode, self.screen

    def left_over(self, seconds: float = 20) -> list[str]:
        """Command lines of processes that outlived the run, after they had some seconds to end."""
        end = time.monotonic() + seconds
        while left := processes_that_mention(str(self.output)):
            if time.monotonic() > end:
                break
            time.sleep(0.2)
        return left


class HurtRun(HurtCommand):
    """A started pre-training run: the product's own script, or the one that injects what `faults` says."""

    def __init__(self, recipe: str, output: Path, *options: str, faults: str = "", processes=2, launcher="deepspeed"):
        script = INJECTING if faults else PRODUCT
        words = [script, "--recipe", recipe, "--ds_config", ds_config("zero2"), "--output", str(output), *options]
        super().__init__(output, words, launcher, faults, processes)

    def wait_for_step(self, step: int) -> None:
        """Until the progress bar shows so many steps."""

        def shown() -> bool:
            bars = re.findall(r"^train: .*\| (\d+)/\d+ \[", self.screen[-400:], re.MULTILINE)
            return any(int(done) >= step for done in bars)

        self.wait_until(shown, f"step {step} was shown")


def _workers(rank: psutil.Process) -> list[psutil.Process]:
    servers = [child for child in rank.children() if "forkserver" in " ".join(child.cmdline())]
    return [worker for server in servers for worker in server.children()]


def processes_that_mention(text: str) -> list[str]:
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(text in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(" ".join(words))
    return found


def errors_on(screen: str) -> list[str]:
    """Lines that tell a user of an error, and each traceback as one; without warnings of torch, which come now and then
    of a process that serves the others' store and is killed."""
    return [
        line for line in screen.splitlines() if re.match(r"error \(|Traceback \(most recent|\[rank\d+\]:(?!\[W)", line)
    ]


def losses(output: Path) -> dict[int, float]:
    """Total loss by step, as TensorBoard shows it: of a step written twice, the later counts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = {}
    for file in sorted((output / "tensorboard").glob("events*"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        events = EventAccumulator(str(file)).Reload()
        if "loss/total" in events.Tags()["scalars"]:
            curve |= {event.step: event.value for event in events.Scalars("loss/total")}
    return curve


def whole_checkpoints(output: Path) -> list[int]:
    """Steps of the checkpoints of a run; each is read from end to end, which fails for a damaged one."""
    steps = []
    for path in checkpoints.list_checkpoints(output):
        saved = checkpoints.read(path)
        load_tokenizer(path / "tokenizer")
        assert checkpoints.step_folder(output, saved.state.step) == path
        assert all(torch.isfinite(weight).all() for weight in saved.weights.values())
        steps.append(saved.state.step)
    return steps
