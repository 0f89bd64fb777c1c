"""Files of others: nothing in them is unpickled, run, followed as a path, or unpacked without a bound."""

from __future__ import annotations

import ast
import gzip
import io
import json
import logging
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_fusion import fusion_recipe
from tiny_models import clip_tokenizer, register_architectures, tiny_config, tiny_model, word_tokenizer
from whole_checkpoint import Whole
from whole_checkpoint import write as write_whole

from modstruct import checkpoints, cli
from modstruct.checkpoints import read_weight_file
from modstruct.commands.arguments import checkpoint_arguments
from modstruct.data.classification.class_files import load_classes
from modstruct.data.faults import BadSample
from modstruct.data.shards import index as index_module
from modstruct.data.shards.index import ROW, ShardIndex, index_tar
from modstruct.data.shards.texts import DEEPEST_METADATA, parse_metadata
from modstruct.data.tokenizers import ClipTokenizer, load_tokenizer
from modstruct.evaluation.result import Result, share
from modstruct.evaluation.tables import table
from modstruct.files import read_yaml
from modstruct.losses.objective import build_objective
from modstruct.models.bounded import no_larger_than
from modstruct.models.fusion.pretraining import FusionModel
from modstruct.training.logging import start_logging

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("modstruct", "tools", "launch_scripts") for path in sorted((ROOT / folder).rglob("*.py"))
]
# What runs code that a file holds.
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "torch.jit.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}


