"""Labelled images in tar shards.

Converted sets have an image and a label a sample, KEY.webp (or png, jpg) and KEY.cls, as CLIP_benchmark converts them:

FOLDER/
  classnames.txt                          one a line, by label
  zeroshot_classification_templates.txt   one a line, {c} where the name goes (optional)
  test/  nshards.txt  0.tar  1.tar  …     and train/ where it was converted

Image-text shards have the label in the metadata, KEY.json: any such data with a class file, and the built-in scenes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from modstruct import distributed
from modstruct.config import DataConfig, Source
from modstruct.data.classification.class_files import ZeroShotClasses, some_of
from modstruct.data.classification.labelled_images import LabelledImages, SetFolder, ShardImages, hashed
from modstruct.data.classification.published import PAPER_TEMPLATE
from modstruct.data.faults import NAMED, BadSample
from modstruct.data.shards.evaluation_samples import EvaluationSample, EvaluationSamples, spaced
from modstruct.data.shards.index import ShardIndex, index_tar
from modstruct.data.shards.members import IMAGES, OTHER, Tally, printable
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.sample_table import Samples
from modstruct.data.shards.tar_headers import BLOCK_BYTES

NAMES, TEMPLATES, COUNT = "classnames.txt", "zeroshot_classification_templates.txt", "nshards.txt"
LABELLED_KINDS = dict.fromkeys(IMAGES, "image") | {"cls": "text"}
LABELLED = "a sample is KEY.webp (or png, jpg, jpeg) and KEY.cls, one after the other in the tar"
LONGEST_LABEL = 32  # bytes of a .cls
LABEL = "label"
"""Field of a labelled set's metadata that holds the number of the class."""
LABELS_CHECKED, MOST_FIELDS = 10_000, 20

log = logging.getLogger(__name__)


def read_class_shards(source: SetFolder) -> LabelledImages:
    """A split of a converted set. Samples without image or label are left out; a damaged shard is refused."""
    classes = source.lines(source.root / NAMES)
    if (source.root / TEMPLATES).is_file():
        templates = [template.replace("{c}", "{}") for template in source.lines(source.root / TEMPLATES)]
        if wrong := [template for template in templates if template.count("{}") != 1]:
            source.refuse(f"{source.root / TEMPLATES}: {wrong[0]!r} has no single {{c}}, where the name goes")
        source = replace(source, templates=(PAPER_TEMPLATE, *templates))
    folder = source.split_folder()
    shards = sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))  # 2.tar before 10.tar
    if not shards:
        source.refuse(f"there is no shard *.tar in {folder}")
    if (folder / COUNT).is_file() and source.lines(folder / COUNT) != [str(len(shards))]:
        stated = ", ".join(source.lines(folder / COUNT))
        source.refuse(f"{folder} has {len(shards)} shards, and its {COUNT} says {stated}")
    return read_labelled_shards(source, shards, classes)


def read_labelled_shards(source: SetFolder, shards: Sequence[Path], classes: Sequence[str]) -> LabelledImages:
    """The images of tars with a label beside each, from 0 to the number of classes less one."""
    places, labels, keys = [], [], list[str]()
    left_out, unused, examples = Counter[str](), Counter[str](), dict[str, list[str]]()
    for number, shard in enumerate(shards):
        of_shard: list[str] = []
        try:
            index = index_tar(shard, LABELLED_KINDS, "label", of_shard)
            written = _labels(shard, index)
        except OSError as error:
            source.refuse(f"{shard} cannot be read ({error.strerror or error})")
        if index.broken:
            source.refuse(f"{shard} is damaged or cut off: {index.broken}")
        left_out, unused = left_out + Counter(index.faults), unused + Counter(index.unused)
        examples = {cause: [f"{shard}: {name}" for name in names] for cause, names in index.examples.items()} | examples
        for key, label, row in zip(of_shard, written, index.rows.tolist(), strict=True):
            if not label.isdigit():
                left_out["malformed label"] += 1
                examples.setdefault("malformed label", [f"{shard}: {printable(key)}"])
                continue
            if int(label) >= len(classes):
                source.refuse(f"{shard}: the label {label} of {printable(key)} is none of the {len(classes)} classes")
            places.append((number, row[0] * BLOCK_BYTES, row[1]))
            labels.append(int(label))
            keys.append(key)
    if not places:
        source.refuse(f"no sample of {len(shards)} shards has image and label ({dict(left_out + unused)}); {LABELLED}")
    for cause, count in (left_out + unused).items():
        what = f"samples left out: {cause}" if cause in left_out else f"{cause} are not used"
        source.note(what, examples[cause], count)
    images = LabelledImages(source, ShardImages(shards, np.array(places), keys), np.array(labels), classes)
    images.left_out = dict(left_out)
    return images


