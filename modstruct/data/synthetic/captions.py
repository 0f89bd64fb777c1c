"""The caption of a scene: `caption(scene)`, which never depends on the factors that only the image has.

Like a person, it says less about each object when there are many: a budget of words is spent on the places, fills and
sizes of the objects and on the ground. The shape and colour of every object are always named, unless captions tell
less: at `told` below 1, each shape, colour and detail is named with that probability times the one at 1. Nothing else
changes with it: the number of objects, the mood, the aside and the template can be read from every caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from modstruct.data.synthetic import words as vocabulary
from modstruct.data.synthetic.factors import Draws, Scene, SceneObject

Detail = tuple[str, int | None]  # place, fill or size with the number of its object; or ground

USUAL_SHARE = 0.55  # how often a class goes by its usual word
UNSAID_SHARE = 0.5  # how often the unremarkable goes without saying: a solid fill, a medium size
LEFT_OUT_SHARE = 0.06  # how often a detail is left out though there was room

# Words that a caption may have, about (32 tokens with the start and the end token hold it), and what its parts take.
WORD_BUDGET = 23
NAME_COST = 4  # article, colour, shape and a comma or `and`
MOOD_COST = 2
ASIDE_COST = 3
DETAIL_COST = {"place": 4, "ground": 4, "fill": 1, "size": 1}
FRAME_COST = {"frame": 3, "there": 2, "seen": 3, "counted": 2, "related": 2}


def left_out_share(told: float) -> float:
    """How often a detail is left out though there was room."""
    return LEFT_OUT_SHARE + (1 - told) * (1 - LEFT_OUT_SHARE)


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def joined(phrases: Sequence[str]) -> str:
    """`x`, `x and y`, `x, y and z`."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def relation(item: SceneObject, other: SceneObject) -> str:
    """Where item lies as seen from other, along the axis on which they are further apart (up and down if equal)."""
    rows, columns = item.row - other.row, item.column - other.column
    if abs(rows) >= abs(columns):
        return "above" if rows < 0 else "below"
    return "left" if columns < 0 else "right"


class Wording:
    """The choices of one caption: which details are mentioned, in what order and words.

    other: number of another wording, which mentions the same.
    """

    def __init__(self, scene: Scene, told: float = 1.0, other: int | None = None):
        self.scene = scene
        self.draws = Draws("wording", scene.wording_seed)
        self.order = self.draws.shuffled(range(len(scene.objects)))
        naming = Draws("naming", scene.wording_seed)  # its own: the other choices at 1 do not depend on it
        named = [(kind, number) for number in self.order for kind in ("shape", "colour") if naming.chance(told)]
        self.mentions = self._choose_mentions(left_out_share(told)).union(named)
        self._said: set[tuple[str, ...]] = set()
        if other is not None:
            self.draws = Draws("reworded", scene.wording_seed, other)
            if scene.template not in ("places first", "related"):  # their first object's place is told, or is not
                self.order = self.draws.shuffled(self.order)

    def _choose_mentions(self, left_out: float) -> set[Detail]:
        """All that is mentioned: what the template needs, then details of the main object, then of the others."""
        template = self.scene.template
        needed = {"ground first": ("ground", None), "places first": ("place", self.order[0])}.get(template)
        details = self.draws.shuffled(self._details())
        details.sort(key=lambda detail: (detail != needed, detail[1] != 0))
        left = WORD_BUDGET - MOOD_COST - NAME_COST * len(self.scene.objects) - FRAME_COST.get(template, 0)
        if self.scene.aside != "none":
            left -= ASIDE_COST
        mentions = set()
        for detail in details:
            cost = DETAIL_COST[detail[0]]
            if detail == needed or (cost <= left and not self.draws.chance(left_out)):
                mentions.add(detail)
                left -= cost
        return mentions

    def _details(self) -> list[Detail]:
        """All that could be mentioned."""
        details: list[Detail] = [("ground", None)]
        for number, item in enumerate(self.scene.objects):
            if self.scene.template != "related" or number != self.order[0]:  # there the relation says where it is
                details.append(("place", number))
            if item.fill != "solid" or not self.draws.chance(UNSAID_SHARE):
                details.append(("fill", number))
            if item.size != "medium" or not self.draws.chance(UNSAID_SHARE):
                details.append(("size", number))
        return details

    def say(self, words: Sequence[str]) -> str:
        return words[0] if self.draws.chance(USUAL_SHARE) else self.draws.choice(words)

    def noun(self, number: int) -> str:
        """`a small striped red star`, without its place; a thing named before by shape and colour is `another`."""
        item = self.scene.objects[number]
        mentioned = [kind for kind in ("shape", "colour", "fill", "size") if (kind, number) in self.mentions]
        fill = [self.say(vocabulary.FILL_WORDS[item.fill])] if "fill" in mentioned else []
        size = [self.say(vocabulary.SIZE_WORDS[item.size])] if "size" in mentioned else []
        colour = [self.say(vocabulary.COLOUR_WORDS[item.colour])] if "colour" in mentioned else []
        shape = self.say(vocabulary.SHAPE_WORDS[item.shape]) if "shape" in mentioned else vocabulary.UNNAMED
        adjectives = [*size, *fill, *colour] if self.draws.chance(0.6) else [*size, *colour, *fill]
        phrase = " ".join([*adjectives, shape])
        name = tuple(getattr(item, kind) for kind in ("shape", "colour") if kind in mentioned)
        again = name in self._said
        self._said.add(name)
        return f"another {phrase}" if again else with_article(phrase)

    def place(self, number: int) -> str:
        if ("place", number) not in self.mentions:
            return ""
        return self.say(vocabulary.PLACE_WORDS[self.scene.objects[number].place])

    def thing(self, number: int) -> str:
        """Noun and place."""
        return " ".join(filter(None, [self.noun(number), self.place(number)]))

    def things(self, numbers: Sequence[int]) -> str:
        return joined([self.thing(number) for number in numbers])

    def ground(self) -> str:
        """`on a pale green ground`, or nothing."""
        if ("ground", None) not in self.mentions:
            return ""
        colour = self.say(vocabulary.GROUND_COLOUR_WORDS[self.scene.ground_colour])
        return f"on {with_article(colour)} {self.say(vocabulary.GROUND_WORDS)}"

    def mood(self) -> str:
        return self.say(vocabulary.MOOD_WORDS[self.scene.mood])

    def count(self) -> str:
        return self.draws.choice(vocabulary.COUNT_WORDS[len(self.scene.objects)])


