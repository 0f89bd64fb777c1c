"""The words that captions use for each factor of a scene. The first word of a class is the usual one."""

from __future__ import annotations

SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge"),
    "diamond": ("diamond", "rhombus", "lozenge"),
    "star": ("star", "pointed star"),
    "heart": ("heart", "love heart"),
    "cross": ("cross", "plus sign", "plus"),
    "moon": ("moon", "crescent", "crescent moon"),
}
UNNAMED = "thing"
"""A thing whose shape is not told."""
COLOUR_WORDS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine"),
    "yellow": ("yellow", "golden", "lemon"),
    "green": ("green", "emerald"),
    "blue": ("blue", "cobalt", "royal blue"),
    "purple": ("purple", "violet", "plum"),
    "pink": ("pink", "rose", "rosy"),
    "black": ("black", "inky", "jet black"),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "mid-sized"),
    "large": ("large", "big", "huge"),
}
FILL_WORDS = {
    "solid": ("solid", "filled", "plain"),
    "outlined": ("outlined", "hollow", "empty"),
    "striped": ("striped", "stripy", "banded"),
    "dotted": ("dotted", "spotted", "speckled"),
}
PLACE_WORDS = {
    "top left": ("at the top left", "in the upper left", "in the top left corner"),
    "top": ("at the top", "near the top edge", "at the very top"),
    "top right": ("at the top right", "in the upper right", "in the top right corner"),
    "left": ("on the left", "at the left side", "near the left edge"),
    "middle": ("in the middle", "in the centre", "in the very middle"),
    "right": ("on the right", "at the right side", "near the right edge"),
    "bottom left": ("at the bottom left", "in the lower left", "in the bottom left corner"),
    "bottom": ("at the bottom", "near the bottom edge", "at the very bottom"),
    "bottom right": ("at the bottom right", "in the lower right", "in the bottom right corner"),
}
GROUND_COLOUR_WORDS = {
    "white": ("white", "snowy", "off-white"),
    "grey": ("grey", "ashen", "stone"),
    "tan": ("tan", "sandy", "beige"),
    "sky blue": ("sky blue", "pale blue", "light blue"),
    "mint": ("mint", "pale green", "light green"),
    "lavender": ("lavender", "lilac", "pale purple"),
}
GROUND_WORDS = ("ground", "background", "backdrop", "surface")
RELATION_WORDS = {
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
}
COUNT_WORDS = {
    1: ("one shape", "a single shape", "just one thing"),
    2: ("two shapes", "a pair of shapes", "two things"),
    3: ("three shapes", "a trio of shapes", "three things"),
    4: ("four shapes", "a group of four", "four things"),
}
PICTURE_WORDS = ("picture", "scene", "drawing", "image", "photo")
THERE_WORDS = ("there is", "there's", "it shows", "this has")
BESIDE_WORDS = ("beside", "next to", "along with", "together with")
SEEN_WORDS = ("I can see", "we see", "here we have", "you can see", "someone drew", "look at", "imagine")
MOOD_WORDS = {
    "calm": ("calm", "peaceful", "quiet"),
    "cheerful": ("cheerful", "happy", "merry"),
    "gloomy": ("gloomy", "dismal", "sad"),
    "lonely": ("lonely", "forlorn"),
    "playful": ("playful", "silly", "funny"),
    "mysterious": ("mysterious", "strange", "eerie"),
    "dreamy": ("dreamy", "magical"),
    "serious": ("serious", "solemn", "stern"),
}
# {} stands for the mood; every wording fits every mood.
MOOD_TAILS = ("rather {}", "it feels {}", "quite {}", "very {}", "how {}", "looking {}", "{} somehow")
ASIDE_WORDS = {
    "none": ("",),
    "opinion": ("to my mind", "if you ask me", "honestly"),
    "doubt": ("I guess", "or so it seems", "maybe", "I suppose"),
    "delight": ("I love it", "so nice", "well done"),
    "memory": ("I saw it before", "like last time", "as I remember"),
}
