"""Tables, tests and plots of a campaign, as Markdown and SVG.

python tools/experiments/report.py gaussian                        # prints the tables
python tools/experiments/report.py gaussian --out docs/findings    # and writes gaussian.md with its plots

Every effect is a difference from the baseline, paired by seed. Interval: Student's over seeds; where outcomes of
queries or images are kept, a bootstrap over seeds and images at once. p: exact sign-flip test over seeds; of several
baselines the larger one counts, and Holm corrects over the claims of one endpoint and data. Results of another plan,
commit, recipe or data are refused.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from plan import Endpoint, Plan, Plot, read_plan
from scipy import stats

from modstruct.cli import run_tool
from modstruct.errors import require
from modstruct.evaluation.statistics import holm, sign_flip, t_interval

POWER, LEVEL = 0.8, 0.95
RESAMPLES = 2000
UNITS = {"share": (100.0, "%"), "nats": (1.0, "nats"), "number": (1.0, "")}


@dataclass
class Effect:
    """Mean over seeds of an arm's endpoint less a baseline's."""

    differences: np.ndarray
    """By seed."""
    low: float
    high: float

    @property
    def mean(self) -> float:
        return float(self.differences.mean())

    @property
    def p(self) -> float:
        """Of all 2^n signs up to 20 seeds."""
        return sign_flip(self.differences, samples=2**20 + 1)


class Results:
    """What the runs of a plan found."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.runs = {(job.data, job.arm, job.seed): found for job in plan.jobs() if (found := job.result())}
        self.failed = [f"{'-'.join(map(str, key))}: {run['error']}" for key, run in self.runs.items() if "error" in run]
        self.runs = {key: run for key, run in self.runs.items() if "error" not in run}
        made = {json.dumps(run.get("prepared", {}), sort_keys=True) for run in self.runs.values()}
        require(len(made) <= 1, f"{plan.name}: prepared data", sorted(made), "runs learnt from different files")
        recipes = defaultdict[tuple[str, str], set[str]](set)
        for (data, arm, _), run in self.runs.items():
            recipes[data, arm].add(run["recipe"])
        for (data, arm), found in recipes.items():
            require(
                len(found) == 1, f"{plan.name}, {data}-{arm}: recipe", sorted(found), "runs of one arm differ in it"
            )

    def values(self, data: str, arm: str, endpoint: Endpoint) -> dict[int, float]:
        """By seed; nothing where the arm does not have the endpoint."""
        found = {seed: self.runs[key]["values"] for seed in self.plan.seeds if (key := (data, arm, seed)) in self.runs}
        return {
            seed: float(np.mean([values[name] for name in endpoint.values]))
            for seed, values in found.items()
            if all(name in values for name in endpoint.values)
        }

    def effect(self, data: str, arm: str, base: str, endpoint: Endpoint) -> Effect | None:
        """None for fewer than two pairs of seeds."""
        mine, theirs = self.values(data, arm, endpoint), self.values(data, base, endpoint)
        seeds = sorted(mine.keys() & theirs.keys())
        if len(seeds) < 2:
            return None
        found = np.array([mine[seed] - theirs[seed] for seed in seeds])
        return Effect(found, *self._interval(data, arm, base, endpoint, seeds, found))

    def _interval(
        self, data: str, arm: str, base: str, endpoint: Endpoint, seeds: list[int], found: np.ndarray
    ) -> tuple[float, float]:
        kept = [[self.runs[data, of, seed].get("outcomes", {}) for seed in seeds] for of in (arm, base)]
        if not all(name in run for runs in kept for run in runs for name in endpoint.values):
            return t_interval(found)
        return seeds_and_images(
            [
                np.array([unpacked(mine[name]) - unpacked(theirs[name]) for mine, theirs in zip(*kept, strict=True)])
                for name in endpoint.values
            ]
        )


def seeds_and_images(differences: list[np.ndarray]) -> tuple[float, float]:
    """Percentile interval of the mean over values of (seeds, rows) differences, seeds and rows drawn independently.

    Rows of different values are drawn apart unless they are as many: then row k of each is the same image.
    """
    random = np.random.default_rng(0)
    seeds = len(differences[0])
    of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    drawn: dict[int, np.ndarray] = {}
    total = np.zeros(RESAMPLES)
    for found in differences:
        rows = found.shape[1]
        if rows not in drawn:
            drawn[rows] = random.multinomial(rows, np.full(rows, 1 / rows), RESAMPLES) / rows
        total += ((found @ drawn[rows].T) * of_seeds.T).sum(0) / len(differences)
    # As wide as Student's for so few seeds, not as the normal distribution's.
    widen = stats.t.ppf((1 + LEVEL) / 2, seeds - 1) / stats.norm.ppf((1 + LEVEL) / 2) * math.sqrt(seeds / (seeds - 1))
    middle = float(np.mean([found.mean() for found in differences]))
    low, high = np.quantile(total, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return middle + (low - middle) * widen, middle + (high - middle) * widen


def unpacked(text: str) -> np.ndarray:
    """Outcomes as one_run.py packs them, (rows,)."""
    rows, _, bits = text.partition(":")
    return np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(bits)), np.uint8))[: int(rows)].astype(float)


