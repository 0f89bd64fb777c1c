"""Two "hosts" on one machine: network namespaces that reach each other, and nothing else, through a pair of interfaces.

Needs the right to make namespaces, and `ip` (Debian: apt-get install iproute2).
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTERFACE = "link0"
SECONDS = 480  # for a run; on a busy machine with two cores half of it goes into imports


@dataclass(frozen=True)
class Host:
    """A network namespace with an address of its own."""

    namespace: str
    address: str


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    if shutil.which("ip") is None:
        return "`ip` is missing: apt-get install iproute2"
    try:
        with two_hosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts, 198.18.77.1 and .2 (of the range that RFC 2544 sets aside for tests), gone when the block ends."""
    name = f"modstruct-{secrets.token_hex(3)}"
    hosts = (Host(f"{name}-0", "198.18.77.1"), Host(f"{name}-1", "198.18.77.2"))
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        pair = [(INTERFACE, "netns", host.namespace) for host in hosts]
        _ip("link", "add", *pair[0], "type", "veth", "peer", "name", *pair[1])
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/30", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", host.namespace, "link", "set", interface, "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)


def run_on_hosts(commands: dict[Host, list[str]], environments: dict[str, dict[str, str]]) -> list[tuple[int, str]]:
    """Run a command on each host at once; exit status and output of each.

    environments: by the host's address. Where one fails, the other gets a minute to notice.
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", host.namespace, *command],
            cwd=ROOT,
            env=os.environ
            | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            | environments[host.address],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for host, command in commands.items()
    ]
    results = []
    try:
        for process in started:
            output, _ = process.communicate(timeout=SECONDS)
            results.append((process.returncode, output))
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return results
