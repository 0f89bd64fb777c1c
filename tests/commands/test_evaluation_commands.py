"""`evaluate.py` from a checkpoint to a report, each command as a user types it; on one process and on two."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from crafted_shards import encoded_image, write_tar
from processes import run_on_processes
from tiny_run import ds_config, tiny_recipe

from modstruct.commands.measure import MeasureConfig, _measure_one
from modstruct.evaluation.embeddings import source as source_module
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet

SCRIPT = Path(__file__).parents[2] / "launch_scripts" / "evaluate.py"
METRICS = ("retrieval", "zero_shot", "structure", "linear_probe", "linear_probe_adamw", "few_shot", "information")
METRICS += ("private_factors",)
QUICKLY = [
    *("--few_shot.shots", "[1,2]", "--few_shot.draws", "2", "--few_shot.strength", "1.0"),
    *("--linear_probe.strength", "1.0"),
    *("--information.folds", "2", "--information.hidden", "0", "--information.words", "20"),
    *("--information.strengths", "[10]", "--information.samples", "100", "--information.iterations", "20"),
    *("--information.labels", "[colour,mood]"),
]


def evaluate(*words: str) -> int:
    """The exit status of a command."""
    with mock.patch.object(sys, "argv", ["evaluate.py", "--local_rank=0", *words]):
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def train(output: str, cache: str) -> None:
    from modstruct.training.pretrain import Pretraining

    run = Pretraining(tiny_recipe(output, cache, steps=4), ds_config("zero0"), None).build()
    with run.heartbeat:
        run.train()


def embed_and_measure(run: str, cache: str, out: str) -> list[int]:
    embedded = ["--embedding.arrays", "[all]", "--embedding.batch", "16", "--embedding.workers", "0"]
    sets = ["--sets", "scenes_colour", "--all_splits", "true", "--data.eval", "scenes"]
    first = evaluate("embed", "--checkpoint", run, "--out", out, "--data.cache", cache, *embedded, *sets)
    return [first, evaluate("measure", out, "--metrics", *METRICS, *QUICKLY)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run, and its evaluation by one process and by two."""
    root = tmp_path_factory.mktemp("commands")
    run_on_processes(train, 1, str(root / "run"), str(root / "cache"))
    for processes in (1, 2):
        ended = run_on_processes(
            embed_and_measure, processes, str(root / "run"), str(root / "cache"), str(root / f"on{processes}")
        )
        assert ended == [[0, 0]] * processes
    return root


def saved(evaluation: Path, metric: str) -> dict:
    return json.loads((evaluation / "results" / "scenes_colour" / f"{metric}.json").read_text())["values"]


def test_two_processes_embed_and_measure_what_one_does(made):
    for name in ("scenes_colour", "scenes_colour-train", "scenes_colour-validation"):
        one, two = (EmbeddedSet.open(made / f"on{processes}" / "embeddings" / name) for processes in (1, 2))
        assert one.keys == two.keys
        assert one.arrays == two.arrays
        for array in one.arrays:
            assert np.array_equal(one.rows(array), two.rows(array))
    for metric in METRICS:
        assert saved(made / "on1", metric) == saved(made / "on2", metric)


def test_splits_for_probes_hold_what_probes_read(made):
    embeddings = made / "on1" / "embeddings"
    for_probes = {"image", "image_features", "image_projected", "image_independent"}
    assert EmbeddedSet.open(embeddings / "scenes_colour-train").arrays == for_probes
    assert "text_independent" in EmbeddedSet.open(embeddings / "scenes_colour").arrays
    assert not (made / "on1" / "results" / "scenes_colour-train").exists()


