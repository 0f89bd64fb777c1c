"""Which of a task's images are there: each folder is listed once, no image is looked up by itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from modstruct.errors import refuse

NAMES_SHOWN = 3


@dataclass
class ImageFolders:
    """The folder of a task's images and its subfolders."""

    root: Path
    option: str
    """The recipe's field that named the folder, for errors."""
    remedy: str
    """Where to get the images."""
    leave_out_missing: bool = False
    """An image that is not there is left out instead of refused."""
    asked: set[Path] = field(default_factory=set)
    """Images asked for."""
    missing: dict[Path, None] = field(default_factory=dict)
    """Images asked for that are not there, in order."""
    _subfolders: dict[str, Path] = field(default_factory=dict)
    _listings: dict[Path, frozenset[str]] = field(default_factory=dict)

    def __post_init__(self):
        self.root = Path(self.root).expanduser()
        if not self.root.is_dir():
            refuse(self.option, str(self.root), f"there is no such folder; {self.remedy}")

    def subfolder(self, name: str) -> Path:
        """`root/name` if that is a folder, else root itself: images unpacked without their folder are found too."""
        if name not in self._subfolders:
            there = name in self._listing(self.root) and (self.root / name).is_dir()
            self._subfolders[name] = self.root / name if there else self.root
        return self._subfolders[name]

    def has(self, picture: Path) -> bool:
        """Whether an image is there; if not, it is noted for `refuse_missing`."""
        self.asked.add(picture)
        there = picture.name in self._listing(picture.parent)
        if not there:
            self.missing[picture] = None
        return there

    def refuse_missing(self) -> None:
        """Raise ValueError if an image was missing and may not be left out, with the number and the first names."""
        if not self.asked:
            return
        first = ", ".join(str(path.relative_to(self.root)) for path in list(self.missing)[:NAMES_SHOWN])
        counts = f"{len(self.missing):,} of {len(self.asked):,} images are not there, the first {first}"
        if len(self.missing) == len(self.asked):
            refuse(self.option, str(self.root), f"{counts}; {self.remedy}")
        if self.missing and not self.leave_out_missing:
            waiver = f"{self.option.partition('.')[0]}.leave_out_missing"  # one field for all splits
            refuse(self.option, str(self.root), f"{counts}; {self.remedy}, or go without them by {waiver}")

    def _listing(self, folder: Path) -> frozenset[str]:
        if folder not in self._listings:
            self._listings[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        return self._listings[folder]
