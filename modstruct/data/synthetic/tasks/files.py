"""The built-in tasks as files, named and laid out like the data sets that they stand for.

    vqa/        v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json, answer_list.json,
                images/train2014/COCO_train2014_000000000001.jpg; validation is val2014, test is test2015
    nlvr2/      train.json, dev.json, test1.json, images/train/0/train-0-0-img0.png, dev/dev-0-0-img0.png, test1/
    snli_ve/    snli_ve_train.jsonl, snli_ve_dev.jsonl, snli_ve_test.jsonl, flickr30k-images/1000000000.jpg
    karpathy/   dataset_coco.json, images/train2014/, images/val2014/

Images are JPEG files, also where NLVR2 names them .png, as some of its own are. Unlike VQA's own, the test
questions are annotated, so that they can be measured here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from modstruct.data.downstream.vqa import build_answer_list, read_vqa
from modstruct.data.synthetic.captions import caption
from modstruct.data.synthetic.factors import Scene
from modstruct.data.synthetic.shards import as_jpeg
from modstruct.data.synthetic.splits import SPLITS
from modstruct.data.synthetic.tasks.captioned import captioned_scenes
from modstruct.data.synthetic.tasks.hypotheses import scene_hypotheses
from modstruct.data.synthetic.tasks.questions import SceneQuestion, scene_questions
from modstruct.data.synthetic.tasks.sizes import SceneTaskSizes
from modstruct.data.synthetic.tasks.statements import statement_sets

VQA_SUBSETS = {"train": "train2014", "validation": "val2014", "test": "test2015"}
NLVR2_NAMES = {"train": "train", "validation": "dev", "test": "test1"}
SNLI_VE_NAMES = {"train": "train", "validation": "dev", "test": "test"}
KARPATHY_NAMES = {"train": "train", "validation": "val", "test": "test"}
NLVR2_DIRECTORIES = 100
RESTVAL_EVERY = 4  # of COCO's training images in these splits, about a quarter are "restval"
FIRST_FLICKR_ID = 1_000_000_000

DrawImage = Callable[[Path, Scene], None]


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

    with tqdm(unit=" pictures", dynamic_ncols=True) as progress:

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
    os.sync()  # one for all: to wait for each of 30,000 small files would take minutes


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
    asked = read_vqa(questions_file, root / "vqa" / "images", annotations_file).entries
    _write_json(root / "vqa" / "answer_list.json", build_answer_list(asked))


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
    pictures, sentence_id = [], 0
    for split, name in KARPATHY_NAMES.items():
        for number, (scene, texts) in enumerate(captioned_scenes(seed, split, sizes.of("captioned", split))):
            image_id = len(pictures)
            rest = split == "train" and number % RESTVAL_EVERY == RESTVAL_EVERY - 1
            folder = "train2014" if split == "train" and not rest else "val2014"
            filename = f"COCO_{folder}_{image_id:012d}.jpg"
            draw_image(root / "karpathy" / "images" / folder / filename, scene)
            sentence_ids = list(range(sentence_id, sentence_id + len(texts)))
            sentence_id += len(texts)
            pictures.append(
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
    _write_json(root / "karpathy" / "dataset_coco.json", {"images": pictures, "dataset": "coco"})


def _write_json(path: Path, content: object) -> None:
    path.write_bytes(json.dumps(content).encode())


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_bytes("".join(json.dumps(record) + "\n" for record in records).encode())
