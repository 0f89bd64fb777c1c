"""The launch templates on two hosts: the same weights as two processes of one host; what is set wrong is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from processes import run_on_processes
from tiny_run import ROOT, ds_config, tiny_recipe
from two_hosts import INTERFACE, run_on_hosts, two_hosts, why_not

from modstruct import checkpoints
from modstruct.config.recipe_files import recipe_to_dict

pytestmark = pytest.mark.slow
STEPS = 3
SCRIPTS = ROOT / "launch_scripts"


@pytest.fixture(scope="module")
def hosts():
    if trouble := why_not():
        pytest.skip(trouble)
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "tiny.yaml"
    recipe = recipe_to_dict(tiny_recipe("set by each test", folder / "cache", STEPS))
    path.write_text(yaml.safe_dump(recipe | {"checkpoints": {"every_steps": 0, "keep_last": 1}}))
    return path


def train_here(recipe_file: str, output: str) -> None:
    from modstruct.cli import parse, recipe_parser
    from modstruct.training.pretrain import Pretraining

    recipe, _ = parse(recipe_parser("", ""), ["--recipe", recipe_file, "--output", output])
    Pretraining(recipe, ds_config("zero2"), None).build().train()


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory, recipe_file) -> dict[str, torch.Tensor]:
    """The weights after a run of two processes on one host."""
    output = tmp_path_factory.mktemp("one")
    run_on_processes(train_here, 2, str(recipe_file), str(output))
    return last_weights(output)


def last_weights(output: Path) -> dict[str, torch.Tensor]:
    path = checkpoints.list_checkpoints(output)[-1]
    assert path == checkpoints.step_folder(output, STEPS)
    return checkpoints.read_weights(path)


def slurm(folder: Path) -> str:
    """A folder with what SLURM's commands do on one host: srun starts the process of this host."""
    folder.mkdir()
    for name, does in (("srun", 'shift; exec "$@"'), ("scontrol", "printf '%s\\n' 198.18.77.1 198.18.77.2")):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def of_host(launcher: str, number: int, folder: Path) -> dict[str, str]:
    """The variables that the user, or SLURM, sets on one of the hosts."""
    if launcher == "slurm":
        tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": str(number), "SLURM_LOCALID": "0"}
        return tasks | {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "host[0-1]", "INTERFACE": INTERFACE}
    own = {"NODE_RANK": str(number), "INTERFACE": INTERFACE}
    if launcher == "torchrun":
        return own | {"HOSTS": "2", "FIRST_HOST": "198.18.77.1", "PROCESSES": "1"}
    (folder / "hosts.txt").write_text("198.18.77.1 slots=1\n198.18.77.2 slots=1\n")
    return own | {"HOSTFILE": str(folder / "hosts.txt")}


def launch(launcher: str, hosts, folder: Path, arguments: list[str], second: list[str] = (), **environment: str):
    """A template on both hosts. second: further arguments on the second host alone."""
    command = ["bash", str(SCRIPTS / f"hosts_{launcher}.sh"), *arguments]
    if launcher == "slurm":
        command = [
            "env",
            f"PATH={slurm(folder / 'slurm')}:{Path(torch.__file__).parents[4] / 'bin'}:/usr/bin:/bin",
            *command,
        ]
    environments = {host.address: of_host(launcher, n, folder) | environment for n, host in enumerate(hosts)}
    return run_on_hosts(dict(zip(hosts, (command, [*command, *second]), strict=True)), environments)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "slurm"])
def test_two_hosts_train_to_the_weights_of_two_processes_on_one(launcher, hosts, recipe_file, on_one_host, tmp_path):
    arguments = ["--recipe", str(recipe_file), "--output", str(tmp_path / "run")]
    for status, output in launch(launcher, hosts, tmp_path, arguments):
        assert status == 0, output[-3000:]
    weights = last_weights(tmp_path / "run")
    assert weights.keys() == on_one_host.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, on_one_host[name], atol=0, rtol=0, msg=name)


def test_a_wrong_interface_is_said_with_the_variables_to_set(hosts, recipe_file, tmp_path):
    arguments = ["--recipe", str(recipe_file), "--output", str(tmp_path / "run")]
    for status, output in launch("torchrun", hosts, tmp_path, arguments, INTERFACE="nosuch0"):
        assert status != 0
        assert "cannot join the others through 198.18.77.1:29500" in output, output[-3000:]
        assert "GLOO_SOCKET_IFNAME" in output


def test_hosts_that_do_not_share_the_output_are_refused(hosts, recipe_file, tmp_path):
    """The second host has another folder under the same name, as where a path is not on the shared file system."""
    output = tmp_path / "run"
    output.mkdir()
    hidden = f"mount -t tmpfs none {output} && "
    command = f'{hidden}exec bash {SCRIPTS}/hosts_torchrun.sh "$@"'
    arguments = ["--recipe", str(recipe_file), "--output", str(output)]
    environments = {host.address: of_host("torchrun", n, tmp_path) for n, host in enumerate(hosts)}
    commands = {
        hosts[0]: ["bash", f"{SCRIPTS}/hosts_torchrun.sh", *arguments],
        hosts[1]: ["unshare", "--mount", "bash", "-c", command, "bash", *arguments],
    }
    for status, said in run_on_hosts(commands, environments):
        assert status != 0
        assert f"output = '{output}': process 1 (" in said, said[-3000:]
        assert "all hosts must share it" in said


def test_hosts_with_different_settings_are_refused_by_the_name_of_the_field(hosts, recipe_file, tmp_path):
    arguments = ["--recipe", str(recipe_file), "--output", str(tmp_path / "run")]
    for status, output in launch("torchrun", hosts, tmp_path, arguments, ["--optimizer.weight_decay", "0.5"]):
        assert status != 0
        assert "optimizer.weight_decay is 0.1 on process 0" in output, output[-3000:]
        assert "and 0.5 on process 1" in output
