"""The image of a scene: `draw(scene, size)`, which never depends on the factors that only the caption has.

The ground is computed at the size of the image; every object is drawn as a mask four times as fine and averaged down,
so that its edge is smooth. An object has a darker rim and a soft shadow, so that each colour stands out on each ground.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from modstruct.data.synthetic.factors import Scene, SceneObject

FINE = 4  # mask pixels per image pixel, each way

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
SHADOW_RGB = (30, 28, 40)
RGB = {
    "red": (218, 38, 38),
    "orange": (250, 128, 14),
    "yellow": (252, 214, 10),
    "green": (34, 148, 62),
    "blue": (32, 84, 208),
    "purple": (122, 40, 168),
    "pink": (250, 128, 186),
    "black": (38, 36, 44),
}
GROUND_RGB = {
    "white": (244, 243, 240),
    "grey": (164, 166, 170),
    "tan": (218, 188, 146),
    "sky blue": (160, 208, 240),
    "mint": (172, 226, 188),
    "lavender": (206, 188, 234),
}
# The side the light comes from, as a unit vector in the image: x to the right, y down.
LIGHT_FROM = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}

# Lengths as shares of the image's side.
RIM = 0.014
STRIPE_PERIOD = 0.085
DOT_PERIOD = 0.085
DOT_RADIUS = 0.024
SHADOW_OFFSET = 0.022
SHADOW_STRENGTH = 90  # of 255
TEXTURE_STRENGTH = 9.0  # of 255, standard deviation
LIGHT_STRENGTH = 11.0  # of 255, at the edge
OUTLINE = 0.27  # of the object's radius


Corners = list[tuple[float, float]]


def arc(radius: float, start: float, stop: float, steps: int, centre_x: float = 0.0) -> Corners:
    """Points on a circle around (centre_x, 0) from one angle to another (radians, clockwise), without the last one."""
    angles = [start + (stop - start) * k / steps for k in range(steps)]
    return [(centre_x + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def star() -> Corners:
    outer = arc(1.18, -0.5 * math.pi, 1.5 * math.pi, 5)
    inner = arc(0.54, -0.3 * math.pi, 1.7 * math.pi, 5)
    return [corner for pair in zip(outer, inner, strict=True) for corner in pair]


def heart() -> Corners:
    times = [2 * math.pi * (k + 0.5) / 40 for k in range(40)]
    heights = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in times]
    return [(1.02 * math.sin(t) ** 3, -(height + 2.5) / 15.2) for t, height in zip(times, heights, strict=True)]


def cross() -> Corners:
    arm, reach = 0.37, 1.02
    quarter = [(arm, -reach), (arm, -arm), (reach, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


def moon() -> Corners:
    """A crescent: the outer arc runs around the left, the inner arc, of a circle pushed to the right, runs back."""
    outer_radius, outer_x, opening, inner_x = 1.06, 0.2, 0.3 * math.pi, 0.86
    tip_x, tip_y = outer_x + outer_radius * math.cos(opening), outer_radius * math.sin(opening)
    inner_radius, inner_opening = math.hypot(tip_x - inner_x, tip_y), math.atan2(tip_y, tip_x - inner_x)
    full = 2 * math.pi
    return [
        *arc(outer_radius, opening, full - opening, 28, outer_x),
        *arc(inner_radius, full - inner_opening, inner_opening, 24, inner_x),
    ]


# Corners of each shape of radius 1 around (0, 0), y down. The shapes cover about the same area.
OUTLINES: dict[str, Corners] = {
    "circle": arc(0.92, 0, 2 * math.pi, 40),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -1.02), (1.02, 0.78), (-1.02, 0.78)],
    "diamond": [(0, -1.16), (0.8, 0), (0, 1.16), (-0.8, 0)],
    "star": star(),
    "heart": heart(),
    "cross": cross(),
    "moon": moon(),
}
CURVED_CORNERS = 20  # an outline with more corners than this is a smooth curve


@lru_cache
def grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of each pixel as angles from 0 to 2 pi, (1, size) and (size, 1) float32."""
    steps = np.arange(size, dtype=np.float32) * np.float32(2 * math.pi / size)
    return steps[None, :], steps[:, None]


def texture(name: str, size: int, seed: int) -> np.ndarray:
    """A pattern of the ground, (size, size) float32, mean about 0 and standard deviation about 1."""
    random = np.random.default_rng(seed)
    phase, other_phase = random.random(2) * 2 * math.pi
    x, y = grid(size)
    if name == "grain":
        return (random.random((size, size), dtype=np.float32) - 0.5) * 3.4
    if name == "clouds":
        coarse = Image.fromarray((random.random((6, 6), dtype=np.float32) - 0.5) * 5.5)
        return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    if name == "waves":
        return 1.4 * np.sin(9 * y + phase + 1.3 * np.sin(2 * x + other_phase))
    if name == "weave":
        return np.sin(13 * x + phase) + np.sin(13 * y + other_phase)
    if name == "checks":
        return np.where((np.sin(4 * x + phase) > 0) == (np.sin(4 * y + other_phase) > 0), 1.0, -1.0)
    if name == "ribs":
        return 1.4 * np.sin(9 * (x + y) + phase)
    raise KeyError(name)


