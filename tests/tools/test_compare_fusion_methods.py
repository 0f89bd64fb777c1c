"""tools/experiments/compare_fusion_methods.py with a launcher that only notes its commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "experiments" / "compare_fusion_methods.py"
LAUNCHER = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
output = Path(words[words.index("--output") + 1])
with open(output.parents[1] / "asked.txt", "a") as file:
    print(Path(words[0]).name, words[words.index("--recipe") + 1], *words[words.index("--recipe") + 2 :], file=file)
if output.name == "snli_ve" and not (output.parents[1] / "mended").exists():
    sys.exit(3)
metrics = {"accuracy": {"value": 0.5, "chance": 0.25}, "consistency": {"value": 0.1}}
(output / "metrics.json").write_text(json.dumps({"schema": 3, "results": {output.name: {"values": metrics}}}))
"""


def compare(folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / "launcher.py").write_text(LAUNCHER)
    command = [
        sys.executable,
        str(TOOL),
        "--out",
        str(folder),
        "--launcher",
        sys.executable,
        str(folder / "launcher.py"),
    ]
    return subprocess.run([*command, *words], capture_output=True, text=True, check=False)


def test_runs_follow_each_other_and_finished_ones_are_not_repeated(tmp_path):
    words = ["--methods", "albef", "--tasks", "nlvr2", "snli_ve"]
    broken = compare(tmp_path, *words)
    assert broken.returncode == 1
    assert "status 3" in broken.stderr
    (tmp_path / "mended").touch()
    assert compare(tmp_path, *words).returncode == 0
    start, assigned = tmp_path / "albef" / "pretraining", tmp_path / "albef" / "text_assignment"
    assert (tmp_path / "asked.txt").read_text().splitlines() == [
        "pretrain.py albef_scenes --method albef",
        f"finetune.py text_assignment --init {start}",
        f"finetune.py nlvr2 --init {assigned}",
        f"finetune.py snli_ve --init {start}",
        f"finetune.py snli_ve --init {start}",
    ]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| method | pre-training, min | nlvr2: accuracy | nlvr2: consistency | snli_ve: accuracy |"
    assert lines[2] == "| prior |  | 25.00 |  | 25.00 |"
    assert lines[3].startswith("| albef | 0.0 | 50.00 (")
    assert json.loads((tmp_path / "table.json").read_text())["albef"]["snli_ve"]["metrics"]["accuracy"]["value"] == 0.5