def detectable(deviation: float, seeds: int) -> float:
    """Smallest true difference that a test of `seeds` pairs finds with probability POWER, at the 5 % level."""
    reach = stats.t.ppf((1 + LEVEL) / 2, seeds - 1) + stats.t.ppf(POWER, seeds - 1)
    return float(reach * deviation / math.sqrt(seeds))


def report(plan: Plan, results: Results, plots: dict[int, str]) -> str:
    """plots: files by their number in the plan."""
    done, kinds = len(results.runs), sorted({run["processor"] for run in results.runs.values()})
    hours = sum(run["seconds"] for run in results.runs.values()) / 3600
    lines = [
        f"# {plan.name}",
        "",
        f"Made by `python tools/experiments/report.py {plan.name} --out docs/findings`: plan `{plan.hash}`, code "
        f"`{plan.commit}`; {done} of {len(plan.jobs())} runs, {len(results.failed)} failed, {hours:.1f} core-hours on "
        f"{', '.join(kinds) or 'nothing'}.",
        *(f"- failed: {line}" for line in results.failed),
    ]
    for data, about in plan.data.items():
        known = ", ".join(f"{name} {value:g}" for name, value in about.known.items())
        lines += ["", f"## {data}{f' ({known})' if known else ''}", ""]
        lines += means_table(plan, results, data)
        differences = effects_table(plan, results, data)
        if differences:
            told = f"Difference from {plan.baseline}, paired by seed, with 95 % interval:"
            lines += ["", told, "", *differences]
        claims = claims_table(plan, results, data)
        lines += (
            ["", "Claims (the larger p of all baselines; Holm over the claims of an endpoint):", "", *claims]
            if claims
            else []
        )
    for number, plot in enumerate(plan.plots):
        if number in plots:
            lines += ["", f"![{plot.y} {plot.x}]({plots[number]})"]
    return "\n".join(lines) + "\n"


def means_table(plan: Plan, results: Results, data: str) -> list[str]:
    head = ["arm", "seeds", *(headed(endpoint) for endpoint in plan.endpoints.values())]
    rows = []
    for arm in plan.arms:
        found = [results.values(data, arm, endpoint) for endpoint in plan.endpoints.values()]
        cells = [told(list(values.values()), e) for values, e in zip(found, plan.endpoints.values(), strict=True)]
        rows.append([labelled(plan, arm), str(max(map(len, found))), *cells])
    return markdown(head, rows)


def told(values: list[float], endpoint: Endpoint) -> str:
    """Mean ± deviation over seeds."""
    scale = UNITS[endpoint.unit][0]
    if not values:
        return ""
    deviation = f" ± {number(scale * float(np.std(values, ddof=1)), endpoint)}" if len(values) > 1 else ""
    return f"{number(scale * float(np.mean(values)), endpoint)}{deviation}"


def effects_table(plan: Plan, results: Results, data: str) -> list[str]:
    """Of the arms that share two seeds with the baseline; empty without any."""
    head = ["arm", *(headed(endpoint) for endpoint in plan.endpoints.values())]
    rows = []
    for arm in (arm for arm in plan.arms if arm != plan.baseline):
        found = [(results.effect(data, arm, plan.baseline, endpoint), endpoint) for endpoint in plan.endpoints.values()]
        if any(effect for effect, _ in found):
            rows.append([labelled(plan, arm), *(shown(effect, endpoint) for effect, endpoint in found)])
    if not rows:
        return []
    rows.append(["smallest detectable", *(smallest(plan, results, data, e) for e in plan.endpoints.values())])
    return markdown(head, rows)


def smallest(plan: Plan, results: Results, data: str, endpoint: Endpoint) -> str:
    """By the median deviation of the arms' paired differences."""
    base, deviations, seeds = results.values(data, plan.baseline, endpoint), [], 0
    for arm in (arm for arm in plan.arms if arm != plan.baseline):
        mine = results.values(data, arm, endpoint)
        differences = [mine[seed] - base[seed] for seed in mine.keys() & base.keys()]
        if len(differences) > 1:
            deviations.append(float(np.std(differences, ddof=1)))
            seeds = max(seeds, len(differences))
    if not deviations:
        return ""
    return number(UNITS[endpoint.unit][0] * detectable(float(np.median(deviations)), seeds), endpoint)


def claims_table(plan: Plan, results: Results, data: str) -> list[str]:
    rows: list[list[str]] = []
    for name, endpoint in plan.endpoints.items():
        claims = [claim for claim in plan.claims if claim.endpoint == name]
        found = [[results.effect(data, claim.arm, base, endpoint) for base in claim.against] for claim in claims]
        whole = [(c, [e for e in effects if e]) for c, effects in zip(claims, found, strict=True) if all(effects)]
        if not whole:
            continue
        corrected = holm([max(effect.p for effect in effects) for _, effects in whole])
        better = 1 if endpoint.higher_is_better is not False else -1
        for (claim, effects), p in zip(whole, corrected, strict=True):
            holds = p < 1 - LEVEL and all(better * effect.mean > 0 for effect in effects)
            beside = zip(effects, claim.against, strict=True)
            cells = [f"{shown(e, endpoint)} p {e.p:.2g} against {labelled(plan, base)}" for e, base in beside]
            rows.append(
                [labelled(plan, claim.arm), endpoint.label, "; ".join(cells), f"{p:.3g}", "yes" if holds else "no"]
            )
    return markdown(["arm", "endpoint", "difference", "p (Holm)", "better than all"], rows) if rows else []


