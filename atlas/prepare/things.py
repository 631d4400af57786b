"""The looks of the synthetic classes: things that drift and turn before a backdrop.

Lengths are in frame widths, areas in frame areas; x points right, y down; images hold 0 to 1.
"""

import functools
import itertools
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
from PIL import Image

from atlas.clips import T

VISIBLE = 0.65  # of a thing is in sight in every frame

PALETTE = {  # hue, saturation, value
    "red": (0.0, 0.9, 0.85), "orange": (0.07, 0.95, 0.95), "yellow": (0.15, 0.9, 0.95),
    "lime": (0.25, 0.85, 0.8), "green": (0.36, 0.9, 0.5), "teal": (0.48, 0.85, 0.7),
    "sky": (0.55, 0.6, 0.95), "blue": (0.63, 0.9, 0.8), "violet": (0.74, 0.7, 0.75),
    "magenta": (0.85, 0.8, 0.85), "pink": (0.94, 0.5, 0.97), "brown": (0.06, 0.75, 0.42),
    "white": (0.1, 0.04, 0.97), "black": (0.6, 0.2, 0.08),
}  # fmt: skip
LOOKS = """
baby_laughter disc gradient pink white
female_singing heart gradient red yellow
male_speech drop gradient blue sky
dog_barking trefoil blotches brown white
cat_meowing star stripes orange black
lions_roaring burst blotches yellow brown
horse_clip-clop crescent blotches violet black
coyote_howling triangle blotches sky white
mynah_bird_singing chevron stripes blue yellow
playing_acoustic_guitar dumbbell rings orange brown
playing_tabla disc rings black yellow
playing_violin hourglass rings red black
playing_piano square stripes black white
playing_ukulele dumbbell stripes lime white
playing_glockenspiel bar stripes teal magenta
helicopter spikes checker green black
race_car arrow checker red white
driving_buses bar halves yellow blue
ambulance_siren cross halves red sky
typing_on_computer_keyboard frame dots violet white
chainsawing_trees gear spokes magenta black
cap_gun_shooting burst dots teal black
lawn_mowing ring spokes green lime
"""  # shape, texture, two colours; none of them gives a class away alone
LOOKS = {name: tuple(look) for name, *look in map(str.split, LOOKS.strip().split("\n"))}
CLASSES = tuple(LOOKS)


def _star(u, v, points, inner):
    """Points at distance 1, notches at `inner`; inner = cos(π / points) is the regular polygon."""
    half = np.pi / points
    angle = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)
    r = np.hypot(u, v)
    ex, ey = inner * np.cos(half) - 1, inner * np.sin(half)
    return ((r * np.cos(angle) - 1) * ey - r * np.sin(angle) * ex) / np.hypot(ex, ey)


def _box(u, v, width, height):
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


# u (right), v (down) -> roughly the signed distance to the outline, < 0 inside; radius about 1.
SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) - 1,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.28,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.68 - np.hypot(u - 0.55, v)),
    "heart": lambda u, v: np.minimum((np.abs(u) + np.abs(v) - 0.85) * 0.71,
        np.hypot(np.abs(u) - 0.425, v + 0.425) - 0.6),
    "drop": lambda u, v: np.minimum(np.hypot(u, v - 0.35) - 0.65,
        np.maximum((np.abs(u) - 0.5 * (v + 1.1)) * 0.89, v - 0.1)),
    "triangle": lambda u, v: _star(u, v, 3, 0.5),
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "frame": lambda u, v: np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.6) - 0.24,
    "bar": lambda u, v: _box(u, v, 1, 0.38),
    "cross": lambda u, v: np.minimum(_box(u, v, 1, 0.34), _box(u, v, 0.34, 1)),
    "star": lambda u, v: _star(u, v, 5, 0.5),
    "spikes": lambda u, v: _star(u, v, 4, 0.4),
    "burst": lambda u, v: _star(u, v, 9, 0.65),
    "gear": lambda u, v: np.hypot(u, v) - 0.84 - 0.14 * np.tanh(3 * np.cos(7 * np.arctan2(v, u))),
    "trefoil": lambda u, v: (np.hypot(u, v) - 0.7 - 0.28 * np.cos(3 * np.arctan2(u, -v))) * 0.8,
    "arrow": lambda u, v: np.minimum(_box(u, v - 0.4, 0.36, 0.6),
        np.maximum((np.abs(u) - 0.85 * (v + 1)) * 0.76, v)),
    "chevron": lambda u, v: np.maximum(np.abs(u) - 0.95,
        (np.abs(v + 0.35 - 0.75 * np.abs(u)) - 0.42) * 0.8),
    "hourglass": lambda u, v: np.maximum(np.abs(v) - 0.9,
        (np.abs(u) - 0.15 - 0.7 * np.abs(v)) * 0.82),
    "dumbbell": lambda u, v: np.minimum(np.hypot(np.abs(u) - 0.6, v) - 0.42, _box(u, v, 0.6, 0.2)),
}  # fmt: skip


def _hard(wave):
    """A wave in ±1 to 0 or 1, with edges about a pixel soft."""
    return 0.5 + 0.5 * np.clip(3 * wave, -1, 1)


