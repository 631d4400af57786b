"""A synthetic AVSBench: things that look and sound alike, in S4's tree, made from a seed.

Each of the 23 classes is one combination of shape, texture and two colours (LOOKS) and one timbre (TIMBRES), whatever the seed.
A clip shows one heard and one or two silent things of different classes, all of them in all T frames, drifting and turning.
The heard one is drawn, placed and layered exactly as the silent ones are, so that nothing but the sound tells it apart.
Its visible pixels are the mask.

A clip depends on (seed, class, split, its number) and on the classes of the set, not on how many clips are made or how large:
a larger set begins with the same clips, and at another `size` the same scenes are drawn. Lengths are in frame widths, areas in
frame areas, x to the right, y down; images are [H, W, 3], H = W = size.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from atlas.audio import RATE
from atlas.clips import CSVS, DOMAINS, SPLITS, T, built_beside, s4_clip, write_clip, write_csv
from atlas.errors import AtlasError

CLASSES = tuple(name for names in DOMAINS.values() for name in names)

# ---------------------------------------------------------------- what a class looks like

PALETTE = {  # hue, saturation, value
    "red": (0.0, 0.9, 0.85), "orange": (0.07, 0.95, 0.95), "yellow": (0.15, 0.9, 0.95), "lime": (0.25, 0.85, 0.8), "green": (0.36, 0.9, 0.5),
    "teal": (0.48, 0.85, 0.7), "sky": (0.55, 0.6, 0.95), "blue": (0.63, 0.9, 0.8), "violet": (0.74, 0.7, 0.75), "magenta": (0.85, 0.8, 0.85),
    "pink": (0.94, 0.5, 0.97), "brown": (0.06, 0.75, 0.42), "white": (0.1, 0.04, 0.97), "black": (0.6, 0.2, 0.08),
}  # fmt: skip
LOOKS = {  # shape, texture, two colours. A domain shares textures, and colours and shapes come back elsewhere: no cue gives a class away alone
    "baby_laughter": ("disc", "gradient", "pink", "white"),
    "female_singing": ("heart", "gradient", "red", "yellow"),
    "male_speech": ("drop", "gradient", "blue", "sky"),
    "dog_barking": ("trefoil", "blotches", "brown", "white"),
    "cat_meowing": ("star", "stripes", "orange", "black"),
    "lions_roaring": ("burst", "blotches", "yellow", "brown"),
    "horse_clip-clop": ("crescent", "blotches", "violet", "black"),
    "coyote_howling": ("triangle", "blotches", "sky", "white"),
    "mynah_bird_singing": ("chevron", "stripes", "blue", "yellow"),
    "playing_acoustic_guitar": ("dumbbell", "rings", "orange", "brown"),
    "playing_tabla": ("disc", "rings", "black", "yellow"),
    "playing_violin": ("hourglass", "rings", "red", "black"),
    "playing_piano": ("square", "stripes", "black", "white"),
    "playing_ukulele": ("dumbbell", "stripes", "lime", "white"),
    "playing_glockenspiel": ("bar", "stripes", "teal", "magenta"),
    "helicopter": ("spikes", "checker", "green", "black"),
    "race_car": ("arrow", "checker", "red", "white"),
    "driving_buses": ("bar", "halves", "yellow", "blue"),
    "ambulance_siren": ("cross", "halves", "red", "sky"),
    "typing_on_computer_keyboard": ("frame", "dots", "violet", "white"),
    "chainsawing_trees": ("gear", "spokes", "magenta", "black"),
    "cap_gun_shooting": ("burst", "dots", "teal", "black"),
    "lawn_mowing": ("ring", "spokes", "green", "lime"),
}


def _star(u, v, points, inner):
    """Points at distance 1, notches at `inner`; inner = cos(π / points) is the regular polygon."""
    half = np.pi / points
    angle = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)
    r, ex, ey = np.hypot(u, v), inner * np.cos(half) - 1, inner * np.sin(half)
    return ((r * np.cos(angle) - 1) * ey - r * np.sin(angle) * ex) / np.hypot(ex, ey)


def _box(u, v, width, height):
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


# Each maps u (right) and v (down) to an approximate signed distance to the outline, negative inside; all fit in about the unit circle.
SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) - 1,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.28,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1, 0.68 - np.hypot(u - 0.55, v)),
    "heart": lambda u, v: np.minimum((np.abs(u) + np.abs(v) - 0.85) * 0.71, np.hypot(np.abs(u) - 0.425, v + 0.425) - 0.6),
    "drop": lambda u, v: np.minimum(np.hypot(u, v - 0.35) - 0.65, np.maximum((np.abs(u) - 0.5 * (v + 1.1)) * 0.89, v - 0.1)),
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
    "arrow": lambda u, v: np.minimum(np.maximum((np.abs(u) - 0.85 * (v + 1)) * 0.76, v), _box(u, v - 0.4, 0.36, 0.6)),
    "chevron": lambda u, v: np.maximum(np.abs(u) - 0.95, (np.abs(v + 0.35 - 0.75 * np.abs(u)) - 0.42) * 0.8),
    "hourglass": lambda u, v: np.maximum(np.abs(v) - 0.9, (np.abs(u) - 0.15 - 0.7 * np.abs(v)) * 0.82),
    "dumbbell": lambda u, v: np.minimum(np.hypot(np.abs(u) - 0.6, v) - 0.42, _box(u, v, 0.6, 0.2)),
}  # fmt: skip


def _hard(wave):
    """A wave in ±1 to near black and white, 0 to 1: edges about a pixel soft."""
    return 0.5 + 0.5 * np.clip(3 * wave, -1, 1)


# Each maps u, v, a phase pair in radians and a fineness (about 1) to the share of the second colour, 0 to 1.
TEXTURES = {
    "gradient": lambda u, v, p, k: np.clip(0.5 + 0.6 * v + 0.1 * np.sin(p[0]), 0, 1),
    "halves": lambda u, v, p, k: _hard(3 * u + 0.4 * np.sin(p[0])),
    "stripes": lambda u, v, p, k: _hard(np.sin(7.5 * k * u + p[0])),
    "checker": lambda u, v, p, k: _hard(2 * np.sin(5.5 * k * u + p[0]) * np.sin(5.5 * k * v + p[1])),
    "dots": lambda u, v, p, k: _hard(np.sin(8 * k * u + p[0]) + np.sin(8 * k * v + p[1]) - 0.6),
    "rings": lambda u, v, p, k: _hard(np.sin(9 * k * np.hypot(u, v) + p[0])),
    "spokes": lambda u, v, p, k: _hard(np.sin(6 * np.arctan2(v, u) + p[0])),
    "blotches": lambda u, v, p, k: _hard(np.sin(4 * k * u + 1.7 * np.sin(3 * v + p[0])) + np.sin(5 * k * v + 1.7 * np.sin(4 * u + p[1]))),
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object of one class on its way through the T frames."""

    name: str
    path: np.ndarray  # [T, 2] centre: x, y
    area: np.ndarray  # [T] of the whole thing, hidden parts included
    angle: np.ndarray  # [T] radians
    colours: np.ndarray  # [2, 3] RGB in 0 to 1
    phase: np.ndarray  # [2] of the texture
    fineness: float


