"""The CSV holds every metric in full; LaTeX is escaped and balanced."""

from __future__ import annotations

import csv
import io
import re

from modstruct.reporting.comparison import compare
from modstruct.reporting.loading import load_evaluations
from modstruct.reporting.tables import csv_table, escaped, latex_tables


def test_the_csv_gives_back_every_metric_exactly(run_folders, report):
    runs = load_evaluations(run_folders)
    lines = list(csv.DictReader(io.StringIO(report.csv.read_text())))
    found = {(line["run"], line["set"], line["metric"], line["figure"]): line for line in lines}
    assert len(found) == len(lines)
    expected = {
        (run.name, result.set, result.metric, "/".join(names)): metric
        for run in runs
        for result in run.results.values()
        for names, metric in result.metrics.items()
    }
    assert found.keys() == expected.keys()
    for key, metric in expected.items():
        read = [found[key][name] for name in ("value", "low", "high", "chance", "rows")]
        written = [metric.value, metric.low, metric.high, metric.chance, metric.rows]
        assert [float(text) if text else None for text in read] == written


def test_the_lead_in_the_csv_is_the_best_value_minus_this_one(report):
    lines = list(csv.DictReader(io.StringIO(report.csv.read_text())))
    led = [line for line in lines if line["best_minus_this"]]
    assert led
    best = {(line["set"], line["metric"], line["figure"]): line for line in lines if line["best"] == "1"}
    for line in led:
        difference = float(best[line["set"], line["metric"], line["figure"]]["value"]) - float(line["value"])
        assert abs(difference - float(line["best_minus_this"])) < 1e-6
        assert float(line["best_minus_this_low"]) <= float(line["best_minus_this_high"])


def test_latex_escapes_all_that_it_reads_as_a_command():
    assert escaped(r"50 % of $x_1 & {y} ~^#\end") == (
        r"50 \% of \$x\_1 \& \{y\} \textasciitilde{}\textasciicircum{}\#\textbackslash{}end"
    )
    assert escaped("two\n\nlines") == "two lines"


def test_latex_tables_are_balanced_and_mark_the_best_in_bold(run_folders, report):
    text = report.tex.read_text()
    for name in ("table", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") > 0
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{table}")
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    row = next(line for line in text.splitlines() if line.strip().startswith("R@1 "))
    assert [r"\textbf" in cell for cell in row.split("&")] == [False, False, False, False, True]
    assert not re.search(r"(?<!\\)_", text)


def test_a_group_of_many_classes_is_left_to_the_csv(run_folders):
    runs = load_evaluations(run_folders)
    sections = compare(runs)
    assert "30 metrics: see the CSV file" in latex_tables(sections, runs)
    assert "per_class/class 29" in csv_table(sections, runs)
