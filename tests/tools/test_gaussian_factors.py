"""tools/experiments/gaussian.py: information in closed form, what arms share, and a training that learns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

TOOLS = Path(__file__).parents[2] / "tools" / "experiments"
SMALL = {"probe_rows": 1000, "test_rows": 200}


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import gaussian
    import gaussian_data

    return gaussian, gaussian_data


@pytest.fixture
def gaussian(tools):
    return tools[0]


def world_of(tools, **data):
    return tools[1].World(tools[1].Data(**data))


def estimated(inputs: torch.Tensor, target: torch.Tensor) -> float:
    """I(inputs; target) of Gaussian rows: half the log of the ratio of generalised variances, in nats."""
    inputs, target = inputs.double(), target.double()
    products = inputs.T @ inputs + 1e-6 * torch.eye(inputs.shape[1], dtype=torch.float64)  # inputs have a lower rank
    left = target - inputs @ torch.linalg.solve(products, inputs.T @ target)
    return float((target.T @ target).logdet() - (left.T @ left).logdet()) / 2


@pytest.mark.parametrize("sizes", [{}, {"private": 3, "shared": 5, "targets": 4}])
@pytest.mark.parametrize("level", [1, 3])
def test_information_is_that_of_many_pairs(tools, level, sizes):
    """From linearly mixed inputs, so that also what the mixing keeps is seen."""
    world = world_of(tools, level=level, mixing="linear", **sizes)
    drawn = world.draw(30_000, 9)
    exact = world.information()
    found = {name: estimated(drawn[name], drawn["target"]) for name in ("image", "text")}
    both = estimated(torch.cat([drawn["image"], drawn["text"]], dim=1), drawn["target"])
    assert found == pytest.approx({name: exact[name] for name in found}, abs=0.05)
    assert both == pytest.approx(exact["image"], abs=0.05)
    assert exact["gap"] == exact["image"] - exact["text"]


def test_levels_of_the_default_data(tools):
    found = [world_of(tools, level=level).information() for level in (1, 2, 3)]
    assert [of["gap"] for of in found] == pytest.approx([0, 4 * np.log(2), 4 * np.log(4)], abs=1e-9)
    assert [of["image"] for of in found] == pytest.approx([4 * np.log(5)] * 3)


def test_nonlinear_mixing_can_be_undone(tools):
    world = world_of(tools)
    drawn = world.draw(50, 9)
    for modality in ("image", "text"):
        into, bias, out = (part.double() for part in world.mixings[modality])
        hidden = torch.linalg.solve(out, drawn[modality].double().T).T
        hidden = torch.where(hidden < 0, hidden * 5, hidden) - bias
        factors = torch.linalg.lstsq(into, hidden.T).solution.T
        wanted = torch.cat([drawn["shared"], drawn[f"{modality}_private"]], dim=1).double()
        assert_close(factors[:, :16], wanted, atol=1e-4, rtol=0)


def test_second_view_keeps_the_factors_and_draws_the_nuisance_anew(tools):
    world = world_of(tools, mixing="linear")
    drawn = world.draw(50, 9)
    for modality in ("image", "text"):
        into = world.mixings[modality][0]
        plain, other = (
            torch.linalg.lstsq(into, drawn[name].T).solution.T for name in (modality, f"{modality}_augmented")
        )
        assert_close(plain[:, :16], other[:, :16], atol=1e-5, rtol=0)
        assert (plain[:, 16:] - other[:, 16:]).std() > 1
    still = world_of(tools, view_noise=0).draw(5, 9)
    assert_close(still["image"], still["image_augmented"])


def test_arms_of_a_seed_share_initial_weights_and_pairs(gaussian, monkeypatch):
    """Also where a method has more heads, learnt numbers, views or steps."""
    seen: dict[str, list[torch.Tensor]] = {}
    weights = {}
    forward = gaussian.Towers.forward

    def noted(self, batch, *rest, **more):
        weights.setdefault(name, {key: value.clone() for key, value in self.state_dict().items()})
        seen.setdefault(name, []).append(batch["image"])
        return forward(self, batch, *rest, **more)

    monkeypatch.setattr(gaussian.Towers, "forward", noted)
    arms = {"clip": 3, "siglip": 3, "sep": 40}
    for name, steps in arms.items():
        gaussian.run({"method": name, "options": {"steps": steps}}, SMALL, 4)
    for name, steps in arms.items():
        assert len(seen[name]) == steps + 1
        assert_close(seen[name][:3], seen["clip"][:3], atol=0, rtol=0)
        assert_close(seen[name][-1], seen["clip"][-1], atol=0, rtol=0)  # held out
        for key in weights["clip"].keys() - {"logit_scale"}:
            assert_close(weights[name][key], weights["clip"][key], atol=0, rtol=0)
    every = torch.cat(seen["sep"])
    assert len(every.unique(dim=0)) == len(every)


def test_a_run_is_a_function_of_its_seed(gaussian):
    arm = {"method": "br", "options": {"steps": 3, "losses.bridge.t": None}}
    first = gaussian.run(arm, SMALL, 1)
    assert gaussian.run(arm, SMALL, 1) == first
    assert gaussian.run(arm, SMALL, 2) != first


def test_values_are_documented_and_finite(gaussian):
    values = gaussian.run({"method": "all", "options": {"steps": 2}}, SMALL, 0)
    for name, value in values.items():
        assert np.isfinite(value), name
        plain = re.sub(r"/(image|text)$", "/MODALITY", name.removeprefix("centred/"))
        plain = re.sub(r"(independent|projection)/r2_\w+", r"\1/r2_…", plain)
        told = [rf"(?<![\w/]){re.escape(word)}(?![\w/])" for word in (plain, name.removeprefix("centred/"))]
        assert any(re.search(word, gaussian.__doc__) for word in told), name


def test_short_training_learns(gaussian):
    arm = {"method": "clip", "options": {"steps": 120, "learning_rate": 5e-3}}
    values = gaussian.run(arm, {"level": 3, "probe_rows": 4000, "test_rows": 500}, 0)
    assert min(values["recall_at_1/image"], values["recall_at_1/text"]) > 0.2  # chance: 0.002
    assert values["r2_shared/image"] > 0.6 > 0.2 > values["r2_private/image"]
    # Close pairs lose about what the theorem says; and no probe tells more than the inputs.
    gap, excess = values["exact/gap"], values["target/excess"]
    assert excess > 0.8 * gap
    assert values["target/excess/text"] > gap - 0.1


def test_probe_of_the_factors_themselves_reaches_the_optimum(tools):
    gaussian, gaussian_data = tools
    data = gaussian_data.Data(level=2)
    drawn = gaussian_data.World(data).draw(12_000, 9)
    probe = gaussian.Probe(drawn, data)
    excess, r2 = probe.target(torch.cat([drawn["shared"], drawn["image_private"]], dim=1))
    assert 0 < excess < 0.2
    assert r2 == pytest.approx(0.8, abs=0.02)
    assert probe.target(drawn["shared"])[0] == pytest.approx(4 * np.log(2), abs=0.2)


@pytest.mark.parametrize(
    ("arm", "data", "words"),
    [
        ({"method": "clop"}, {}, ["arm.method", "clop", "clip_inmodal"]),
        ({"method": "albef"}, {}, ["losses.queue_contrast.weight", "fusion"]),
        ({"options": {}}, {}, ["arm"]),
        ({"method": "clip", "options": {"stepz": 3}}, {}, ["stepz", "steps", "learning_rate"]),
        ({"method": "clip", "options": {"data.train": "x"}}, {}, ["data.train"]),
        ({"method": "clip", "options": {"steps": 0}}, {}, ["options.steps", "0"]),
        ({"method": "clip", "options": {"steps": "many"}}, {}, ["options.steps", "whole number"]),
        ({"method": "br", "options": {"losses.bridge.t": 2.0}}, {}, ["losses.bridge.t", "from 0 to 1"]),
        ({"method": "br", "options": {"losses.bridge.u": 2.0}}, {}, ["losses.bridge.u"]),
        ({"method": "clip", "options": {"losses.contrastive.weight": 0}}, {}, ["weight"]),
        ({"method": "clip"}, {"level": 4}, ["data.level", "4", "1, 2, 3"]),
        ({"method": "clip"}, {"levels": 1}, ["data.levels", "level", "private"]),
        ({"method": "clip"}, {"observed": 10}, ["data.observed", "24"]),
        ({"method": "clip"}, {"mixing": "cubic"}, ["data.mixing", "linear"]),
        ({"method": "clip"}, {"target_noise": 0.0}, ["data.target_noise"]),
    ],
)
def test_what_is_unknown_is_refused(gaussian, arm, data, words):
    with pytest.raises(ValueError) as refused:  # noqa: PT011  # the words are checked below
        gaussian.check(arm, data)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_command_prints_the_values_and_refuses_in_one_line():
    def ended(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(TOOLS / "gaussian.py"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    few = ("--data", "probe_rows=1000", "test_rows=100")
    found = ended("--method", "gc", "--level", "3", "--option", "steps=2", *few)
    assert re.search(r"^exact/gap +5\.5452$", found.stdout, re.MULTILINE), found.stderr
    refused = ended("--method", "clop")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: arm.method = 'clop'")