def draw_object(name, rng):
    """A thing of class `name`. Area, position and motion follow the same law for every class, heard or not."""
    area = rng.uniform(0.07, 0.15) * np.exp(np.linspace(-1, 1, T) * rng.uniform(-0.12, 0.12))
    margin = 0.75 * np.sqrt(
        area.max() / 1.5
    )  # a typical radius; corners of the longest shapes may leave the frame
    start, heading, length = (
        rng.uniform(margin, 1 - margin, 2),
        rng.uniform(0, 2 * np.pi),
        rng.uniform(0.08, 0.3),
    )
    end = np.clip(start + length * np.array([np.cos(heading), np.sin(heading)]), margin, 1 - margin)
    hsv = np.array([PALETTE[colour] for colour in LOOKS[name][2:]]) + rng.uniform(-1, 1, (2, 3)) * (
        0.025,
        0.08,
        0.08,
    )
    return Thing(
        name=name, area=area, path=start + np.linspace(0, 1, T)[:, None] * (end - start),
        angle=rng.uniform(-0.5, 0.5) + np.linspace(-0.5, 0.5, T) * rng.uniform(-0.6, 0.6),
        colours=np.array([_rgb(*colour) for colour in hsv]), phase=rng.uniform(0, 2 * np.pi, 2), fineness=rng.uniform(0.85, 1.15),
    )  # fmt: skip


def _rgb(hue, saturation, value):
    saturation, value = np.clip((saturation, value), 0, 1)
    sector = (np.array([5, 3, 1]) + 6 * hue) % 6
    return value * (1 - saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1))


@functools.cache
def _unit_area(shape):
    """Area of a shape in its own coordinates, so that things of all classes can be drawn equally large."""
    grid = np.linspace(-1.3, 1.3, 400)
    return (SHAPES[shape](grid, grid[:, None]) < 0).mean() * 2.6**2


