"""Pre-train every method of the fusion framework, fine-tune each on the four tasks, and put all in one table.

python tools/compare_fusion_methods.py --out runs/comparison                          # hours on two cores
python tools/compare_fusion_methods.py --out runs/comparison --methods albef albef_gc --tasks vqa snli_ve

Every run is the README's own command, one after the other; what is finished is not run again, and a run that was
stopped goes on, so the command may be repeated. Writes table.md and table.json to --out: figures of the test split in
percent beside their priors, and minutes of each run on this machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
METHODS = ("albef", "albef_sep", "albef_br", "albef_gc", "albef_all")
TASKS = ("vqa", "nlvr2", "snli_ve", "retrieval")
# The figures of a task's metrics.json that stand in the table.
SHOWN = {
    "vqa": ("accuracy",),
    "nlvr2": ("accuracy", "consistency"),
    "snli_ve": ("accuracy",),
    "retrieval": ("text -> image R@1", "matched text -> image R@1", "image -> text R@1", "matched image -> text R@1"),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="Folder for all runs and the table.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--ds_config", default=str(ROOT / "ds_configs" / "zero2.json"))
    parser.add_argument("--launcher", nargs="+", default=["deepspeed"], help="Command that starts a script.")
    options = parser.parse_args(arguments)
    results = {}
    for method in options.methods:
        folder = options.out / method
        start = folder / "pretraining"
        words = ["--recipe", "albef_scenes", "--method", method]
        results[method] = {"pretraining": run(options, "pretrain", start, words)}
        for task in options.tasks:
            init = start
            if task == "nlvr2":  # whose two pictures are learned about first
                init = folder / "text_assignment"
                words = ["--recipe", "text_assignment", "--init", str(start)]
                results[method]["text_assignment"] = run(options, "finetune", init, words)
            words = ["--recipe", task, "--init", str(init)]
            results[method][task] = run(options, "finetune", folder / task, words)
        (options.out / "table.json").write_text(json.dumps(results, indent=1))
        (options.out / "table.md").write_text(table(results, options.tasks))
    print(table(results, options.tasks))


def run(options: argparse.Namespace, script: str, output: Path, words: list[str]) -> dict:
    """Metrics of a run and its minutes, from its folder where it was finished before."""
    finished = output / "finished.json"
    if not finished.exists():
        output.mkdir(parents=True, exist_ok=True)
        command = [*options.launcher, str(ROOT / "launch_scripts" / f"{script}.py"), "--ds_config", options.ds_config]
        command += ["--output", str(output), "--resume", "latest", *words]
        print(" ".join(command), flush=True)
        started = time.monotonic()
        with open(output / "screen.txt", "a") as screen:
            ended = subprocess.run(command, stdout=screen, stderr=subprocess.STDOUT, check=False)
        if ended.returncode:
            sys.exit(f"error: it ended with status {ended.returncode}; {output / 'screen.txt'} says why")
        minutes = (time.monotonic() - started) / 60
        metrics = json.loads((output / "metrics.json").read_text()) if (output / "metrics.json").exists() else {}
        finished.write_text(json.dumps({"minutes": minutes, "metrics": metrics}))
    return json.loads(finished.read_text())


def table(results: dict[str, dict], tasks: list[str]) -> str:
    """Methods in rows, figures in columns, as Markdown; the first row are the priors."""
    columns = [(task, name) for task in tasks for name in SHOWN[task]]
    head = ["method", "pre-training, min", *(f"{task}: {name}" for task, name in columns)]
    first = next(iter(results.values()))

    def percent(figure: dict, key: str) -> str:
        return f"{100 * figure[key]:.2f}" if key in figure else ""

    rows = [["prior", "", *(percent(first[task]["metrics"][name], "chance") for task, name in columns)]]
    for method, runs in results.items():
        figures = [f"{percent(runs[t]['metrics'][n], 'value')} ({runs[t]['minutes']:.1f} min)" for t, n in columns]
        rows.append([method, f"{runs['pretraining']['minutes']:.1f}", *figures])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main()
