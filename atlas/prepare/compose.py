"""An open AVS set from a stock of real pictures and sounds, as AVSBench's S4 or MS3 tree.

Pictures stand side by side: in S4 two, one heard; in MS3 two or three, one or two heard, each in
seconds of its own. The truth of a second is every pixel of what is heard in it.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from atlas.audio import read_wave
from atlas.clips import RATE, SPLITS, T, built_beside, ms3_clip, read_mask, s4_clip
from atlas.errors import AtlasError
from atlas.prepare.stock import LEAST, read_pictures, read_stock, sources_of
from atlas.prepare.tree import draw_schedule, gate, write_clip, write_csv

CLIPS = {"s4": 40, "ms3": 1000}  # train clips: of a class (S4), in all (MS3)
PARTS = {"val": 4, "test": 2}  # a fourth and half as many at most, and
CLIPS_A_SOURCE = 2  # of a class's pictures, or of its sounds where these are fewer
SHARE = {"train": 0.6, "test": 0.25, "val": 0.15}  # of the sources of a class
DISTRACTORS = 0.2  # of the silent pictures are of classes that are never heard
ONE_HEARD = 0.6  # of the MS3 clips; in the others a second picture is heard too
CHANCES = (0.9, 0.5)  # MS3: that the first and the second heard picture sound in a given second
VISIBLE = 0.02  # of every frame shows the class of each picture
RMS = 0.05  # of a recording


@dataclass(frozen=True)
class Recipe:
    dataset: str = "s4"
    seed: int = 0
    clips: int | None = None  # None: CLIPS
    size: int = 128  # height and width in pixels
    classes: tuple | None = None  # to be heard; None: all that have enough
    alone: float = 0.0  # share of the clips that show one picture only


def make_open_set(stock, out, recipe):
    """Make the set of a Recipe at `out`; return the report, which is also out/compose.json.

    It holds the recipe; heard {class: {split: count()}}; clips [{id, split, what make_clip says}].
    """
    if Path(out).exists():
        raise AtlasError(f"{out} is there already: remove it, or give another --out")
    if recipe.size < 32 or recipe.seed < 0 or (recipe.clips or 4) < 4 or not 0 <= recipe.alone <= 1:
        raise AtlasError("compose needs --size of 32, --seed of 0, --clips of 4, --alone of 0 to 1")
    pools = gather(stock, recipe)
    sources = sorted({picture.source for pool in pools.values() for picture in pool.pictures})
    rows, made, takes = [], [], Counter()
    with built_beside(out) as folder:
        for split, pool in pools.items():
            for first in tqdm(pool.plan(split, recipe), f"composing {split}", disable=None):
                *files, entry = make_clip(pool, first, recipe)
                source, mask = entry["source"], entry["mask"]
                # clips.source_of() finds the source in it
                name = f"p{sources.index(source):010d}_{takes[source]}"
                takes[source] += 1
                clip = ms3_clip(folder, name, split, mask)
                if recipe.dataset == "s4":
                    clip = s4_clip(folder, name, first, split, mask)
                rows.append(write_clip(clip, *files))
                made.append({"id": name, "split": split, **entry})
        heard = {name: {split: count(made, name, split) for split in SPLITS} for name in pool.heard}
        report = {"recipe": asdict(recipe), "heard": heard, "clips": made}
        Path(folder, "compose.json").write_text(json.dumps(report, indent=1) + "\n")
        write_csv(folder, recipe.dataset, rows)
    return report


def count(made, name, split):
    mine = [p for clip in made if clip["split"] == split for p in clip["pictures"]]
    mine = [p for p in mine if p["recording"] and p["class"] == name]
    pictures, sounds = ({p[key] for p in mine} for key in ("source", "recording_source"))
    return {"clips": len(mine), "picture_sources": len(pictures), "sound_sources": len(sounds)}


def gather(stock, recipe):
    """{split: Pool}: the stock divided for a recipe."""
    pictures, sounds = read_stock(stock)
    pictures = [p for p in tqdm(pictures, "reading masks", disable=None) if large_enough(p)]
    shown, known = sources_of(pictures), sources_of(sounds)
    least = 3 if recipe.classes else LEAST  # three can be divided
    enough = {name for name in shown if min(len(shown[name]), len(known[name])) >= least}
    heard = sorted(set(recipe.classes or enough))
    if not enough.issuperset(heard) or not heard:
        few = ", ".join(name for name in heard if name not in enough) or "every class"
        raise AtlasError(f"too few sources of pictures or of sounds, {least} needed: {few}")
    rng = np.random.default_rng(recipe.seed)
    seen_in = divide(shown, heard, rng)
    heard_in = divide({name: known[name] for name in heard}, heard, rng)
    pools = {}
    for split in SPLITS:
        seen = [picture for picture in pictures if seen_in[picture.source] == split]
        own = [sound for sound in sounds if heard_in.get(sound.source) == split]
        pools[split] = Pool(seen, own, heard, rng, Counter())
    return pools


def large_enough(picture):
    """Whether the class fills VISIBLE of a half frame in each mask, with room to cut."""
    masks = [read_mask(path) for path in picture.masks]
    return all(m.sum() >= 1.5 * VISIBLE * min(m.shape[0], 2 * m.shape[1]) ** 2 for m in masks)


def divide(sources, heard, rng):
    """{source: split} of {class: sources}, each class near SHARE, the rarest first."""
    order = sorted(sources, key=lambda name: (name not in heard, len(sources[name]), name))
    for _ in range(200):  # sources of several classes may leave one without any in a split
        split_of = {}
        for name in order:
            mine = sorted(sources[name])
            got = Counter(split_of[source] for source in mine if source in split_of)
            for source in rng.permutation([s for s in mine if s not in split_of]).tolist():
                lack = {s: (not got[s], SHARE[s] * len(mine) - got[s]) for s in SHARE}
                split_of[source] = max(SHARE, key=lack.get)
                got[split_of[source]] += 1
        lacking = [c for c in heard if len({split_of[s] for s in sources[c]}) < len(SPLITS)]
        if not lacking:
            return split_of
    what = f"{lacking[0]} shares its sources with other classes and cannot be split"
    raise AtlasError(f"{what}: add sources, or leave a class out with --classes")


@dataclass
class Pool:
    """The pictures and sounds of one split, and how often each was used."""

    pictures: list
    sounds: list
    heard: list  # classes
    rng: np.random.Generator
    used: Counter

    def plan(self, split, recipe):
        """The class that each clip is about."""
        train = recipe.clips or CLIPS[recipe.dataset]
        if recipe.dataset == "ms3":
            train = -(-train // len(self.heard))
        if split == "train":
            return self.heard * train
        shown, known = sources_of(self.pictures), sources_of(self.sounds)
        most = {c: CLIPS_A_SOURCE * min(len(shown[c]), len(known[c])) for c in self.heard}
        return [c for k in range(train // PARTS[split]) for c in self.heard if k < most[c]]

    def showing(self, name, without):
        return [p for p in self.pictures if p.category == name and not p.also & set(without)]

    def draw(self, role, items):
        """One of `items` by chance, of those whose source was used least in this `role`."""
        order = self.rng.permutation(len(items)).tolist()
        keys = [((role, i.category, i.source), (role, i.category, i.name, 0)) for i in items]
        best = min(order, key=lambda k: [self.used[key] for key in keys[k]])
        self.used.update(keys[best])
        return items[best]

    def cast(self, first, recipe):
        """(heard classes, silent classes) of a clip in which `first` is heard the most."""
        heard, silent, wanted = [first], [], 2
        if self.rng.random() < recipe.alone:
            return heard, silent
        if recipe.dataset == "ms3":
            wanted = self.rng.integers(2, 4)
            if self.rng.random() >= ONE_HEARD:
                beside = [c for c in self.heard if c != first]
                beside = [c for c in beside if self.showing(first, {c}) and self.showing(c, heard)]
                heard += self.rng.choice(beside, min(1, len(beside))).tolist()
        for _ in range(wanted - len(heard)):
            names = {p.category for p in self.pictures if not p.also & set(heard)}
            names = sorted(names - {*heard, *silent})
            usual = [name for name in names if name in self.heard]
            rare = [name for name in names if name not in self.heard]
            if rare and (not usual or self.rng.random() < DISTRACTORS):
                usual = rare
            if usual:
                silent.append(str(self.rng.choice(usual)))
        if len(heard) + len(silent) < 2:
            what = f"in one of the splits no picture without {first} can stand beside it"
            raise AtlasError(f"{what}: add pictures, or leave it out with --classes")
        return heard, silent


def make_clip(pool, first, recipe):
    """(frames [T, H, W, 3] uint8, masks [T, H, W] bool, wave [T * RATE], entry of the report).

    The entry: source, of the picture of `first`; mask, "drawn" where all of the heard are; heard,
    classes; pictures from left to right, with their columns [from, to).
    """
    heard, silent = pool.cast(first, recipe)
    names = heard + silent
    edges = np.linspace(0, recipe.size, len(names) + 1).round().astype(int).tolist()
    wave = np.zeros(T * RATE)
    views, shown = [], []
    for place, left, right in zip(pool.rng.permutation(len(names)).tolist(), edges, edges[1:]):
        name = names[place]
        sounding = place < len(heard)
        pictures = pool.showing(name, {*heard} - {name})
        picture = pool.draw("heard" if sounding else "silent", pictures)
        seen, mask = view(picture, (right - left, recipe.size), pool.rng)
        schedule = np.full(T, sounding)
        recording = recording_source = None
        if sounding:
            sound = pool.draw("sound", [s for s in pool.sounds if s.category == name])
            recording, recording_source = sound.name, sound.source
            own = load_sound(sound.files[0])
            if recipe.dataset == "ms3":
                schedule = draw_schedule(own, CHANCES[place], pool.rng)
            wave += own * gate(schedule)
        views.append((seen, mask & schedule[:, None, None]))
        entry = {"class": name, "picture": picture.name, "source": picture.source}
        entry |= {"mask": picture.mask, "columns": [left, right]}
        entry["schedule"] = schedule.astype(int).tolist()
        shown.append(entry | {"recording": recording, "recording_source": recording_source})
    source = next(entry["source"] for entry in shown if entry["class"] == first)
    drawn = all(entry["mask"] == "drawn" for entry in shown if entry["recording"])
    report = {"source": source, "mask": "drawn" if drawn else "made"}
    report |= {"heard": heard, "pictures": shown}
    wave /= max(1, np.abs(wave).max())  # each recording stays within 1, their sum may not
    frames, masks = (np.concatenate(parts, axis=2) for parts in zip(*views))
    return frames, masks, wave, report


def view(picture, size, rng):
    """(frames [T, H, W, 3] uint8, masks [T, H, W] bool) of a `size` (W, H): a window pans and zooms
    around the object. It is the first of 30 draws that keeps VISIBLE in sight, or the best."""
    width, height = size
    pairs = read_pictures(picture) * (T // len(picture.files))
    high, wide = pairs[0][1].shape
    middle = np.array([np.argwhere(mask).mean(0)[::-1] + 0.5 for _, mask in pairs])  # [T, 2], x y
    masks = [Image.fromarray(mask) for _, mask in pairs]
    tallest = min(high, wide * height / width)
    time = np.linspace(-0.5, 0.5, T)[:, None]
    most = -1
    for _ in range(30):
        zoom = rng.uniform(0.7, 1) * np.linspace(1, rng.uniform(0.92, 1.08), T)
        tall = tallest * np.clip(zoom, 0.6, 1)
        extent = np.stack([tall * width / height, tall], axis=1)  # [T, 2]
        centre = middle + rng.uniform(-0.25, 0.25, 2) * extent[0]
        centre = centre + time * rng.uniform(-0.06, 0.06, 2) * tallest
        corner = np.clip(centre - extent / 2, 0, [wide, high] - extent)
        boxes = np.concatenate([corner, corner + extent], axis=1).clip(0, [wide, high] * 2).tolist()
        cut = np.stack([m.resize(size, Image.NEAREST, box) for m, box in zip(masks, boxes)])
        seen = cut.mean((1, 2)).min() * width / height
        if seen > most:
            most, best, kept = seen, boxes, cut
        if seen >= VISIBLE:
            break
    frames = [Image.fromarray(f).resize(size, Image.BILINEAR, b) for (f, _), b in zip(pairs, best)]
    return np.stack(frames), kept


def load_sound(path):
    """A recording at one loudness, [T * RATE]: trimmed of silence, looped if short."""
    wave = read_wave(path).numpy()
    audible = np.flatnonzero(np.abs(wave) > 1e-3 * np.abs(wave).max(initial=0))
    if not len(audible):
        raise AtlasError(f"the sound {path} is silent: remove it from the stock")
    wave = np.resize(wave[audible[0] : audible[-1] + 1], T * RATE)  # repeats it
    return wave * min(RMS / np.sqrt(np.mean(wave**2)), 1 / np.abs(wave).max())
