"""The checkpoints of a run: which there are, the best of them, and which are kept."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from modstruct.errors import refuse
from modstruct.files import atomic_write, sync_folder

log = logging.getLogger(__name__)
_COMPLETE = re.compile(r"step-(\d{8,})")


def folder(output: str | Path) -> Path:
    return Path(output) / "checkpoints"


def step_folder(output: str | Path, step: int) -> Path:
    return folder(output) / f"step-{step:08d}"


def list_checkpoints(output: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in folder(output).glob("step-*") if _COMPLETE.fullmatch(p.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(path.name.removeprefix("step-"))


def find(which: str, output: str | Path, option: str = "--resume") -> Path | None:
    """The folder that `latest`, `best`, a checkpoint's or a run's path names; None for a run without one.

    output: the run's folder, for `latest` and `best`. option: where `which` came from, for the error.
    """
    if which == "best":
        best = read_best(output)
        if best is None:
            score = _noted_best(output).get("score")
            noted = (
                "it needs data.validation" if score is None else f"best.json names none that is there, score {score!r}"
            )
            refuse(option, which, f"{output} has no best checkpoint; {noted}")
        return folder(output) / best["checkpoint"]
    if which == "latest" or folder(which).is_dir():
        found = list_checkpoints(output if which == "latest" else which)
        return found[-1] if found else None
    if not (Path(which) / "state.json").is_file():
        refuse(
            option, which, "is no checkpoint; give a folder …/checkpoints/step-…, a run's folder, `latest` or `best`"
        )
    return Path(which)


def read_best(output: str | Path) -> dict | None:
    """{"checkpoint": folder name, "score": …} of the best checkpoint of a run by validation; None without one.

    A score that is NaN or infinite is none: nothing would ever be above it.
    """
    best = _noted_best(output)
    name, score = best.get("checkpoint"), best.get("score")
    # A name and no path: it must not lead out of the run.
    if not isinstance(name, str) or not _COMPLETE.fullmatch(name) or not _is_score(score):
        return None
    return best if (folder(output) / name).is_dir() else None


def _noted_best(output: str | Path) -> dict:
    try:
        best = json.loads((folder(output) / "best.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return best if isinstance(best, dict) else {}


def _is_score(score: object) -> bool:
    return isinstance(score, (int, float)) and abs(score) <= sys.float_info.max  # which holds of no NaN


def note_score(path: Path, score: float) -> bool:
    """Make the checkpoint `path` the best of its run if its score is above the best so far; say whether.

    score: of the validation source, R@1 or a task's accuracy; NaN or infinity is none, which the log says.
    """
    if not _is_score(score):
        log.warning("%s: its score by data.validation is %s, so it is not taken for the best", path.name, score)
        return False
    best, before = read_best(path.parents[1]), _noted_best(path.parents[1]).get("score")
    better = not best or best["score"] < score
    if better and before is not None and not _is_score(before):
        log.warning("best.json: the score %r is none and is replaced by that of %s", before, path.name)
    noted = {"checkpoint": path.name, "score": score} if better else best or {}
    with atomic_write(path.with_name("best.json")) as file:
        file.write(json.dumps(noted | {"validated": step_of(path)}).encode())
    return better


def was_validated(path: Path) -> bool:
    """Whether a score of the checkpoint `path` was noted, be it the best or not: a stop may have come before.

    Scores of versions that did not note the step in best.json count as those of every checkpoint.
    """
    noted = _noted_best(path.parents[1])
    last = noted.get("validated", step_of(path) if noted else None)
    return isinstance(last, int) and last >= step_of(path)


def remove_old(output: str | Path, keep_last: int, step: int) -> None:
    """Keep the last `keep_last` checkpoints and the best.

    step: of the checkpoint just written; later ones belong to a branch that a resume from an earlier step has left.
    """
    best = read_best(output)
    found = list_checkpoints(output)
    ours = [path for path in found if step_of(path) <= step]
    for path in [*found[len(ours) :], *ours[:-keep_last]]:
        if step_of(path) > step or best is None or path.name != best["checkpoint"]:
            discard(path)


def clean(output: str | Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for suffix in ("*.part", "*.old"):
        for path in folder(output).glob(suffix):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def replace_folder(aside: Path, target: Path) -> None:
    """Put a folder on the disk and give it the name `target`, whose earlier content goes."""
    sync_tree(aside)
    if target.exists():
        discard(target)
    os.rename(aside, target)
    sync_folder(target.parent)


def discard(path: Path) -> None:
    """Remove a folder."""
    # Renamed first: a kill in the middle must not leave a damaged folder under a whole one's name.
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}.", suffix=".old"))
    os.rename(path, old / path.name)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(path: Path) -> None:
    """Put a folder with all that it holds on the disk."""
    for file in path.rglob("*"):
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        else:
            sync_folder(file)
    sync_folder(path)