def _look(thing, t, size):
    """Coverage [H, W] in 0 to 1 and the thing's own coordinates u, v of every pixel in frame t."""
    shape = LOOKS[thing.name][0]
    radius = np.sqrt(thing.area[t] / _unit_area(shape))
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = (pixels - thing.path[t, 0]) / radius, ((pixels - thing.path[t, 1]) / radius)[:, None]
    cos, sin = np.cos(thing.angle[t]), np.sin(thing.angle[t])
    u, v = (cos * x + sin * y).astype(np.float32), (cos * y - sin * x).astype(np.float32)
    return np.clip(0.5 - SHAPES[shape](u, v) * np.float32(radius * size), 0, 1), u, v


def render_frame(things, t, background):
    """Paint `things` in order, the last in front, on background [H, W, 3] in 0 to 1: image in 0 to 1, visible masks [len(things), H, W] bool."""
    image, masks = background.copy(), []
    for thing in things:
        cover, u, v = _look(thing, t, len(background))
        second = TEXTURES[LOOKS[thing.name][1]](u, v, thing.phase, thing.fineness)[..., None]
        first, other = thing.colours.astype(np.float32)
        image += cover[..., None] * (first + second * (other - first) - image)
        masks = [mask & (cover < 0.5) for mask in masks] + [cover >= 0.5]
    return image, np.array(masks)


def draw_scene(names, rng, visible=0.65):
    """Things of the classes `names`, layered at random, each with at least this share of itself in sight in every frame. Back to front."""
    order, grid = (
        rng.permutation(len(names)),
        np.zeros((48, 48, 3), np.float32),
    )  # judged on a fixed grid: the same scene at every size
    while True:
        things = [draw_object(names[k], rng) for k in order]
        gaps = [
            np.hypot(*(a.path - b.path).T) / (np.sqrt(a.area) + np.sqrt(b.area))
            for i, a in enumerate(things)
            for b in things[:i]
        ]
        if gaps and np.min(gaps) < 0.4:  # a cheap test first
            continue
        if all(
            (
                render_frame(things, t, grid)[1].mean((1, 2))
                >= visible * np.array([thing.area[t] for thing in things])
            ).all()
            for t in range(T)
        ):
            return things


def draw_background(rng, size):
    """A dull, smooth backdrop [H, W, 3] in 0 to 1: greyish, so that it looks like no class."""
    backdrop = np.full((size, size, 3), rng.uniform(0.3, 0.7), np.float32)
    for cells, grey, colour in ((3, 0.1, 0.03), (9, 0.04, 0.015)):
        coarse = rng.normal(0, grey, (cells, cells, 1)) + rng.normal(0, colour, (cells, cells, 3))
        for channel in range(3):
            plane = Image.fromarray(coarse[..., channel].astype(np.float32))
            backdrop[..., channel] += np.asarray(
                plane.resize((size, size), Image.Resampling.BICUBIC)
            )
    return np.clip(backdrop, 0.1, 0.9)


# ---------------------------------------------------------------- what a class sounds like

