"""A command in surroundings of its own: a mount namespace with a small /dev/shm and small disks, another user.

The user has a number that the system does not know, no HOME, umask 077, and may read everything (the interpreter may
lie in somebody's home) but write only what is his; the installation is read-only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
USER = 23_456
SHARED_MEMORY_MIB = 64  # a container's default
SECONDS = 600
AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
AS_USER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@dataclass
class Surroundings:
    """What the command finds."""

    disks_mib: dict[str, int] = field(default_factory=dict)
    """Folders on small disks of their own."""
    read_only: list[str] = field(default_factory=list)
    """Folders that nobody may write to, beside the installation."""
    variables: dict[str, str] = field(default_factory=dict)
    kill_when: str | None = None
    """A glob pattern: once something matches, every process of the command gets SIGKILL at once."""


@dataclass
class Outcome:
    status: int
    screen: str
    shared_memory: list[str]
    """What is left in /dev/shm."""

    @property
    def errors(self) -> list[str]:
        """Lines that tell of an error, and each traceback as one."""
        lines = self.screen.replace("\r", "\n").splitlines()
        return [line for line in lines if line.startswith(("error", "Traceback (most recent"))]


def why_not() -> str | None:
    """Why there can be no such surroundings here; None if there can."""
    try:
        subprocess.run(["unshare", "--mount", *AS_USER, "true"], check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"{error.filename} is missing: apt-get install util-linux"
    except subprocess.CalledProcessError as error:
        return f"no mount namespaces here: {error.stderr.strip()}"
    return None


def run(command: list[str], folder: Path, surroundings: Surroundings | None = None) -> Outcome:
    """The outcome of a command in `folder`, which is the user's."""
    os.chown(folder, USER, USER)
    wanted = json.dumps([command, str(folder), asdict(surroundings or Surroundings())])
    inside = ["unshare", "--mount", "--propagation", "private", sys.executable, __file__]
    done = subprocess.run(inside, input=wanted, text=True, capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    return Outcome(**json.loads(done.stdout))


def _inside(command: list[str], folder: str, wanted: Surroundings) -> Outcome:
    """The same, in the namespace, as root."""
    small = {"/dev/shm": SHARED_MEMORY_MIB} | wanted.disks_mib
    for place, size in small.items():
        _mount("-t", "tmpfs", "-o", f"size={size}m,mode=1777", "tmpfs", place)
    for place in (str(ROOT), *wanted.read_only):
        _mount("--bind", place, place)
        _mount("-o", "remount,ro,bind", place)
    known = {name: value for name, value in os.environ.items() if name not in ("HOME", "TORCH_EXTENSIONS_DIR")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = known | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | wanted.variables
    with open(f"{folder}/screen", "w+") as screen:
        process = subprocess.Popen(
            [*AS_USER, *command],
            cwd=folder,
            env=environment,
            stdout=screen,
            stderr=subprocess.STDOUT,
            umask=0o077,
            start_new_session=True,
        )
        while process.poll() is None:
            time.sleep(0.05)
            if wanted.kill_when and next(Path(folder).glob(wanted.kill_when), None):
                os.killpg(process.pid, signal.SIGKILL)
        time.sleep(2)  # loader processes look for their parent
        screen.seek(0)
        return Outcome(process.returncode, screen.read(), sorted(os.listdir("/dev/shm")))


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


if __name__ == "__main__":
    command, folder, wanted = json.load(sys.stdin)
    print(json.dumps(asdict(_inside(command, folder, Surroundings(**wanted)))))
