"""Gaussian factors, whose information is known exactly: every two-tower method in seconds, without an engine.

python tools/experiments/gaussian.py --method gc --level 2 --seed 0
python tools/experiments/gaussian.py --method br --option losses.bridge.t=0 steps=1000 --level 3 --data private=16

Data: see gaussian_data.py. The level changes the target Y alone: the same towers are judged at all levels.

Training. MLP towers under the methods' own losses (modstruct/config/recipes/methods), on pairs that never repeat.
Initial weights, pairs and held-out rows are functions of the seeds: equal for all arms.

Values of a run, all of held-out pairs, in three kinds: + higher is better, - lower is better, 0 describes.
/MODALITY is /image or /text; centred/ stands before what is measured again after z' = norm(z - mean of its modality).

    exact/image, exact/text, exact/gap  0  I(X_V; Y), I(X_T; Y), Delta_p in nats
    target/excess                       -  loss of predicting Y from z_V and z_T, less that of the exact distribution
                                           given x_V and x_T, in nats: the theorem's left side; also centred
    target/excess/MODALITY              -  the same from one z alone
    target/r2, target/r2/MODALITY       +  R^2 of Y by the same probe, see Probe; the former also centred
    recall_at_1/MODALITY                +  of the modality's queries among the others' held-out items; also centred
    mean_log_rank/MODALITY              -  of the right item; also centred
    mixed_ndcg_at_10                    +  of both modalities' queries in one gallery of all other images and texts, the
                                           other one of the pair being right; also centred
    r2_shared/MODALITY                  +  R^2 of the shared factors by a linear probe of z
    r2_private/MODALITY                 +  R^2 of the modality's private factors
    independent/r2_…/MODALITY           +  both from [z, z^i], where the method has z^i
    projection/r2_…/MODALITY            +  both from [z, r], r a random projection of the trunk's output to as many
                                           dimensions, which z^i must beat
    alignment, uniformity/MODALITY      0  these and the gaps: as modstruct.evaluation.structure defines them
    modality_gap                        0  distance of the modalities' means
    relative_modality_gap               0  of pairs beside that within the modalities
    temperature                         0  1 / logit scale, to be read beside every gap
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from gaussian_data import HELD_OUT, MODALITIES, Data, World
from torch import Tensor, nn
from torch.nn import functional as F

from modstruct.cli import RECIPES, parse_recipe_text, read_recipe_file, recipe_path, run_tool
from modstruct.config import LossesConfig, Recipe
from modstruct.config.migrations import SCHEMA, migrate_method
from modstruct.errors import RunError, require, require_counts
from modstruct.evaluation.retrieval.measure import measure_retrieval
from modstruct.evaluation.retrieval.mixed import search_mixed
from modstruct.evaluation.structure.metrics import relative_gap, structure
from modstruct.losses.objective import Objective, build_objective
from modstruct.losses.protocol import LossSettings
from modstruct.models.protocol import TrainableModel
from modstruct.models.two_tower import TwoTower

RIDGE = 1e-4
"""Penalty of the probes beside the mean squared error, of features of variance 1."""
PROBE_WIDTH = 256
PROBES = 0
"""Seed of what is random in the probes."""


@dataclass(frozen=True)
class Training:
    """What an arm's options may set besides losses.… and model.logit_scale_… of the recipe."""

    steps: int = 500
    batch: int = 128
    dimension: int = 16
    """D, of the embeddings."""
    width: int = 128
    """Of the towers' two hidden layers."""
    learning_rate: float = 2e-3
    """Of AdamW, after a rise over the first tenth of the steps; then it falls to 0 as a cosine."""
    weight_decay: float = 0.01
    """Of matrices."""

    def __post_init__(self) -> None:
        require_counts("options", self, ("steps", "dimension", "width"))
        require(self.batch >= 2, "options.batch", self.batch, "at least 2: pairs are compared with each other")
        require(0 < self.learning_rate < 1, "options.learning_rate", self.learning_rate, "between 0 and 1")
        require(0 <= self.weight_decay < 1, "options.weight_decay", self.weight_decay, "from 0 to below 1")