def test_the_report_shows_both_runs_and_every_metric(made, tmp_path):
    assert evaluate("report", str(made / "on1"), str(made / "on2"), "--out", str(tmp_path / "page")) == 0
    page = (tmp_path / "page.html").read_text()
    for shown in (
        "Image-text retrieval",
        "Zero-shot",
        "Linear probe",
        "Few-shot",
        "Information",
        "data:image/jpeg;base64",
    ):
        assert shown in page
    with open(tmp_path / "page.csv", newline="") as file:
        assert len(list(csv.reader(file))) > 40
    assert "\\toprule" in (tmp_path / "page.tex").read_text()


def test_the_adamw_probe_is_known_by_its_former_name_too(made, capsys):
    former = ("--metrics", "linear_probe_sgd", "--linear_probe.sgd.epochs", "3")
    assert evaluate("measure", str(made / "on1"), *former) == 0
    assert "linear_probe_adamw.json" in capsys.readouterr().out


def test_what_is_measured_stays_and_other_weights_are_refused(made, tmp_path, capsys):
    out = made / "on1"
    before = (out / "results" / "scenes_colour" / "structure.json").stat().st_mtime_ns
    assert evaluate("measure", str(out), "--metrics", "structure") == 0
    assert "measured before" in capsys.readouterr().out
    assert (out / "results" / "scenes_colour" / "structure.json").stat().st_mtime_ns == before
    earlier = made / "run" / "checkpoints" / "step-00000002"
    words = ("--sets", "scenes_colour", "--data.cache", str(made / "cache"), "--embedding.workers", "0")
    assert evaluate("embed", "--checkpoint", str(earlier), "--out", str(out), *words) == 1
    assert "choose another folder" in capsys.readouterr().err


def test_a_metric_that_a_set_cannot_have_is_named_and_the_others_are_measured(made, capsys):
    words = (
        "--metrics",
        "few_shot",
        "zero_shot",
        "--again",
        "true",
        "--few_shot.shots",
        "[64]",
        "--few_shot.strength",
        "1.0",
    )
    assert evaluate("measure", str(made / "on2"), *words) == 1
    error = capsys.readouterr().err
    assert "scenes_colour, few_shot: " in error
    assert "64" in error


def test_leaked_images_are_left_out_of_a_second_measurement(made):
    out = made / "on2"
    keys = EmbeddedSet.open(out / "embeddings" / "scenes_colour").keys
    (out / "results" / "scenes_colour" / "leaked_keys.jsonl").write_text(json.dumps(keys[3]) + "\n")
    assert evaluate("measure", str(out), "--metrics", "retrieval") == 0
    without = EmbeddedSet.open(out / "embeddings" / "scenes_colour-without-leaked")
    assert without.keys == [key for key in keys if key != keys[3]]
    found = json.loads((out / "results" / without.name / "retrieval.json").read_text())
    assert found["rows"]["image"] == len(keys) - 1


def centre(out: str) -> int:
    return evaluate(
        "measure", out, "--centre", "true", "--metrics", "retrieval", "zero_shot", "structure", "linear_probe"
    )


def test_centred_sets_are_measured_beside_the_others(made, tmp_path, capsys):
    """On one process and on two."""
    out, results = tmp_path / "on1", []
    shutil.copytree(made / "on1", out)
    plain = {metric: saved(out, metric) for metric in METRICS}
    assert centre(str(out)) == 0
    assert (
        "scenes_colour-centred, linear probe: left out, a centred set has no training split" in capsys.readouterr().out
    )
    assert {metric: saved(out, metric) for metric in METRICS} == plain
    shutil.copytree(made / "on1", tmp_path / "on2")
    assert run_on_processes(centre, 2, str(tmp_path / "on2")) == [0, 0]
    for metric in ("retrieval", "zero_shot", "structure"):
        one, two = (
            json.loads((tmp_path / run / "results" / "scenes_colour-centred" / f"{metric}.json").read_text())
            for run in ("on1", "on2")
        )
        assert one["values"] == two["values"]
        assert one["settings"]["centred"] is True
        assert one["set"] == "scenes_colour-centred"
        assert one["values"] != plain[metric]
        results.append(one)
    gap = results[2]["values"]["modality_gap"]["value"]
    assert gap < 0.5 * plain["structure"]["modality_gap"]["value"]
    assert evaluate("report", str(out), "--out", str(tmp_path / "page")) == 0
    assert "scenes_colour-centred" in (tmp_path / "page.html").read_text()


