"""Runs of a campaign, one after another, by the code of the checkout that this file lies in.

Started by run.py from the worktree of the plan's commit: reads jobs from its standard input, a line of JSON each, and
answers each with a line: {"values": {name: number}, "outcomes": {name: text}, "recipe": text} or {"error": text}.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch_scripts"


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = gaussian(job) if job["kind"] == "gaussian" else training(job)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def gaussian(job: dict[str, Any]) -> dict[str, Any]:
    from gaussian import check, run

    if job.get("check"):
        check(job["arm"], job["data"])
        return {"values": {}}
    return {"values": run(job["arm"], job["data"], job["seed"]), "recipe": hashed([job["arm"], job["data"]])}


def training(job: dict[str, Any]) -> dict[str, Any]:
    """pretrain.py, evaluate.py embed and measure, then finetune.py for each task, in job["folder"], which is removed
    unless something fails."""
    how, folder = job["training"], Path(job["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = {
        name: value.replace("{fold}", str(job["fold"])) if isinstance(value, str) else value
        for name, value in job["data"].items()
    }
    options = how["options"] | data | job["arm"]["options"]
    recipe = ["--recipe", how["recipe"], "--method", job["arm"]["method"], *words_of(options)]
    recipe += ["--train.seed", str(job["seed"]), "--output", str(folder / "run")]
    if job.get("check"):
        script([LAUNCH / "pretrain.py", *recipe, "--print_config"], folder / "check.txt")
        return {"values": {}}
    script([LAUNCH / "pretrain.py", "--ds_config", ROOT / "ds_configs" / "zero0.json", *recipe], folder / "train.txt")
    made = validation_shards(folder / "run") if any("{validation}" in word for word in how["sets"]) else ""
    sets = ["--sets", *(word.replace("{validation}", made) for word in how["sets"])]
    embed = [LAUNCH / "evaluate.py", "embed", "--checkpoint", folder / "run", "--out", folder / "evaluation", *sets]
    script([*embed, *words_of(how["embed"])], folder / "embed.txt")
    for number, options in enumerate(how["measure"]):
        measure = [LAUNCH / "evaluate.py", "measure", folder / "evaluation", *options.split()]
        script(measure, folder / f"measure-{number}.txt")
    values, outcomes = measured(folder / "evaluation" / "results", how["outcomes"])
    for task in how["tasks"]:
        options = ["--train.seed", job["seed"], *(["--train.steps", 2] if job.get("rehearsal") else [])]
        values |= fine_tuned(task, folder, options)
    made_with = next((folder / "run").glob("checkpoints/*/recipe.yaml")).read_text()
    for name, value in data.items():
        if value != job["data"][name]:  # runs of one arm differ in their fold alone
            made_with = made_with.replace(value, job["data"][name])
    own = [line for line in made_with.splitlines() if not line.strip().startswith(("output:", "seed:"))]
    shutil.rmtree(folder)
    return {"values": values, "outcomes": outcomes, "recipe": hashed(own)}


def fine_tuned(task: str, folder: Path, options: list[Any]) -> dict[str, float]:
    """Metrics of the test split of a task, by TASK/METRIC."""
    assigned = folder / "text_assignment"
    start = assigned if task == "nlvr2" and assigned.exists() else folder / "run"
    words = ["--recipe", task, "--init", start, "--output", folder / task, *options]
    script([LAUNCH / "finetune.py", "--ds_config", ROOT / "ds_configs" / "zero0.json", *words], folder / f"{task}.txt")
    found = json.loads((folder / task / "metrics.json").read_bytes())["results"].values()
    return {f"{task}/{name}": value["value"] for result in found for name, value in result["values"].items()}


def validation_shards(run: Path) -> str:
    """The validation shards of the scenes that a run learnt from."""
    from modstruct.cli import parse_recipe_text
    from modstruct.data.run_data import scenes_of
    from modstruct.models.build import image_size

    recipe = parse_recipe_text(next(run.glob("checkpoints/*/recipe.yaml")).read_text())
    return str(scenes_of(recipe, image_size(recipe)).validation)


def words_of(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", json.dumps(value).strip('"'))]


def script(words: list[Any], screen: Path) -> None:
    """Run a script by this interpreter. Raises RuntimeError with the end of what it printed where it fails."""
    with open(screen, "w") as file:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, *map(str, words)]
        ended = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False, env=environment)
    if ended.returncode:
        lines = [line.rpartition("\r")[2] for line in screen.read_text(errors="replace").splitlines() if line.strip()]
        raise RuntimeError(f"{Path(words[0]).name} ended with status {ended.returncode}: {' | '.join(lines[-5:])}")


def measured(results: Path, kept: list[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Values by SET/METRIC/NAME, without those by class, and the outcomes of the values that are kept."""
    values, outcomes = {}, {}
    for path in sorted(results.glob("*/*.json")):
        of_metric = f"{path.parent.name}/{path.stem}"
        for name, value in json.loads(path.read_bytes()).get("values", {}).items():
            if "per_class" not in name:
                values[f"{of_metric}/{name}"] = float(value["value"])
        wanted = [name.removeprefix(f"{of_metric}/") for name in kept if name.startswith(f"{of_metric}/")]
        if wanted:
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                outcomes |= {f"{of_metric}/{name}": packed(arrays[name]) for name in wanted}
    missing = sorted(set(kept) - set(outcomes))
    if missing:
        raise ValueError(f"training.outcomes: {', '.join(missing)}: not measured; there are {', '.join(values)}")
    return values, outcomes


def packed(outcomes: np.ndarray) -> str:
    """Outcomes of 0 and 1 as text: "ROWS:" and their bits, deflated, in base 64."""
    if not np.isin(outcomes, (0, 1)).all():
        raise ValueError("training.outcomes: kept are outcomes of 0 and 1 alone")
    return f"{len(outcomes)}:" + base64.b64encode(zlib.compress(np.packbits(outcomes.astype(bool)).tobytes())).decode()


def hashed(about: Any) -> str:
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()


if __name__ == "__main__":
    main()
