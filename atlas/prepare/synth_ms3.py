"""A synthetic MS3: two or three of synth's things in a frame, one or two of them heard.

The two clips of a source share their cast, as clips cut from one video do. What is heard is of one
scene (SCENES), each in seconds of its own. The mask of a second is what is seen of the things heard
in it. Multi-sources/scenes.json, which no reader opens, tells what is heard in a clip and when.
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from atlas.clips import CSVS, RATE, SPLITS, T, built_beside, ms3_clip
from atlas.prepare.synth import chosen_classes, draw_background, draw_scene, paint
from atlas.prepare.timbres import sound
from atlas.prepare.tree import draw_schedule, gate, write_clip, write_csv

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


def draw_cast(rng, classes):
    """(heard, silent): one or two classes of one scene, and others: two or three in all."""
    heard = [str(rng.choice(classes))]
    scene = next(set(names) for names in SCENES if heard[0] in names)
    beside = [name for name in classes if name in scene - {heard[0]}]
    if beside and rng.random() < 0.5:
        heard += rng.choice(beside, 1).tolist()
    others = [name for name in classes if name not in heard]
    silent = rng.choice(others, min(rng.integers(2, 4) - len(heard), len(others)), replace=False)
    return heard, silent.tolist()


def make_ms3_clip(heard, silent, rng, size=96):
    """Frames [T, H, W, 3] uint8, masks [T, H, W] bool, wave, and schedules {class: [T] bool}."""
    things = draw_scene([*heard, *silent], rng)
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


def synth_ms3(root, seed=0, size=96, train=1200, val=60, test=120, classes=None, progress=True):
    """Write a synthetic MS3 as ROOT/Multi-sources/, the whole tree or nothing; return the root.

    `train`, `val`, `test`: clips in all. `classes`: default all 23.
    """
    tree = Path(root, CSVS["ms3"]).parent
    counts = (train, val, test)
    classes = chosen_classes(tree, classes, seed, size, counts)
    jobs = [(split, i) for split in range(3) for i in range(counts[split])]
    clips, scenes = [], {}
    with built_beside(tree, inside=tree.name) as folder:
        for split, i in tqdm(jobs, "synthetic MS3", unit="clip", disable=not progress or None):
            where = [seed, split, i // 2]
            name = f"m{split}{i // 2:09d}" + "_2" * (i % 2)
            heard, silent = draw_cast(np.random.default_rng(where), classes)
            rng = np.random.default_rng([*where, i % 2])
            *files, schedules = make_ms3_clip(heard, silent, rng, size)
            clips.append(write_clip(ms3_clip(folder, name, SPLITS[split]), *files))
            seconds = {thing: np.flatnonzero(on).tolist() for thing, on in schedules.items()}
            scenes[name] = {"heard": seconds, "silent": silent}
        Path(folder, tree.name, "scenes.json").write_text(json.dumps(scenes))
        write_csv(folder, clips, "ms3")
    return Path(root)
