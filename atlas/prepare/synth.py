"""Synthetic sets in AVSBench's trees, made from a seed: only the sound tells what is heard.

A class has its own look (things.py) and timbre (timbres.py). The mask of a second is what is seen
of the things heard in it. S4: one heard and one or two silent things. MS3: two or three things, of
which one or two of one scene are heard, each in seconds of its own.
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from atlas.clips import CSVS, RATE, SPLITS, T, built_beside, ms3_clip, s4_clip
from atlas.errors import AtlasError
from atlas.prepare.things import CLASSES, draw_background, draw_scene, paint
from atlas.prepare.timbres import sound
from atlas.prepare.tree import draw_schedule, gate, write_clip, write_csv

CLIPS = {"s4": (32, 3, 5), "ms3": (1200, 60, 120)}  # of each split: of a class (S4), in all (MS3)
SCENES = (  # classes of like log-mel spectra, so that a cluster of sounds is a cluster of classes
    ("lions_roaring", "race_car", "chainsawing_trees", "lawn_mowing"),
    ("playing_glockenspiel", "typing_on_computer_keyboard", "cap_gun_shooting"),
    ("female_singing", "mynah_bird_singing", "playing_violin"),
    ("baby_laughter", "coyote_howling", "ambulance_siren"),
    ("male_speech", "playing_acoustic_guitar", "playing_tabla", "playing_piano", "helicopter",
     "driving_buses"),
    ("dog_barking", "cat_meowing", "horse_clip-clop", "playing_ukulele"),
)  # fmt: skip
CHANCES = (0.85, 0.5)  # that the first and the second heard thing are heard in a given second


def make_set(dataset, root, seed=0, size=96, classes=CLASSES, **counts):
    """Write a synthetic tree below `root`, whole or not at all; return the root.

    counts: the clips of each split, where not CLIPS. More clips begin with the same ones.
    """
    tree = Path(root, CSVS[dataset]).parent
    counts = dict(zip(SPLITS, CLIPS[dataset])) | counts
    if len(set(classes)) < 2 or not set(classes) <= set(CLASSES):
        what = f"{', '.join(classes)}: give two classes or more of"
        raise AtlasError(f"{what} {', '.join(CLASSES)}")
    classes = [name for name in CLASSES if name in classes]
    if size < 32 or min(seed, *counts.values()) < 0:
        given = f"size {size}, seed {seed}, clips {counts}"
        raise AtlasError(f"{given}: the size must be at least 32, the others 0")
    if tree.exists() or tree.parent.is_file():
        raise AtlasError(f"{tree} is there already: remove it, or name another --out")
    clips_of = {"s4": s4_clips, "ms3": ms3_clips}[dataset]
    total = sum(counts.values()) * (len(classes) if dataset == "s4" else 1)
    with built_beside(tree, inside=tree.name) as folder:
        made = clips_of(folder, seed, size, classes, counts)
        bar = tqdm(made, f"synthetic {dataset.upper()}", total, disable=None)
        write_csv(folder, dataset, [write_clip(*files) for files in bar])
    return Path(root)


def s4_clips(folder, seed, size, classes, counts):
    """Yield (clip, frames, masks, wave)."""
    for name in classes:
        for k, split in enumerate(SPLITS):
            for i in range(counts[split]):
                where = CLASSES.index(name), k, i
                clip = s4_clip(folder, "s{:02d}{}{:05d}".format(*where), name, split)
                yield clip, *make_clip(name, np.random.default_rng([seed, *where]), size, classes)


def make_clip(name, rng, size=96, classes=CLASSES):
    """One S4 clip: frames [T, H, W, 3] uint8, masks [T, H, W] bool, wave [samples]."""
    others = [other for other in classes if other != name]
    silent = rng.choice(others, min(rng.integers(1, 3), len(others)), replace=False)
    things = draw_scene([name, *silent.tolist()], rng)
    wave = sound(name, rng)
    frames, visible = paint(things, draw_background(rng, size), rng)
    return frames, visible[:, [thing.name for thing in things].index(name)], wave


def ms3_clips(folder, seed, size, classes, counts):
    """Yield as s4_clips, two clips of a cast; then write scenes.json: what is heard and when."""
    scenes = {}
    for k, split in enumerate(SPLITS):
        for i in range(counts[split]):
            where = [seed, k, i // 2]
            name = f"m{k}{i // 2:09d}" + "_2" * (i % 2)
            heard, silent = draw_cast(np.random.default_rng(where), classes)
            rng = np.random.default_rng([*where, i % 2])
            *files, schedules = make_ms3_clip(heard, silent, rng, size)
            yield ms3_clip(folder, name, split), *files
            seconds = {thing: np.flatnonzero(on).tolist() for thing, on in schedules.items()}
            scenes[name] = {"heard": seconds, "silent": silent}
    Path(folder, CSVS["ms3"]).with_name("scenes.json").write_text(json.dumps(scenes))


def draw_cast(rng, classes):
    """(one or two heard classes of one scene, silent ones): two or three in all."""
    heard = [str(rng.choice(classes))]
    scene = next(set(names) for names in SCENES if heard[0] in names)
    beside = [name for name in classes if name in scene - {heard[0]}]
    if beside and rng.random() < 0.5:
        heard += rng.choice(beside, 1).tolist()
    others = [name for name in classes if name not in heard]
    silent = rng.choice(others, min(rng.integers(2, 4) - len(heard), len(others)), replace=False)
    return heard, silent.tolist()


def make_ms3_clip(heard, silent, rng, size=96):
    """What make_clip gives, and schedules {class: [T] bool}."""
    things = draw_scene(heard + silent, rng)
    backdrop = draw_background(rng, size)
    wave = np.zeros(T * RATE)
    schedules = {}
    for name, chance in zip(heard, CHANCES):
        own = sound(name, rng)
        schedules[name] = draw_schedule(own, chance, rng)
        wave += own * gate(schedules[name])
    frames, visible = paint(things, backdrop, rng)  # visible [T, things, H, W]
    on = np.array([schedules.get(thing.name, np.zeros(T, bool)) for thing in things])  # [things, T]
    masks = (visible & on.T[:, :, None, None]).any(1)
    return frames, masks, wave / max(1, np.abs(wave).max() / 0.95), schedules