# f0 Hz, harmonics falling as 1/k^tilt (or `partials`, ratios to f0), raised around `formants` Hz; glide: octaves up and down, times a
# second; noise: band in Hz, at `hiss` times the tone's level. Loudness: strike (events a second, decay in s) or throb (Hz, depth).
# notes: semitones above f0, one drawn for each event.
TIMBRES = {
    "baby_laughter": dict(f0=400, tilt=0.8, formants=(1100, 3300), glide=(0.15, 2.5), throb=(5, 1.0)),
    "female_singing": dict(f0=330, tilt=1.0, formants=(850, 2900), glide=(0.05, 6), throb=(0.8, 0.3)),
    "male_speech": dict(f0=115, tilt=0.9, formants=(500, 1600), glide=(0.12, 1.2), throb=(3.5, 0.9)),
    "dog_barking": dict(f0=260, tilt=0.5, formants=(900,), noise=(500, 2500), hiss=0.6, strike=(2.8, 0.09)),
    "cat_meowing": dict(f0=620, tilt=0.6, formants=(1900,), glide=(0.35, 1), throb=(1.1, 0.8)),
    "lions_roaring": dict(f0=75, tilt=0.5, formants=(300,), noise=(80, 900), hiss=0.9, throb=(1.2, 0.7)),
    "horse_clip-clop": dict(f0=700, partials=(1, 1.9), noise=(600, 2200), hiss=1.0, strike=(5, 0.025), notes=(0, 4)),
    "coyote_howling": dict(f0=900, tilt=2.8, glide=(0.4, 1), throb=(1, 0.4)),
    "mynah_bird_singing": dict(f0=3200, tilt=2.5, glide=(0.3, 6), throb=(4, 1.0)),
    "playing_acoustic_guitar": dict(f0=200, tilt=0.8, formants=(600,), strike=(3, 0.22), notes=(0, 4, 7)),
    "playing_tabla": dict(f0=150, partials=(1, 1.5, 2.1, 2.9), noise=(150, 900), hiss=0.2, strike=(4.5, 0.1), notes=(0, 7)),
    "playing_violin": dict(f0=650, tilt=0.5, formants=(2600,), glide=(0.03, 5.5), throb=(1, 0.2), notes=(0, 2)),
    "playing_piano": dict(f0=290, tilt=2.2, strike=(4, 0.35), notes=(0, 4, 7)),
    "playing_ukulele": dict(f0=500, tilt=0.9, formants=(2200,), strike=(6.5, 0.06), notes=(0, 4, 7)),
    "playing_glockenspiel": dict(f0=1600, partials=(1, 2.76, 3.9), strike=(3.5, 0.25), notes=(0, 2, 4)),
    "helicopter": dict(f0=50, tilt=1.2, noise=(60, 1200), hiss=1.5, throb=(11, 1.0)),
    "race_car": dict(f0=260, tilt=0.3, glide=(0.25, 0.8), noise=(2500, 7500), hiss=0.25),
    "driving_buses": dict(f0=45, tilt=1.0, noise=(40, 450), hiss=0.7, throb=(0.7, 0.2)),
    "ambulance_siren": dict(f0=900, tilt=1.0, glide=(0.3, 2)),
    "typing_on_computer_keyboard": dict(noise=(2500, 6500), strike=(8, 0.012)),
    "chainsawing_trees": dict(f0=110, tilt=0.1, noise=(2000, 7000), hiss=1.0, throb=(22, 0.5)),
    "cap_gun_shooting": dict(noise=(300, 7000), strike=(2.6, 0.07)),
    "lawn_mowing": dict(f0=85, tilt=0.6, noise=(300, 3000), hiss=1.2, throb=(14, 0.5)),
}  # fmt: skip


def sound(name, rng, seconds=T):
    """A stretch of class `name`'s timbre, [seconds * RATE] in ±1, without a silent second; pitch, tempo, phase and level vary."""
    timbre, clock = TIMBRES[name], np.arange(int(seconds * RATE)) / RATE
    pitch, tempo = np.exp(rng.uniform(-0.12, 0.12, 2))
    rate, decay = timbre.get("strike", (2, None))
    onsets = (np.cumsum(rng.uniform(0.7, 1.3, int(2 * rate * (seconds + 2)))) - 2) / (
        rate * tempo
    )  # from before 0 to beyond the end
    event = np.searchsorted(onsets, clock, side="right") - 1
    wave = np.zeros(len(clock))
    if "f0" in timbre:
        notes = rng.choice(timbre.get("notes", (0,)), len(onsets))[event]
        octaves, speed = timbre.get("glide", (0, 1))
        glide = octaves * np.sin(2 * np.pi * (speed * tempo * clock + rng.random()))
        f0 = timbre["f0"] * pitch
        wave = _tone(
            2 * np.pi / RATE * np.cumsum(f0 * np.exp2(notes / 12 + glide)), f0, rng, **timbre
        )
        wave /= wave.std()
    if "noise" in timbre:
        wave += timbre.get("hiss", 1) * _noise(len(clock), rng, np.array(timbre["noise"]) * pitch)
    if decay:
        wave *= rng.uniform(0.6, 1, len(onsets))[event] * np.exp(-(clock - onsets[event]) / decay)
    elif "throb" in timbre:
        speed, depth = timbre["throb"]
        wave *= 1 - depth * (0.5 + 0.5 * np.sin(2 * np.pi * (speed * tempo * clock + rng.random())))
    wave /= wave.std()
    wave += 10 ** (-rng.uniform(20, 30) / 20) * _noise(
        len(clock), rng, (50, rng.uniform(1000, 7500))
    )
    wave *= 10 ** (-rng.uniform(18, 26) / 20)
    return wave / max(1, np.abs(wave).max() / 0.95)


