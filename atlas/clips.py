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
POINTER = b"version https://git-lfs"


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
    """The YouTube id (11 characters, not all small letters) in a name of AVSBench's form, ID or
    ID_NUMBERS; else the whole name."""
    found = YOUTUBE.fullmatch(name)
    return found[1] if found else name


def s4_clip(root, name, category, split, mask=None):
    """One S4 clip below `root`, which holds Single-source/. Its files need not exist."""
    data = Path(root, "Single-source/s4_data")
    place = f"{split}/{category}/{name}"
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
    return [s4_clip(root, *values) for values in _rows(root, "s4")]


def read_ms3(root):
    return [ms3_clip(root, *values) for values in _rows(root, "ms3")]


READERS = {"s4": read_s4, "ms3": read_ms3}


@contextlib.contextmanager
def built_beside(final, inside="."):
    """Yield an empty folder, and rename it (what lies `inside` it) to `final` at the end.

    On failure nothing is left. Where another process was faster, its folder is used.
    """
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
    """Open the file `path`, locked until it is closed, also between the nodes of a cluster.

    Another process that has it is waited for, or with `in_use` an AtlasError of that text.
    """
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


def _rows(root, dataset):
    path = Path(root, CSVS[dataset])
    if not path.is_file():
        what = f"no {dataset.upper()} tree in {root}: {path} is missing"
        raise AtlasError(f"{what}; set data_root to the folder of {path.parent.name}/")
    columns = COLUMNS[dataset]
    return [[*map(row.get, columns), row.get("mask")] for row in read_rows(path, columns)]


def read_rows(path, columns):
    """The rows of a table of clips. The first of `columns` is the id; all are plain file names."""
    seen, rows = set(), read_table(path, columns)
    for row in rows:
        name, wrong = row[columns[0]], None
        for value in (row[column] for column in columns):
            if value in ("", ".", "..") or "/" in value:
                wrong = f"{value!r} is no plain file name"
        if row["split"] not in SPLITS:
            wrong = f"its split is {row['split']!r}; write {', '.join(SPLITS)}"
        if row.get("mask") not in (None, *MASKS):
            wrong = f"its mask is {row['mask']!r}; write {' or '.join(MASKS)}"
        if name in seen:
            wrong = "its id stands twice; remove or rename one"
        if wrong:
            raise AtlasError(f"{path}, clip {name}: {wrong}")
        seen.add(name)
    return rows


def read_table(path, columns):
    """The rows of a table that holds `columns` and maybe others: dicts of strings without blanks.

    Commas, semicolons or tabs part the values, as Excel writes them; the text is UTF-8 or UTF-16.
    """
    try:
        content = Path(path).read_bytes()
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        if "\0" in text or not text.strip() or content.startswith(POINTER):
            raise ValueError("it holds no text")
        return _parsed(text, columns)
    except (OSError, ValueError) as error:
        why = why_unreadable(path, error)
        what = "save it as a UTF-8 CSV" if isinstance(error, UnicodeError) else "mend it"
        raise AtlasError(f"cannot read the table {path}: {why}; {what}") from None


def _parsed(text, columns):
    mark = max(",;\t", key=text.lstrip().split("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    rows = []
    try:
        for cells in lines:
            row = [cell.strip() for cell in cells]
            rows += [row] if any(row) else []
            width = len(rows[0]) if rows else 0
            if any(row) and len(row) < width or any(row[width:]):
                raise csv.Error(f"{len(row)} values in {width} columns")
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}") from None
    header = rows.pop(0)
    for column in columns:
        if header.count(column) != 1:
            held = ", ".join(header)[:200]
            raise ValueError(f"it holds the columns {held} and must hold {column} once")
    if not rows:
        raise ValueError("it holds no row below the names of its columns")
    return [dict(zip(header, row)) for row in rows]


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
    if start.startswith(POINTER):
        return "it is a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html")):
        return "it is a web page; fetch the file again"
    return str(error)


def open_picture(path):
    """The picture in `path` as Pillow's image, in its own mode, turned as its EXIF says.

    `image.info["deep"]` says whether the file holds 16 bits a channel.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.info["deep"] = ";16" in str(image.tile)
            _refuse_ambiguous(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # whatever a broken file makes Pillow raise
        why = why_unreadable(path, error)
        raise AtlasError(f"the picture {path} is not readable: {why}") from None
    return image


def _refuse_ambiguous(image):
    why = None
    if image.width * image.height > PIXELS:
        why = f"it is too large, with {image.width}x{image.height} pixels"
    elif getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a camera's JPEG
        why = f"it holds {image.n_frames} frames"
    elif image.mode in ("I", "F", "LAB"):
        why = "it has 32 bits a channel, or colours that are not RGB"
    elif image.has_transparency_data:
        if image.mode == "I;16" or image.convert("RGBA").getextrema()[3][0] < 255:
            why = "it has transparent pixels"
    if why:
        raise ValueError(f"{why}; save it anew as PNG or JPEG")


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
            masks[t] = resized(mask.astype(np.uint8), size, Image.Resampling.NEAREST)
    return frames, masks


def resized(array, size, how=Image.Resampling.BILINEAR):
    """A picture [H, W, ...] at size x size."""
    if array.shape[:2] == (size, size):
        return array
    return np.asarray(Image.fromarray(array).resize((size, size), how))