def called(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_calls_what_could_run_a_file(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not UNSAFE & {name.split(".")[0] for name in names}
    for call in called(tree):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        weights_alone = ast.unparse(call.func) == "torch.load" and given.get("weights_only") == "True"
        assert weights_alone or ast.unparse(call.func) not in UNSAFE_CALLS
        assert given.get("allow_pickle", "False") == "False"
        if ast.unparse(call.func) in ("np.load", "load_checkpoint"):
            assert given.get("allow_pickle") == "False" or given.get("weights_only") == "True"


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """Pickles of every kind that write a file when they are read: the file's place, and each pickle by its kind."""
    sprung = tmp_path / "sprung"
    kinds = {
        "plain": pickle.dumps(Trap(sprung)),
        "array": io.BytesIO(),
        "torch": io.BytesIO(),
        "old torch": io.BytesIO(),
    }
    np.save(kinds["array"], np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    torch.save({"a": Trap(sprung)}, kinds["torch"])
    torch.save({"a": Trap(sprung)}, kinds["old torch"], _use_new_zipfile_serialization=False)
    kinds = {name: kind if isinstance(kind, bytes) else kind.getvalue() for name, kind in kinds.items()}
    pickle.loads(kinds["plain"])
    assert sprung.exists(), "the trap works where it is let"
    sprung.unlink()
    return sprung, kinds


@pytest.mark.parametrize("kind", ["plain", "array", "torch", "old torch"])
def test_no_reader_unpickles(trap, kind, tmp_path, monkeypatch):
    sprung, kinds = trap
    content = kinds[kind]
    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("something was unpickled"))
    monkeypatch.setattr(np.lib.format, "pickle", None, raising=False)

    path = checkpoints.step_folder(tmp_path / "run", 1)
    (tmp_path / "file").write_bytes(content)
    assert ShardIndex.load(tmp_path / "file") is None
    with zipfile.ZipFile(tmp_path / "file.npz", "w") as archive:
        archive.writestr("rows.npy", content)
        archive.writestr("report.npy", content)
    assert ShardIndex.load(tmp_path / "file.npz") is None
    assert index_tar(tmp_path / "file").broken
    with pytest.raises(ValueError, match=r"not a YAML|three keys"):
        load_classes(tmp_path / "file")
    with pytest.raises(BadSample):
        parse_metadata(content, "here")
    written = Whole({"a": torch.ones(1)}, {}, {}, checkpoints.TrainState(), {"step": 0}, {"output": "x"})
    write_whole(path, written, word_tokenizer())
    for file in [file for file in path.rglob("*") if file.is_file()]:
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(ValueError):  # noqa: PT011  each file has its message; see test_checkpoints.py
            load_tokenizer(path / "tokenizer") if file.parent != path else checkpoints.read(path)
        file.write_bytes(whole)
    assert checkpoints.read(path).weights.keys() == {"a"}
    assert not sprung.exists()


@pytest.mark.parametrize("suffix", ["pt", "bin", "npz", "npy", "safetensors", "ckpt"])
@pytest.mark.parametrize("kind", ["plain", "array", "torch", "old torch"])
def test_no_weights_file_runs_code(trap, kind, suffix, tmp_path):
    sprung, kinds = trap
    register_architectures(tmp_path)
    (tmp_path / f"weights.{suffix}").write_bytes(kinds[kind])
    with pytest.raises(ValueError, match=r"model\.pretrained = .*cannot be loaded"):
        tiny_model(tiny_config(name="tiny-vit", pretrained=str(tmp_path / f"weights.{suffix}")), clip_tokenizer())
    assert not sprung.exists()


def test_an_index_points_nowhere_but_into_its_shard(tmp_path):
    def saved(size_bytes=10_000, **columns) -> ShardIndex | None:
        row = {"image_block": 1, "image_bytes": 9, "text_block": 3, "text_bytes": 9, "header_blocks": 1} | columns
        rows = np.zeros(2, dtype=ROW)
        for name, value in row.items():
            rows[name] = value
        ShardIndex(rows, size_bytes).save(tmp_path / "x.npz")
        return ShardIndex.load(tmp_path / "x.npz")

    assert saved() is not None
    for wrong in (
        {"image_block": 2**32 - 1},
        {"image_bytes": 2**32 - 1},
        {"text_block": 19, "text_bytes": 273},
        {"text_bytes": 2**21, "size_bytes": 2**30},
        {"metadata_bytes": 2**21, "size_bytes": 2**30},
        {"header_blocks": 2},
        {"image_block": 2**20, "header_blocks": 2**20, "size_bytes": 2**40},
        {"size_bytes": "10000"},
    ):
        assert saved(**wrong) is None, wrong


def test_an_index_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "LARGEST_INDEX_BYTES", 10_000)
    ShardIndex(np.zeros(1000, dtype=ROW), 10**6).save(tmp_path / "x.npz")
    assert (tmp_path / "x.npz").stat().st_size < 3000
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    assert ShardIndex.load(tmp_path / "x.npz") is None


def nested(depth: int) -> bytes:
    return b'{"a":' * (depth - 1) + b"{}" + b"}" * (depth - 1)


def test_metadata_deeper_than_what_travels_between_processes_is_malformed():
    """JSON of 500 levels parses, and breaks the pickling in a loader process, whose consumer would wait for ever."""
    assert parse_metadata(nested(DEEPEST_METADATA), "here")
    for depth in (DEEPEST_METADATA + 1, 500, 100_000):
        with pytest.raises(BadSample, match="malformed metadata"):
            parse_metadata(nested(depth), "here")


def test_a_caption_of_a_megabyte_is_augmented_in_no_time(tmp_path):
    script = (
        "import resource; from modstruct.data.transforms.text_views import EasyDataAugmentation\n"
        "change, text = EasyDataAugmentation(0.1), 'ab ' * 350_000\n"
        "assert all(change(text, seed) for seed in range(12))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 5


LAUGHS = "\n".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (f"a: &a [ha, ha]\n{LAUGHS}", "aliases stand for more"),
        ("a: &a [*a]", "aliases stand for more"),
        ("[" * 5000, "not YAML"),
        ("#" * (5 << 20), "larger than 4 MiB"),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
        ("!!python/name:os.system", "not YAML"),
        ("a: !!binary x\n  - [", "not YAML"),
    ],
)
def test_yaml_that_runs_grows_or_recurses_is_refused_wherever_it_is_read(tmp_path, content, reason, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_yaml(path)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_classes(path)
    with pytest.raises(SystemExit):
        cli.parse(cli.recipe_parser("", ""), ["--recipe", str(path)])
    assert str(path) in capsys.readouterr().err


def test_the_best_checkpoint_lies_in_its_run(tmp_path):
    outside = tmp_path / "elsewhere" / "step-00000001"
    outside.mkdir(parents=True)
    marker = checkpoints.folder(tmp_path / "run") / "best.json"
    marker.parent.mkdir(parents=True)
    for name in ("../../elsewhere/step-00000001", str(outside), "..", "", 7, None, ["x"]):
        marker.write_text(json.dumps({"checkpoint": name, "recall_at_1": 1.0}))
        assert checkpoints.read_best(tmp_path / "run") is None
    for damaged in ("", "[", "[]", "7", "{}", "[" * 100_000):
        marker.write_text(damaged)
        assert checkpoints.read_best(tmp_path / "run") is None


def test_a_checkpoints_recipe_cannot_permit_shell_commands(tmp_path):
    """evaluate.py takes the recipe of a checkpoint, which may come from anywhere; the permission is the user's own."""
    path = checkpoints.step_folder(tmp_path, 1)
    recipe = {"data": {"allow_pipe": True, "eval": f"pipe:touch {tmp_path}/ran"}}
    written = Whole({}, {}, {}, checkpoints.TrainState(), {"step": 0}, recipe)
    write_whole(path, written, word_tokenizer())
    parser = cli.recipe_parser("", "")
    parser.add_argument("--checkpoint")

    def allowed(*more: str) -> bool:
        arguments = ["--checkpoint", str(path), *more]
        return cli.parse(parser, arguments, prepare=checkpoint_arguments)[0].data.allow_pipe

    assert not allowed()
    assert allowed("--data.allow_pipe", "true")


def checkpoint_of(recipe: dict, path: Path) -> Path:
    folder = checkpoints.step_folder(path, 1)
    weights = {"a": torch.zeros(3)}
    written = Whole(weights, {}, {}, checkpoints.TrainState(), {"step": 0}, recipe)
    write_whole(folder, written, word_tokenizer())
    return folder


def test_a_checkpoints_recipe_cannot_choose_where_is_written(tmp_path, capsys):
    cache = tmp_path / "precious"
    folder = checkpoint_of({"data": {"cache": str(cache)}}, tmp_path / "run")
    parser = cli.recipe_parser("", "")
    parser.add_argument("--checkpoint")

    def used(*more: str) -> str:
        arguments = ["--checkpoint", str(folder), *more]
        return cli.parse(parser, arguments, prepare=checkpoint_arguments)[0].data.cache

    assert used() == "~/.cache/modstruct"
    assert (
        f"data.cache = {cache} in the checkpoint's recipe is no cache here: ~/.cache/modstruct"
        in capsys.readouterr().out
    )
    cache.mkdir()
    (cache / "letters").mkdir()
    assert used() == "~/.cache/modstruct"
    assert used("--data.cache", str(cache)) == used(f"--data.cache={cache}") == str(cache)
    (cache / "indexes").mkdir()  # a run of this user's own made it
    assert used() == str(cache)
    fine_tuned = checkpoint_of({"task": {"name": "vqa"}, "data": {"cache": str(tmp_path / "other")}}, tmp_path / "vqa")
    words = checkpoint_arguments(["--checkpoint", str(fine_tuned)], fine_tuned=True)
    assert words[words.index("--data.cache") + 1] == "~/.cache/modstruct"


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        ({"data": {"scenes": {"test_samples": 10**9}}}, "data.scenes.test_samples"),
        ({"data": {"workers": 10_000}}, "data.workers"),
        ({"evaluation": {"batch": 10**9}}, "evaluation.batch"),
        ({"model": {"vision": {"image_size": 10**6}}}, "model.vision.image_size"),
    ],
)
def test_a_checkpoints_recipe_asks_for_no_more_than_is_usual(tmp_path, recipe, option, capsys):
    folder = checkpoint_of(recipe, tmp_path)
    parser = cli.recipe_parser("", "")
    parser.add_argument("--checkpoint")
    arguments = ["--checkpoint", str(folder)]
    with pytest.raises(SystemExit):
        cli.parse(parser, arguments, prepare=checkpoint_arguments)
    assert f"error: {option} = 10" in (said := capsys.readouterr().err)
    assert f"in a checkpoint's recipe, which others may have written; give --{option} yourself" in said
    assert cli.parse(parser, [*arguments, f"--{option}", "64"], prepare=checkpoint_arguments)


