"""Shards of image-text pairs whose metadata holds a label: any such data with a class file, and the built-in scenes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from modstruct.config import DataConfig, Source
from modstruct.data.classification.class_files import ZeroShotClasses, load_classes
from modstruct.data.classification.labelled_images import hashed
from modstruct.data.classification.set_folder import SetFolder
from modstruct.data.shards.evaluation_samples import EvaluationSample
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import open_samples
from modstruct.data.synthetic.splits import SPLITS
from modstruct.data.transforms.decoding import decode_image

SCENES_LABELS = {"colour": "zero_shot.yaml", "shape": "zero_shot_shape.yaml"}


class LabelledSamples:
    """The LabelledImages of image-text shards: the label stands in each sample's KEY.json, and the captions stay.

    metadata has all that KEY.json has, "label" (class row, -1 where the file has none or null) and "key" beside it.
    """

    def __init__(self, name: str, split: str, shards: str, classes: ZeroShotClasses, config: DataConfig):
        """shards: path, glob or brace pattern. Raises ValueError as `open_samples` does."""
        self.name, self.split, self.config = name, split, config
        self.classes, self.templates = tuple(classes.classes.values()), classes.templates
        self.samples = open_samples([Source(shards)], config, name)
        self.left_out = dict(sum((Counter(shard["faults"]) for shard in self.samples.shard_faults), Counter()))
        self.fingerprint = hashed(self.samples.fingerprint, classes.label, list(classes.classes.items()))
        self._named, self._reader = classes, ShardReader(self.samples, config)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EvaluationSample:
        """Raises BadSample, IndexError, and ValueError for a label that is none of the classes."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} of {self.name}")
        raw = self._reader.read(index)
        metadata = raw.metadata | {"label": self._named.row_of(raw.metadata), "key": raw.key}
        return EvaluationSample(
            decode_image(raw.image, self.config.max_image_pixels, raw.where), raw.captions, metadata
        )


def open_scenes(name: str, place: SetFolder, split: str, label: str, config: DataConfig) -> LabelledSamples:
    """A split of the built-in images, in the folder that `ensure_scenes` fills, by colour or by shape."""
    file = place.root / SCENES_LABELS[label]
    if not file.is_file():
        place.refuse(f"there is no {file.name} in it")
    shards = sorted(place.root.glob(f"{split}-*.tar"))
    if split not in SPLITS or not shards:
        place.refuse(f"there is no shard {split}-*.tar in it")
    return LabelledSamples(name, split, str(place.root / f"{split}-*.tar"), load_classes(file), config)


def open_with_class_file(file: Path, shards: str, config: DataConfig) -> LabelledSamples:
    """Image-text shards with a class file (`label`, `templates`, `classes`), called by the file's name."""
    return LabelledSamples(file.stem, "test", shards, load_classes(file), config)