def draw_ground(scene: Scene, size: int) -> Image.Image:
    """The image before there is anything on it: a textured colour, brighter where the light comes from."""
    pattern = texture(scene.ground_texture, size, scene.texture_seed) * TEXTURE_STRENGTH
    ramp = np.linspace(-LIGHT_STRENGTH, LIGHT_STRENGTH, size, dtype=np.float32)
    light_x, light_y = LIGHT_FROM[scene.light]
    pattern = pattern + light_x * ramp[None, :] + light_y * ramp[:, None]
    colour = np.array(GROUND_RGB[scene.ground_colour], dtype=np.float32)
    pixels = np.clip(colour + pattern[:, :, None], 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def fill_pattern(fill: str, side: int, unit: int) -> Image.Image:
    """Where the second colour of a fill goes: a mask of (side, side); unit: the image's side in mask pixels."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    centre = side / 2
    if fill == "striped":
        period = STRIPE_PERIOD * unit
        reach = math.ceil(side / period)
        for k in range(-reach, reach + 1):
            start = centre + (k - 0.25) * period  # slanted, so that stripes look like no edge of a square
            upper, lower = start + centre, start - centre
            pen.polygon([(upper, 0), (upper + period / 2, 0), (lower + period / 2, side), (lower, side)], fill=255)
    if fill == "dotted":
        period, radius = DOT_PERIOD * unit, DOT_RADIUS * unit
        reach = math.ceil(centre / period)
        for row in range(-reach, reach + 1):
            for column in range(-reach, reach + 1):
                x = centre + (column + row % 2 / 2) * period
                y = centre + row * period * 0.87
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def mixed(colour: tuple[int, ...], other: tuple[int, ...], share: float) -> tuple[int, ...]:
    """`colour` with a share of `other`."""
    return tuple(round(c + (o - c) * share) for c, o in zip(colour, other, strict=True))


def object_masks(item: SceneObject, size: int, left: int, top: int, side: int) -> tuple[Image.Image, Image.Image]:
    """Body and rim of an object in a square of `side` mask pixels whose corner is the image's pixel (left, top)."""
    unit = size * FINE
    centre_x, centre_y = item.x * unit - left * FINE, item.y * unit - top * FINE
    radians = math.radians(item.angle)
    cosine, sine = math.cos(radians) * item.radius * unit, math.sin(radians) * item.radius * unit
    corners = [(centre_x + x * cosine - y * sine, centre_y + x * sine + y * cosine) for x, y in OUTLINES[item.shape]]

    body = Image.new("L", (side, side))
    ImageDraw.Draw(body).polygon(corners, fill=255)
    rim = Image.new("L", (side, side))
    width = OUTLINE * item.radius if item.fill == "outlined" else RIM
    joint = "curve" if len(corners) < CURVED_CORNERS else None
    # A line of twice the width along the edge, of which the inner half is kept; two corners more close its joints.
    ImageDraw.Draw(rim).line([*corners, *corners[:2]], fill=255, width=round(2 * width * unit), joint=joint)
    return body, ImageChops.darker(body, rim)


def draw_object(image: Image.Image, item: SceneObject, light: str) -> None:
    """Draw one object onto the image, with its shadow on the side away from the light."""
    size = image.width
    half = math.ceil((1.25 * item.radius + RIM) * size) + 1
    left, top = round(item.x * size) - half, round(item.y * size) - half
    side = 2 * half * FINE
    body, rim = object_masks(item, size, left, top, side)
    solid = rim if item.fill == "outlined" else body
    coverage = solid.reduce(FINE)
    shadow = ImageChops.multiply(coverage, Image.new("L", coverage.size, SHADOW_STRENGTH))
    light_x, light_y = LIGHT_FROM[light]
    offset = SHADOW_OFFSET * size
    image.paste(SHADOW_RGB, (left - round(light_x * offset), top - round(light_y * offset)), shadow)

    colour = mixed(RGB[item.colour], WHITE if item.shade > 0 else BLACK, 0.1 * abs(item.shade))
    image.paste(colour, (left, top), coverage)
    if item.fill in ("striped", "dotted"):
        pattern = ImageChops.darker(body, fill_pattern(item.fill, side, size * FINE))
        image.paste(mixed(colour, WHITE, 0.82), (left, top), pattern.reduce(FINE))
    if item.fill != "outlined":
        image.paste(mixed(colour, BLACK, 0.45), (left, top), rim.reduce(FINE))


def draw(scene: Scene, size: int) -> Image.Image:
    """The image of a scene: RGB, size x size pixels."""
    image = draw_ground(scene, size)
    for item in scene.objects:
        draw_object(image, item, scene.light)
    return image