def spaced(*phrases: str) -> str:
    return " ".join(filter(None, phrases))


def listed(wording: Wording) -> str:
    return spaced(wording.things(wording.order), wording.ground())


def framed(wording: Wording) -> str:
    image = f"{wording.mood()} {wording.draws.choice(vocabulary.PICTURE_WORDS)}"
    return spaced(with_article(image), "of", wording.things(wording.order), wording.ground())


def there(wording: Wording) -> str:
    return spaced(wording.draws.choice(vocabulary.THERE_WORDS), wording.things(wording.order), wording.ground())


def seen(wording: Wording) -> str:
    return spaced(wording.draws.choice(vocabulary.SEEN_WORDS), wording.things(wording.order), wording.ground())


def ground_first(wording: Wording) -> str:
    return f"{wording.ground()}, {wording.things(wording.order)}"


def places_first(wording: Wording) -> str:
    phrases = [spaced(wording.place(number), wording.noun(number)) for number in wording.order]
    return spaced(joined(phrases), wording.ground())


def counted(wording: Wording) -> str:
    return f"{spaced(wording.count(), wording.ground())}: {wording.things(wording.order)}"


def related(wording: Wording) -> str:
    first, second, *rest = wording.order
    objects = wording.scene.objects
    phrase = wording.say(vocabulary.RELATION_WORDS[relation(objects[first], objects[second])])
    pair = spaced(wording.noun(first), phrase, wording.thing(second))
    return spaced(f"{pair} with {wording.things(rest)}" if rest else pair, wording.ground())


def main_first(wording: Wording) -> str:
    rest = [number for number in wording.order if number != 0]
    return spaced(
        wording.thing(0), wording.draws.choice(vocabulary.BESIDE_WORDS), wording.things(rest), wording.ground()
    )


BODIES = {
    "list": listed,
    "frame": framed,
    "there": there,
    "seen": seen,
    "ground first": ground_first,
    "places first": places_first,
    "counted": counted,
    "related": related,
    "main first": main_first,
}


def caption(scene: Scene, told: float = 1.0, other: int | None = None) -> str:
    """The caption of a scene, in lower case, without a full stop. told: 0 to 1, see the module. other: as Wording."""
    wording = Wording(scene, told, other)
    parts = [BODIES[scene.template](wording)]
    if scene.template != "frame":
        parts.append(wording.draws.choice(vocabulary.MOOD_TAILS).format(wording.mood()))
    if scene.aside != "none":
        parts.append(wording.draws.choice(vocabulary.ASIDE_WORDS[scene.aside]))
    return ", ".join(parts)


def reworded(scene: Scene, told: float = 1.0) -> str:
    """The caption in other words and another order: it mentions the same, in the same template."""
    first, others = caption(scene, told), (caption(scene, told, other) for other in count())
    return next(text for text in others if text != first)
