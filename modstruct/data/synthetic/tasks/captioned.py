"""Scenes with several captions each, as if several people had described the image (in the manner of COCO)."""

from __future__ import annotations

from dataclasses import replace
from itertools import count as endless
from itertools import islice

from modstruct.data.synthetic.captions import caption
from modstruct.data.synthetic.factors import ASIDES, MOODS, PLAIN_SHARE, TEMPLATES, TEMPLATES_OF_SEVERAL, Draws, Scene
from modstruct.data.synthetic.splits import scenes

FEWEST_CAPTIONS, MOST_CAPTIONS = 2, 5
MOST_TRIES = 50  # wordings tried for a caption that no other image has


def captioned_scenes(seed: int, split: str, count: int) -> list[tuple[Scene, tuple[str, ...]]]:
    """Scenes with two to five different captions; in validation and test no caption belongs to two images.

    The scenes are like those of the shards, and like them no two of validation or test agree in all that a caption
    can say; but they come from a stream of their own, so that fine-tuning sees other images than pre-training.
    """
    taken: set[str] = set()
    found = []
    for index, (scene, _) in enumerate(islice(scenes(f"{seed} captioned", split), count)):
        draws = Draws(seed, "captions", split, index)
        wanted = FEWEST_CAPTIONS + draws.whole(MOST_CAPTIONS - FEWEST_CAPTIONS + 1)
        texts: dict[str, None] = {}
        for tries in endless():
            text = caption(_described_anew(scene, draws))
            # A few scenes are alike up to what most captions leave out; after many tries a caption may be shared.
            if split == "train" or text not in taken or tries > MOST_TRIES:
                texts[text] = None
            if len(texts) == wanted:
                break
        taken |= texts.keys()
        found.append((scene, tuple(texts)))
    return found


def _described_anew(scene: Scene, draws: Draws) -> Scene:
    """The same image in the words of another speaker, who has a mood of their own."""
    return replace(
        scene,
        mood=draws.choice(MOODS),
        aside="none" if draws.chance(PLAIN_SHARE) else draws.choice(ASIDES[1:]),
        template=draws.choice(TEMPLATES if len(scene.objects) == 1 else TEMPLATES_OF_SEVERAL),
        wording_seed=draws.whole(2**31),
    )
