"""The CSV holds every metric in full; LaTeX is escaped and balanced."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import pytest
from evaluation_folders import save_result

from modstruct.evaluation.result import Value
from modstruct.reporting.comparison import compare
from modstruct.reporting.loading import load_evaluations
from modstruct.reporting.tables import as_cell, csv_table, escaped, latex_tables


def test_the_csv_gives_back_every_metric_exactly(run_folders, report):
    runs = load_evaluations(run_folders)
    lines = list(csv.DictReader(io.StringIO(report.csv.read_text())))
    found = {(line["run"], line["set"], line["metric"], line["name"]): line for line in lines}
    assert len(found) == len(lines)
    expected = {
        (run.name, set_name, metric, name): value
        for run in runs
        for (set_name, metric), result in run.results.items()
        for name, value in result.values.items()
    }
    assert found.keys() == expected.keys()
    for key, metric in expected.items():
        read = [found[key][name] for name in ("value", "low", "high", "deviation", "chance", "rows")]
        written = [metric.value, metric.low, metric.high, metric.deviation, metric.chance, metric.rows]
        assert [float(text) if text else None for text in read] == written


def test_the_lead_in_the_csv_is_the_best_value_minus_this_one(report):
    lines = list(csv.DictReader(io.StringIO(report.csv.read_text())))
    led = [line for line in lines if line["best_minus_this"]]
    assert led
    best = {(line["set"], line["metric"], line["name"]): line for line in lines if line["best"] == "1"}
    for line in led:
        difference = float(best[line["set"], line["metric"], line["name"]]["value"]) - float(line["value"])
        assert abs(difference - float(line["best_minus_this"])) < 1e-6
        assert float(line["best_minus_this_low"]) <= float(line["best_minus_this_high"])


def test_latex_escapes_all_that_it_reads_as_a_command():
    assert escaped(r"50 % of $x_1 & {y} ~^#\end") == (
        r"50 \% of \$x\_1 \& \{y\} \textasciitilde{}\textasciicircum{}\#\textbackslash{}end"
    )
    assert escaped("two\n\nlines") == "two lines"


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("caf\u00e9 na\u00efve \u0160", r"caf\'{e} na\"{i}ve \v{S}"),
        ("\u732b \U0001f600", r"\texttt{U+732B} \texttt{U+1F600}"),
        ("a\x1b[31m\x07b", r"a\texttt{U+001B}[31m\texttt{U+0007}b"),
        ("\u201cx\u201d \u2014 3 \u00d7 \u00b5", r"``x'' --- 3 $\times$ $\mu$"),
        ("\ud800\u202e", r"\texttt{U+D800}\texttt{U+202E}"),
    ],
)
def test_latex_is_ascii_without_control_characters(text, printed):
    assert escaped(text) == printed


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ('=HYPERLINK("http://x")', '\'=HYPERLINK("http://x")'),
        ("+1", "'+1"),
        ("-0.5", "'-0.5"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\uff1dx", "'\uff1dx"),
        ("\t=x", r"'\t=x"),
        ("\r=x\x1b[2J", r"'\r=x\x1b[2J"),
        (" =x", "' =x"),
        ("a=b, c-d", "a=b, c-d"),
        ("\u732b", "\u732b"),
    ],
)
def test_a_cell_of_others_is_no_formula(text, cell):
    assert as_cell(text) == cell


def test_names_of_others_command_neither_spreadsheet_nor_latex(run_folders, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(run_folders[0], folder)
    model = json.loads((folder / "model.json").read_text()) | {"name": "=cmd|' /C calc'!A1\x1b]0;x\x07"}
    (folder / "model.json").write_text(json.dumps(model))
    values = {name: Value(0.5, chance=0.1) for name in ("[2cm]", "*x")} | {"-0.5": Value(-0.25)}
    save_result(folder, "shapes", "zero_shot", values)
    runs = load_evaluations([folder])
    sections = compare(runs)
    text = csv_table(sections, runs)
    lines = [line for line in csv.DictReader(io.StringIO(text)) if line["metric"] == "zero_shot"]
    assert {line["run"] for line in lines} == {r"'=cmd|' /C calc'!A1\x1b]0;x\x07"}
    assert {line["name"]: float(line["value"]) for line in lines}["'-0.5"] == -0.25
    made = latex_tables(sections, runs)
    assert made.isascii()
    assert all(c.isprintable() or c == "\n" for c in text + made)
    assert "[2cm]" in made
    assert not any(line.startswith(("[", "*")) for line in made.splitlines())


def test_latex_tables_are_balanced_and_mark_the_best_in_bold(run_folders, report):
    text = report.tex.read_text()
    for name in ("table", "table*", "tabular"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}")
    assert text.count(r"\toprule") == text.count(r"\bottomrule") > 0
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    rows = [line for line in text.splitlines() if line.startswith((r"{}gc", r"{}clip\_gc", r"\midrule {}gc"))]
    assert any(r"\textbf" in row for row in rows)
    assert not re.search(r"(?<!\\)_", text)


def test_a_group_of_many_classes_is_left_to_the_csv(run_folders):
    runs = load_evaluations(run_folders)
    sections = compare(runs)
    assert "30 metrics: see the CSV file" in latex_tables(sections, runs)
    assert "per_class/class 29" in csv_table(sections, runs)
