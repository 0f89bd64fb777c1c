"""tools/experiments: run.py and report.py on a repository of their own, whose runs take no time."""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).parents[2] / "tools" / "experiments"
# In the place of tools/experiments/gaussian.py. Outcomes depend on arm and seed alone.
RUNS = """
def check(arm, data):
    if arm["method"] not in ("clip", "gc"):
        raise ValueError(f"method = {arm['method']!r}: give clip or gc")

def run(arm, data, seed):
    if arm["options"].get("fails"):
        raise RuntimeError("diverged")
    return {"recall": data["level"] + 0.01 * seed + (0.1 + 0.001 * seed) * (arm["method"] == "gc")}
"""
PLAN = """
kind: gaussian
commit: COMMIT
seeds: [0, 1, 2, 3, 4, 5, 6, 7]
baseline: clip
arms:
  clip: {method: clip}
  gc: {method: gc}
  broken: {method: gc, options: {fails: true}}
data:
  low: {options: {level: 0.2}, known: {delta_p: 0.5}}
endpoints:
  recall: {values: [recall], label: R@1, unit: share, higher_is_better: true}
claims:
  - {arm: gc, against: [clip], endpoint: recall}
plots:
  - {y: recall}
  - {y: recall, x: delta_p}
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with the tools, runs that take no time and one campaign."""
    folder = tmp_path / "repository"
    experiments = folder / "tools" / "experiments"
    experiments.mkdir(parents=True)
    for name in ("plan.py", "run.py", "report.py", "one_run.py"):
        shutil.copy(TOOLS / name, experiments)
    (experiments / "gaussian.py").write_text(RUNS)
    (experiments / "make.py").write_text("import shutil, sys\nshutil.copytree(sys.argv[1], sys.argv[3])\n")
    (folder / "setup.py").write_text("")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "tools"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    (experiments / "campaigns").mkdir()
    (experiments / "campaigns" / "short.yaml").write_text(PLAN.replace("COMMIT", commit))
    return folder


