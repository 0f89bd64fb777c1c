"""The plan of a campaign: arms x data x seeds, the endpoints, and what is claimed of them before any run."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from modstruct.errors import refuse, require
from modstruct.files import read_yaml

HERE = Path(__file__).parent
CAMPAIGNS, RESULTS = HERE / "campaigns", HERE / "results"
Scalar = int | float | str | bool | None


@dataclass
class Arm:
    """What is compared: a method with options of its own."""

    method: str
    """A file of modstruct/config/recipes/methods, by its name."""
    options: dict[str, Scalar] = field(default_factory=dict)
    """Fields of the recipe (kind training) or of gaussian.py's Arm (kind gaussian)."""
    label: str = ""
    """What tables call it; "" takes its name."""


@dataclass
class Data:
    """What is learnt from."""

    options: dict[str, Scalar] = field(default_factory=dict)
    """Fields of the recipe (kind training) or of gaussian.py's Data (kind gaussian)."""
    known: dict[str, float] = field(default_factory=dict)
    """Numbers known of the data, such as delta_p in nats: the x of plots."""
    folds: int = 1
    """Seeds take so many folds in turn: {fold} in options stands for the number of a seed's."""


@dataclass
class Endpoint:
    """One number of a run."""

    values: list[str]
    """Names of a run's values, whose mean it is."""
    label: str
    unit: Literal["share", "nats", "number"] = "number"
    """A share is shown in percent."""
    higher_is_better: bool | None = None


@dataclass
class Claim:
    """That an arm's endpoint is better than that of each of several others: the test is the one with the largest p."""

    arm: str
    against: list[str]
    endpoint: str


@dataclass
class Training:
    """How a run of kind training trains and is measured."""

    recipe: str = "campaign_scenes"
    options: dict[str, Scalar] = field(default_factory=dict)
    """Fields of the recipe, for all arms and data."""
    sets: list[str] = field(default_factory=lambda: ["eval"])
    """As `evaluate.py embed --sets` takes them; {validation} stands for the scenes' validation shards."""
    embed: dict[str, Scalar] = field(default_factory=dict)
    """Options of `evaluate.py embed`."""
    measure: list[str] = field(default_factory=lambda: ["--metrics retrieval"])
    """Options of `evaluate.py measure`, for as many commands one after another; what was measured is not repeated."""
    tasks: list[str] = field(default_factory=list)
    """Recipes of finetune.py, from the pre-trained model; nlvr2 from text_assignment where that is before it."""
    outcomes: list[str] = field(default_factory=list)
    """Names of values whose outcomes (0 or 1 by query or image) are kept, for the bootstrap over seeds and images."""


@dataclass
class Plot:
    """A plot of the report: `effects` of the endpoint y an arm, or y against x, another endpoint or a known number."""

    y: str
    x: str = "effects"
    arms: list[str] = field(default_factory=list)
    """[] takes all."""


@dataclass(eq=False)
class Plan:
    kind: Literal["gaussian", "training"]
    commit: str
    """That trains: a worktree of it is checked out, so that results of many days are of one code."""
    seeds: list[int]
    """Of initialisation, order and draws: arms of one seed are paired."""
    arms: dict[str, Arm]
    data: dict[str, Data]
    endpoints: dict[str, Endpoint]
    baseline: str
    """The arm from which effects are told."""
    claims: list[Claim] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    prepare: dict[str, str] = field(default_factory=dict)
    """Folders of the checkout that data options name, and the tool with its options that makes each with --out, before
    the first run; {source} stands for run.py's --source."""
    training: Training = field(default_factory=Training)
    name: str = ""
    hash: str = ""
    """Of all that its file says; comments do not count."""

    def __post_init__(self) -> None:
        require(
            bool(self.seeds) and len(set(self.seeds)) == len(self.seeds),
            "seeds",
            self.seeds,
            "at least one, all different",
        )
        for label, arms in [("baseline", [self.baseline]), *((f"plots ({plot.y})", plot.arms) for plot in self.plots)]:
            self._require_known(label, arms, self.arms)
        for name, data in self.data.items():
            require(data.folds >= 1, f"data ({name}): folds", data.folds, "at least 1")
        for claim in self.claims:
            require(bool(claim.against), f"claims ({claim.arm}): against", claim.against, "name at least one arm")
            self._require_known("claims", [claim.arm, *claim.against], self.arms)
            self._require_known("claims", [claim.endpoint], self.endpoints)
        for plot in self.plots:
            known = {name for data in self.data.values() for name in data.known}
            self._require_known("plots: y", [plot.y], self.endpoints)
            self._require_known("plots: x", [plot.x], {"effects", *self.endpoints, *known})

    @staticmethod
    def _require_known(field_name: str, names: list[str], known: Any) -> None:
        for name in names:
            require(name in known, field_name, name, f"not in this plan; it has {', '.join(sorted(known))}")

    @property
    def results(self) -> Path:
        return RESULTS / self.name

    def jobs(self) -> list[Job]:
        """All runs, seed by seed, so that what is finished is paired."""
        return [Job(self, data, arm, seed) for seed, arm, data in itertools.product(self.seeds, self.arms, self.data)]


@dataclass(frozen=True)
class Job:
    """One run of a plan."""

    plan: Plan
    data: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.arm}-{self.seed}"

    @property
    def file(self) -> Path:
        return self.plan.results / f"{self.name}.json"

    def told(self, more: dict[str, Scalar] | None = None) -> dict[str, Any]:
        """What one_run.py needs of it. more: options over the arm's own."""
        data, arm = self.plan.data[self.data], self.plan.arms[self.arm]
        return {
            "name": self.name,
            "kind": self.plan.kind,
            "seed": self.seed,
            "arm": {"method": arm.method, "options": arm.options | (more or {})},
            "data": data.options,
            "fold": self.plan.seeds.index(self.seed) % data.folds,
            "training": asdict(self.plan.training),
        }

    def result(self) -> dict[str, Any] | None:
        """What the run found, an "error" instead of "values" where it failed; None where it has not run.

        Raises ValueError where the file is of another plan or commit.
        """
        try:
            found = json.loads(self.file.read_bytes())
        except FileNotFoundError:
            return None
        for name, mine in (("plan", self.plan.hash), ("commit", self.plan.commit)):
            remedy = f"of another {name} than {self.plan.name}.yaml, which has {mine}: move it away to run it anew"
            require(found.get(name) == mine, str(self.file), found.get(name), remedy)
        return found


def read_plan(name: str) -> Plan:
    """The plan in campaigns/NAME.yaml, or in a file. Raises ValueError naming the field that is wrong."""
    path = CAMPAIGNS / f"{name}.yaml"
    path = path if path.is_file() else Path(name)
    known = ", ".join(sorted(file.stem for file in CAMPAIGNS.glob("*.yaml")))
    require(path.is_file(), "CAMPAIGN", name, f"no such file; give a YAML file or one of {known}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan)
    try:
        content = read_yaml(path)
        said = json.dumps(content, sort_keys=True).encode()
        fields = parser.instantiate(parser.parse_object(content))
        return Plan(**vars(fields) | {"name": path.stem, "hash": hashlib.blake2b(said, digest_size=8).hexdigest()})
    except Exception as error:  # jsonargparse has several kinds
        refuse("CAMPAIGN", str(path), " ".join(str(error).split()))
