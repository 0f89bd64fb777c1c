"""Measure models: quickly, or at scale with a report; modstruct/evaluation/commands has a file for each command."""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("full", "embed", "measure", "report", "task")
QUICK = "quick"


def main() -> None:
    words = sys.argv[1:]
    # The launcher puts a word of its own, --local_rank=N, in front.
    first = next((n for n, word in enumerate(words) if not word.startswith("--local_rank=")), len(words))
    command = words.pop(first) if words[first : first + 1] and words[first] in COMMANDS else QUICK
    importlib.import_module(f"modstruct.evaluation.commands.{command}").main(words)


if __name__ == "__main__":
    main()
