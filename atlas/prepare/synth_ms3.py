"""A synthetic MS3: two or three of synth's things in a frame, some of them heard, each on its own schedule; in MS3's tree, made from a seed.

As real MS3's clips come from videos with a cast, the two clips of a source share theirs: what is heard is of one scene (SCENES), what is only seen is of any class.
Frame t shows second t. A thing is heard in the seconds of its schedule; now and then a whole clip is silent for a second. The mask of second t is the visible part of
all things heard in it. The heard ones are drawn, placed and layered exactly as the silent ones are, so that nothing but the sound tells them apart.

Multi-sources/scenes.json tells what is in a clip and when it is heard. The generator knows it; no reader opens it and the learner never sees it.

A clip depends on (seed, split, its number) and on the classes of the set, not on how many clips are made: a larger set begins with the same clips.
"""

import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from atlas.audio import RATE, draw_schedule, gate
from atlas.clips import CSVS, SPLITS, T, built_beside, ms3_clip, write_clip, write_csv
from atlas.prepare.synth import chosen_classes, draw_background, draw_scene, paint, sound

SCENES = (  # classes whose log-mel spectra lie closest, so that clusters of sound, which TF-CL's stream drifts through, are clusters of classes
    ("lions_roaring", "race_car", "chainsawing_trees", "lawn_mowing"),
    ("playing_glockenspiel", "typing_on_computer_keyboard", "cap_gun_shooting"),
    ("female_singing", "mynah_bird_singing", "playing_violin"),
    ("baby_laughter", "coyote_howling", "ambulance_siren"),
    ("male_speech", "playing_acoustic_guitar", "playing_tabla", "playing_piano", "helicopter", "driving_buses"),
    ("dog_barking", "cat_meowing", "horse_clip-clop", "playing_ukulele"),
)  # fmt: skip
CHANCES = (0.85, 0.5)  # that the first and the second heard thing are heard in a given second


def draw_cast(rng, classes):
    """(heard, silent): one or two classes of one scene, and others, so that there are two or three in all."""
    first = str(rng.choice(classes))
    scene = [
        name
        for names in SCENES
        if first in names
        for name in names
        if name in classes and name != first
    ]
    heard = [first] + (rng.choice(scene, 1).tolist() if scene and rng.random() < 0.5 else [])
    others = [name for name in classes if name not in heard]
    silent = rng.choice(others, min(rng.integers(2, 4) - len(heard), len(others)), replace=False)
    return heard, silent.tolist()


def make_ms3_clip(heard, silent, rng, size=96):
    """One clip: frames [T, H, W, 3] uint8, masks [T, H, W] bool of what is heard in each second, wave [samples], schedules {class: [T] bool}."""
    things, backdrop = draw_scene([*heard, *silent], rng), draw_background(rng, size)
    wave, schedules = np.zeros(T * RATE), {}
    for name, chance in zip(heard, CHANCES):
        own = sound(name, rng)
        schedules[name] = draw_schedule(own, chance, rng)
        wave += own * gate(schedules[name])
    frames, visible = paint(things, backdrop, rng)  # visible [T, things, H, W]
    on = np.array([schedules.get(thing.name, np.zeros(T, bool)) for thing in things])  # [things, T]
    masks = (visible & on.T[:, :, None, None]).any(1)
    return frames, masks, wave / max(1, np.abs(wave).max() / 0.95), schedules


def synth_ms3(root, seed=0, size=96, train=1200, val=60, test=120, classes=None, progress=True):
    """Write a synthetic MS3 of `train`, `val` and `test` clips below `root`, as Multi-sources/, the whole tree or nothing; what else is in `root` stays."""
    root, counts = Path(root), dict(zip(SPLITS, (train, val, test)))
    classes = chosen_classes("ms3", root, classes, seed, size, (train, val, test))
    clips, scenes, tree = [], {}, Path(root, CSVS["ms3"]).parent
    with built_beside(tree, inside=tree.name) as folder:
        for split, i in tqdm(
            [(s, i) for s in SPLITS for i in range(counts[s])],
            desc="synthetic MS3",
            unit="clip",
            disable=None if progress else True,
        ):
            where = [seed, SPLITS.index(split), i // 2]
            source = "m{}{:09d}".format(*where[1:])
            name = f"{source}_2" if i % 2 else source
            heard, silent = draw_cast(np.random.default_rng(where), classes)
            *files, schedules = make_ms3_clip(
                heard, silent, np.random.default_rng([*where, i % 2]), size
            )
            clips.append(write_clip(ms3_clip(folder, name, split), *files))
            scenes[name] = {
                "heard": {thing: np.flatnonzero(on).tolist() for thing, on in schedules.items()},
                "silent": silent,
            }
        Path(folder, tree.name, "scenes.json").write_text(json.dumps(scenes))
        write_csv(folder, clips, "ms3")
    return root