def test_a_model_far_larger_than_its_weights_is_not_built(tmp_path):
    """A terabyte's worth of layers, widths or positions, beside a file of three numbers."""
    weights = {"a": torch.zeros(3)}
    for part in ({"width": 1 << 21, "heads": 1}, {"layers": 1 << 30}):
        recipe = fusion_recipe(text=part) if "width" in part else fusion_recipe(vision=part | {"width": 64})
        with (
            pytest.raises(
                ValueError, match=r"--checkpoint = 'x': its recipe describes a model far larger than its 3 w"
            ),
            no_larger_than(weights, "--checkpoint", "x"),
        ):
            FusionModel(recipe, word_tokenizer(), build_objective(recipe.losses))
    with no_larger_than(weights, "--checkpoint", "x"):
        made = FusionModel(fusion_recipe(), word_tokenizer(), build_objective(fusion_recipe().losses))
    assert sum(parameter.numel() for parameter in made.parameters()) > 1000


def test_a_tokenizer_that_unpacks_to_gigabytes_is_refused(tmp_path):
    bomb = gzip.compress(bytes(1 << 25))
    with pytest.raises(ValueError, match=r"not CLIP's merges .*16 MiB unpacked"):
        ClipTokenizer(bomb, 8)
    clip_tokenizer().save(tmp_path)
    for length in (10**12, -1, True, "8", 2.5, None):
        description = json.loads((tmp_path / "tokenizer.json").read_text()) | {"context_length": length}
        (tmp_path / "tokenizer.json").write_text(json.dumps(description))
        with pytest.raises(ValueError, match="tokenizer"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["plain", "torch", "old torch"])
