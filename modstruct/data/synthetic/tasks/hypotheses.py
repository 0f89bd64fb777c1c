"""Hypotheses about a scene: entailed, contradicted, or left open by its image (in the manner of SNLI-VE).

Each scene has one hypothesis of each label, so the majority is a third. A contradiction of one scene is the
entailment of another, word for word: every wording occurs equally often with both labels, and only the image tells
them apart. What the image cannot show, moods, opinions and stories, is neutral and, as in SNLI-VE, to be seen from
the words alone; so a model that never looks at an image can reach two thirds; what it has above them it has seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from modstruct.data.synthetic import words as vocabulary
from modstruct.data.synthetic.captions import USUAL_SHARE
from modstruct.data.synthetic.factors import Draws, Scene
from modstruct.data.synthetic.tasks.claims import Claim, drawn, say, task_scenes, true_claim
from modstruct.data.synthetic.tasks.sizes import HYPOTHESES_PER_PICTURE

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


@dataclass(frozen=True)
class Hypothesis:
    text: str
    label: str
    """entailment, contradiction or neutral."""
    claim: Claim | None = None
    """What it says of the image; None if neutral."""


def scene_hypotheses(seed: int, split: str, count: int) -> list[tuple[Scene, tuple[Hypothesis, ...]]]:
    """Scenes with one hypothesis of each label in random order; count: hypotheses in all."""
    scenes = list(islice(task_scenes(seed, "snli_ve", split), count // HYPOTHESES_PER_PICTURE))
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

    A random order is mended by exchanges that help one scene and hurt none. Raises ValueError if that does not
    succeed, as with a few scenes that are too much alike.
    """
    partners = draws.shuffled(range(len(scenes)))

    def denies(scene: int, partner: int) -> bool:
        return not entailed[partner].claim.holds(scenes[scene])

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
        # Half of the time the mood that the caption speaks of, half of the time any other: the image shows neither.
        mood = scene.mood if draws.chance(0.5) else draws.choice(tuple(vocabulary.MOOD_WORDS))
        return f"the {draws.choice(vocabulary.PICTURE_WORDS)} is {say(vocabulary.MOOD_WORDS[mood], draws)}"
    if kind == "opinion":
        return draws.choice(OPINIONS)
    shape = draws.choice(scene.objects).shape
    return f"the {say(vocabulary.SHAPE_WORDS[shape], draws)} {draws.choice(STORIES)}"
