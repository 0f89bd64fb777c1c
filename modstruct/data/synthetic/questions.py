"""Questions, hypotheses and captions about one scene, in the manner of VQA v2, SNLI-VE and COCO.

Colours, of objects and of the ground, make up most questions, as they are learned first. The answers to a question
type are about equally likely (one of eight colours, yes or no, …), so that guessing from the words alone gains little.

Each scene has one hypothesis of each label, so the majority is a third. A contradiction of one scene is the
entailment of another, word for word: every wording occurs equally often with both labels, and only the image tells
them apart. What the image cannot show (moods, opinions, stories) is neutral and, as in SNLI-VE, recognised from the
words alone: a model that ignores the image can reach two thirds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count as endless
from itertools import islice

from modstruct.data.synthetic import words as vocabulary
from modstruct.data.synthetic.captions import USUAL_SHARE, caption, relation
from modstruct.data.synthetic.claims import THING_WORDS, Claim, drawn, false_claim, say, task_scenes, true_claim
from modstruct.data.synthetic.factors import (
    ASIDES,
    MOODS,
    PLAIN_SHARE,
    TEMPLATES,
    TEMPLATES_OF_SEVERAL,
    Draws,
    Scene,
    SceneObject,
)
from modstruct.data.synthetic.splits import scenes

QUESTIONS_PER_IMAGE = 2
ANNOTATORS = 10
SYNONYM_SHARE = 0.08  # how often an annotator says it in another word
MISTAKE_SHARE = 0.04  # how often an annotator is wrong

QUESTION_SHARES = {
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

HYPOTHESES_PER_IMAGE = 3  # one of each label
CLAIM_SHARES = {"colour": 0.4, "ground": 0.25, "number": 0.15, "shape": 0.12, "thing": 0.08}
SHOWN_BY = ("the picture shows", "I can see", "it shows", "we see", "here we have")
OPINIONS = ("it is the best of all pictures", "everyone would love it", "it is well done", "nobody would buy it")
STORIES = (
    "is waiting for a friend",
    "was drawn by a child",
    "has come a long way",
    "will be gone tomorrow",
    "is older than it looks",
    "belongs to someone else",
)

FEWEST_CAPTIONS, MOST_CAPTIONS = 2, 5
MOST_WORDINGS = 50  # wordings tried for a caption that no other image has


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
    """Scenes with QUESTIONS_PER_IMAGE questions of different kinds each; count: questions in all."""
    found = []
    for index, scene in zip(range(count // QUESTIONS_PER_IMAGE), task_scenes(seed, "vqa", split), strict=False):
        draws = Draws(seed, "vqa questions", split, index)
        asked: dict[str, SceneQuestion] = {}
        while len(asked) < QUESTIONS_PER_IMAGE:
            kind = drawn(QUESTION_SHARES, draws)
            question = None if kind in asked else QUESTION_MAKERS[kind](scene, draws)
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
    # A separate type: its answers are other words than those of "what colour is the".
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


QUESTION_MAKERS = {
    "colour": _colour,
    "presence": _presence,
    "ground": _ground,
    "number": _number,
    "shape": _shape,
    "place": _place,
    "relation": _relation,
}


@dataclass(frozen=True)
class Hypothesis:
    text: str
    label: str
    """entailment, contradiction or neutral."""
    claim: Claim | None = None
    """What it says of the image; None if neutral."""


def scene_hypotheses(seed: int, split: str, count: int) -> list[tuple[Scene, tuple[Hypothesis, ...]]]:
    """Scenes with one hypothesis of each label in random order; count: hypotheses in all."""
    scenes = list(islice(task_scenes(seed, "snli_ve", split), count // HYPOTHESES_PER_IMAGE))
    entailed = [_entailed(scene, Draws(seed, "snli_ve entailed", split, n)) for n, scene in enumerate(scenes)]
    partners = denied_partners(scenes, entailed, Draws(seed, "snli_ve partners", split))
    found = []
    for number, (scene, partner) in enumerate(zip(scenes, partners, strict=True)):
        draws = Draws(seed, "snli_ve neutral", split, number)
        denied = Hypothesis(entailed[partner].text, "contradiction", entailed[partner].claim)
        neutral = Hypothesis(_neutral(scene, draws), "neutral")
        found.append((scene, tuple(draws.shuffled([entailed[number], denied, neutral]))))
    return found


def denied_partners(scenes: list[Scene], entailed: list[Hypothesis], draws: Draws) -> list[int]:
    """For each scene the number of another whose hypothesis it denies; each number occurs once.

    A random order is corrected by exchanges that help one scene and hurt none. Raises ValueError if that fails, as with
    a few scenes that are too much alike.
    """
    partners = draws.shuffled(range(len(scenes)))

    def denies(scene: int, partner: int) -> bool:
        claim = entailed[partner].claim
        return claim is not None and not claim.holds(scenes[scene])

    for place in range(len(scenes)):
        if denies(place, partners[place]):
            continue
        for other in draws.shuffled(range(len(scenes))):
            fits = denies(place, partners[other])
            if fits and (denies(other, partners[place]) or not denies(other, partners[other])):
                partners[place], partners[other] = partners[other], partners[place]
                break
        else:
            raise ValueError(
                f"{len(scenes)} scenes are too few, or too much alike, to contradict each other: take more"
            )
    return partners


def _entailed(scene: Scene, draws: Draws) -> Hypothesis:
    claim = true_claim(drawn(CLAIM_SHARES, draws), scene, draws)
    phrase = claim.phrase(draws)
    if draws.chance(USUAL_SHARE):
        return Hypothesis(f"there {'are' if claim.plural else 'is'} {phrase}", "entailment", claim)
    return Hypothesis(f"{draws.choice(SHOWN_BY)} {phrase}", "entailment", claim)


def _neutral(scene: Scene, draws: Draws) -> str:
    kind = drawn({"mood": 0.5, "story": 0.35, "opinion": 0.15}, draws)
    if kind == "mood":
        # Half of the time the caption's mood, otherwise any other: the image shows neither.
        mood = scene.mood if draws.chance(0.5) else draws.choice(tuple(vocabulary.MOOD_WORDS))
        return f"the {draws.choice(vocabulary.PICTURE_WORDS)} is {say(vocabulary.MOOD_WORDS[mood], draws)}"
    if kind == "opinion":
        return draws.choice(OPINIONS)
    shape = draws.choice(scene.objects).shape
    return f"the {say(vocabulary.SHAPE_WORDS[shape], draws)} {draws.choice(STORIES)}"


def captioned_scenes(seed: int, split: str, count: int) -> list[tuple[Scene, tuple[str, ...]]]:
    """Scenes with two to five different captions; in validation and test no caption belongs to two images.

    The scenes are like those of the shards, where no two of validation or test agree in everything that a caption can
    say, but from another stream, so that fine-tuning sees other images than pretraining.
    """
    taken: set[str] = set()
    found = []
    for index, (scene, _) in enumerate(islice(scenes(f"{seed} captioned", split), count)):
        draws = Draws(seed, "captions", split, index)
        wanted = FEWEST_CAPTIONS + draws.whole(MOST_CAPTIONS - FEWEST_CAPTIONS + 1)
        texts: dict[str, None] = {}
        for tries in endless():
            text = caption(_reworded(scene, draws))
            # A few scenes differ only in what most captions leave out; after many tries a caption may be shared.
            if split == "train" or text not in taken or tries > MOST_WORDINGS:
                texts[text] = None
            if len(texts) == wanted:
                break
        taken |= texts.keys()
        found.append((scene, tuple(texts)))
    return found


def _reworded(scene: Scene, draws: Draws) -> Scene:
    """The same image as another speaker in another mood describes it."""
    return replace(
        scene,
        mood=draws.choice(MOODS),
        aside="none" if draws.chance(PLAIN_SHARE) else draws.choice(ASIDES[1:]),
        template=draws.choice(TEMPLATES if len(scene.objects) == 1 else TEMPLATES_OF_SEVERAL),
        wording_seed=draws.whole(2**31),
    )