def test_what_was_measured_of_other_embeddings_is_measured_again(made, capsys):
    out, words = made / "on1", ("--sets", "scenes_colour", "--data.cache", str(made / "cache"))
    again = ("--embedding.overwrite", "true", "--embedding.dtype", "float32", "--embedding.workers", "0")
    assert evaluate("embed", "--checkpoint", str(made / "run"), "--out", str(out), *words, *again) == 0
    assert evaluate("measure", str(out), "--metrics", "structure") == 0
    assert "measured before" not in capsys.readouterr().out
    assert evaluate("measure", str(out), "--metrics", "structure") == 0
    assert "measured before" in capsys.readouterr().out
    (out / "results" / "scenes_colour" / "structure.json").write_text("[1]")  # damaged
    assert evaluate("measure", str(out), "--metrics", "structure") == 0
    assert "measured before" not in capsys.readouterr().out


def test_only_the_sets_that_are_named_are_measured(made, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made / "on2", out)
    shutil.rmtree(out / "results")
    more = ("--sets", "scenes_shape", "--data.cache", str(made / "cache"), "--embedding.workers", "0")
    assert evaluate("embed", "--checkpoint", str(made / "run"), "--out", str(out), *more) == 0
    assert evaluate("measure", str(out), "--metrics", "structure", "--sets", "scenes_shape") == 0
    assert [path.name for path in (out / "results").iterdir()] == ["scenes_shape"]
    assert evaluate("measure", str(out), "--metrics", "structure", "--sets", "scenes_size") == 1
    assert "there are scenes_colour, scenes_shape" in capsys.readouterr().err


def measure_again(out: str) -> int:
    return evaluate("measure", out, "--metrics", "retrieval", "zero_shot", "--again", "true")


def test_a_source_that_is_gone_costs_the_examples_alone(made, tmp_path):
    shutil.copytree(made / "on2", tmp_path / "out")
    note = tmp_path / "out" / "model.json"
    noted = json.loads(note.read_text())
    noted["sets"]["scenes_colour"]["word"] = "scenes_colour@/nowhere"
    note.write_text(json.dumps(noted))
    assert run_on_processes(measure_again, 2, str(tmp_path / "out")) == [1, 1]
    assert saved(tmp_path / "out", "zero_shot") == saved(made / "on2", "zero_shot")


