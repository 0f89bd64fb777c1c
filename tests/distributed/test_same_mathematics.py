"""Float32 training ends with the same weights however it is divided: processes, ZeRO stage, micro-batches.

Without BatchNorm and dropout, whose results depend on the division by their nature (see the README).
"""

from __future__ import annotations

import pytest
from processes import run_on_processes
from small_runs import OFFLOADED, STAGES, distance, train_several

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