# u, v, two phases in radians, a fineness (about 1) -> the share of the second colour, 0 to 1.
TEXTURES = {
    "gradient": lambda u, v, p, k: np.clip(0.5 + 0.6 * v + 0.1 * np.sin(p[0]), 0, 1),
    "halves": lambda u, v, p, k: _hard(3 * u + 0.4 * np.sin(p[0])),
    "stripes": lambda u, v, p, k: _hard(np.sin(7.5 * k * u + p[0])),
    "checker": lambda u, v, p, k: _hard(
        2 * np.sin(5.5 * k * u + p[0]) * np.sin(5.5 * k * v + p[1])
    ),
    "dots": lambda u, v, p, k: _hard(np.sin(8 * k * u + p[0]) + np.sin(8 * k * v + p[1]) - 0.6),
    "rings": lambda u, v, p, k: _hard(np.sin(9 * k * np.hypot(u, v) + p[0])),
    "spokes": lambda u, v, p, k: _hard(np.sin(6 * np.arctan2(v, u) + p[0])),
    "blotches": lambda u, v, p, k: _hard(np.sin(4 * k * u + 1.7 * np.sin(3 * v + p[0]))
        + np.sin(5 * k * v + 1.7 * np.sin(4 * u + p[1]))),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object of one class on its way through the T frames."""

    name: str
    path: np.ndarray  # [T, 2] centre: x, y
    area: np.ndarray  # [T] of the whole thing, hidden parts included
    angle: np.ndarray  # [T] radians
    colours: np.ndarray  # [2, 3] RGB
    phase: np.ndarray  # [2] of the texture, radians
    fineness: float


def draw_object(name, rng):
    """A thing of class `name`; area, place and motion follow the same law for every class."""
    area = rng.uniform(0.07, 0.15) * np.exp(np.linspace(-1, 1, T) * rng.uniform(-0.12, 0.12))
    margin = 0.75 * np.sqrt(area.max() / 1.5)  # a typical radius; long corners may leave the frame
    start = rng.uniform(margin, 1 - margin, 2)
    heading = rng.uniform(0, 2 * np.pi)
    step = rng.uniform(0.08, 0.3) * np.array([np.cos(heading), np.sin(heading)])
    end = np.clip(start + step, margin, 1 - margin)
    hsv = np.array([PALETTE[colour] for colour in LOOKS[name][2:]])
    hsv = hsv + rng.uniform(-1, 1, (2, 3)) * (0.025, 0.08, 0.08)
    path = start + np.linspace(0, 1, T)[:, None] * (end - start)
    angle = rng.uniform(-0.5, 0.5) + np.linspace(-0.5, 0.5, T) * rng.uniform(-0.6, 0.6)
    colours = np.array([hsv_to_rgb(h % 1, *np.clip((s, v), 0, 1)) for h, s, v in hsv])
    texture = rng.uniform(0, 2 * np.pi, 2), rng.uniform(0.85, 1.15)
    return Thing(name, path, area, angle, colours, *texture)


@functools.cache
def _unit_area(shape):
    grid = np.linspace(-1.3, 1.3, 400)
    return (SHAPES[shape](grid, grid[:, None]) < 0).mean() * 2.6**2


def render_frame(things, t, background):
    """(image with `things`, the last in front; what is seen of each, [things, H, W] bool)."""
    image, masks = background.copy(), []
    size = len(image)
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    for thing in things:
        shape, texture = LOOKS[thing.name][:2]
        radius = np.sqrt(thing.area[t] / _unit_area(shape))
        x, y = (pixels[:, None] - thing.path[t]).T / radius
        y = y[:, None]
        cos, sin = np.cos(thing.angle[t]), np.sin(thing.angle[t])
        u = (cos * x + sin * y).astype(np.float32)
        v = (cos * y - sin * x).astype(np.float32)
        cover = np.clip(0.5 - SHAPES[shape](u, v) * np.float32(radius * size), 0, 1)
        second = TEXTURES[texture](u, v, thing.phase, thing.fineness)[..., None]
        first, other = thing.colours.astype(np.float32)
        image += cover[..., None] * (first + second * (other - first) - image)
        masks = [mask & (cover < 0.5) for mask in masks] + [cover >= 0.5]
    return image, np.array(masks)


def draw_scene(names, rng):
    """Things of the classes `names`, back to front in random order. VISIBLE of each is in sight,
    whatever the size of the set."""
    order = rng.permutation(len(names))
    while True:
        things = [draw_object(names[k], rng) for k in order]
        pairs = itertools.combinations(things, 2)
        near = [np.hypot(*(a.path - b.path).T) / sum(np.sqrt((a.area, b.area))) for a, b in pairs]
        if np.min(near) < 0.4:  # one thing must hide another: a cheap first test
            continue
        least = VISIBLE * np.array([thing.area for thing in things])  # [things, T]
        frames = (render_frame(things, t, np.zeros((48, 48, 3), np.float32)) for t in range(T))
        if all((seen.mean((1, 2)) >= least[:, t]).all() for t, (_, seen) in enumerate(frames)):
            return things


def draw_background(rng, size):
    """A greyish, smooth backdrop."""
    backdrop = np.full((size, size, 3), rng.uniform(0.3, 0.7), np.float32)
    for cells, grey, colour in ((3, 0.1, 0.03), (9, 0.04, 0.015)):
        coarse = rng.normal(0, grey, (cells, cells, 1)) + rng.normal(0, colour, (cells, cells, 3))
        for channel in range(3):
            plane = Image.fromarray(coarse[..., channel].astype(np.float32))
            backdrop[..., channel] += np.asarray(plane.resize((size, size), Image.BICUBIC))
    return np.clip(backdrop, 0.1, 0.9)


def paint(things, backdrop, rng):
    """Frames [T, H, W, 3] uint8 with a little grain; what is seen [T, things, H, W] bool."""
    frames, masks = [], []
    for t in range(T):
        image, seen = render_frame(things, t, backdrop)
        image += 0.015 * rng.standard_normal((*image.shape[:2], 1), dtype=np.float32)
        frames.append(np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8))
        masks.append(seen)
    return np.stack(frames), np.stack(masks)
