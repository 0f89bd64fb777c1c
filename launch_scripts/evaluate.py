"""Measure models: quickly, or at scale with a report; modstruct/commands has a file for each command."""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("full", "embed", "measure", "report", "task")
QUICK = "quick"


def main() -> None:
    # The launcher puts a word of its own in front, which torch.distributed has from the environment too.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    command = words.pop(0) if words and words[0] in COMMANDS else QUICK
    importlib.import_module(f"modstruct.commands.{command}").main(words)


if __name__ == "__main__":
    main()
