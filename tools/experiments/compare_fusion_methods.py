"""Pre-train every method of the fusion framework, fine-tune each on the four tasks, and put all in one table.

python tools/experiments/compare_fusion_methods.py --out runs/comparison --at_once 2              # hours on two cores
python tools/experiments/compare_fusion_methods.py --out runs/comparison --methods albef albef_gc --tasks vqa snli_ve

Every run is the README's own command, with the structure losses of the method at the weights of albef_scenes
(--weights method keeps the paper's). What is finished is not run again, and a run that was stopped goes on, so the
command may be repeated. Writes table.md and table.json to --out: metrics of the test split in percent beside their
priors, and minutes of each run on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).parents[2]
METHODS = ("albef", "albef_inmodal", "albef_sep", "albef_br", "albef_gc", "albef_all")
TASKS = ("vqa", "nlvr2", "snli_ve", "retrieval")
# The metrics of a task's metrics.json that stand in the table.
SHOWN = {
    "vqa": ("accuracy",),
    "nlvr2": ("accuracy", "consistency"),
    "snli_ve": ("accuracy",),
    "retrieval": tuple(
        f"{stage}{way}/recall_at_1" for way in ("text_to_image", "image_to_text") for stage in ("", "matched_")
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder for all runs and the table.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--ds_config", default=str(ROOT / "ds_configs" / "zero2.json"))
    parser.add_argument("--launcher", nargs="+", default=["deepspeed"], help="Command that starts a script.")
    parser.add_argument("--weights", choices=("recipe", "method"), default="recipe", help="Of the structure losses.")
    parser.add_argument("--at_once", type=int, default=1, help="Runs beside each other; they share the cores.")
    options = parser.parse_args(arguments)
    lanes = Lanes(options.at_once)
    with ThreadPoolExecutor(options.at_once) as pool:
        # First come, first served: all pre-training is begun before the first task waits for its own.
        starts = {method: pool.submit(pretraining, options, method, lanes) for method in options.methods}
        tasks = {
            method: [pool.submit(task_of, options, method, task, starts[method], lanes) for task in options.tasks]
            for method in options.methods
        }
        results = {}
        for method in options.methods:
            results[method] = {"pretraining": starts[method].result()}
            for runs in tasks[method]:
                results[method] |= runs.result()
            (options.out / "table.json").write_text(json.dumps(results, indent=1))
            (options.out / "table.md").write_text(table(results, options.tasks))
    print(table(results, options.tasks))


class Lanes:
    """Numbers for runs beside each other: each has its own port, and its share of the cores."""

    def __init__(self, count: int) -> None:
        self.threads = max(1, (os.cpu_count() or 1) // count)
        self.free: SimpleQueue[int] = SimpleQueue()
        for number in range(count):
            self.free.put(number)


def pretraining(options: argparse.Namespace, method: str, lanes: Lanes) -> dict:
    words = ["--recipe", "albef_scenes", "--method", method]
    if options.weights == "recipe":
        words += recipe_weights(method)
    return run(options, "pretrain", options.out / method / "pretraining", words, lanes)


def recipe_weights(method: str) -> list[str]:
    """Words that give the structure losses of a method the weights of albef_scenes."""
    folder = ROOT / "modstruct" / "config" / "recipes"
    recipe = yaml.safe_load((folder / "albef_scenes.yaml").read_text())["losses"]
    losses = yaml.safe_load((folder / "methods" / f"{method}.yaml").read_text())["losses"]
    chosen = [name for name in ("separation", "bridge", "geometry") if name in losses]
    return [word for name in chosen for word in (f"--losses.{name}.weight", str(recipe[name]["weight"]))]


def task_of(options: argparse.Namespace, method: str, task: str, start: Future, lanes: Lanes) -> dict[str, dict]:
    """Runs of one task, once the method's pre-training is there."""
    start.result()
    folder = options.out / method
    init, runs = folder / "pretraining", {}
    if task == "nlvr2":  # whose two images are learned about first
        words = ["--recipe", "text_assignment", "--init", str(init)]
        init = folder / "text_assignment"
        runs["text_assignment"] = run(options, "finetune", init, words, lanes)
    words = ["--recipe", task, "--init", str(init)]
    runs[task] = run(options, "finetune", folder / task, words, lanes)
    return runs


def run(options: argparse.Namespace, script: str, output: Path, words: list[str], lanes: Lanes) -> dict:
    """Metrics of a run and its minutes, from its folder where it was finished before."""
    finished = output / "finished.json"
    if not finished.exists():
        lane = lanes.free.get()
        output.mkdir(parents=True, exist_ok=True)
        launcher = [*options.launcher]
        if options.at_once > 1 and launcher == ["deepspeed"]:
            launcher += ["--master_port", str(29600 + lane)]
        command = [*launcher, str(ROOT / "launch_scripts" / f"{script}.py"), "--ds_config", options.ds_config]
        command += ["--output", str(output), "--resume", "latest", *words]
        print(" ".join(command), flush=True)
        environment = os.environ if options.at_once == 1 else os.environ | {"OMP_NUM_THREADS": str(lanes.threads)}
        started = time.monotonic()
        with open(output / "screen.txt", "a") as screen:
            ended = subprocess.run(command, stdout=screen, stderr=subprocess.STDOUT, check=False, env=environment)
        minutes = (time.monotonic() - started) / 60
        lanes.free.put(lane)
        if ended.returncode:
            sys.exit(f"error: it ended with status {ended.returncode}; {output / 'screen.txt'} says why")
        measured = json.loads((output / "metrics.json").read_text()) if (output / "metrics.json").exists() else {}
        metrics = measured.get("results", {}).get(output.name, {}).get("values", {})
        finished.write_text(json.dumps({"minutes": minutes, "metrics": metrics}))
    return json.loads(finished.read_text())


def table(results: dict[str, dict], tasks: list[str]) -> str:
    """Methods in rows, metrics in columns, as Markdown; the first row are the priors."""
    columns = [(task, name) for task in tasks for name in SHOWN[task]]
    head = ["method", "pre-training, min", *(f"{task}: {name}" for task, name in columns)]
    first = next(iter(results.values()))

    def percent(metric: dict, key: str) -> str:
        return f"{100 * metric[key]:.2f}" if key in metric else ""

    rows = [["prior", "", *(percent(first[task]["metrics"][name], "chance") for task, name in columns)]]
    for method, runs in results.items():
        metrics = [f"{percent(runs[t]['metrics'][n], 'value')} ({runs[t]['minutes']:.1f} min)" for t, n in columns]
        rows.append([method, f"{runs['pretraining']['minutes']:.1f}", *metrics])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
