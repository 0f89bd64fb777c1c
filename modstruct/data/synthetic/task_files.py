"""The built-in downstream tasks, written once into the cache in the formats of published data sets.

    vqa/        v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json, answer_list.json,
                images/train2014/COCO_train2014_000000000001.jpg; validation is val2014, test is test2015
    nlvr2/      train.json, dev.json, test1.json, images/train/0/train-0-0-img0.png, dev/dev-0-0-img0.png, test1/
    snli_ve/    snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl, flickr30k-images/1000000000.jpg
    karpathy/   dataset_coco.json, images/train2014/, images/val2014/

modstruct.data.downstream reads them like the published ones. Images are JPEG files, also where NLVR2 names them .png,
as some of its own are. Unlike VQA's own, the test questions are annotated, so that they can be evaluated. Scenes belong
to their split of splits.py, so combinations of objects in validation and test occur neither in pretraining nor in
fine-tuning.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modstruct.config import ScenesConfig
from modstruct.data.downstream.vqa import build_answer_list, read_vqa
from modstruct.data.synthetic.captions import caption
from modstruct.data.synthetic.claims import STATEMENTS_PER_SET, statement_sets
from modstruct.data.synthetic.factors import Scene
from modstruct.data.synthetic.questions import (
    HYPOTHESES_PER_IMAGE,
    QUESTIONS_PER_IMAGE,
    SceneQuestion,
    captioned_scenes,
    scene_hypotheses,
    scene_questions,
)
from modstruct.data.synthetic.shards import GENERATOR_VERSION, as_jpeg, ensure_folder, require_drawable
from modstruct.data.synthetic.splits import SPLITS
from modstruct.errors import require

# Part of the folder's name: raise it when the same scenes would give other tasks.
TASKS_VERSION = 1
VQA_SUBSETS = {"train": "train2014", "validation": "val2014", "test": "test2015"}
NLVR2_NAMES = {"train": "train", "validation": "dev", "test": "test1"}
SNLI_VE_NAMES = {"train": "train", "validation": "dev", "test": "test"}
KARPATHY_NAMES = {"train": "train", "validation": "val", "test": "test"}
NLVR2_DIRECTORIES = 100
RESTVAL_EVERY = 4  # of COCO's training images in these splits, about a quarter are "restval"
FIRST_FLICKR_ID = 1_000_000_000

DrawImage = Callable[[Path, Scene], None]


@dataclass(frozen=True)
class SceneTaskSizes:
    """Items of each task; writing the default takes about 40 s."""

    train_questions: int = 12_000
    evaluation_questions: int = 1_000
    """Of validation and of test each, here and below."""
    train_statements: int = 8_000
    evaluation_statements: int = 1_000
    train_hypotheses: int = 9_000
    evaluation_hypotheses: int = 999
    train_captioned: int = 6_000
    """Images with two to five captions."""
    evaluation_captioned: int = 1_000

    def __post_init__(self):
        divisors = {
            "questions": QUESTIONS_PER_IMAGE,
            "statements": STATEMENTS_PER_SET,
            "hypotheses": HYPOTHESES_PER_IMAGE,
            "captioned": 1,
        }
        for name, value in vars(self).items():
            divisor = divisors[name.partition("_")[2]]
            require(
                value >= divisor and value % divisor == 0,
                f"scene_tasks.{name}",
                value,
                f"a multiple of {divisor} above 0",
            )

    def of(self, task: str, split: str) -> int:
        """Items of a task (questions, …) in a split (train, validation, test)."""
        return getattr(self, f"{'train' if split == 'train' else 'evaluation'}_{task}")


# The arguments of the readers in modstruct.data.downstream, but for Karpathy's split (train, val, test).
@dataclass(frozen=True)
class VqaPaths:
    questions: str
    images: str
    annotations: str


@dataclass(frozen=True)
class Nlvr2Paths:
    statements: str
    images: str


@dataclass(frozen=True)
class SnliVePaths:
    hypotheses: str
    images: str


@dataclass(frozen=True)
class KarpathyPaths:
    captions: str
    images: str


@dataclass(frozen=True)
class SceneTaskPaths:
    """Where the built-in tasks lie; the keys are train, validation and test."""

    vqa: dict[str, VqaPaths]
    answer_list: str
    nlvr2: dict[str, Nlvr2Paths]
    snli_ve: dict[str, SnliVePaths]
    karpathy: KarpathyPaths


def scene_tasks_folder(config: ScenesConfig, cache: Path, image_size: int, sizes: SceneTaskSizes) -> Path:
    """The folder of these tasks; its name holds a hash of everything that determines them."""
    versions = {"version": TASKS_VERSION, "scenes_version": GENERATOR_VERSION}
    decisive = json.dumps(versions | {"image_size": image_size, "seed": config.seed} | asdict(sizes), sort_keys=True)
    return cache / f"scene-tasks-{image_size}px-{hashlib.sha256(decisive.encode()).hexdigest()[:12]}"


def ensure_scene_tasks(
    config: ScenesConfig, cache: Path | str, image_size: int, sizes: SceneTaskSizes | None = None
) -> SceneTaskPaths:
    """Paths of the built-in tasks, which are drawn and written first if the cache does not hold them (about 40 s).

    config: only its seed counts. image_size: side of the images in pixels. sizes: None for the default. The folder is
    complete or absent, as with `ensure_scenes`. Raises ValueError, naming data.cache, if the cache cannot be written or
    its disk is full.
    """
    require_drawable(image_size)
    sizes = sizes or SceneTaskSizes()
    root = scene_tasks_folder(config, Path(cache).expanduser().absolute(), image_size, sizes)
    what = "the scenes of the downstream tasks"
    ensure_folder(root, lambda part: write_scene_tasks(part, config.seed, sizes, image_size), what)
    vqa, nlvr2, snli_ve = {}, {}, {}
    for split in SPLITS:
        questions, annotations = vqa_files(root, split)
        vqa[split] = VqaPaths(str(questions), str(root / "vqa" / "images"), str(annotations))
        nlvr2[split] = Nlvr2Paths(*map(str, nlvr2_files(root, split)))
        snli_ve[split] = SnliVePaths(*map(str, snli_ve_files(root, split)))
    karpathy = KarpathyPaths(str(root / "karpathy" / "dataset_coco.json"), str(root / "karpathy" / "images"))
    return SceneTaskPaths(vqa, str(root / "vqa" / "answer_list.json"), nlvr2, snli_ve, karpathy)


def vqa_files(root: Path, split: str) -> tuple[Path, Path]:
    """Questions and annotations of a split."""
    subset = VQA_SUBSETS[split]
    folder = root / "vqa"
    return folder / f"v2_OpenEnded_mscoco_{subset}_questions.json", folder / f"v2_mscoco_{subset}_annotations.json"


def nlvr2_files(root: Path, split: str) -> tuple[Path, Path]:
    """Statements and folder of images of a split."""
    name = NLVR2_NAMES[split]
    return root / "nlvr2" / f"{name}.json", root / "nlvr2" / ("images/train" if split == "train" else name)


def snli_ve_files(root: Path, split: str) -> tuple[Path, Path]:
    """Hypotheses and folder of images of a split."""
    return root / "snli_ve" / f"snli_ve_{SNLI_VE_NAMES[split]}.jsonl", root / "snli_ve" / "flickr30k-images"


def write_scene_tasks(root: Path, seed: int, sizes: SceneTaskSizes, image_size: int) -> None:
    """Write all tasks into an empty folder, and wait until they are on the disk.

    Raises OSError when the disk is full or cannot be written.
    """
    from tqdm import tqdm

    with tqdm(unit=" images", dynamic_ncols=True) as progress:

        def draw_image(path: Path, scene: Scene) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(as_jpeg(scene, image_size))
            progress.update()

        for task, write in {
            "questions": _write_vqa,
            "statements": _write_nlvr2,
            "hypotheses": _write_snli_ve,
            "captions": _write_karpathy,
        }.items():
            progress.set_description(f"drawing scenes, {task}")
            write(root, seed, sizes, draw_image)
    os.sync()  # once for all: syncing each of 30,000 small files would take minutes


def _write_vqa(root: Path, seed: int, sizes: SceneTaskSizes, draw_image: DrawImage) -> None:
    image_id = 0
    for split, subset in VQA_SUBSETS.items():
        questions, annotations = [], []
        for scene, asked in scene_questions(seed, split, sizes.of("questions", split)):
            image_id += 1
            draw_image(root / "vqa" / "images" / subset / f"COCO_{subset}_{image_id:012d}.jpg", scene)
            for number, question in enumerate(asked):
                # As in VQA v2, a question's id is its image's with three digits more.
                ids = {"image_id": image_id, "question_id": image_id * 1000 + number}
                questions.append(ids | {"question": question.question})
                annotations.append(ids | _annotation(question))
        about = {
            "info": {"description": "Built-in scenes in the format of VQA v2", "version": "2.0"},
            "data_type": "mscoco",
            "data_subtype": subset,
            "license": {"name": "", "url": ""},
        }
        questions_file, annotations_file = vqa_files(root, split)
        _write_json(questions_file, about | {"task_type": "Open-Ended", "questions": questions})
        _write_json(annotations_file, about | {"annotations": annotations})
    questions_file, annotations_file = vqa_files(root, "train")
    training = read_vqa(questions_file, root / "vqa" / "images", annotations_file).entries
    _write_json(root / "vqa" / "answer_list.json", build_answer_list(training))


def _annotation(question: SceneQuestion) -> dict[str, Any]:
    return {
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        "multiple_choice_answer": max(sorted(set(question.answers)), key=question.answers.count),
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number}
            for number, answer in enumerate(question.answers, start=1)
        ],
    }


def _write_nlvr2(root: Path, seed: int, sizes: SceneTaskSizes, draw_image: DrawImage) -> None:
    for split, name in NLVR2_NAMES.items():
        statements, images = nlvr2_files(root, split)
        lines = []
        for number, group in enumerate(statement_sets(seed, split, sizes.of("statements", split))):
            folder, directory = images, {}
            if split == "train":
                directory = {"directory": number % NLVR2_DIRECTORIES}
                folder = images / str(directory["directory"])
            for pair, sides in enumerate(group.pairs):
                for side, scene in enumerate(sides):
                    draw_image(folder / f"{name}-{number}-{pair}-img{side}.png", scene)
                for sentence, text in enumerate(group.sentences):
                    identifier = f"{name}-{number}-{pair}-{sentence}"
                    label = str(group.label(pair, sentence))
                    lines.append({"sentence": text, "label": label, "identifier": identifier} | directory)
        _write_lines(statements, lines)


def _write_snli_ve(root: Path, seed: int, sizes: SceneTaskSizes, draw_image: DrawImage) -> None:
    image_id = FIRST_FLICKR_ID
    for split in SPLITS:
        hypotheses, images = snli_ve_files(root, split)
        lines = []
        for scene, said in scene_hypotheses(seed, split, sizes.of("hypotheses", split)):
            draw_image(images / f"{image_id}.jpg", scene)
            premise = caption(scene)
            for hypothesis in said:
                lines.append(
                    {
                        "annotator_labels": [hypothesis.label],
                        "captionID": f"{image_id}.jpg#0",
                        "gold_label": hypothesis.label,
                        # SNLI's pair ids end with the first letter of the label that the writer was asked for.
                        "pairID": f"{image_id}.jpg#0r1{hypothesis.label[0]}",
                        "sentence1": premise,
                        "sentence2": hypothesis.text,
                        "Flickr30K_ID": str(image_id),
                    }
                )
            image_id += 1
        _write_lines(hypotheses, lines)


def _write_karpathy(root: Path, seed: int, sizes: SceneTaskSizes, draw_image: DrawImage) -> None:
    images: list[dict[str, Any]] = []
    sentence_id = 0
    for split, name in KARPATHY_NAMES.items():
        for number, (scene, texts) in enumerate(captioned_scenes(seed, split, sizes.of("captioned", split))):
            image_id = len(images)
            rest = split == "train" and number % RESTVAL_EVERY == RESTVAL_EVERY - 1
            folder = "train2014" if split == "train" and not rest else "val2014"
            filename = f"COCO_{folder}_{image_id:012d}.jpg"
            draw_image(root / "karpathy" / "images" / folder / filename, scene)
            sentence_ids = list(range(sentence_id, sentence_id + len(texts)))
            sentence_id += len(texts)
            images.append(
                {
                    "filepath": folder,
                    "sentids": sentence_ids,
                    "filename": filename,
                    "imgid": image_id,
                    "split": "restval" if rest else name,
                    "sentences": [
                        {
                            "tokens": text.replace(",", "").replace(":", "").split(),
                            "raw": text,
                            "imgid": image_id,
                            "sentid": k,
                        }
                        for k, text in zip(sentence_ids, texts, strict=True)
                    ],
                    "cocoid": image_id,
                }
            )
    _write_json(root / "karpathy" / "dataset_coco.json", {"images": images, "dataset": "coco"})


def _write_json(path: Path, content: object) -> None:
    path.write_bytes(json.dumps(content).encode())


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode())
