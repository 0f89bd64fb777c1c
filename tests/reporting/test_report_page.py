"""The page is whole, well formed, safe, needs nothing from outside, and says what was measured."""

from __future__ import annotations

import json
import os
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from evaluation_folders import save_model, save_older, save_result, write_run
from PIL import Image

from modstruct.evaluation.result import Curve, Value
from modstruct.reporting.loading import galleries, load_evaluations
from modstruct.reporting.report import write_report

VOID = {"meta", "img", "br", "hr", "link", "input", "circle", "rect", "path", "polygon"}
HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\x00"


class Page(HTMLParser):
    """Checks that elements nest, and collects what the tests ask for."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.strong: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or (tag in ("circle", "path") and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)
        if "strong" in self.open:
            self.strong.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(report) -> Page:
    return Page(report.html.read_text())


def test_it_has_every_run_section_chart_and_command(page, report):
    text = " ".join(page.text)
    for name in ("clip", "clip_sep", "clip_gc"):
        assert name in text
        assert f"deepspeed launch_scripts/pretrain.py --recipe scenes --method {name}" in text
        assert f"runs/{name}/checkpoints/step-00000220" in text
    assert "geometry: {weight: 0.25}" in text
    assert 'losses.method "clip" "clip_sep" "clip_gc"' in " ".join(text.split())
    metrics = {"retrieval", "zero_shot", "linear_probe", "few_shot", "structure", "information", "leakage"}
    ids = {attrs["id"] for attrs in page.all("section")}
    assert ids == metrics | {"summary", "planes", "examples", "runs", "reading"}
    assert {attrs["href"].removeprefix("#") for attrs in page.all("a") if attrs["href"].startswith("#")} == ids
    labels = [attrs["aria-label"] for attrs in page.all("svg") if "aria-label" in attrs]
    for plot in ("Recall at K, text_to_image, scenes", "Spectrum, scenes", "Search of the penalty, shapes"):
        assert plot in labels
    assert sum("two principal axes" in label for label in labels) == 3


def test_it_says_what_was_measured_and_what_the_values_mean(page):
    text = " ".join(" ".join(page.text).split())
    for words in (
        "240 images · 240 captions · 240 pairs",
        "240 images · 240 labelled images · 18 classes · first template: template “a photo of a {}.”",
        "features image_features",
        "Share of queries with a right item among the first 5.",
        "Distance of the mean image from the mean caption.",
        "± 3.0",
        "Scroll the table sideways for all 3 runs",
    ):
        assert words in text


def test_a_definition_of_several_labels_is_said_once(tmp_path):
    folder = tmp_path / "run"
    save_model(folder, "run")
    abouts = {"even, images": "How even.", "near": "How near.", "even, texts": "How even.", "bare": ""}
    values = {label: Value(0.5, label, about=about) for label, about in abouts.items()}
    save_result(folder, "shapes", "structure", values | {"each/near": Value(0.5, "near", about="How near each.")})
    text = write_report([folder], tmp_path / "page").html.read_text()
    defined = re.findall("<dt>(.*)</dt><dd>(.*)</dd>", text)
    assert defined == [("even, images \u00b7 even, texts", "How even."), ("near", "How near.")]


def test_its_links_lead_to_files_beside_it(page, report):
    links = {attrs["href"] for attrs in page.all("a") if not attrs["href"].startswith("#")}
    assert {"report.csv", "report.tex", "report.json", "report-figures/"} < links
    assert all((report.html.parent / link).exists() for link in links)
    for path in report.figures.iterdir():
        assert f"report-figures/{path.name}" in links
        assert path.read_bytes().startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
    with Image.open(report.figures / "structure-scenes-Spectrum.png") as image:
        assert image.size[0] == round(3.25 * 200)


def test_plots_take_their_colours_from_the_page(page, report):
    text = report.html.read_text()
    drawn = text[text.index('<svg class="plot"') :]
    assert 'class="run-2"' in drawn
    assert not re.search(r'(stroke|fill)="#(?!000000|ffffff)', drawn)
    assert len(page.all("clippath")) == len(page.all("metadata")) == 0
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_json_holds_every_result_of_every_run(run_folders, report):
    content = json.loads(report.json.read_text())
    assert content["schema"] == 1
    runs = load_evaluations(run_folders)
    assert [run["name"] for run in content["runs"]] == [run.name for run in runs]
    for written, run in zip(content["runs"], runs, strict=True):
        assert written["model"]["name"] == run.model["name"]
        assert written["results"] == json.loads(json.dumps([result.to_json() for result in run.results.values()]))


def test_seeds_share_a_column_and_are_listed(tmp_path):
    folders = []
    for method in ("clip", "gc"):
        for seed in (0, 1):
            folders.append(tmp_path / f"{method}-s{seed}")
            noise = 0.6 if method == "clip" else 0.4
            write_run(folders[-1], f"{method}-s{seed}/step-9", noise, 0.5, 0.5, seed, method)
    files = write_report(folders, tmp_path / "new" / "folder" / "report")
    grouped = Page(files.html.read_text())
    assert "mean of 2 seeds" in " ".join(grouped.text)
    assert not any("run-2" in attrs.get("class", "") for attrs in grouped.all("span"))
    assert any("clip-s1: " in attrs.get("title", "") for attrs in grouped.all("td"))
    assert len(json.loads(files.json.read_text())["runs"]) == 4


def test_intervals_can_be_left_out(run_folders, tmp_path):
    text = " ".join(Page(write_report(run_folders, tmp_path / "r", with_interval=False).html.read_text()).text)
    assert not re.search(r"\[\d+\.\d, \d+\.\d\]", text)
    assert "± 3.0" in text


def test_only_what_is_shown_to_be_best_is_bold(page):
    row = next(i for i, text in enumerate(page.text) if text.startswith("R@1"))
    following = [text.strip() for text in page.text[row : row + 30] if re.fullmatch(r"\d+\.\d", text.strip())]
    chance, first, second, third = following[:4]
    assert third in page.strong
    assert first not in page.strong
    assert second not in page.strong
    assert float(chance) < float(first) < float(third)


def test_it_asks_nothing_of_the_network_and_runs_no_script(page, report):
    text = report.html.read_text()
    assert not re.search(r"(src|href|action)\s*=\s*[\"']?\s*(https?:|//|file:|javascript:)", text)
    assert "@import" not in text
    assert "url(" not in text
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in page.all("img"))
    assert not any(name.startswith("on") or name == "style" for _, attrs in page.elements for name in attrs)
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_tables_have_captions_and_scopes_images_have_texts_and_headings_descend(page):
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(attrs.get("scope") in ("col", "row", "rowgroup") for attrs in page.all("th"))
    assert all(attrs["alt"] for attrs in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_hostile_texts_stay_texts(run_folders, tmp_path):
    folder = shutil.copytree(run_folders[0], tmp_path / "run")
    model = json.loads((folder / "model.json").read_text())
    model |= {"name": HOSTILE, "recipe": HOSTILE, "commands": [["run", HOSTILE]], "checkpoint": HOSTILE}
    (folder / "model.json").write_text(json.dumps(model))
    captions = folder / "embeddings/scenes/captions.jsonl"
    captions.write_text("".join(json.dumps(HOSTILE) + "\n" for _ in captions.read_text().splitlines()))
    examples = json.loads((folder / "results/scenes/examples/examples.json").read_text())
    for example in examples["examples"]:
        for item in (example["query"], example["right"], *example["results"]):
            item |= {"key": HOSTILE} | ({"text": HOSTILE + "\ud800"} if "text" in item else {})
    (folder / "results/scenes/examples/examples.json").write_text(json.dumps(examples))
    values = {HOSTILE: Value(0.5, HOSTILE, about=HOSTILE), f"group/{HOSTILE}": Value(1.5)}
    texts = {"title": HOSTILE, "x_label": HOSTILE + "$x_1$", "y_label": HOSTILE}
    curves = {HOSTILE: Curve([1.0, 2.0], [1.0, 2.0], **texts), "b": Curve([1.0], [2.0], plot=HOSTILE, **texts)}
    more = {"title": HOSTILE, "about": HOSTILE, "groups": {"group": HOSTILE}, "headlines": (HOSTILE,)}
    more |= {"settings": {HOSTILE: HOSTILE, "features": HOSTILE, "templates": {HOSTILE: [HOSTILE]}}, "curves": curves}
    save_result(folder, "scenes", "new_metric", values, rows={HOSTILE: 3}, **more)
    save_older(folder, "scenes", "older_metric", {HOSTILE: {"value": 0.5}}, settings={HOSTILE: HOSTILE})
    files = write_report([folder], tmp_path / "report")
    hostile = Page(files.html.read_text())
    assert hostile.all("script") == []
    assert len(hostile.all("style")) == 1
    assert all(attrs["src"].startswith("data:") for attrs in hostile.all("img"))
    assert "\x00" not in files.html.read_text()
    assert "<script>alert(1)</script>" in " ".join(hostile.text)


def test_credentials_are_not_in_a_report(run_folders, tmp_path):
    folder, secret = shutil.copytree(run_folders[0], tmp_path / "run"), "https://me:pass_word@host/a.tar?sig=pass_word"
    model = json.loads((folder / "model.json").read_text())
    model["recipe"] += f"\ndata: {{train: '{secret}'}}\n"
    model |= {"commands": [["evaluate.py", "--sets", f"a={secret}"]], "sets": {"a": {"word": secret}}}
    (folder / "model.json").write_text(json.dumps(model))
    save_result(folder, "scenes", "new", {"a": Value(0.5)}, command=("x", secret), settings={"a": [secret]})
    files = write_report([folder], tmp_path / "report")
    for file in (files.html, files.json):
        assert "pass_word" not in file.read_text()
        assert "host/a.tar?..." in file.read_text()


def test_other_data_are_said_on_the_page(run_folders, tmp_path):
    folder = shutil.copytree(run_folders[1], tmp_path / "other")
    path = folder / "results/scenes/retrieval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": "another"}))
    (folder / "results/shapes/few_shot.json").unlink()
    text = write_report([run_folders[0], folder], tmp_path / "report").html.read_text()
    assert "Not the same data" in text
    assert "Few-shot classification on shapes was not measured for clip_sep." in text


def test_one_run_alone_makes_a_page_without_comparison(run_folders, tmp_path):
    alone = Page(write_report(run_folders[:1], tmp_path / "alone.html").html.read_text())
    assert any(text.endswith("Text → image, ") for text in alone.text)
    assert not any(re.fullmatch(r"\d+\.\d", text) for text in alone.strong)


def test_queries_of_several_runs_stand_together(run_folders):
    found = galleries(load_evaluations(run_folders))
    assert found.keys() == {("scenes", "text_to_image"), ("scenes", "image_to_text")}
    for queries in found.values():
        assert len(queries) == 3
        for query in queries:
            assert [one["run"] for one in query] == [0, 1, 2]
            assert all(one["right"]["name"] == one["query"]["name"] for one in query)


def test_a_run_without_examples_is_named(run_folders, tmp_path):
    folder = shutil.copytree(run_folders[0], tmp_path / "clip")
    shutil.rmtree(folder / "results/scenes/examples")
    report = write_report([folder, *run_folders[1:]], tmp_path / "report")
    assert "Retrieved examples were not kept of clip." in Page(report.html.read_text()).text
    assert {name.rpartition("-")[2] for name in os.listdir(report.figures) if "plane" in name} >= {
        "clip.png",
        "clip_sep.png",
    }


def test_images_beyond_the_limit_are_named_instead(run_folders):
    found = galleries(load_evaluations(run_folders), limit=3000)
    retrieved = [one for queries in found.values() for query in queries for one in query]
    items = [item for one in retrieved for item in one["results"] if item["text"] is None]
    shown = [item for item in items if item["image"]]
    assert 0 < sum(len(uri) for uri in {item["image"] for item in shown}) <= 3000
    assert len(shown) < len(items)
    assert all(item["name"] for item in items)


def test_examples_may_name_no_file_of_another_folder(run_folders, tmp_path):
    folder = shutil.copytree(run_folders[0], tmp_path / "run")
    path = folder / "results/scenes/examples/examples.json"
    for name in ("../../../model.json", "/etc/hostname"):
        example = {"query": {"key": "a", "image": name}, "results": []}
        path.write_text(json.dumps({"examples": [example]}))
        with pytest.raises(ValueError, match="of this folder"):
            galleries(load_evaluations([folder]))
