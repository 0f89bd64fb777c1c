"""A run that stopped goes on anywhere: other processes, ZeRO stage, loader workers, micro-batches. It takes the same
samples in the same global batches and ends with the same weights."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from processes import run_on_processes
from small_runs import OFFLOADED, STAGES, distance, rows_taken, train_several

from modstruct.checkpoints import step_folder

STEPS, STOP = 8, 4
TOLERANCE = 1e-4


def unbroken(folder: Path, stages: list[str], processes: int = 2) -> dict[str, Path]:
    """A run for each stage, with a checkpoint half way."""
    outputs = {stage: folder / f"{stage}-on-{processes}" for stage in stages}
    runs = {str(output): {"stage": s, "steps": STEPS, "every_steps": STOP} for s, output in outputs.items()}
    run_on_processes(train_several, processes, str(folder / "cache"), runs)
    return outputs


def gone_on(folder: Path, processes: int, runs: dict[str, dict]) -> dict[str, Path]:
    """Runs by name, each from the middle of the run `whole`, on so many processes."""
    outputs = {name: folder / f"{name}-on-{processes}" for name in runs}
    options = {
        str(outputs[name]): {key: value for key, value in run.items() if key != "whole"}
        | {"steps": STEPS, "resume": str(step_folder(run["whole"], STOP))}
        for name, run in runs.items()
    }
    run_on_processes(train_several, processes, str(folder / "cache"), options)
    return outputs


def differences(whole: Path, resumed: Path) -> list[str]:
    """What of a resumed run is not as in the unbroken one."""
    expected = {step: rows for step, rows in rows_taken(whole).items() if step >= STOP}
    wrong = [] if rows_taken(resumed) == expected else ["takes other samples"]
    far = distance(whole, resumed)
    return wrong + ([] if far < TOLERANCE else [f"ends {far:.1e} away"])


def test_on_other_processes_stage_workers_and_micro_batches(tmp_path):
    whole = unbroken(tmp_path, ["zero2"])["zero2"]
    resumed = gone_on(tmp_path, 3, {"other": {"whole": whole, "stage": "zero3", "workers": 1, "micro": 3}})
    assert differences(whole, resumed["other"]) == []


@pytest.mark.slow
def test_from_every_stage_to_every_stage(tmp_path):
    stages = STAGES + OFFLOADED
    wholes = unbroken(tmp_path, stages)
    runs = {f"{a}-to-{b}": {"whole": wholes[a], "stage": b} for a, b in product(stages, stages)}
    resumed = gone_on(tmp_path, 2, runs)
    wrong = {name: differences(run["whole"], resumed[name]) for name, run in runs.items()}
    print(f"\n{len(runs)} changes of stage")
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2, 4])
def test_from_any_number_of_processes_to_any(tmp_path, before):
    """Each with other loader workers and another micro-batch, and to a stage that keeps the weights elsewhere."""
    wholes = unbroken(tmp_path, ["zero0", "zero3"], before)
    found = {}
    for after in (1, 2, 3, 4):
        runs = {
            f"{a}-to-{b}-{workers}-workers-micro-{micro}": {
                "whole": wholes[a],
                "stage": b,
                "workers": workers,
                "micro": micro,
            }
            for (a, b), (workers, micro) in product(
                [("zero0", "zero3"), ("zero3", "zero1")], [(0, 2), (1, None), (2, 1)]
            )
        }
        resumed = gone_on(tmp_path, after, runs)
        found |= {f"{after} {name}": differences(run["whole"], resumed[name]) for name, run in runs.items()}
    print(f"\nfrom {before} processes: {len(found)} resumed runs")
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