def tool(repository: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repository / "tools" / "experiments" / name), "short", *words]
    if name == "run.py":
        command += ["--work", str(repository.parent / "work")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def change(repository: Path, old: str, new: str) -> None:
    plan = repository / "tools" / "experiments" / "campaigns" / "short.yaml"
    assert old in plan.read_text()
    plan.write_text(plan.read_text().replace(old, new))


def test_campaign_runs_is_resumed_and_reported(repository):
    change(repository, "  broken: {method: gc, options: {fails: true}}\n", "")
    results = repository / "tools" / "experiments" / "results" / "short"
    stopped = tool(repository, "run.py", "--hours", "0")
    assert stopped.returncode == 0, stopped.stderr
    assert not list(results.iterdir())
    ended = tool(repository, "run.py", "--lanes", "2")
    assert ended.returncode == 0, ended.stderr
    assert "16 runs done, 0 left, 0 failed" in ended.stdout
    assert "16 runs, 0 to do" in tool(repository, "run.py").stdout
    (results / "low-gc-3.json").unlink()
    assert "1 runs done, 0 left" in tool(repository, "run.py").stdout

    reported = tool(repository, "report.py", "--out", str(repository / "findings"))
    assert reported.returncode == 0, reported.stderr
    text = (repository / "findings" / "short.md").read_text()
    assert "16 of 16 runs, 0 failed" in text
    # The mean of 0.1 + 0.001 s over s = 0 … 7; all eight differences have one sign, so p = 2 / 2^8.
    assert "| gc | +10.35 [" in text
    assert "| gc | R@1 | +10.35" in text
    assert "| 0.00781 | yes |" in text
    for plot in ("short-recall-effects.svg", "short-recall-delta_p.svg"):
        assert plot in text
        assert (repository / "findings" / plot).stat().st_size > 1000


def test_what_a_plan_has_wrong_is_refused_before_the_first_run(repository):
    for old, new, told in [
        ("{arm: gc, against", "{arm: cyclip, against", "claims = 'cyclip': not in this plan; it has broken, clip, gc"),
        ("gc: {method: gc}", "gc: {method: cyclip}", "method = 'cyclip': give clip or gc"),
        ("values: [recall]", "values: [precision]", "endpoints = ['precision']: no arm has them; there are recall"),
        ("baseline: clip", "baselin: clip", "baselin"),
        ("kind: gaussian", "kind: gauss", "kind"),
    ]:
        if "precision" in new:
            change(repository, "options: {fails: true}", "options: {}")
        change(repository, old, new)
        ended = tool(repository, "run.py")
        assert ended.returncode == 2
        assert told in ended.stderr
        assert not list((repository / "tools" / "experiments").glob("results/*/*.json"))
        change(repository, new, old)


def test_failed_runs_are_kept_and_results_of_another_plan_refused(repository):
    results = repository / "tools" / "experiments" / "results" / "short"
    ended = tool(repository, "run.py")
    assert "24 runs done, 0 left, 8 failed" in ended.stdout
    assert "0 to do" in tool(repository, "run.py").stdout
    assert "8 runs done" in tool(repository, "run.py", "--again").stdout
    assert "failed: low-broken-3: RuntimeError: diverged" in tool(repository, "report.py").stdout

    elsewhere = results / "low-clip-0.json"
    elsewhere.write_text(json.dumps(json.loads(elsewhere.read_text()) | {"processor": "another"}))
    ended = tool(repository, "run.py", "--again")
    assert "seed 0: 1 runs left to another" in ended.stdout
    assert "7 runs done" in ended.stdout

    change(repository, "label: R@1", "label: recall at 1")
    ended = tool(repository, "report.py")
    assert ended.returncode == 2
    assert "of another plan than short.yaml" in ended.stderr


def test_data_is_made_once_and_its_hash_is_in_every_result(repository):
    change(repository, "  broken: {method: gc, options: {fails: true}}\n", "")
    change(repository, "plots:", 'prepare: {made: "tools/experiments/make.py {source}"}\nplots:')
    refused = tool(repository, "run.py")
    assert refused.returncode == 2
    assert "--source = None: made is made from it" in refused.stderr
    source = repository.parent / "source"
    source.mkdir()
    (source / "photographs").write_text("of cats")
    assert tool(repository, "run.py", "--source", str(source)).returncode == 0
    results = [json.loads(file.read_bytes()) for file in repository.glob("tools/experiments/results/short/*.json")]
    assert len(results) == 16
    assert len({result["prepared"]["made"] for result in results}) == 1
    first = repository / "tools" / "experiments" / "results" / "short" / "low-clip-0.json"
    first.write_text(json.dumps(json.loads(first.read_bytes()) | {"prepared": {"made": "of other files"}}))
    reported = tool(repository, "report.py")
    assert reported.returncode == 2
    assert "runs learnt from different files" in reported.stderr


def test_folds_and_tasks_of_a_training(tmp_path, monkeypatch):
    """A launcher that only writes what the scripts would."""
    monkeypatch.syspath_prepend(str(TOOLS))
    one_run = importlib.import_module("one_run")
    asked = []

    def script(words, screen):
        options = dict(itertools.pairwise(words))
        asked.append((Path(words[0]).stem, options))
        if Path(words[0]).stem == "finetune":
            values = {"accuracy": {"value": 0.5, "chance": 0.25}}
            options["--output"].mkdir()
            metrics = {"results": {options["--recipe"]: {"values": values}}}
            (options["--output"] / "metrics.json").write_text(json.dumps(metrics))
        if Path(words[0]).stem == "pretrain":
            checkpoint = Path(options["--output"]) / "checkpoints" / "step"
            checkpoint.mkdir(parents=True)
            recipe = f"data:\n  train: {options['--data.train']}\ntrain:\n  seed: {options['--train.seed']}\n"
            (checkpoint / "recipe.yaml").write_text(recipe)

    monkeypatch.setattr(one_run, "script", script)
    monkeypatch.setattr(one_run, "validation_shards", lambda run: "none")
    training = {"recipe": "r", "options": {}, "sets": ["eval"], "embed": {}, "measure": [], "outcomes": []}
    job = {
        "training": training | {"tasks": ["vqa", "text_assignment", "nlvr2"]},
        "arm": {"method": "albef", "options": {}},
        "data": {"data.train": "made/fold-{fold}/*.tar"},
    }
    found = [
        one_run.training(job | {"seed": seed, "fold": seed % 2, "folder": str(tmp_path / str(seed))}) for seed in (4, 5)
    ]
    assert [options["--data.train"] for name, options in asked if name == "pretrain"] == [
        "made/fold-0/*.tar",
        "made/fold-1/*.tar",
    ]
    assert found[0]["recipe"] == found[1]["recipe"]
    assert found[0]["values"] == dict.fromkeys(("vqa/accuracy", "text_assignment/accuracy", "nlvr2/accuracy"), 0.5)
    starts = {options["--recipe"]: options["--init"].name for name, options in asked if name == "finetune"}
    assert starts == {"vqa": "run", "text_assignment": "run", "nlvr2": "text_assignment"}


def test_statistics_against_closed_forms():
    sys.path.insert(0, str(TOOLS))
    try:
        report, one_run = importlib.import_module("report"), importlib.import_module("one_run")
    finally:
        sys.path.pop(0)
    random = np.random.default_rng(0)
    assert report.Effect(np.arange(1.0, 9), 0.0, 0.0).p == pytest.approx(2 / 2**8)
    # Ten of twelve: the two-sided tail of all signs, counted.
    differences = random.normal(0.5, 1, 10)
    signs = 1 - 2 * ((np.arange(2**10)[:, None] >> np.arange(10)) & 1)
    counted = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12)
    assert report.Effect(differences, 0.0, 0.0).p == pytest.approx(counted)
    bits = random.integers(0, 2, 1003)
    np.testing.assert_array_equal(report.unpacked(one_run.packed(bits)), bits)
    # Rows vary, seeds do not: the interval is that of a mean over rows, widened for 8 seeds.
    rows = np.tile(random.normal(0, 1, 4000), (8, 1))
    low, high = report.seeds_and_images([rows])
    assert (high - low) / 2 == pytest.approx(2.365 * np.sqrt(8 / 7) * rows[0].std() / np.sqrt(4000), rel=0.1)
    # Of the power of a paired t test at the difference it calls detectable: 80 %.
    t = report.detectable(1.0, 8)
    means = random.normal(t, 1, (4000, 8))
    found = np.abs(means.mean(1)) > 2.365 * means.std(1, ddof=1) / np.sqrt(8)
    assert found.mean() == pytest.approx(0.8, abs=0.04)
