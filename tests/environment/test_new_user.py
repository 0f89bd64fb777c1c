"""As a new user meets it: a container's /dev/shm, another user without HOME, a read-only installation, small disks.

Run it as root: pytest tests/environment -m slow -s
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from surroundings import ROOT, USER, Outcome, Surroundings, run, why_not
from tiny_run import ds_config, tiny_recipe

from modstruct.config.recipe_files import recipe_to_dict

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
PRETRAIN, EVALUATE = str(ROOT / "launch_scripts" / "pretrain.py"), str(ROOT / "launch_scripts" / "evaluate.py")


@pytest.fixture
def mine() -> Iterator[Path]:
    """A folder of the user's in which the command runs; pytest's own ones are closed to others."""
    with tempfile.TemporaryDirectory(prefix="modstruct-new-user-") as folder:
        os.chmod(folder, 0o755)
        mine = Path(folder, "mine")
        mine.mkdir()
        yield mine


def write_recipe(folder: Path, steps: int = 4, **changes) -> list[str]:
    """The options of a tiny run into ./run with ./cache. changes: fields of sections, as --FIELD."""
    recipe = recipe_to_dict(tiny_recipe("run", "cache", steps=steps))
    recipe["data"] |= {"validation": "scenes", "eval": "scenes", "zero_shot": "scenes", "workers": 1}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    options = [word for name, value in changes.items() for word in (f"--{name.replace('__', '.')}", str(value))]
    return ["--recipe", "tiny.yaml", "--ds_config", ds_config("zero2"), *options]


def launched(processes: int, port: int = 29_400) -> list[str]:
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    return [launcher, "--num_gpus", str(processes), "--master_port", str(port + os.getpid() % 90)]


def succeeded(outcome: Outcome) -> Outcome:
    assert outcome.status == 0, outcome.screen[-3000:]
    assert outcome.shared_memory == []
    return outcome


def refused(outcome: Outcome, *told: str) -> None:
    """One line of ours, which says all of `told`."""
    assert outcome.status != 0
    assert len(outcome.errors) == 1, outcome.screen[-3000:]
    print(outcome.errors[0])
    for part in told:
        assert part in outcome.errors[0], outcome.errors[0]
    assert outcome.shared_memory == []


@pytest.mark.parametrize("processes", [1, 2])
def test_from_the_first_line_to_the_report(mine, tried, processes):
    """64 MiB of /dev/shm, no HOME, an unknown user, umask 077, a read-only installation."""
    options = write_recipe(mine)
    with tried(f"training and resuming, {processes} process(es)"):
        trained = succeeded(run([*launched(processes), PRETRAIN, *options], mine))
        assert "Starting on" in trained.screen
        assert "R@10" in trained.screen
        assert (mine / "run" / "export").is_dir()
        assert {path.stat().st_mode & 0o077 for path in (mine / "run").rglob("*")} == {0}
        more = ["--resume", "latest", "--train.steps", "6"]
        succeeded(run([*launched(processes), PRETRAIN, *options, *more], mine))
    with tried(f"embedding, measuring and reporting, {processes} process(es)"):
        command = ["embed", "--checkpoint", "run", "--out", "evaluation", "--data.cache", "cache"]
        succeeded(run([*launched(processes), EVALUATE, *command], mine))
        metrics = ["--metrics", "retrieval", "structure"]
        succeeded(run([*launched(processes), EVALUATE, "measure", "evaluation", *metrics], mine))
        succeeded(run([sys.executable, EVALUATE, "report", "evaluation", "--out", "report"], mine))
        assert (mine / "report.html").is_file()


def test_the_default_recipe_and_large_batches(mine, tried):
    """Batches of 2 loader processes take 200 MiB here: more than the shared memory of a container."""
    small = ["--data.cache", "cache", "--train.steps", "2", "--output", "run"]
    scenes = [f"--data.scenes.{split}_samples" for split in ("train", "validation", "test")]
    sizes = [word for split, size in zip(scenes, ("600", "40", "40"), strict=True) for word in (split, size)]
    with tried("the default recipe"):
        succeeded(run([*launched(1), PRETRAIN, "--ds_config", ds_config("zero2"), *small, *sizes], mine))
    with tried("batches beyond /dev/shm"):
        options = write_recipe(mine, 2, output="large", data__workers=2, train__global_batch=96)
        large = ["--model.vision.image_size", "224", "--model.vision.patch_size", "56"]
        succeeded(run([sys.executable, PRETRAIN, *options, *large], mine))


def test_nothing_stays_in_the_shared_memory_when_all_is_killed(mine, tried):
    options = write_recipe(mine, 10_000, checkpoints__every_steps=5)
    with tried("kill -9 of everything"):
        killed = run(
            [*launched(2), PRETRAIN, *options],
            mine,
            Surroundings(kill_when="run/checkpoints/step-*5"),
        )
        assert killed.status == -9
        assert killed.shared_memory == []


@pytest.mark.parametrize("kind", ["missing, in a read-only folder", "a file", "of another user", "read-only"])
@pytest.mark.parametrize("field", ["output", "data.cache"])
def test_a_place_that_cannot_be_written_is_named_by_its_field(mine, tried, field, kind):
    place = mine / "place"
    wanted = Surroundings()
    if kind == "a file":
        place.write_text("")
    else:
        place.mkdir()
        if kind == "of another user":
            place.chmod(0o755)
        else:
            os.chown(place, USER, USER)
            wanted.read_only = [str(place)]
    given = place / "below" if kind.startswith("missing") else place
    options = write_recipe(mine)
    with tried(f"{field} {kind}"):
        because = {"a file": "is a file", "of another user": "belongs to root, this process to user"}
        outcome = run([sys.executable, PRETRAIN, *options, f"--{field}", str(given)], mine, wanted)
        refused(outcome, f"{field} = '{given}'", because.get(kind, "Read-only file system"))


def test_evaluation_that_cannot_be_written_is_refused_before_it_is_made(mine, tried):
    options = write_recipe(mine)
    succeeded(run([sys.executable, PRETRAIN, *options], mine))
    read_only = Surroundings(read_only=[str(mine / "run")])
    with tried("evaluation of somebody's run"):
        command = ["--checkpoint", "run", "--data.cache", "cache"]
        outcome = run([sys.executable, EVALUATE, *command], mine, read_only)
        refused(outcome, "--out = ", "Read-only file system")
        assert "R@10" not in outcome.screen
        succeeded(run([sys.executable, EVALUATE, *command, "--out", "mine.json"], mine, read_only))


def test_without_home_and_cache_the_field_is_named(mine, tried):
    options = write_recipe(mine, data__cache="~/.cache/modstruct")
    with tried("no HOME, no cache"):
        refused(run([sys.executable, PRETRAIN, *options], mine), "HOME = None", "data.cache")


@pytest.mark.parametrize("mebibytes", [1, 2])
def test_a_full_disk_names_path_and_room(mine, tried, mebibytes):
    """Full when the run starts to save, or later."""
    (mine / "small").mkdir()
    options = write_recipe(mine, 40, output="small/run", checkpoints__every_steps=5, checkpoints__keep_last=9)
    with tried("output on a full disk"):
        outcome = run([*launched(2), PRETRAIN, *options], mine, Surroundings({str(mine / "small"): mebibytes}))
        refused(outcome, "No space left on device", "small/run", f"of {mebibytes} MiB are free there")


def test_a_busy_port(mine, tried):
    options = write_recipe(mine)
    with socket.socket() as other, tried("busy port"):
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus"]
        script = ["--master_port", str(port), PRETRAIN, *options]
        refused(run([*command, "2", *script], mine), f"MASTER_PORT = '{port}'", "--master_port")
        succeeded(run([*command, "1", *script], mine))


def _other_pythons() -> list[str]:
    """Interpreters from 3.11 on that the project is installed for; PYTHONS names more, with colons between."""
    named = [name for name in os.environ.get("PYTHONS", "").split(":") if name]
    found = [shutil.which(f"python3.{minor}") for minor in range(11, 20)]
    usable = []
    for python in [*named, *filter(None, found)]:
        probe = "import sys, deepspeed, modstruct._C; print(sys.version_info[:2])"
        known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run([python, "-P", "-c", probe], capture_output=True, text=True, env=known, check=False)
        if done.returncode == 0 and done.stdout.splitlines()[-1] != str(sys.version_info[:2]):
            usable.append(python)
    return usable


def test_every_python_that_is_here(mine, tried):
    pythons = _other_pythons()
    if not pythons:
        pytest.skip("the project is installed for no other Python from 3.11 on; PYTHONS=/path/to/python names one")
    for number, python in enumerate(pythons):
        version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        options = write_recipe(mine, output=f"run{number}")
        with tried(version):
            succeeded(run([python, PRETRAIN, *options], mine, Surroundings(variables={"PYTHONPATH": ""})))
