"""A stock: real pictures with masks, and sounds, by class; docs/data.md tells of its tables.

pictures/CLASS/NAME.jpg    masks/CLASS/NAME.png    sounds/CLASS/NAME.wav
"""

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from atlas.audio import read_wave
from atlas.clips import T, read_frame, read_mask, read_table
from atlas.errors import AtlasError

COLUMNS = {
    "pictures": ("class", "picture", "source", "also", "mask", "dataset", "repository", "path"),
    "sounds": ("class", "sound", "source", "dataset", "repository", "path"),
}
LEAST = 10  # sources of pictures, and of sounds, that a class needs to be heard by default


@dataclass
class Item:
    """A photo (a file and a mask), a video (T of each) or a sound (no mask)."""

    category: str
    name: str
    source: str  # it stays in one split
    files: list
    masks: list
    also: set  # the other classes that a picture shows
    mask: str  # drawn | made


def read_stock(root):
    """(pictures, sounds): Items, by class and name. Only the tables are opened."""
    if not any(Path(root, kind).is_dir() for kind in COLUMNS):
        raise AtlasError(f"{root} is no stock: it holds neither pictures/ nor sounds/")
    return _items(root, "pictures"), _items(root, "sounds")


def _items(root, kind):
    rows, items = read_rows(root, kind), []
    for folder in entries(Path(root, kind)):
        for path in entries(folder):
            row = rows.get((folder.name, path.stem), {})
            source = row.get("source") or f"{folder.name}/{path.name}"
            files, masks = [path], []
            if kind == "pictures":
                if path.is_dir():
                    files = evenly(entries(path))
                    if not files:
                        raise AtlasError(f"the video {path} has no frames: fill or remove it")
                places = [file.relative_to(folder.parent).with_suffix(".png") for file in files]
                masks = [Path(root, "masks", place) for place in places]
            also = set(row.get("also", "").replace(";", " ").split())
            drawn = row.get("mask") or "drawn"
            items.append(Item(folder.name, path.name, source, files, masks, also, drawn))
    return items


def entries(folder):
    """What a folder holds, without hidden files. (glob passes over what it may not read.)"""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if not path.name.startswith(".")]


def evenly(frames):
    """T of the frames of a video, or none."""
    places = np.linspace(0, len(frames) - 1, T).round().astype(int)
    return [frames[k] for k in places if frames]


def read_pictures(item):
    """[(frame [H, W, 3] uint8, mask [H, W] bool)], all of one size."""
    pairs = [(read_frame(path), read_mask(mask)) for path, mask in zip(item.files, item.masks)]
    if len({array.shape[:2] for pair in pairs for array in pair}) > 1:
        raise AtlasError(f"{item.files[0]}, its masks or its other frames differ in size")
    return pairs


def read_rows(root, kind):
    """{(class, name without suffix): row} of a stock's table, {} without one."""
    path, columns = Path(root, f"{kind}.csv"), ("class", kind[:-1], "source")
    return by_place(read_table(path, columns), kind) if path.is_file() else {}


def by_place(rows, kind):
    return {(row["class"], Path(row[kind[:-1]]).stem): row for row in rows}


def sources_of(items):
    """{class: its sources}."""
    found = defaultdict(set)
    for item in items:
        found[item.category].add(item.source)
    return found


def check_stock(root):
    """(counts, errors, warnings), lists of lines. A photo may serve several classes."""
    pictures, sounds = read_stock(root)
    errors, warnings, contents = [], [], defaultdict(list)
    for item in tqdm(pictures + sounds, "checking the stock", unit="file", disable=None):
        try:
            contents[_content(item)].append(item)
        except AtlasError as error:
            errors.append(str(error))
    for same in contents.values():
        if len({i.category for i in same}) < len(same) or len({i.source for i in same}) > 1:
            named = ", ".join(f"{i.category}/{i.name} (source {i.source})" for i in same)
            errors.append(f"the same content stands several times: {named}")
    shown, known = sources_of(pictures), sources_of(sounds)
    line = "{:<16}{:>9}{:>8}{:>8}{:>8}{:>8}".format
    counts = [line("class", "pictures", "drawn", "sources", "sounds", "sources")]
    for name in sorted({*shown, *known}):
        masks = [item.mask for item in pictures if item.category == name]
        files = sum(item.category == name for item in sounds)
        seen, heard = len(shown[name]), len(known[name])
        counts.append(line(name, len(masks), masks.count("drawn"), seen, files, heard))
        if seen and min(seen, heard) < LEAST:
            found = f"{seen} sources of pictures and {heard} of sounds, of {LEAST}"
            warnings.append(f"{name} is too small to be heard by default: it has {found}")
    return counts, errors, warnings


def _content(item):
    """What tells the pixels or samples of an item from others."""
    if item.masks:
        frames, masks = zip(*read_pictures(item))
        content = np.stack(frames)
        good = all(mask.any() for mask in masks)
    else:
        content = read_wave(item.files[0]).numpy()
        good = content.any()
    if not good:
        raise AtlasError(f"{item.category}/{item.name}: its mask is empty, or its sound silent")
    return content.shape, hashlib.sha256(content).digest()
