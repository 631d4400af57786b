"""Open AVS sets: pictures and videos with masks x environmental sounds, joined by shared class, written as an AVSBench S4 tree.

AVSBench is by e-mail request only; PASCAL VOC, DAVIS and ESC-50 are a download away (scan.py reads them). A clip is pictures side by side.

- S4: two pictures and one recording. One picture shows the heard class; the other is silent and does not contain that class.
  Truth = every pixel of the heard class in the frame.

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

from atlas.audio import RATE
from atlas.clips import SPLITS, T, built_beside, s4_clip, write_clip, write_csv
from atlas.errors import AtlasError
from atlas.scan import VISIBLE, load_sound, read_image, read_mask
from atlas.stock import picture_deck, showing, shown_classes, sound_deck, take_stock

DISTRACTORS = 0.2  # silent pictures of classes that are never heard


def compose_s4(out, voc=None, davis=None, esc=None, seed=0, clips=24, val=None, test=None, size=128, classes=None, class_map=None, progress=True):
    """Build the S4 set at `out` and return its report, which is also written to out/compose.json.

    clips, val, test: clips a class in each split (val: a quarter, test: half of `clips`). `classes`: only these; `class_map`: another map file.
    The report: seed, arguments, kept {class: {split: {"clips", "picture_sources", "recordings"}}}, dropped {class: reason},
    unknown [DAVIS sequences whose class nobody tells], clips [{id, split, class, side, name and source of both pictures and of the recording}].
    """
    counts = {"train": clips, "val": -(-clips // 4) if val is None else val, "test": -(-clips // 2) if test is None else test}
    fits = lambda pictures, name, kept: any(name not in p.contains for p in pictures)
    stock = take_stock(out, voc, davis, esc, seed, counts, size, classes, class_map, progress, fits)
    return write_set(out, "s4", stock.report, draw_s4(stock, size), len(stock.kept) * sum(counts.values()), progress)


def draw_s4(stock, size):
    """Yield (split, frames [T, H, W, 3], masks [T, H, W], wave [T * RATE], what the report says of the clip), one for each clip."""
    rng = stock.rng
    for split, name, heard_deck, (sound, sound_source, _), silent_class, silent_deck in plan_s4(stock):
        heard, heard_frames, heard_masks = first_view(heard_deck, name, size, size // 2, rng)
        silent, silent_frames, silent_masks = first_view(silent_deck, silent_class, size, size // 2, rng)
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
            decks = {other: picture_deck(mine, stock.rng) for other in shown_classes(here) if (mine := showing(here, other, {name}))}
            for _ in range(stock.counts[split]):
                silent = draw_class(list(decks), stock)
                yield split, name, heard, next(sounds), silent, decks[silent]


def draw_class(names, stock):
    """One of the classes `names` at random, DISTRACTORS of the time one that is never heard, where there is such."""
    usual, never_heard = [c for c in names if c in stock.kept], [c for c in names if c not in stock.kept]
    pool = never_heard if never_heard and (not usual or stock.rng.random() < DISTRACTORS) else usual
    return pool[stock.rng.integers(len(pool))]


def first_view(deck, name, size, width, rng):
    """(picture, frames, masks) of the first picture of `deck` that can be cut so that class `name` stays in sight."""
    for _, picture in zip(range(50), deck):
        if found := view(picture, name, size, width, rng):
            return picture, *found
    raise AtlasError(f"{picture.name}: no part of it (or of the other pictures of its split) keeps {name} in sight; leave {name} out with --classes")


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
    middle = np.array([[x.mean() + 0.5, y.mean() + 0.5] if len(x) else [wide / 2, high / 2] for y, x in map(np.nonzero, arrays)])  # [T, 2]
    time = np.linspace(0, 1, T)[:, None]
    whole = min(high, wide / share)  # of the tallest window
    tries = 30
    for k in range(tries):
        path = middle if k >= tries // 2 else middle[0] * (1 - time) + middle[-1] * time
        first = rng.uniform(0.7, 1)
        tall = whole * np.clip(first * np.linspace(1, rng.uniform(0.92, 1.08), T), 0.6, 1)  # [T]
        extent = np.stack([tall * share, tall], axis=1)  # [T, 2], x and y
        centre = path + rng.uniform(-0.25, 0.25, 2) * extent[0] + (time - 0.5) * rng.uniform(-0.06, 0.06, 2) * whole
        corner = np.clip(centre - extent / 2, 0, [wide, high] - extent)
        boxes = np.concatenate([corner, corner + extent], axis=1).clip(0, [wide, high] * 2).tolist()
        cut = np.stack([m.resize((width, size), Image.NEAREST, box) for m, box in zip(masks, boxes)]) > 0
        if cut.mean((1, 2)).min() >= VISIBLE / share:
            images = [read_image(path, (wide, high)) for path in picture.frames] * (T // len(picture.frames))
            return np.stack([im.resize((width, size), Image.BILINEAR, box) for im, box in zip(images, boxes)]), cut
    return None


def write_set(out, dataset, report, drawn, total, progress):
    """Write the clips that draw_s4 yields, then compose.json and the CSV; return the report."""
    with built_beside(out) as folder:
        written = []
        for split, frames, masks, wave, entry in tqdm(drawn, "compose", total, unit="clip", disable=not progress):
            name = f"c{len(written):06d}"
            clip = s4_clip(folder, name, entry["class"], split)
            written.append(write_clip(clip, frames, masks, wave, RATE))
            report["clips"].append({"id": name, "split": split, **entry})
        Path(folder, "compose.json").write_text(json.dumps(report, indent=1) + "\n")
        write_csv(folder, written, dataset)
    return report
