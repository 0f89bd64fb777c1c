"""Files that torchvision compares with published MD5 sums: no others are opened, least of all a pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import published_layouts as layouts
import pytest

from modstruct.config import DataConfig
from modstruct.data.classification.published import published_sets
from modstruct.data.classification.registry import open_labelled


class Runs:
    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("file", ["test_batch", "data_batch_3", "batches.meta"])
def test_a_pickle_that_is_not_the_published_one_is_not_read(tmp_path, monkeypatch, file):
    root, made = layouts.cifar10(tmp_path / "set"), tmp_path / "made"
    layouts.put(root / "cifar-10-batches-py" / file, pickle.dumps({"data": Runs(made)}))
    with pytest.raises(ValueError, match=r"cifar10@.*/batches.meta is not the published file: its MD5 is another; dow"):
        open_labelled(f"cifar10@{root}", DataConfig(workers=0))
    assert not made.exists()
    # It would have run: with the comparison taken away, it does.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    with pytest.raises(ValueError, match="cifar10@"):
        open_labelled(f"cifar10:{'test' if file == 'test_batch' else 'train'}@{root}", DataConfig(workers=0))
    assert made.exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "stl10", "svhn"])
def test_the_first_file_that_is_not_the_published_one_is_named(tmp_path, name):
    root = getattr(layouts, name)(tmp_path)
    split = published_sets()[name].splits["test"]
    first = split[2] if name == "flowers102" else split[1]
    with pytest.raises(ValueError, match=rf"/{first} is not the published file: its MD5 is another; ") as refusal:
        open_labelled(f"{name}@{root}", DataConfig(workers=0))
    assert "download=True" not in str(refusal.value)
