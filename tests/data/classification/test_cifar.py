"""CIFAR in both published forms gives the same set, and nothing in its pickles is run."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import published_layouts as layouts
import pytest
import torchvision.datasets as peers

from modstruct.config import DataConfig
from modstruct.data.classification.registry import open_labelled

CONFIG = DataConfig(workers=0)
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HUNDRED = ["apple", "aquarium_fish", *(f"thing_{number}" for number in range(2, 100))]
BATCHES = {**{f"data_batch_{n}": [n % 10, 9] for n in range(1, 6)}, "test_batch": [3, 0, 7]}


def cifar10_pickles(root):
    for number, (name, labels) in enumerate(BATCHES.items()):
        content = {"data": layouts.cifar_rows(len(labels), number), "labels": labels, "batch_label": [name]}
        layouts.put(root / f"cifar-10-batches-py/{name}", layouts.python2_batch(content))
    layouts.put(root / "cifar-10-batches-py/batches.meta", layouts.python2_batch({"label_names": TEN}))
    return root


def cifar10_binary(root):
    for number, (name, labels) in enumerate(BATCHES.items()):
        rows = np.concatenate([np.array(labels, np.uint8)[:, None], layouts.cifar_rows(len(labels), number)], axis=1)
        layouts.put(root / f"cifar-10-batches-bin/{name}.bin", rows.tobytes())
    layouts.put(root / "cifar-10-batches-bin/batches.meta.txt", "\n".join(TEN) + "\n\n")
    return root


def cifar100_pickles(root):
    for number, (split, labels) in enumerate({"train": [99, 1], "test": [0, 50, 1]}.items()):
        content = {"data": layouts.cifar_rows(len(labels), number), "fine_labels": labels, "coarse_labels": [7] * 3}
        layouts.put(root / f"cifar-100-python/{split}", layouts.python2_batch(content))
    layouts.put(root / "cifar-100-python/meta", layouts.python2_batch({"fine_label_names": HUNDRED}))
    return root


def cifar100_binary(root):
    for number, (split, labels) in enumerate({"train": [99, 1], "test": [0, 50, 1]}.items()):
        both = np.stack([np.full(len(labels), 7), labels], axis=1).astype(np.uint8)
        rows = np.concatenate([both, layouts.cifar_rows(len(labels), number)], axis=1)
        layouts.put(root / f"cifar-100-binary/{split}.bin", rows.tobytes())
    layouts.put(root / "cifar-100-binary/fine_label_names.txt", "\n".join(HUNDRED) + "\n")
    return root


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("name", "pickles", "binary", "peer"),
    [
        ("cifar10", cifar10_pickles, cifar10_binary, peers.CIFAR10),
        ("cifar100", cifar100_pickles, cifar100_binary, peers.CIFAR100),
    ],
    ids=["cifar10", "cifar100"],
)
def test_both_forms_agree_with_torchvision(tmp_path, monkeypatch, name, pickles, binary, peer, split):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    theirs = peer(pickles(tmp_path / "pickles"), train=split == "train")
    forms = [
        open_labelled(f"{name}:{split}@{tmp_path / 'pickles'}", CONFIG),
        open_labelled(f"{name}:{split}@{binary(tmp_path / 'binary')}", CONFIG),
    ]
    for ours in forms:
        assert len(ours) == len(theirs)
        for number, (image, label) in enumerate(theirs):
            assert np.array_equal(np.asarray(ours[number].image), np.asarray(image))
            assert ours[number].metadata == {"label": label, "key": f"{split}/{number:06d}"}
        assert ours.classes == tuple(name.replace("_", " ") for name in theirs.classes)
    assert forms[0].fingerprint == forms[1].fingerprint


@pytest.mark.parametrize("protocol", range(2, 5))
def test_a_pickle_of_python_3_is_read_too(tmp_path, protocol):
    root = cifar10_pickles(tmp_path)
    rows = layouts.cifar_rows(3, 5)
    layouts.put(
        root / "cifar-10-batches-py/test_batch", pickle.dumps({b"data": rows, b"labels": [1, 2, 3]}, protocol=protocol)
    )
    images = open_labelled(f"cifar10@{root}", CONFIG)
    assert images.labels.tolist() == [1, 2, 3]
    assert np.array_equal(np.asarray(images[2].image), rows[2].reshape(3, 32, 32).transpose(1, 2, 0))


def test_names_in_pythons_oldest_form_are_read_too(tmp_path):
    root = cifar10_pickles(tmp_path)
    names = "".join(f"S'{name}'\np{number}\na" for number, name in enumerate(TEN, 4))
    old = f"(dp1\nS'num_cases_per_batch'\np2\nI10000\nsS'label_names'\np3\n(lp99\n{names}s."
    layouts.put(root / "cifar-10-batches-py/batches.meta", old)
    assert open_labelled(f"cifar10@{root}", CONFIG).classes == tuple(TEN)


class _Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, exec, np.load], ids=["mkdir", "exec", "numpy.load"])
def test_nothing_in_a_pickle_is_run(tmp_path, function):
    root, made = cifar10_pickles(tmp_path), tmp_path / "made"
    argument = f"import os; os.mkdir({str(made)!r})" if function is exec else str(made)
    layouts.put(root / "cifar-10-batches-py/test_batch", pickle.dumps({"data": _Calls(function, argument)}))
    with pytest.raises(ValueError, match=r"test_batch is no pickle of plain values and arrays of bytes .*it calls"):
        open_labelled(f"cifar10@{root}", CONFIG)
    assert not made.exists()


def _with_persistent_id() -> bytes:
    content = io.BytesIO()
    pickler = pickle.Pickler(content)
    pickler.persistent_id = lambda value: "elsewhere" if value == "x" else None
    pickler.dump({"data": "x"})
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no pickle"),
        (_with_persistent_id(), "it has the instruction BINPERSID"),
        (pickle.dumps([1, 2]), "holds no dictionary"),
        # 100 pairs of pairs of …, whose hash would take 2^100 steps
        (b"\x80\x02})" + b"q\x01h\x01\x86" * 100 + b"K\x01s.", "a key is neither text nor number"),
        (layouts.python2_batch({"data": [1, 2], "labels": [1, 2]}), r"no array of bytes \(images, 3072\)"),
        (layouts.python2_batch({"data": np.zeros((1, 3), np.uint8), "labels": [1]}), r"no array of bytes"),
        (layouts.python2_batch({"data": layouts.cifar_rows(2, 0), "labels": [1]}), "no list of 2 labels"),
        (layouts.python2_batch({"data": layouts.cifar_rows(1, 0), "labels": [-1]}), "no list of 1 labels"),
        (layouts.python2_batch({"data": layouts.cifar_rows(1, 0), "labels": [10]}), "outside the 10 classes"),
        (layouts.python2_batch({"data": layouts.cifar_rows(1, 0)})[:-700], "no pickle"),
        (
            layouts.python2_batch({"data": layouts.cifar_rows(1, 0), "labels": [1]}).replace(b"u1", b"O8"),
            "no array of bytes",
        ),
    ],
)
def test_a_damaged_pickle_is_named(tmp_path, content, message):
    root = cifar10_pickles(tmp_path)
    layouts.put(root / "cifar-10-batches-py/test_batch", content)
    with pytest.raises(ValueError, match=message) as refusal:
        open_labelled(f"cifar10@{root}", CONFIG)
    assert "test_batch" in str(refusal.value)
    assert "download CIFAR-10" in str(refusal.value)


def test_a_cut_or_missing_binary_file_is_named(tmp_path):
    root = cifar10_binary(tmp_path)
    file = root / "cifar-10-batches-bin/test_batch.bin"
    layouts.put(file, file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"test_batch.bin has 9218 bytes, no multiple of the 3073 of an image"):
        open_labelled(f"cifar10@{root}", CONFIG)
    file.unlink()
    with pytest.raises(ValueError, match=r"there is no file .*test_batch.bin"):
        open_labelled(f"cifar10@{root}", CONFIG)
    with pytest.raises(ValueError, match=r"cifar100@.*there is no fine_label_names.txt in it, nor in cifar-100-binary"):
        open_labelled(f"cifar100@{root}", CONFIG)
