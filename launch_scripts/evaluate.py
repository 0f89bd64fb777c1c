"""Measure models: quickly, or at scale with a report; modstruct/commands has a file for each command."""

from __future__ import annotations

import importlib
import sys

from modstruct import stopping

COMMANDS = ("full", "embed", "measure", "report", "task")
QUICK = "quick"


def main() -> None:
    # The launcher puts a word of its own in front, which torch.distributed has from the environment too.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]
    named = bool(words) and not words[0].startswith("-")
    if named and words[0] not in COMMANDS:
        if stopping.is_first_process():
            print(f"error: {words[0]!r} is no command; give {', '.join(COMMANDS)} or --checkpoint", file=sys.stderr)
        sys.exit(2)
    command = words.pop(0) if named else QUICK
    importlib.import_module(f"modstruct.commands.{command}").main(words)


if __name__ == "__main__":
    stopping.listen()
    main()
