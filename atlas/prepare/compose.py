"""Open AVS sets: pictures and videos with masks x environmental sounds, joined by shared class, written as an AVSBench tree, S4 or MS3.

AVSBench is by e-mail request only; PASCAL VOC, DAVIS and ESC-50 are a download away (scan.py reads them). A clip is pictures side by side.

- S4: two pictures and one recording. One picture shows the heard class; the other is silent and does not contain that class.
  Truth = every pixel of the heard class in the frame.
- MS3: two or three pictures of different classes, none with a pixel of another's class. One or two of them are heard, each with a recording
  and seconds of its own. Truth at second t = every pixel of every class heard in second t; nothing where nothing sounds.

What keeps it honest:
- Pictures, videos and recordings never cross splits.
- Silent pictures are drawn from the heard pictures of the other classes (one in five: from classes that are never heard), cut and moved in the
  same way, so the picture does not tell whether it is heard; recordings have one loudness.
- A class needs three sources of pictures that show it and three recordings; a class of fewer is dropped and named.

Shapes: T frames (5), H W pixels of the square frame; each picture fills a column of it. Masks are 1 on the sounding object.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from atlas.audio import RATE, draw_schedule, gate
from atlas.clips import SPLITS, T, built_beside, ms3_clip, s4_clip, write_clip, write_csv
from atlas.errors import AtlasError
from atlas.prepare.scan import VISIBLE, load_sound, read_image, read_mask
from atlas.prepare.stock import (
    deck,
    picture_deck,
    showing,
    shown_classes,
    sound_deck,
    stand_together,
    take_stock,
)

DISTRACTORS = 0.2  # silent pictures of classes that are never heard
ALONE = 0.6  # MS3: clips in which only one picture is ever heard
SOUNDS = (
    0.9,
    0.5,
)  # MS3: the chance of the first and of the second heard picture to sound in a second


def compose_s4(
    out,
    voc=None,
    davis=None,
    esc=None,
    seed=0,
    clips=24,
    val=None,
    test=None,
    size=128,
    classes=None,
    class_map=None,
    progress=True,
):
    """Build the S4 set at `out` and return its report, which is also written to out/compose.json.

    clips, val, test: clips a class in each split (val: a quarter, test: half of `clips`). `classes`: only these; `class_map`: another map file.
    The report: seed, arguments, kept {class: {split: {"clips", "picture_sources", "recordings"}}}, dropped {class: reason},
    unknown [DAVIS sequences whose class nobody tells], clips [{id, split, class, side, name and source of both pictures and of the recording}].
    """
    counts = {
        "train": clips,
        "val": -(-clips // 4) if val is None else val,
        "test": -(-clips // 2) if test is None else test,
    }
    fits = lambda pictures, name, kept: any(name not in p.contains for p in pictures)
    stock = take_stock(out, voc, davis, esc, seed, counts, size, classes, class_map, progress, fits)
    return write_set(
        out,
        "s4",
        stock.report,
        draw_s4(stock, size),
        len(stock.kept) * sum(counts.values()),
        progress,
    )


def compose_ms3(
    out,
    voc=None,
    davis=None,
    esc=None,
    seed=0,
    clips=400,
    val=None,
    test=None,
    size=128,
    classes=None,
    class_map=None,
    progress=True,
):
    """Build the MS3 set at `out` and return its report, which is also written to out/compose.json.

    clips, val, test: clips in each split (val: a sixth, test: a quarter of `clips`); the other arguments are compose_s4's. So is the report, but
    kept counts the clips in which a class is ever heard, and its clips are [{id, split, heard [classes, the dominant one first],
    pictures [from left to right: {class, picture, source, columns [first, behind the last], schedule [T x 0 or 1], recording, recording_source}]}].

    One picture dominates. TF-CL's stream drifts by clusters of the clips' audio features, and with the four classes that open data leaves, clips
    of two equal voices would all fall between the clusters. So each class dominates equally many clips; in ALONE of them nothing else is heard,
    in the others a second picture sounds about half as often. That keeps what MS3 is about (sounds that start, stop and overlap, and about one
    second in nine in which nothing sounds) and leaves the stream something to drift by.
    """
    counts = {
        "train": clips,
        "val": -(-clips // 6) if val is None else val,
        "test": -(-clips // 4) if test is None else test,
    }
    fits = lambda pictures, name, kept: any(
        stand_together(pictures, {name, other}) for other in kept if other != name
    )
    stock = take_stock(
        out, voc, davis, esc, seed, counts, size, classes, class_map, progress, fits, least=2
    )
    return write_set(
        out, "ms3", stock.report, draw_ms3(stock, size), sum(counts.values()), progress
    )


def draw_s4(stock, size):
    """Yield (split, frames [T, H, W, 3], masks [T, H, W], wave [T * RATE], what the report says of the clip), one for each clip."""
    rng = stock.rng
    for split, name, heard_deck, (sound, sound_source, _), silent_class, silent_deck in plan_s4(
        stock
    ):
        heard, heard_frames, heard_masks = first_view(heard_deck, name, size, size // 2, rng)
        silent, silent_frames, silent_masks = first_view(
            silent_deck, silent_class, size, size // 2, rng
        )
        side = ("left", "right")[rng.integers(2)]
        order = 1 if side == "left" else -1
        frames = np.concatenate([heard_frames, silent_frames][::order], axis=2)
        masks = np.concatenate([heard_masks, np.zeros_like(silent_masks)][::order], axis=2)
        stock.report["kept"][name][split]["clips"] += 1
        yield split, frames, masks, load_sound(sound), {
            "class": name, "side": side, "heard": heard.name, "heard_source": heard.source, "silent": silent.name, "silent_source": silent.source,
            "silent_class": silent_class, "recording": sound.name, "recording_source": sound_source}  # fmt: skip


def plan_s4(stock):
    """Yield (split, class, deck of its pictures, recording, silent class, deck of its pictures), one for each clip."""
    for split in SPLITS:
        here = stock.pictures[split]
        for name in stock.kept:
            heard = picture_deck(showing(here, name), stock.rng)
            sounds = sound_deck(stock, split, name)
            decks = {
                other: picture_deck(mine, stock.rng)
                for other in shown_classes(here)
                if (mine := showing(here, other, {name}))
            }
            for _ in range(stock.counts[split]):
                silent = draw_class(list(decks), stock)
                yield split, name, heard, next(sounds), silent, decks[silent]


def draw_ms3(stock, size):
    """As draw_s4, for clips of two or three columns and of sounds that come and go."""
    for split, heard, cast in plan_ms3(stock):
        edges = np.linspace(0, size, len(cast) + 1).round().astype(int).tolist()
        frames, masks, wave, pictures = [], [], np.zeros(T * RATE), []
        for (name, suited, recording, chance), left, right in zip(cast, edges, edges[1:]):
            picture, seen, mask = first_view(suited, name, size, right - left, stock.rng)
            sound, source, schedule = None, None, np.zeros(T, bool)
            if recording:
                sound, source, _ = recording
                sounding = load_sound(sound)
                schedule = draw_schedule(sounding, chance, stock.rng)
                wave += sounding * gate(schedule)
            frames.append(seen)
            masks.append(mask & schedule[:, None, None])
            pictures.append({"class": name, "picture": picture.name, "source": picture.source, "columns": [left, right],
                             "schedule": schedule.astype(int).tolist(), "recording": sound and sound.name, "recording_source": source})  # fmt: skip
        for name in heard:
            stock.report["kept"][name][split]["clips"] += 1
        wave /= max(1, np.abs(wave).max())  # each recording stays within 1, their sum may not
        yield (
            split,
            np.concatenate(frames, axis=2),
            np.concatenate(masks, axis=2),
            wave,
            {"heard": heard, "pictures": pictures},
        )


def plan_ms3(stock):
    """Yield (split, heard classes, cast: [(class, deck of its pictures, recording or None, chance to sound in a second)] from left to right)."""
    rng = stock.rng
    for split in SPLITS:
        here = stock.pictures[split]
        sounds = {name: sound_deck(stock, split, name) for name in stock.kept}
        decks = {}  # (class, classes of the clip) -> deck: a picture must suit the others of its clip
        for _, first in zip(
            range(stock.counts[split]), deck([(name, name) for name in stock.kept], rng)
        ):
            heard, wanted, names = 1 + (rng.random() >= ALONE), rng.integers(2, 4), [first]
            while len(names) < wanted:
                beside = [
                    c
                    for c in shown_classes(here)
                    if c not in names and stand_together(here, {*names, c})
                ]
                if len(names) < heard:
                    beside = [c for c in beside if c in stock.kept]
                if not beside:
                    break  # two pictures always go together (take_stock saw to it), a third may not
                names.append(draw_class(beside, stock))
            cast = []
            for place in rng.permutation(len(names)).tolist():
                name, clip = names[place], frozenset(names)
                if (name, clip) not in decks:
                    decks[name, clip] = picture_deck(showing(here, name, clip - {name}), rng)
                sound = (next(sounds[name]), SOUNDS[place]) if place < heard else (None, 0)
                cast.append((name, decks[name, clip], *sound))
            yield split, names[:heard], cast


def draw_class(names, stock):
    """One of the classes `names` at random, DISTRACTORS of the time one that is never heard, where there is such."""
    usual, never_heard = (
        [c for c in names if c in stock.kept],
        [c for c in names if c not in stock.kept],
    )
    pool = never_heard if never_heard and (not usual or stock.rng.random() < DISTRACTORS) else usual
    return pool[stock.rng.integers(len(pool))]


def first_view(deck, name, size, width, rng):
    """(picture, frames, masks) of the first picture of `deck` that can be cut so that class `name` stays in sight."""
    for _, picture in zip(range(50), deck):
        if found := view(picture, name, size, width, rng):
            return picture, *found
    raise AtlasError(
        f"{picture.name}: no part of it (or of the other pictures of its split) keeps {name} in sight; leave {name} out with --classes"
    )


def view(picture, name, size, width, rng):
    """Five views of a picture by a window that pans and zooms a little: frames [T, size, width, 3] uint8 and class `name`'s masks [T, size, width].

    The same window cuts frame and mask (bilinear and nearest). It is drawn at random around the class's pixels; after half of the tries it
    follows them from frame to frame. None if the class never keeps VISIBLE of the square frame; heard and silent pictures are treated alike.
    """
    arrays = [read_mask(path) for path in picture.masks]
    values = picture.values[name]
    arrays = [a > 0 if values is None else np.isin(a, values) for a in arrays] * (T // len(arrays))
    high, wide = arrays[0].shape  # of the picture
    share = width / size  # of the frame; a window is this much as wide as tall
    masks = [Image.fromarray(a.astype(np.uint8)) for a in arrays]
    middle = np.array(
        [
            [x.mean() + 0.5, y.mean() + 0.5] if len(x) else [wide / 2, high / 2]
            for y, x in map(np.nonzero, arrays)
        ]
    )  # [T, 2]
    time = np.linspace(0, 1, T)[:, None]
    whole = min(high, wide / share)  # of the tallest window
    tries = 30
    for k in range(tries):
        path = middle if k >= tries // 2 else middle[0] * (1 - time) + middle[-1] * time
        first = rng.uniform(0.7, 1)
        tall = whole * np.clip(first * np.linspace(1, rng.uniform(0.92, 1.08), T), 0.6, 1)  # [T]
        extent = np.stack([tall * share, tall], axis=1)  # [T, 2], x and y
        centre = (
            path
            + rng.uniform(-0.25, 0.25, 2) * extent[0]
            + (time - 0.5) * rng.uniform(-0.06, 0.06, 2) * whole
        )
        corner = np.clip(centre - extent / 2, 0, [wide, high] - extent)
        boxes = np.concatenate([corner, corner + extent], axis=1).clip(0, [wide, high] * 2).tolist()
        cut = (
            np.stack([m.resize((width, size), Image.NEAREST, box) for m, box in zip(masks, boxes)])
            > 0
        )
        if cut.mean((1, 2)).min() >= VISIBLE / share:
            images = [read_image(path, (wide, high)) for path in picture.frames] * (
                T // len(picture.frames)
            )
            return np.stack(
                [im.resize((width, size), Image.BILINEAR, box) for im, box in zip(images, boxes)]
            ), cut
    return None


def write_set(out, dataset, report, drawn, total, progress):
    """Write the clips that draw_s4 or draw_ms3 yields, then compose.json and the CSV; return the report."""
    with built_beside(out) as folder:
        written = []
        for split, frames, masks, wave, entry in tqdm(
            drawn, "compose", total, unit="clip", disable=not progress
        ):
            name = f"c{len(written):06d}"
            clip = (
                s4_clip(folder, name, entry["class"], split)
                if dataset == "s4"
                else ms3_clip(folder, name, split)
            )
            written.append(write_clip(clip, frames, masks, wave, RATE))
            report["clips"].append({"id": name, "split": split, **entry})
        Path(folder, "compose.json").write_text(json.dumps(report, indent=1) + "\n")
        write_csv(folder, written, dataset)
    return report
