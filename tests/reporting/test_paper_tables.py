"""The paper's tables: ranks, averages, what rows lack, and LaTeX that compiles whatever names hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from modstruct.config import Recipe
from modstruct.config.recipe_files import recipe_to_yaml
from modstruct.evaluation.result import Result, share
from modstruct.reporting.clip_benchmark import benchmark_files, read_benchmark
from modstruct.reporting.loading import Evaluation
from modstruct.reporting.paper_tables import (
    FORMS,
    Options,
    compiled,
    latex,
    load_runs,
    markdown,
    method_of,
    paper_table,
)


def probed(name: str, **accuracies: float) -> Evaluation:
    results = {
        (of, "linear_probe"): Result("linear_probe", of, {"top_1": share(v, low=v, high=v)}, fingerprint=of)
        for of, v in accuracies.items()
    }
    return Evaluation(Path(name), name, {"name": name}, results)


def test_the_average_is_over_what_all_rows_have_and_ranks_are_of_measured_rows():
    runs = [probed("a", cifar10=0.5, dtd=0.3, stl10=0.9), probed("b", cifar10=0.6, dtd=0.3)]
    made = paper_table("linear_probe", runs, Options(paper_rows=True))
    a, b = made.rows[-2:]
    assert [row.cells["average"][0].value for row in (a, b)] == pytest.approx([0.4, 0.45])
    assert [made.rank(row, "cifar10", 0) for row in (a, b)] == [1, 0]
    assert [made.rank(row, "dtd", 0) for row in (a, b)] == [0, 0]
    assert made.rank(a, "stl10", 0) is None
    assert all(made.rank(row, "cifar10", 0) is None for row in made.rows[:-2])
    assert "Without STL10: b." in made.caption
    assert "**60.00**" in markdown(made, Options())


def test_the_paper_rows_average_as_printed():
    run = probed("a", **dict.fromkeys(FORMS["linear_probe"]["sets"], 0.5))
    made = paper_table("linear_probe", [run], Options(paper_rows=True))
    clip = next(row for row in made.rows if row.name == "CLIP (paper)")
    assert 100 * clip.cells["average"][0].value == pytest.approx(61.05, abs=0.006)


def test_an_unknown_set_is_refused_by_name():
    with pytest.raises(ValueError, match=r"--sets.*nowhere"):
        paper_table("linear_probe", [probed("a", dtd=0.5)], Options(sets=("nowhere",)))


def test_the_distribution_shift_is_of_its_own_sets_or_of_named_ones():
    shown = {"top_1": share(0.5), "top_3": share(0.6), "top_5": share(0.7)}

    def run(*sets: str) -> Evaluation:
        return Evaluation(Path("a"), "a", {}, {(of, "zero_shot"): Result("zero_shot", of, shown) for of in sets})

    remedy = r"--tables = 'distribution_shift': no run measured one of its sets, imagenet_v2, .*, or name .* --sets"
    with pytest.raises(ValueError, match=remedy):
        paper_table("distribution_shift", [run("scenes_colour")], Options())
    assert [*paper_table("zero_shot", [run("scenes_colour")], Options()).columns] == ["scenes_colour"]
    named = paper_table("distribution_shift", [run("scenes_colour")], Options(sets=("scenes_colour",)))
    assert [*named.columns] == ["scenes_colour"]
    both = run("imagenet_a", "scenes_colour")
    assert [*paper_table("distribution_shift", [both], Options()).columns] == ["imagenet_a"]


def test_that_no_row_of_the_paper_fits_is_said():
    def caption(of: str, **options: bool) -> str:
        return paper_table("linear_probe", [probed("a", **{of: 0.5})], Options(**options)).caption

    said = "No rows of the paper, which has only Caltech101, SVHN, "
    assert said in caption("scenes_colour", paper_rows=True)
    assert said not in caption("scenes_colour")
    assert said not in caption("dtd", paper_rows=True)


def test_a_recipe_without_losses_has_no_method():
    def method(recipe: str | None) -> str | None:
        return method_of(Evaluation(Path(), "run", {"recipe": recipe}).recipe)

    assert method(recipe_to_yaml(Recipe()).replace("weight: 1.0", "weight: 0.0")) is None
    assert method("losses: {contrastive: {weight: 1.0, in_modal: false}}") == "clip"  # older than second_view
    separated = "losses: {contrastive: {weight: 1.0, in_modal: true}, separation: {weight: 1.0%s}}"
    assert method(separated % "") == "sep"
    assert method(separated % ", orthogonality_weight: 0.0") == "sep_no_ortho"
    assert method(None) is None
    assert method("a: [") is None


@pytest.mark.parametrize("count", [2, 7, 12])
def test_latex_fits_the_page_whatever_names_hold(count):
    names = ["[2cm] a&b_%$#{}~^\\", "*x", "\u732b\u202e\u00e9", "x" * 70]
    columns = {of: 0.5 for of in FORMS["linear_probe"]["sets"]}
    runs = [probed(f"{names[i % 4]}{i}", **columns) for i in range(count)]
    options = Options(paper_rows=True, intervals=True)
    text = latex(paper_table("linear_probe", runs, options), options)
    assert text.isascii()
    assert text.count(r"\toprule") == text.count(r"\bottomrule") > 0
    assert not any(line.startswith(("[", "*")) for line in text.splitlines())
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not installed: the structure alone was checked")
    pdf, log = compiled(text)
    assert pdf is not None
    assert "Overfull" not in log


def test_clip_benchmark_reads_what_it_writes(tmp_path):
    values = {"ensemble/top_1": share(0.4), "ensemble/top_5": share(0.7), "ensemble/mean_per_class": share(0.39)}
    recalls = {"text_to_image/recall_at_5": share(0.3), "image_to_text/recall_at_5": share(0.2)}
    results = {
        ("imagenet", "zero_shot"): Result("zero_shot", "imagenet", values),
        ("coco", "retrieval"): Result("retrieval", "coco", recalls),
    }
    files = benchmark_files([Evaluation(tmp_path, "ours", {"name": "ours", "checkpoint": "runs/ours"}, results)])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    json_files = [tmp_path / name for name in files if name.endswith(".json")]
    for paths in ([tmp_path / "benchmark.csv"], json_files):
        (run,) = read_benchmark(paths)
        assert run.name == "ours runs/ours"
        read = {key: {name: v.value for name, v in of.values.items()} for key, of in run.results.items()}
        assert read == {key: {name: v.value for name, v in of.values.items()} for key, of in results.items()}


def test_a_share_above_one_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("dataset,model,pretrained,task,acc1\ncifar10,ViT,x,zeroshot_classification,45\n")
    with pytest.raises(ValueError, match=r"rows\.csv, line 2.*45"):
        read_benchmark([path])


def fine_tuned(folder: Path, start: Path, seed: int, accuracy: float) -> Path:
    """A run with a checkpoint and the files that `evaluate.py task` writes."""
    checkpoint = folder / "checkpoints" / "step-00000009"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "recipe.yaml").write_text(f"init: {start}\noutput: {folder}\ntrain: {{seed: {seed}}}\n")
    for split, value in (("validation", accuracy), ("test", accuracy + 0.01)):
        Result("vqa", split, {"accuracy": share(value)}, fingerprint=split).save(folder / f"{split}.json")
    return folder


def test_the_fusion_table_joins_fine_tuned_runs_by_where_they_started(tmp_path):
    folders = []
    for method, first in (("albef", 0.5), ("albef_gc", 0.7)):
        start = tmp_path / method
        for seed in (0, 1):
            checkpoint = start / "checkpoints" / "step-00000005"
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "state.json").write_text("{}")
            (checkpoint / "recipe.yaml").write_text(f"output: {start}\ntrain: {{seed: 7}}\nlosses: {{}}\nx: {method}\n")
            folders.append(fine_tuned(tmp_path / f"{method}-vqa-{seed}", start, seed, first + 0.02 * seed))
    runs = load_runs(folders)
    made = paper_table("fusion", runs, Options(paper_rows=True))
    ours = [row for row in made.rows if row.kind == "measured"]
    assert [(row.name, row.seeds) for row in ours] == [("albef", 2), ("albef_gc", 2)]
    assert [round(value.value, 6) for value in ours[1].cells["vqa"]] == [0.71, 0.72]
    assert [round(value.deviation, 6) for value in ours[1].cells["vqa"]] == [round(0.02 / 2**0.5, 6)] * 2
    assert [made.rank(row, "vqa", 0) for row in ours] == [1, 0]
    text = markdown(made, Options())
    assert "**71.00** ± 1.41/**72.00** ± 1.41" in text
    assert "ALBEF (paper)" in text
    with pytest.raises(ValueError, match="a second"):
        load_runs([*folders, fine_tuned(tmp_path / "again", tmp_path / "albef", 0, 0.5)])
