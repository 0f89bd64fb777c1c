"""Run a campaign: arms x data x seeds of campaigns/NAME.yaml, each by the code of the plan's commit.

python tools/experiments/run.py gaussian --lanes 2 --hours 2
python tools/experiments/report.py gaussian

A lane is a process with one thread, which does one run after another. Each run leaves one small JSON in
results/NAME; what is there is not run again, so the same command goes on where it ended, on another day or machine. A
run that fails is kept with its error and counted; --again repeats those. All arms of a seed run on one kind of
processor: seeds that another kind began are left to it, and named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from plan import HERE, Job, Plan, read_plan

from modstruct.cli import run_tool
from modstruct.errors import RunError, require
from modstruct.files import atomic_write

ROOT = HERE.parents[1]
TURN = threading.Lock()
STEPS_OPTION = {"gaussian": "steps", "training": "train.steps"}
"""By kind, the option that a rehearsal sets."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", help="Its name in campaigns, or a YAML file.")
    parser.add_argument("--lanes", type=int, default=1, help="Runs beside each other, of one thread each.")
    parser.add_argument("--hours", type=float, default=1e9, help="No run begins that would end later.")
    parser.add_argument("--source", type=Path, help="What the plan's data is made from, where its header asks for it.")
    parser.add_argument("--again", action="store_true", help="Repeat the runs that failed.")
    cache = Path("~/.cache/modstruct/experiments").expanduser()
    parser.add_argument("--work", type=Path, default=cache, help=f"Worktrees and runs in progress (default: {cache}).")
    options = parser.parse_args()
    return run_tool(lambda: run(options), (OSError, ValueError, RunError))


def run(options: argparse.Namespace) -> None:
    require(options.lanes >= 1, "--lanes", options.lanes, "at least 1")
    plan = read_plan(options.campaign)
    here, until = processor(), time.monotonic() + 3600 * options.hours
    waiting = list(jobs_to_run(plan, here, options.again))
    say(f"{plan.name}, plan {plan.hash}: {len(plan.jobs())} runs, {len(waiting)} to do here ({here})")
    if not waiting:
        return
    checkout = worktree(plan.commit, options.work)
    prepared = {folder: prepare(checkout, folder, tool, options.source) for folder, tool in plan.prepare.items()}
    work = options.work / plan.name
    rehearse(plan, Lane(checkout, work, "rehearsal"), waiting)
    plan.results.mkdir(parents=True, exist_ok=True)
    seconds: list[float] = []
    taken = iter(waiting)

    def of_lane(number: int) -> None:
        lane = Lane(checkout, work, str(number))
        while time.monotonic() + (statistics.median(seconds) if seconds else 0) < until:
            with TURN:
                job = next(taken, None)
            if job is None:
                break
            started = time.monotonic()
            found = lane.answer(job.told())
            seconds.append(time.monotonic() - started)
            save(job, found | {"processor": here, "prepared": prepared, "seconds": round(seconds[-1], 1)})
            left = len(waiting) - len(seconds)
            hours = statistics.median(seconds) * left / options.lanes / 3600
            say(f"{job.name}: {found.get('error', f'{seconds[-1]:.0f} s')} ({left} left, {hours:.1f} h)")
        lane.end()

    with ThreadPoolExecutor(options.lanes) as pool:
        list(pool.map(of_lane, range(options.lanes)))
    failed = [job.name for job in plan.jobs() if "error" in (job.result() or {})]
    say(f"{len(seconds)} runs done, {len(waiting) - len(seconds)} left, {len(failed)} failed {' '.join(failed)}")


def prepare(checkout: Path, name: str, tool: str, source: Path | None) -> str:
    """Make a folder of data in the checkout unless it is there; the hash of its files' names and bytes."""
    require("{source}" not in tool or source is not None, "--source", source, f"{name} is made from it: give its path")
    folder = checkout / name
    if not folder.exists():
        words = [word.replace("{source}", str((source or Path()).resolve())) for word in tool.split()]
        say(f"{' '.join(words)} --out {folder}")
        command([sys.executable, *words, "--out", str(folder)], checkout, PYTHONPATH=str(checkout))
    content = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content.update(f"{file.relative_to(folder)}\n".encode() + hashlib.blake2b(file.read_bytes()).digest())
    return content.hexdigest()


