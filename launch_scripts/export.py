"""Write a checkpoint's weights for other programs; modstruct/commands/export.py has the command."""

from __future__ import annotations

from modstruct.commands.export import main

if __name__ == "__main__":
    main()
