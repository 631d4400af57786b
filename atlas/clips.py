"""Clips as files: AVSBench's tree as released, and the only readers of tables and pictures.

Shapes: T seconds (= frames, 5), H W pixels. Masks are 1 on the sounding object.
"""

import contextlib
import csv
import fcntl
import io
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from atlas.errors import AtlasError

T = 5  # seconds = frames of a clip
RATE = 16000  # samples a second, of every sound ATLAS writes or hears
SPLITS = ("train", "val", "test")
MASKS = ("drawn", "made")  # by people, by a program
CSVS = {"s4": "Single-source/s4_meta_data.csv", "ms3": "Multi-sources/ms3_meta_data.csv"}
COLUMNS = {"s4": ("name", "category", "split"), "ms3": ("video_id", "split")}  # and maybe `mask`
DOMAINS = {  # groups of AVSBench's class list; their names are ours
    "human": ("baby_laughter", "female_singing", "male_speech"),
    "animal": ("dog_barking", "cat_meowing", "lions_roaring", "horse_clip-clop", "coyote_howling",
        "mynah_bird_singing"),
    "instrument": ("playing_acoustic_guitar", "playing_tabla", "playing_violin", "playing_piano",
        "playing_ukulele", "playing_glockenspiel"),
    "vehicle": ("helicopter", "race_car", "driving_buses", "ambulance_siren"),
    "tool": ("typing_on_computer_keyboard", "chainsawing_trees", "cap_gun_shooting", "lawn_mowing"),
}  # fmt: skip
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
PIXELS = 10**8  # of a picture, at most; Pillow's own bound only warns
Image.MAX_IMAGE_PIXELS = None
YOUTUBE = re.compile(r"(?=[a-z_-]{0,10}[A-Z0-9])([A-Za-z0-9_-]{11})(_(0|[1-9]\d*))*")


@dataclass(frozen=True)
class Clip:
    id: str
    source: str  # the video that it was cut from; clips of one source belong in one split
    split: str
    category: str | None  # MS3 has none
    frames: tuple  # T paths
    masks: tuple  # T paths, or None where a frame has no mask (S4 train: all but the first)
    audio: str
    mask: str | None = None  # who made the masks, one of MASKS; None: not said


def source_of(name):
    """The YouTube id (11 characters, not all small letters) of a name ID or ID_NUMBERS, as AVSBench
    has them; else the whole name."""
    found = YOUTUBE.fullmatch(name)
    return found[1] if found else name


def s4_clip(root, name, category, split, mask=None):
    """One S4 clip below `root`, which holds Single-source/. Its files need not exist."""
    data, place = Path(root, "Single-source/s4_data"), f"{split}/{category}/{name}"
    frames = _numbered(f"{data}/visual_frames/{place}/{name}")
    masks = _numbered(f"{data}/gt_masks/{place}/{name}")
    if split == "train":
        masks = (masks[0], *[None] * (T - 1))
    audio = f"{data}/audio_wav/{place}.wav"
    return Clip(name, source_of(name), split, category, frames, masks, audio, mask)


def ms3_clip(root, name, split, mask=None):
    """One MS3 clip below `root`, which holds Multi-sources/. Its files need not exist."""
    data = Path(root, "Multi-sources/ms3_data")
    frames = _numbered(f"{data}/visual_frames/{name}/{name}.mp4")  # no split here
    masks = _numbered(f"{data}/gt_masks/{split}/{name}/{name}")
    audio = f"{data}/audio_wav/{split}/{name}.wav"
    return Clip(name, source_of(name), split, None, frames, masks, audio, mask)


def _numbered(stem):
    return tuple(f"{stem}_{k}.png" for k in range(1, T + 1))


def read_s4(root):
    """All clips that S4's table below `root` names, in its order. Their files are not opened."""
    return _read(root, "s4", s4_clip)


def read_ms3(root):
    return _read(root, "ms3", ms3_clip)


def _read(root, dataset, make):
    path, columns = Path(root, CSVS[dataset]), COLUMNS[dataset]
    if not path.is_file():
        what = f"no {dataset.upper()} tree in {root}: {path} is missing"
        raise AtlasError(f"{what}; set data_root to the folder of {path.parent.name}/")
    rows = read_rows(path, columns)
    return [make(root, *map(row.get, columns), row.get("mask")) for row in rows]


READERS = {"s4": read_s4, "ms3": read_ms3}