def _tone(phase, pitch, rng, partials=(), tilt=1.0, formants=(), **_):
    """Sum of sines at the given phase [samples], of a fundamental of `pitch` Hz."""
    if partials:
        return sum(
            np.sin(ratio * phase + rng.uniform(0, 2 * np.pi)) / (k + 1)
            for k, ratio in enumerate(partials)
        )
    k = np.arange(
        1, max(2, int(5000 / pitch))
    )  # glides and notes may raise it by half an octave: below RATE / 2 still
    level = k**-tilt * (
        1
        + 6
        * sum(np.exp(-(((k * pitch - formant) / (0.15 * formant)) ** 2)) for formant in formants)
    )
    spectrum = np.zeros(
        2049, complex
    )  # one period by inverse FFT, then looked up: a sine for each harmonic would be ten times slower
    spectrum[k] = level * np.exp(1j * rng.uniform(0, 2 * np.pi, len(k)))
    return np.fft.irfft(spectrum)[(phase * (4096 / (2 * np.pi))).astype(np.int64) % 4096]


def _noise(samples, rng, band):
    """White noise between two frequencies, of unit level."""
    low, high = (min(int(hertz * samples / RATE), samples // 2) for hertz in band)
    spectrum = np.zeros(samples // 2 + 1, complex)
    spectrum[low:high] = rng.standard_normal((high - low, 2)) @ (1, 1j)
    wave = np.fft.irfft(spectrum, samples)
    return wave / wave.std()


# ---------------------------------------------------------------- clips


def make_clip(name, rng, size=96, classes=CLASSES):
    """One S4 clip: frames [T, H, W, 3] uint8, masks [T, H, W] bool of the heard thing, wave [samples]. Silent things come from `classes`."""
    others = [other for other in classes if other != name]
    silent = rng.choice(others, min(rng.integers(1, 3), len(others)), replace=False)
    things, wave, backdrop = (
        draw_scene([name, *silent.tolist()], rng),
        sound(name, rng),
        draw_background(rng, size),
    )
    heard = [thing.name for thing in things].index(name)
    frames, visible = paint(things, backdrop, rng)
    return frames, visible[:, heard], wave


def paint(things, backdrop, rng):
    """Frames [T, H, W, 3] uint8 with a little camera grain, and the visible pixels of each thing [T, len(things), H, W] bool."""
    size = len(backdrop)
    frames, masks = (
        np.empty((T, size, size, 3), np.uint8),
        np.empty((T, len(things), size, size), bool),
    )
    for t in range(T):
        image, masks[t] = render_frame(things, t, backdrop)
        image += 0.015 * rng.standard_normal((size, size, 1), dtype=np.float32)
        frames[t] = np.clip(image * 255 + 0.5, 0, 255)
    return frames, masks


def chosen_classes(dataset, root, classes, seed, size, counts):
    """The classes of a synthetic set in CLASSES' order, once all arguments are found good and the set is not there yet."""
    unknown = sorted(set(classes or ()) - set(CLASSES))
    if unknown:
        raise AtlasError(
            f"synthetic {dataset.upper()}: no class {unknown[0]!r}; the classes are {', '.join(CLASSES)}"
        )
    if classes is not None and len(set(classes)) < 2:
        raise AtlasError(
            f"synthetic {dataset.upper()}: give at least two classes; the silent objects of a clip are of another class than the heard one"
        )
    if size < 32 or seed < 0 or min(counts) < 0:
        raise AtlasError(
            f"synthetic {dataset.upper()}: size must be at least 32, seed and clip counts at least 0; got size {size}, seed {seed}, clips {counts}"
        )
    tree = Path(root, CSVS[dataset]).parent
    if tree.exists() or Path(root).is_file():
        raise AtlasError(
            f"{tree} is there already; a synthetic set is never written over anything: use it as it is, remove it or name another --out"
        )
    return [name for name in CLASSES if classes is None or name in classes]


def synth_s4(root, seed=0, size=96, train=32, val=3, test=5, classes=None, progress=True):
    """Write a synthetic S4 below `root`, as Single-source/: `train`, `val` and `test` clips for each of `classes` (default: all 23), the whole tree or nothing."""
    root, counts = Path(root), (train, val, test)
    classes = chosen_classes("s4", root, classes, seed, size, counts)
    jobs = [
        (name, split, i)
        for name in classes
        for split, count in zip(SPLITS, counts)
        for i in range(count)
    ]
    clips, tree = [], Path(root, CSVS["s4"]).parent
    with built_beside(tree, inside=tree.name) as folder:
        for name, split, i in tqdm(
            jobs, desc="synthetic S4", unit="clip", disable=None if progress else True
        ):
            where = CLASSES.index(name), SPLITS.index(split), i
            video = "s{:02d}{}{:05d}".format(
                *where
            )  # unique in its first 11 characters, which stand for the YouTube id
            clips.append(
                write_clip(
                    s4_clip(folder, video, name, split),
                    *make_clip(name, np.random.default_rng([seed, *where]), size, classes),
                )
            )
        write_csv(folder, clips)
    return root
