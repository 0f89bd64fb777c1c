"""Commands in README and docs have options that exist, files that they name are there, and links lead somewhere.

A block behind the line `<!-- runs -->`, which no reader sees, is carried out as it stands.
"""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import modstruct.cli
import modstruct.commands.env

COMMANDS = [  # imported before `run` is replaced, which they have by name
    importlib.import_module(f"modstruct.commands.{name}")
    for name in ("full", "embed", "measure", "report", "task", "quick", "export")
]
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = ROOT / "tests" / "checkpoints" / "written_by_0.1.0"
RUNS = {"two_tower": ["scenes", "emoji", "clip_inmodal"], "fusion": ["albef_scenes", "text_assignment"]}
RUNS |= {"snli_ve": ["vqa", "snli_ve"]}
TOOLS = ("make_shards", "index_shards", "inspect_shards", "train_tokenizer")


def commands(page: Path) -> list[list[str]]:
    """Words after the launcher of every command that starts a script of ours, in fenced blocks."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = "\n".join(text for kind, text in fenced if kind in ("", "bash")).replace("\\\n", " ").splitlines()
    starts = [part for line in lines for part in line.split(" && ") if re.match(r"python |deepspeed |torchrun ", part)]
    found = [shlex.split(part, comments=True) for part in starts]
    scripts = [(n, words) for words in found for n, word in enumerate(words) if re.fullmatch(r"[\w/.]+\.(py|sh)", word)]
    return [words[n:] for n, words in scripts if "…" not in words]


ALL = [pytest.param(words, id=f"{page.stem}: {' '.join(words)[:70]}") for page in PAGES for words in commands(page)]


@pytest.fixture
def where_runs_are(tmp_path, monkeypatch):
    """A folder with the runs that the pages speak of."""
    for kind, names in RUNS.items():
        for name in names:
            shutil.copytree(WRITTEN / kind, tmp_path / "runs" / name)
    for script in ("launch_scripts", "tools", "ds_configs", "docs"):
        (tmp_path / script).symlink_to(ROOT / script)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("words", ALL)
def test_every_command_is_understood(words, where_runs_are, monkeypatch):
    script, *options = words
    assert (ROOT / script).is_file(), f"{script} is not there"
    name = Path(script).stem

    def parsed(*_, **__):
        raise Parsed

    monkeypatch.setattr(modstruct.cli, "run", parsed)
    monkeypatch.setattr(modstruct.cli, "run_tool", parsed)
    monkeypatch.setattr(sys, "argv", [script, *options])
    if not ((script.startswith("launch_scripts/") and script.endswith(".py")) or name in TOOLS):
        return  # benchmarks, experiments and templates: that they are there is all that is seen here
    for command in COMMANDS:
        monkeypatch.setattr(command, "run", parsed)
    with pytest.raises((Parsed, SystemExit)) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert getattr(ended.value, "code", 0) in (0, None)  # --help and --print_config end so; a wrong option by 2


RUNNABLE = [
    pytest.param(block, id=f"{page.stem}: {block[:60]}")
    for page in PAGES
    for block in re.findall(r"^<!-- runs -->\n```bash\n(.*?)^```", page.read_text(), re.M | re.S)
]


@pytest.fixture
def where_data_are(where_runs_are):
    """The evaluations and tables that the pages speak of, too."""
    for name in ("scenes", "clip_inmodal"):
        shutil.copytree(ROOT / "tests/commands/written_by_0.1.0/evaluation", where_runs_are / "evaluations" / name)
    Image.new("RGB", (40, 30), "red").save(where_runs_are / "red.png")
    for table in ("train.csv", "test.csv"):
        (where_runs_are / table).write_text("file,title\nred.png,all red\n")


@pytest.mark.parametrize("block", RUNNABLE)
def test_what_is_marked_runs(block, where_data_are, monkeypatch, capsys):
    """In this process, which has imported nearly all that they need."""
    for line in block.replace("\\\n", " ").splitlines():
        launcher, script, *options = shlex.split(line, comments=True)
        monkeypatch.setattr(sys, "argv", [script, *options] if launcher == "python" else [launcher, script, *options])
        try:
            if launcher == "modstruct":
                modstruct.commands.env.main()
            else:
                monkeypatch.syspath_prepend(str(Path(script).resolve().parent))  # as Python has it
                runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{line}\n{capsys.readouterr().err}") from ended
        assert capsys.readouterr().out.strip()


def test_some_blocks_are_marked():
    assert len(RUNNABLE) >= 5
    named = " ".join(page.read_text() for page in PAGES)
    assert named.count("<!-- runs -->") == len(RUNNABLE)  # none before another kind of block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_page(page):
    linked = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in linked if not (page.parent / link).is_file()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_is_there(page):
    named = re.findall(
        r"`((?:modstruct|tools|launch_scripts|ds_configs|tests|csrc|docs)/[\w/.-]+\.\w+)`", page.read_text()
    )
    assert not [path for path in named if "NAME" not in path and not (ROOT / path).exists()]