@contextlib.contextmanager
def built_beside(final, inside="."):
    """Yield an empty folder; at the end it (what lies `inside` it) becomes `final`, or on failure
    nothing. Where another process was faster, its folder is used."""
    final = Path(final)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        try:
            os.rename(temporary / inside, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def locked(path, in_use=None):
    """The file `path`, open and locked until it is closed, also between the nodes of a cluster.
    Another process that has it is waited for, or with `in_use` an AtlasError of that text."""
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # another process has it
        if in_use:
            raise AtlasError(in_use) from None
        print(f"waiting for the process that has locked {path}", file=sys.stderr)
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        why = f"cannot lock {path}: {error.strerror}"
        raise AtlasError(f"{why}; choose a disk with locks (out_dir, cache_dir)") from None
    return file


def read_rows(path, columns):
    """The rows of a table of clips. The first of `columns` is the id; all are plain file names."""
    rows, ids = read_table(path, columns), set()
    for row in rows:
        name, mask = row[columns[0]], row.get("mask")
        bad = [v for v in map(row.get, columns) if v in ("", ".", "..") or "/" in v]
        for wrong, what in (
            (bad, f"{bad} cannot name files; write plain file names"),
            (row["split"] not in SPLITS, f"its split is {row['split']!r}, not {SPLITS}"),
            (mask not in (None, *MASKS), f"its mask is {mask!r}; write {' or '.join(MASKS)}"),
            (name in ids, "its id stands twice; remove or rename one"),
        ):
            if wrong:
                raise AtlasError(f"{path}, clip {name}: {what}")
        ids.add(name)
    return rows


def read_table(path, columns):
    """The rows of a table that holds `columns` and maybe others: dicts of strings without blanks.
    Commas, semicolons or tabs part the values, as Excel writes them; the text is UTF-8 or UTF-16.
    """
    rows = []
    try:
        content = Path(path).read_bytes()
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it holds no text")
        mark = max(",;\t", key=text.lstrip().split("\n")[0].count)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        for cells in lines:
            row = [cell.strip() for cell in cells]
            rows += [row] if any(row) else []
            width = len(rows[0]) if rows else 0
            if any(row) and len(row) < width or any(row[width:]):
                raise csv.Error(f"{len(row)} values in {width} columns")
        held = rows[0] if rows else []
        if len(rows) < 2 or any(held.count(column) != 1 for column in columns):
            found = f"it has {', '.join(held)[:200]} and {len(rows) - 1} rows"
            raise ValueError(f"{found}; it must have {', '.join(columns)} once, and rows below")
    except (OSError, ValueError, csv.Error) as error:
        where = f"line {lines.line_num}: " if isinstance(error, csv.Error) else ""
        why = why_unreadable(path, f"{where}{error}; mend it, and save it as a UTF-8 CSV")
        raise AtlasError(f"cannot read the table {path}: {why}") from None
    return [dict(zip(held, row)) for row in rows[1:]]


def why_unreadable(path, error):
    """Why a file could not be read: what it is instead of what it should be, or else `error`."""
    try:
        with open(path, "rb") as file:
            start = file.read(100).lstrip().lower()
    except FileNotFoundError:
        return "the file is missing"
    except OSError as refused:
        return refused.strerror
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html")):
        return "it is a web page; fetch the file again"
    return str(error)


def open_picture(path):
    """The picture in `path` as Pillow's image, in its own mode, turned as its EXIF says;
    `image.info["deep"]`: the file holds 16 bits a channel."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.info["deep"] = ";16" in str(image.tile)
            if image.width * image.height > PIXELS:
                raise ValueError(f"it is too large, with {image.width}x{image.height} pixels")
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's JPEG
                raise ValueError(f"it holds {image.n_frames} frames")
            if image.mode in ("I", "F", "LAB"):
                raise ValueError("it has 32 bits a channel, or colours that are not RGB")
            if image.has_transparency_data:
                if image.mode == "I;16" or image.convert("RGBA").getextrema()[3][0] < 255:
                    raise ValueError("it has transparent pixels")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # whatever a broken file makes Pillow raise
        why = why_unreadable(path, f"{error}; save it anew as PNG or JPEG")
        raise AtlasError(f"the picture {path} is not readable: {why}") from None
    return image


def read_frame(path):
    """The picture in `path` as RGB uint8 [H, W, 3]: grey, palette, CMYK and 16 bits converted."""
    image = open_picture(path)
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def read_mask(path):
    """The mask in `path`, black and white in any format, as bool [H, W]."""
    image = open_picture(path)
    grey = np.asarray(image)
    if not image.mode.startswith("I;16"):
        colours = np.asarray(image.convert("RGB"))
        grey = colours[..., 0]
        if image.info["deep"] or (colours != grey[..., None]).any():
            raise AtlasError(f"the mask {path} holds colours; save it as a black and white PNG")
    white = grey.max()
    if white not in (0, 1, 255, 65535) or not ((grey == 0) | (grey == white)).all():
        what = f"the mask {path} holds the values {np.unique(grey)[:6].tolist()}"
        raise AtlasError(f"{what}; a mask holds 0 and 255 only, without smoothing")
    return grey > 0


def refuse_other_size(path, mask, frame):
    if mask.shape != frame.shape[:2]:
        sizes = f"is {mask.shape} pixels high and wide, its frame {frame.shape[:2]}"
        raise AtlasError(f"the mask {path} {sizes}; make them equal")


def load_clip(clip, size):
    """A clip's frames [T, size, size, 3] uint8 and masks [T, size, size] bool (none: zero)."""
    frames = np.zeros((T, size, size, 3), np.uint8)
    masks = np.zeros((T, size, size), bool)
    for t, (frame_path, mask_path) in enumerate(zip(clip.frames, clip.masks)):
        frame = read_frame(frame_path)
        frames[t] = resized(frame, size)
        if mask_path:
            mask = read_mask(mask_path)
            refuse_other_size(mask_path, mask, frame)
            masks[t] = resized(mask, size)
    return frames, masks


def resized(picture, size):
    """A frame [H, W, 3] uint8 (bilinear) or mask [H, W] bool (nearest) at size x size."""
    if picture.shape[:2] == (size, size):
        return picture
    how = Image.NEAREST if picture.dtype == bool else Image.BILINEAR
    return np.asarray(Image.fromarray(picture).resize((size, size), how))