@pytest.mark.parametrize("ending", ["pth", "bin", "safetensors"])
def test_no_weight_file_of_a_fusion_model_runs_code(trap, tmp_path, kind, ending):
    sprung, kinds = trap
    file = tmp_path / f"weights.{ending}"
    file.write_bytes(kinds[kind])
    with pytest.raises(ValueError, match=r"fusion\.init = '.*weights\.\w+': cannot be read"):
        read_weight_file(file, "fusion.init")
    assert not sprung.exists()


@pytest.mark.parametrize("content", [{"a": 1}, [1, 2], {"model": {"a": torch.ones(1), "b": "text"}}])
def test_a_weight_file_that_holds_more_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"fusion\.init = .*: holds more than tensors by name"):
        read_weight_file(tmp_path / "weights.pth", "fusion.init")


ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e"


def test_what_others_wrote_commands_no_terminal(tmp_path, capsys, monkeypatch):
    """Keys of a recipe, state.json, and what is said of them, in errors, log lines and tables."""
    (tmp_path / "recipe.yaml").write_text(json.dumps({f"tr{ESCAPES}ain": 1, "output": ESCAPES}))
    with pytest.raises(SystemExit):
        cli.parse(cli.recipe_parser("", ""), ["--recipe", str(tmp_path / "recipe.yaml")])

    def fail() -> None:
        raise ValueError(f"state.json: {ESCAPES}")

    with pytest.raises(SystemExit):
        cli.run(fail)
    logger = logging.getLogger("modstruct.test")
    monkeypatch.setattr(logging.getLogger("modstruct"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("modstruct"), "propagate", False)
    logger.warning("data.train: sample left out: %s", ESCAPES)
    start_logging(tmp_path)
    logger.warning("key %s\nits second line \u732b", ESCAPES)
    print(table([Result("vqa", "test", {ESCAPES: share(0.5, label=f"accuracy {ESCAPES}")}, ESCAPES)]))
    out, err = capsys.readouterr()
    said = out + err + (tmp_path / "log.txt").read_text()
    assert said.count("title") >= 5
    assert "its second line \u732b" in said
    assert all(c.isprintable() or c in "\n\r" for c in said), [c for c in said if not c.isprintable()]