def _labels(shard: Path, index: ShardIndex) -> list[str]:
    """What each .cls holds."""
    labels = []
    with open(shard, "rb", buffering=BLOCK_BYTES) as file:
        for block, size in index.rows[["text_block", "text_bytes"]].tolist():
            file.seek(block * BLOCK_BYTES)
            labels.append(file.read(min(size, LONGEST_LABEL + 1)).decode("ascii", "replace").strip())
    return labels


def check_labels(
    classes: ZeroShotClasses, samples: Samples, config: DataConfig, field: str, thorough: bool = True
) -> str | None:
    """Compare the labels of image-text shards with a class file before anything is embedded, reading KEY.json alone.

    Of a large source some 10,000 samples, evenly spaced, are read; thorough: ten times as many where none of them has a
    label. field: the recipe's field of the source, for messages. Returns None if a sample has a label, else what is
    wrong. Raises ValueError for labels that are not among the classes.
    """
    reader = ShardReader(samples, config)
    unknown, seen, fields = Tally(), set[str](), dict[str, None]()
    for limit in (LABELS_CHECKED, 10 * LABELS_CHECKED)[: 1 + thorough]:
        numbers = list(spaced(samples, limit))
        for sample, metadata in reader.each(reader.metadata, numbers):  # bad ones count where they are read with images
            label = classes.label_of(metadata)
            if label is None:
                fields |= dict.fromkeys(list(metadata)[:MOST_FIELDS])
            elif label in classes.classes:
                seen.add(label)
            else:
                unknown.add(repr(metadata[classes.label])[:LONGEST_LABEL], samples.place(sample))
        if seen or unknown.counts or len(numbers) == len(samples):
            break
    if unknown.counts:
        labels = [label for label, _ in unknown.counts.most_common() if label != OTHER][:NAMED]
        named = "; ".join(f"{label}: {unknown.examples[label][0]}" for label in labels)
        raise ValueError(
            f"{field}: of {len(numbers)} samples that were looked at, {unknown.counts.total()} have a label "
            f"{classes.label} that is not among the classes {some_of(classes.classes)} ({named}): {classes.remedy}"
        )
    if repeated := [name for name, times in Counter(classes.classes.values()).items() if times > 1]:
        log.warning("%s: no prompt tells classes of one name apart: %s", field, some_of(repeated, NAMED))
    every, absent = len(numbers) == len(samples), [label for label in classes.classes if label not in seen]
    if seen and absent and every:
        log.warning("%s: no sample is of these classes, which chance counts: %s", field, some_of(absent, NAMED))
    if seen:
        return None
    there = f"its fields are {some_of(map(printable, fields))}" if fields else "there is none, or an empty one"
    missing = f"none of {len(numbers)} samples of {field} has a label {classes.label!r} in its KEY.json ({there})"
    if not every:  # the others may have labels
        log.warning("%s; zero-shot classification is left out where the others have none either", missing)
    return missing if every else None


class LabelledSamples(LabelledImages):
    """Image-text shards whose label is in each sample's KEY.json; the captions stay.

    metadata has all fields of KEY.json, and "label" (class row, -1 where the file has none or null) and "key".
    """

    def __init__(self, name: str, shards: str, classes: ZeroShotClasses, config: DataConfig):
        """shards: path, glob or brace pattern. Raises ValueError as `open_samples` does."""
        self.name, self.config = name, config
        self.classes, self.templates = tuple(classes.classes.values()), classes.templates
        field, self._named = f"--sets {name}", classes
        self._samples = EvaluationSamples([Source(shards)], config, field, distributed.is_main())
        samples = self._samples.samples
        self.content = "" if classes.label == LABEL else samples.content
        """Fingerprint of the shards alone, whatever the classes; "" where a label takes the name of its own field."""
        self.left_out = dict(samples.left_out)
        self.fingerprint = hashed(samples.content, classes.label, list(classes.classes.items()))
        missing = check_labels(classes, samples, config, field) if distributed.is_main() else None
        if missing:
            raise ValueError(f"{shards}: {missing}: correct `label` of {classes.file}")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> EvaluationSample:
        """Raises BadSample, IndexError, and ValueError for a label that is none of the classes."""
        return self._named_by_class(self._samples[index])

    def read(self, indices: Sequence[int]) -> Iterator[EvaluationSample | BadSample]:
        """As EvaluationSamples.read; raises ValueError as __getitem__ does."""
        for sample in self._samples.read(indices):
            yield sample if isinstance(sample, BadSample) else self._named_by_class(sample)

    def _named_by_class(self, sample: EvaluationSample) -> EvaluationSample:
        return replace(sample, metadata=self.labelled(sample.metadata, sample.key), key="")

    def labelled(self, metadata: dict, key: str) -> dict:
        """A sample's metadata with its label. Raises ValueError for one that is none of the classes."""
        return metadata | {LABEL: int(self._named.rows_of([metadata])[0]), "key": key}