def rehearse(plan: Plan, lane: Lane, waiting: list[Job]) -> None:
    """Refuse what is wrong with the plan before the first run: options of every arm and data, names of endpoints.

    Where nothing has run yet, arms train two steps each, those of claims first, until every endpoint has been measured.
    """
    claimed = {claim.arm for claim in plan.claims}
    each = {(job.arm, job.data): job for job in sorted(waiting, key=lambda job: job.arm not in claimed)}
    for job in each.values():
        found = lane.answer(job.told() | {"check": True})
        require("error" not in found, f"{plan.name}, {job.data}, {job.arm}", found.get("error"), "correct the plan")
    missing = {value for endpoint in plan.endpoints.values() for value in endpoint.values}
    measured: set[str] = set()
    for job in each.values() if len(waiting) == len(plan.jobs()) else ():
        if missing and job.data == waiting[0].data:
            say(f"rehearsing {job.arm}")
            found = lane.answer(job.told({STEPS_OPTION[plan.kind]: 2}) | {"rehearsal": True})
            require("error" not in found, f"{plan.name}, {job.arm}", found.get("error"), "correct the plan")
            measured |= set(found["values"])
            missing -= measured
    if measured:
        require(not missing, "endpoints", sorted(missing), f"no arm has them; there are {', '.join(sorted(measured))}")
    lane.end()


def jobs_to_run(plan: Plan, here: str, again: bool) -> Iterator[Job]:
    """Those without a result, of the seeds that no other kind of processor began."""
    found = {job: job.result() for job in plan.jobs()}
    elsewhere = {
        job.seed: result["processor"] for job, result in found.items() if result and result["processor"] != here
    }
    left_out = Counter[int]()
    for job, result in found.items():
        if result is None or (again and "error" in result):
            left_out[job.seed] += job.seed in elsewhere
            if job.seed not in elsewhere:
                yield job
    for seed, count in sorted((+left_out).items()):
        say(f"seed {seed}: {count} runs left to {elsewhere[seed]}, which began it (remove its results to begin anew)")


class Lane:
    """A process of the checkout that does runs, with a folder of its own for what they write."""

    def __init__(self, checkout: Path, work: Path, name: str):
        self.folder = work / f"lane-{name}"
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(checkout)}
        command = [sys.executable, str(checkout / "tools" / "experiments" / "one_run.py")]
        with open(self.folder / "screen.txt", "ab") as screen:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=screen, text=True, env=environment)

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(job | {"folder": str(self.folder / job["name"])}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RunError(f"the process of runs ended: {self.folder / 'screen.txt'} says why")
        return json.loads(line)

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def save(job: Job, found: dict[str, Any]) -> None:
    about = {"plan": job.plan.hash, "commit": job.plan.commit, "data": job.data, "arm": job.arm, "seed": job.seed}
    with atomic_write(job.file) as file:
        file.write((json.dumps(about | found, sort_keys=True) + "\n").encode())


def worktree(commit: str, work: Path) -> Path:
    """A checkout of the commit with its extension built for the CPU."""
    folder = work / "worktrees" / commit
    if not (folder / "built").exists():
        say(f"checking out {commit} and building its extension in {folder}")
        if not folder.exists():
            command(["git", "-C", str(ROOT), "worktree", "add", "--force", "--detach", str(folder), commit])
        command([sys.executable, "setup.py", "build_ext", "--inplace"], folder, MODSTRUCT_CUDA="0")
        (folder / "built").touch()
    return folder


def command(words: list[str], folder: Path | None = None, **environment: str) -> None:
    ended = subprocess.run(words, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RunError(f"{' '.join(words)}: status {ended.returncode}: {ended.stderr.strip()[-500:]}")


def processor() -> str:
    """Model and widest vectors of this machine's processor: sums of another kind round otherwise."""
    facts = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    told = {name.strip(): value.strip() for name, value in facts.items()}
    flags = told.get("flags", "").split()
    widest = next((name for name in ("amx_tile", "avx512f", "avx2") if name in flags), "")
    return " ".join(filter(None, [told.get("model name", "unknown"), widest]))


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
