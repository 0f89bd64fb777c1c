"""Float32 training ends with the same weights however it is divided: processes, ZeRO stage, micro-batches.

Without BatchNorm and dropout, whose results depend on the division by their nature (see the README).
"""

from __future__ import annotations

import pytest
from processes import run_on_processes
from small_runs import OFFLOADED, STAGES, distance, momentum_distance, train_several

from modstruct.cli import RECIPES

METHODS = sorted(path.stem for path in (RECIPES / "methods").glob("*.yaml") if not path.stem.startswith("albef"))
BATCH = 16
MICRO_BATCHES = [None, 2, 3, 1]  # of 16, 8 and 4 rows a process: all, a divisor, a non-divisor, one by one
TOLERANCE = 1e-4


def test_two_processes_every_stage_in_micro_batches(tmp_path):
    runs = {stage: {"stage": stage, "micro": 4} for stage in STAGES + OFFLOADED}  # of 6 rows
    runs = {"undivided": {"stage": "zero0"}} | runs
    run_on_processes(
        train_several, 2, str(tmp_path / "cache"), {str(tmp_path / n): {"steps": 4, **o} for n, o in runs.items()}
    )
    distances = {name: distance(tmp_path / "undivided", tmp_path / name) for name in runs}
    assert max(distances.values()) < TOLERANCE, distances


def test_the_fusion_model_on_one_process_and_two(tmp_path):
    """Whole, and in micro-batches, whose negatives lie in other micro-batches and on the other process."""
    cells = [("zero1", None), ("zero0", 4), ("zero3", 4)]  # of 6 rows
    alone, two = tmp_path / "one", {cell: tmp_path / f"two-{cell[0]}-{cell[1]}" for cell in cells}
    alike = {"steps": 4, "method": "albef_all"}
    run_on_processes(train_several, 1, str(tmp_path / "cache"), {str(alone): {"stage": "zero0", **alike}})
    runs = {str(output): {"stage": stage, "micro": micro, **alike} for (stage, micro), output in two.items()}
    run_on_processes(train_several, 2, str(tmp_path / "cache"), runs)
    for cell, output in two.items():
        assert distance(alone, output) < TOLERANCE, cell
        assert momentum_distance(alone, output) < TOLERANCE, cell


@pytest.mark.slow
def test_the_fusion_model_on_any_number_of_processes_at_any_stage(tmp_path):
    alike = {"steps": 20, "method": "albef_all", "batch": 24}
    cells = {}
    for processes in (1, 2, 3, 4):
        stages = STAGES + OFFLOADED if processes == 2 else STAGES
        runs = {
            str(tmp_path / f"{processes}-{stage}-{micro}"): {"stage": stage, "micro": micro, **alike}
            for stage in stages
            for micro in (None, 5)  # of 24, 12, 8 and 6 rows
        }
        run_on_processes(train_several, processes, str(tmp_path / "cache"), runs)
        cells |= runs
    reference = tmp_path / "1-zero0-None"
    found = {
        output.rpartition("/")[2]: (distance(reference, output), momentum_distance(reference, output))
        for output in cells
    }
    print(f"\nalbef_all: {len(cells)} runs of 20 steps, largest relative distances {max(found.values())}")
    assert {name: far for name, far in found.items() if max(far) >= TOLERANCE} == {}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_any_number_of_processes_any_stage_any_micro_batch(tmp_path, method):
    alike = {"steps": 20, "method": method, "batch": BATCH}
    cells = {}
    for processes in (1, 2, 4):
        runs = {
            str(tmp_path / f"{processes}-{stage}-{micro}"): {"stage": stage, "micro": micro, **alike}
            for stage in STAGES
            for micro in MICRO_BATCHES
        }
        run_on_processes(train_several, processes, str(tmp_path / "cache"), runs)
        cells |= runs
    reference = tmp_path / "1-zero0-None"
    distances = {output.rpartition("/")[2]: distance(reference, output) for output in cells}
    print(f"\n{method}: {len(cells)} runs of 20 steps, largest relative distance {max(distances.values()):.1e}")
    assert {name: d for name, d in distances.items() if d >= TOLERANCE} == {}