def shown(effect: Effect | None, endpoint: Endpoint) -> str:
    if effect is None:
        return ""
    scale = UNITS[endpoint.unit][0]
    mean, low, high = (number(scale * value, endpoint, sign=True) for value in (effect.mean, effect.low, effect.high))
    return f"{mean} [{low}, {high}]"


def headed(endpoint: Endpoint) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[endpoint.higher_is_better]
    unit = UNITS[endpoint.unit][1]
    return f"{endpoint.label}{f', {unit}' if unit else ''}{arrow}"


def number(value: float, endpoint: Endpoint, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''}.{2 if endpoint.unit == 'share' else 3}f}"


def labelled(plan: Plan, arm: str) -> str:
    return plan.arms[arm].label or arm


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]]


def draw(plan: Plan, results: Results, plot: Plot, path: Path) -> bool:
    """One plot as SVG; nothing is drawn, and False returned, where there is no point to draw."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    arms, y = plot.arms or list(plan.arms), plan.endpoints[plot.y]
    of_effects = plot.x == "effects"
    inches = 0.5 + 0.32 * len(arms) * len(plan.data) if of_effects else 4.0
    figure, axes = pyplot.subplots(figsize=(6.5, inches))
    if of_effects:
        drawn = effects_plot(plan, results, arms, y, axes)
    else:
        drawn = scatter_plot(plan, results, arms, plot, axes)
    if drawn:
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return drawn


def effects_plot(plan: Plan, results: Results, arms: list[str], y: Endpoint, axes: Any) -> bool:
    scale, unit = UNITS[y.unit]
    names = []
    for data in plan.data:
        for arm in (arm for arm in arms if arm != plan.baseline):
            effect = results.effect(data, arm, plan.baseline, y)
            if effect:
                ends = [[scale * (effect.mean - effect.low)], [scale * (effect.high - effect.mean)]]
                axes.errorbar(
                    [scale * effect.mean], [-len(names)], xerr=ends, fmt="o", color=f"C{list(plan.data).index(data)}"
                )
                names.append(f"{labelled(plan, arm)}{f', {data}' if len(plan.data) > 1 else ''}")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks([-i for i in range(len(names))], names)
    axes.set_xlabel(f"{y.label}: difference from {labelled(plan, plan.baseline)}{f', {unit}' if unit else ''}")
    return bool(names)


def scatter_plot(plan: Plan, results: Results, arms: list[str], plot: Plot, axes: Any) -> bool:
    """y of each arm over another endpoint (a point a data set, mean over seeds) or over a known number of the data."""
    y, x = plan.endpoints[plot.y], plan.endpoints.get(plot.x)
    drawn = False
    for number_of_arm, arm in enumerate(arms):
        points = []
        for data, about in plan.data.items():
            of_y = list(results.values(data, arm, y).values())
            of_x = list(results.values(data, arm, x).values()) if x else [about.known[plot.x]] * (plot.x in about.known)
            if of_y and of_x:
                points.append(
                    (np.mean(of_x) * (UNITS[x.unit][0] if x else 1), *(UNITS[y.unit][0] * v for v in spread(of_y)))
                )
        if points:
            at, mean, half = np.array(sorted(points)).T
            style = {"color": f"C{number_of_arm % 10}", "marker": "os^Dv"[number_of_arm // 10 % 5]}
            axes.errorbar(at, mean, yerr=half, label=labelled(plan, arm), linestyle="" if x else "-", **style)
            drawn = True
    axes.set_xlabel(headed(x) if x else plot.x.replace("_", " "))
    axes.set_ylabel(headed(y))
    if drawn:
        axes.legend(fontsize=7, ncols=2)
    return drawn


def spread(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half of its 95 % interval."""
    return float(np.mean(values)), float(np.ptp(t_interval(np.array(values))) / 2) if len(values) > 1 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", help="Its name in campaigns, or a YAML file.")
    parser.add_argument("--out", type=Path, help="Folder for CAMPAIGN.md and its plots.")
    options = parser.parse_args()
    return run_tool(lambda: write(read_plan(options.campaign), options.out), (OSError, ValueError))


def write(plan: Plan, out: Path | None) -> None:
    results = Results(plan)
    require(bool(results.runs), "CAMPAIGN", plan.name, f"no run of it is in {plan.results}; run.py makes them")
    plots = {}
    if out:
        out.mkdir(parents=True, exist_ok=True)
        for place, plot in enumerate(plan.plots):
            name = f"{plan.name}-{plot.y}-{plot.x}.svg"
            if draw(plan, results, plot, out / name):
                plots[place] = name
    text = report(plan, results, plots)
    print(text)
    if out:
        (out / f"{plan.name}.md").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