def test_two_sets_of_one_name_are_refused(made, tmp_path, capsys):
    words = ("--sets", "a=x-{0..1}.tar", "a=y.tar", "--data.cache", str(made / "cache"))
    for shard in ("x-0", "x-1", "y"):
        shutil.copy(next((made / "cache").rglob("test-*.tar")), tmp_path / f"{shard}.tar")
    words = [word.replace("=", f"={tmp_path}/") for word in words]
    assert evaluate("embed", "--checkpoint", str(made / "run"), "--out", str(tmp_path / "out"), *words) == 1
    assert "two sets have this name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_is_refused_where_a_file_is_written_before_anything_is_embedded(made, tmp_path, capsys):
    assert evaluate("--checkpoint", str(made / "run"), "--out", str(tmp_path), "--data.cache", str(made / "cache")) == 1
    found = capsys.readouterr()
    assert f"--out = '{tmp_path}': is a folder; name the JSON file to write" in found.err
    assert "images of" not in found.out + found.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embed", "--out", "x"], "--checkpoint"),
        (["embed", "--open_clip", "ViT-Z"], "needed, and not given: --out"),
        (["measure"], "needed, and not given: folders"),
        (["embed", "--checkpoint", "nowhere", "--out", "x"], "nowhere"),
        (["embed", "--open_clip", "ViT-Z", "--out", "x"], "ViT-Z"),
        (["mesure", "nowhere"], "give full, embed, measure, report, task"),
        (["measure", "nowhere"], "model.json"),
        (["measure", "nowhere", "--metrics", "beauty"], "beauty"),
        (["report", "nowhere", "--out", "x"], "nowhere is no evaluation folder: `evaluate.py full --checkpoint RUN"),
    ],
)
def test_a_wrong_command_is_one_line_that_names_it(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = evaluate(*words)
    assert status == 2 if words[0] == "mesure" else status in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_what_a_set_lacks_is_said_with_how_to_get_it(tmp_path, capsys):
    rows = np.eye(4, dtype=np.float32)
    shards = EmbeddedSet("mine", {"fingerprint": "0"}, {"image": rows, "text": rows}, pairs=np.repeat([[0], [1]], 2, 1))
    for kind in ("zero_shot", "linear_probe", "private_factors"):
        _measure_one(kind, tmp_path / f"{kind}.json", shards, MeasureConfig(), [])
    zero_shot, probe, private = capsys.readouterr().out.splitlines()
    assert zero_shot.endswith("left out, the set has no classes (shards get some as --sets CLASSES.yaml@SHARDS)")
    assert "no embedded training split (embed --all_splits true; shards of your own have splits by a set file" in probe
    assert "(name fields: measure --information.labels NAME)" in private


def test_equal_images_and_captions_a_line_each_are_counted_in_the_table(made, tmp_path, capsys, caplog):
    """A retrieval set as CLIP_benchmark converts it, each of whose images is there twice."""
    captions = [[f"a thing {number} seen {way}" for way in ("near", "far", "above")] for number in range(24)]
    images = [encoded_image(number // 2) for number in range(24)]
    members = [
        (f"{number:04d}.{extension}", content)
        for number, (image, lines) in enumerate(zip(images, captions, strict=True))
        for extension, content in (("png", image), ("txt", "\n".join(lines).encode()))
    ]
    shard = write_tar(tmp_path / "things.tar", members)
    source_module.say_merged.cache_clear()
    chosen = ["--checkpoint", str(made / "run"), "--data.cache", str(tmp_path / "cache"), "--data.workers", "0"]
    table = ["--data.eval", str(shard), "--data.zero_shot", "null", "--out", str(tmp_path / "metrics.json")]
    assert evaluate(*chosen, *table) == 0
    assert "24 samples, 12 images, 72 captions, 72 pairs" in capsys.readouterr().out
    assert "data.eval: 24 samples hold 12 distinct images: byte-equal images are merged" in caplog.text
    assert f"data.eval: 24 of 24 KEY.txt looked at in {shard} hold several lines: each line is a caption" in caplog.text
    assert evaluate(*chosen, *table, "--data.caption_lines", "false") == 0
    assert "24 samples, 12 images, 24 captions, 24 pairs" in capsys.readouterr().out
    assert "each whole text is a caption; data.caption_lines: true takes each line for one" in caplog.text
    embedding = ["--embedding.batch", "16", "--embedding.workers", "0", "--sets", f"things={shard}"]
    assert evaluate("embed", *chosen, "--out", str(tmp_path / "evaluation"), *embedding) == 0
    assert "24 images (12 distinct), 72 captions" in capsys.readouterr().out
    assert evaluate("measure", str(tmp_path / "evaluation"), "--metrics", "retrieval", "structure") == 0
    for metric in ("retrieval", "structure"):
        rows = json.loads((tmp_path / "evaluation" / "results" / "things" / f"{metric}.json").read_text())["rows"]
        assert (rows["image"], rows["text"], rows["pairs"]) == (12, 72, 72)
    examples = tmp_path / "evaluation" / "results" / "things" / "examples" / "examples.json"
    shown = json.loads(examples.read_text())["examples"]
    assert all(len({item["key"] for item in example["results"]}) == 5 for example in shown)