Config = TypeVar("Config", Data, Training)


def check(arm: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[Recipe, Training, Data]:
    """What `run` would train on, by losses and model of the recipe; ValueError naming what is unknown or wrong.

    arm: {"method": NAME, "options": {FIELD: VALUE}}, a method of modstruct/config/recipes/methods and fields of
    Training or, dotted, of a recipe's losses. data: fields of Data.
    """
    require(arm.keys() <= {"method", "options"} and "method" in arm, "arm", sorted(arm), "give method and options")
    own = {field.name for field in fields(Training)}
    options = dict(arm.get("options") or {})
    of_recipe = {name: value for name, value in options.items() if name not in own}
    for name in of_recipe:
        remedy = f"no such option; there are {', '.join(sorted(own))}, losses.SECTION.FIELD and model.logit_scale_init"
        require(name.startswith(("losses.", "model.logit_scale_")), "options", name, remedy)
    path = recipe_path(str(arm["method"]), RECIPES / "methods", "arm.method")
    content = {"losses": {loss.name: {"weight": 0.0} for loss in fields(LossesConfig)}, "schema": SCHEMA}
    for part in (migrate_method(read_recipe_file(path)), of_recipe):
        _merge(content, part)
    recipe = parse_recipe_text(yaml.safe_dump(content))
    training = {name: value for name, value in options.items() if name in own}
    return recipe, _checked(Training, "options", training), _checked(Data, "data", data)


def _merge(content: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Set a recipe's fields, nested or dotted, over those that are there."""
    for name, value in part.items():
        section, _, field = name.partition(".")
        value = {field: value} if field else value
        if isinstance(value, Mapping):
            _merge(content.setdefault(section, {}), value)
        else:
            content[name] = value


def _checked(kind: type[Config], section: str, given: Mapping[str, Any]) -> Config:
    known = {field.name: type(field.default) for field in fields(kind)}
    for name, value in given.items():
        require(name in known, f"{section}.{name}", value, f"no such field; there are {', '.join(known)}")
        fits = type(value) is known[name] or (known[name] is float and type(value) is int)
        wanted = {int: "a whole number", float: "a number", str: "text"}[known[name]]
        require(fits, f"{section}.{name}", value, f"must be {wanted}")
    return kind(**given)


class Towers(TwoTower):
    """The project's two towers, each a perceptron of vectors; initial weights do not depend on the method."""

    def __init__(self, recipe: Recipe, training: Training, observed: int, objective: Objective, seed: int):
        TrainableModel.__init__(self)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.image, self.text = (self._tower(training, observed, objective.independent) for _ in MODALITIES)
        self.logit_scale = nn.Parameter(torch.tensor([recipe.model.logit_scale_init]))
        self.scalar_limits["logit_scale"] = (0.0, recipe.model.logit_scale_max)
        self.add_scalars(objective.scalars)
        self.patch_dropout = None

    @staticmethod
    def _tower(training: Training, observed: int, independent: bool) -> nn.ModuleDict:
        width = training.width
        trunk = nn.Sequential(nn.Linear(observed, width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        head, own = (nn.Linear(width, training.dimension, bias=False) for _ in range(2))
        return nn.ModuleDict({"trunk": trunk, "head": head} | ({"independent_head": own} if independent else {}))

    def normalize(self, images: Tensor) -> Tensor:
        return images


def run(arm: Mapping[str, Any], data: Mapping[str, Any], seed: int) -> dict[str, float]:
    """Train an arm and measure it; arm and data as in `check`, values as above, by their names.

    seed: of initial weights, pairs and held-out rows. Raises ValueError before any training for what is unknown.
    """
    _, _, checked = check(arm, data)
    require(type(seed) is int and seed >= 0, "seed", seed, "a whole number, 0 or more")
    learnt_from = {name: value for name, value in data.items() if name != "level"}
    return measure(_trained(json.dumps(arm), json.dumps(learnt_from), seed), World(checked), seed)


@lru_cache(maxsize=1)
def _trained(arm: str, data: str, seed: int) -> Towers:
    """Kept for the next run: the level changes nothing that is learnt from."""
    recipe, training, checked = check(json.loads(arm), json.loads(data))
    return train(recipe, training, World(checked), seed)


def train(recipe: Recipe, training: Training, world: World, seed: int) -> Towers:
    objective = build_objective(recipe.losses, LossSettings(seed=seed))
    towers = Towers(recipe, training, world.data.observed, objective, seed)
    matrices, others = ([p for p in towers.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False))
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, training.learning_rate, weight_decay=training.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, training.steps))
    for step, batch in enumerate(world.batches(training.steps, training.batch, seed)):
        total, _ = objective(towers({name: batch[name] for name in (*MODALITIES, *sorted(objective.views))}), step)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, limits in towers.scalar_limits.items():
                towers.get_parameter(name).clamp_(*limits)
    return towers


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: a rise, then a cosine."""
    rise = max(1, steps // 10)
    return (step + 1) / rise if step < rise else (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


@torch.no_grad()
def measure(towers: Towers, world: World, seed: int) -> dict[str, float]:
    """All values that the towers allow, of pairs that they have not seen."""
    data = world.data
    drawn = world.draw(data.probe_rows + data.test_rows, HELD_OUT, seed)
    z = towers({m: drawn[m] for m in MODALITIES}, features=True)
    if not all(rows.isfinite().all() for rows in z.values()):
        raise RunError("training diverged: embeddings are not finite; lower options.learning_rate")
    centred = {m: F.normalize(z[m] - z[m][: data.probe_rows].mean(0), dim=-1) for m in MODALITIES}
    values = {f"exact/{name}": value for name, value in world.information().items()}
    values["temperature"] = 1 / float(z["logit_scale"])
    probe = Probe(drawn, data)
    for prefix, of in (("", z), ("centred/", centred)):
        image, text = (of[m][data.probe_rows :] for m in MODALITIES)
        found = retrieval(image.numpy(), text.numpy())
        found["target/excess"], found["target/r2"] = probe.target(torch.cat([of[m] for m in MODALITIES], dim=1))
        values |= {f"{prefix}{name}": value for name, value in found.items()}
    image, text = (z[m][data.probe_rows :] for m in MODALITIES)
    values |= {name.replace("uniformity_", "uniformity/"): value for name, value in structure(image, text).items()}
    pairs = np.arange(data.test_rows)[:, None].repeat(2, axis=1)
    values["relative_modality_gap"] = relative_gap(image.numpy(), text.numpy(), pairs)
    random = torch.Generator().manual_seed(PROBES)
    for m in MODALITIES:
        values[f"target/excess/{m}"], values[f"target/r2/{m}"] = probe.target(z[m])
        trunk = z[f"{m}_features"]
        projected = F.normalize(trunk @ torch.randn(trunk.shape[1], z[m].shape[1], generator=random), dim=-1)
        beside = {"": z[m][:, :0], "projection/": projected, "independent/": z.get(f"{m}_independent")}
        for prefix, more in beside.items():
            for of, factors in (("shared", "shared"), ("private", f"{m}_private")) if more is not None else ():
                values[f"{prefix}r2_{of}/{m}"] = probe.r2(torch.cat([z[m], more], dim=1), drawn[factors])
    return values


def retrieval(image: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """R@1, mean log-rank and NDCG@10 in the mixed gallery, row j of each being a pair."""
    rows = np.arange(len(image))
    values = {}
    for direction, found in measure_retrieval(image, text, rows[:, None].repeat(2, axis=1), (1,)).items():
        query = direction.split("_")[0]
        values |= {f"{name}/{query}": found[name]["value"] for name in ("recall_at_1", "mean_log_rank")}
    return values | {"mixed_ndcg_at_10": float(search_mixed(image, text, np.tile(rows, 2), 2 * len(rows)).ndcg.mean())}


class Probe:
    """Ridge regressions, fitted on the first held-out rows and measured on the others, in float64.

    Y is predicted by one of the features and of PROBE_WIDTH random ReLU features of them, with Gaussian residuals of
    the covariance that they have on the fitted rows. So losses are bounds from above: a perceptron fitted on 40,000
    rows found 0.4 to 0.6 nats less, for clip as for clip_inmodal to 0.1, at levels 1 and 3.
    """

    def __init__(self, drawn: Mapping[str, Tensor], data: Data):
        self.fitted, self.wanted = data.probe_rows, drawn["target"].double()
        noise = (self.wanted - drawn["target_mean"])[self.fitted :]
        # Of the same rows, so that what chance gives both losses cancels.
        self.optimum = (noise.square() / data.target_noise + math.log(data.target_noise)).sum(1) / 2

    def target(self, features: Tensor) -> tuple[float, float]:
        """(excess loss in nats, R^2) of Y."""
        features = self._standardised(features)
        random = torch.Generator().manual_seed(PROBES)
        weights = torch.randn(features.shape[1], PROBE_WIDTH, generator=random).double() / features.shape[1] ** 0.5
        hidden = (features @ weights + torch.randn(PROBE_WIDTH, generator=random)).relu()
        residuals, r2 = self._fit(torch.cat([features, hidden], dim=1), self.wanted)
        fitted, held_out = residuals[: self.fitted], residuals[self.fitted :]
        covariance = fitted.T @ fitted / len(fitted)
        loss = ((held_out @ covariance.inverse() * held_out).sum(1) + covariance.logdet()) / 2
        return float((loss - self.optimum).mean()), r2

    def r2(self, features: Tensor, wanted: Tensor) -> float:
        """R^2 of wanted (rows, k), over all k together, by a linear probe."""
        return self._fit(self._standardised(features), wanted.double())[1]

    def _standardised(self, features: Tensor) -> Tensor:
        rows = features.double()
        return (rows - rows[: self.fitted].mean(0)) / rows[: self.fitted].std(0).clamp(min=1e-6)

    def _fit(self, features: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
        """Residuals of all rows, and R^2 of the held-out ones."""
        x, y = features - features[: self.fitted].mean(0), wanted - wanted[: self.fitted].mean(0)
        fitted = x[: self.fitted]
        gram = fitted.T @ fitted / len(fitted) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
        residuals = y - x @ torch.linalg.solve(gram, fitted.T @ y[: self.fitted] / len(fitted))
        left, all_of = (rows[self.fitted :].square().sum() for rows in (residuals, y))
        return residuals, 1 - float(left / all_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, help="By its name in modstruct/config/recipes/methods.")
    parser.add_argument("--option", nargs="+", default=[], metavar="FIELD=VALUE", help="Options of the arm.")
    parser.add_argument("--level", type=int, default=Data.level)
    parser.add_argument("--data", nargs="+", default=[], metavar="FIELD=VALUE", help="Other fields of the data.")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    arm = {"method": given.method, "options": _fields(given.option)}
    for name, value in run(arm, {"level": given.level} | _fields(given.data), given.seed).items():
        print(f"{name:28} {value:8.4f}")


def _fields(words: list[str]) -> dict[str, Any]:
    for word in words:
        require("=" in word, "--option or --data", word, "give FIELD=VALUE")
    return {name: yaml.safe_load(value) for name, _, value in (word.partition("=") for word in words)}


if __name__ == "__main__":
    sys.exit(run_tool(main, (ValueError, RunError, OSError)))
