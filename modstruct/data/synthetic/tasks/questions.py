"""Questions about one scene, with the answers of ten simulated annotators (in the manner of VQA v2).

Colours, of objects and of the ground, make up most questions, as they are learned first. The answers to a question
type are about equally likely (one of eight colours, yes or no, …), so that guessing from the words alone gains
little.
"""

from __future__ import annotations

from dataclasses import dataclass

from modstruct.data.synthetic import words as vocabulary
from modstruct.data.synthetic.captions import relation
from modstruct.data.synthetic.factors import Draws, Scene, SceneObject
from modstruct.data.synthetic.tasks.claims import THING_WORDS, drawn, false_claim, say, task_scenes, true_claim
from modstruct.data.synthetic.tasks.sizes import QUESTIONS_PER_PICTURE

ANNOTATORS = 10
SYNONYM_SHARE = 0.08  # how often an annotator says it in another word
MISTAKE_SHARE = 0.04  # how often an annotator is wrong

KIND_SHARES = {
    "colour": 0.3,
    "presence": 0.2,
    "ground": 0.16,
    "number": 0.14,
    "shape": 0.12,
    "place": 0.05,
    "relation": 0.03,
}
PRESENCE_SHARES = {"colour": 0.6, "shape": 0.25, "thing": 0.15}
OPPOSITE = {"above": "below", "below": "above", "left": "right", "right": "left"}

# What annotators say for each value, the usual word first. The official accuracy takes "one" for "1".
NUMBERS = {1: ("1", "one"), 2: ("2", "two"), 3: ("3", "three")}
YES_NO = {True: ("yes",), False: ("no",)}
PLACES = {
    "top left": ("top left", "upper left"),
    "top": ("top",),
    "top right": ("top right", "upper right"),
    "left": ("left",),
    "middle": ("middle", "centre"),
    "right": ("right",),
    "bottom left": ("bottom left", "lower left"),
    "bottom": ("bottom",),
    "bottom right": ("bottom right", "lower right"),
}


@dataclass(frozen=True)
class SceneQuestion:
    question: str
    question_type: str
    """First words of the question."""
    answer_type: str
    """yes/no, number or other."""
    answer: str
    """The true one, in its usual word."""
    answers: tuple[str, ...]
    """Of the annotators."""


def scene_questions(seed: int, split: str, count: int) -> list[tuple[Scene, tuple[SceneQuestion, ...]]]:
    """Scenes with QUESTIONS_PER_PICTURE questions of different kinds each; count: questions in all."""
    found = []
    for index, scene in zip(range(count // QUESTIONS_PER_PICTURE), task_scenes(seed, "vqa", split), strict=False):
        draws = Draws(seed, "vqa questions", split, index)
        asked: dict[str, SceneQuestion] = {}
        while len(asked) < QUESTIONS_PER_PICTURE:
            kind = drawn(KIND_SHARES, draws)
            question = None if kind in asked else KINDS[kind](scene, draws)
            if question is not None:
                asked[kind] = question
        found.append((scene, tuple(asked.values())))
    return found


def _question(
    question: str, question_type: str, answer_type: str, value: object, said: dict, draws: Draws
) -> SceneQuestion:
    """A question whose answer is `value`, one of the keys of `said`."""
    right, *synonyms = said[value]
    wrong = [words[0] for other, words in said.items() if other != value]
    answers = []
    for _ in range(ANNOTATORS):
        level = draws.uniform(0, 1)
        if level < MISTAKE_SHARE:
            answers.append(draws.choice(wrong))
        elif synonyms and level < MISTAKE_SHARE + SYNONYM_SHARE:
            answers.append(draws.choice(synonyms))
        else:
            answers.append(right)
    return SceneQuestion(question, question_type, answer_type, right, tuple(answers))


def _named_by_shape(scene: Scene, draws: Draws) -> tuple[SceneObject, str] | None:
    """An object that its shape alone tells from the others, and a noun for it; None if there is none."""
    item = draws.choice(scene.objects)
    if sum(other.shape == item.shape for other in scene.objects) > 1:
        return None
    if len(scene.objects) == 1 and draws.chance(0.4):
        return item, draws.choice(THING_WORDS)
    return item, say(vocabulary.SHAPE_WORDS[item.shape], draws)


def _colour(scene: Scene, draws: Draws) -> SceneQuestion | None:
    named = _named_by_shape(scene, draws)
    if named is None:
        return None
    item, noun = named
    start = "what colour is the" if draws.chance(0.7) else "what is the colour of the"
    return _question(f"{start} {noun}?", start, "other", item.colour, vocabulary.COLOUR_WORDS, draws)


def _shape(scene: Scene, draws: Draws) -> SceneQuestion | None:
    item = draws.choice(scene.objects)
    if sum(other.colour == item.colour for other in scene.objects) > 1:
        return None
    plain = len(scene.objects) == 1 and draws.chance(0.4)
    colour = [] if plain else [say(vocabulary.COLOUR_WORDS[item.colour], draws)]
    question = " ".join(["what shape is the", *colour, "thing?"])
    return _question(question, "what shape is the", "other", item.shape, vocabulary.SHAPE_WORDS, draws)


def _place(scene: Scene, draws: Draws) -> SceneQuestion | None:
    named = _named_by_shape(scene, draws)
    if named is None:
        return None
    item, noun = named
    return _question(f"where is the {noun}?", "where is the", "other", item.place, PLACES, draws)


def _ground(scene: Scene, draws: Draws) -> SceneQuestion:
    question = f"what colour is the {say(vocabulary.GROUND_WORDS, draws)}?"
    said = vocabulary.GROUND_COLOUR_WORDS
    # A type of its own: its answers are other words than those of "what colour is the".
    return _question(question, "what colour is the ground", "other", scene.ground_colour, said, draws)


def _number(scene: Scene, draws: Draws) -> SceneQuestion:
    question = f"how many {draws.choice(THING_WORDS)}s {draws.choice(('are there', 'can you see'))}?"
    return _question(question, "how many", "number", len(scene.objects), NUMBERS, draws)


def _presence(scene: Scene, draws: Draws) -> SceneQuestion:
    truth = draws.chance(0.5)
    claim = (true_claim if truth else false_claim)(drawn(PRESENCE_SHARES, draws), scene, draws)
    return _question(f"is there {claim.phrase(draws)}?", "is there a", "yes/no", truth, YES_NO, draws)


def _relation(scene: Scene, draws: Draws) -> SceneQuestion | None:
    if len(scene.objects) == 1:
        return None
    first, second = draws.shuffled(scene.objects)[:2]
    shapes = [item.shape for item in scene.objects]
    if shapes.count(first.shape) > 1 or shapes.count(second.shape) > 1:
        return None
    truth = draws.chance(0.5)
    side = relation(first, second) if truth else OPPOSITE[relation(first, second)]
    noun, other = (say(vocabulary.SHAPE_WORDS[item.shape], draws) for item in (first, second))
    question = f"is the {noun} {say(vocabulary.RELATION_WORDS[side], draws)} the {other}?"
    return _question(question, "is the", "yes/no", truth, YES_NO, draws)


KINDS = {
    "colour": _colour,
    "presence": _presence,
    "ground": _ground,
    "number": _number,
    "shape": _shape,
    "place": _place,
    "relation": _relation,
}
