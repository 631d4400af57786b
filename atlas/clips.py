"""Clips as files: AVSBench's tree as released, and the readers of its tables and pictures.

Shapes: T seconds (= frames, 5), H W pixels. Masks are 1 on the sounding object. DATA_ROOT holds

    Single-source/s4_meta_data.csv                                      name,start,category,split
    Single-source/s4_data/visual_frames/SPLIT/CATEGORY/VIDEO/VIDEO_{1..5}.png
    Single-source/s4_data/gt_masks/SPLIT/CATEGORY/VIDEO/VIDEO_{1..5}.png      (train: only _1)
    Single-source/s4_data/audio_wav/SPLIT/CATEGORY/VIDEO.wav

    Multi-sources/ms3_meta_data.csv                                     video_id,split
    Multi-sources/ms3_data/visual_frames/VIDEO/VIDEO.mp4_{1..5}.png           (no split here)
    Multi-sources/ms3_data/gt_masks/SPLIT/VIDEO/VIDEO_{1..5}.png              (train: all five)
    Multi-sources/ms3_data/audio_wav/SPLIT/VIDEO.wav
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
CSVS = {"s4": "Single-source/s4_meta_data.csv", "ms3": "Multi-sources/ms3_meta_data.csv"}
COLUMNS = {"s4": ("name", "category", "split"), "ms3": ("video_id", "split")}
DOMAINS = {  # the line breaks of AVSBench's own class list; the names of the groups are ours
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
    """One record. `frames` and `masks` are T paths; a mask is None where a frame has none."""

    id: str
    source: str  # the video that it was cut from; clips of one source belong in one split
    split: str
    category: str | None  # MS3 has none
    frames: tuple
    masks: tuple  # S4 train: the first frame's alone
    audio: str


def source_of(name):
    """The source in a clip's name: the YouTube id in a name of AVSBench's form, else the name.

    AVSBench's form is a YouTube id, by itself or with `_` and numbers behind it. A YouTube id has
    11 characters, of which one at least is a capital letter or a digit.
    """
    found = YOUTUBE.fullmatch(name)
    return found[1] if found else name


def s4_clip(root, name, category, split):
    """One S4 clip below `root`, which holds Single-source/. Its files need not exist."""
    data = Path(root, "Single-source/s4_data")
    place = f"{split}/{category}/{name}"
    frames = [f"{data}/visual_frames/{place}/{name}_{k}.png" for k in range(1, T + 1)]
    masks = [f"{data}/gt_masks/{place}/{name}_{k}.png" for k in range(1, T + 1)]
    if split == "train":
        masks[1:] = [None] * (T - 1)
    audio = f"{data}/audio_wav/{place}.wav"
    frames, masks = tuple(frames), tuple(masks)
    return Clip(name, source_of(name), split, category, frames, masks, audio)


def ms3_clip(root, name, split):
    """One MS3 clip below `root`, which holds Multi-sources/. Its files need not exist."""
    data = Path(root, "Multi-sources/ms3_data")
    frames = [f"{data}/visual_frames/{name}/{name}.mp4_{k}.png" for k in range(1, T + 1)]
    masks = [f"{data}/gt_masks/{split}/{name}/{name}_{k}.png" for k in range(1, T + 1)]
    audio = f"{data}/audio_wav/{split}/{name}.wav"
    frames, masks = tuple(frames), tuple(masks)
    return Clip(name, source_of(name), split, None, frames, masks, audio)


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
    """Open the file `path`, locked until it is closed. The file itself stays, empty.

    Another process that has it is waited for; with `in_use`, an AtlasError of that text is raised.
    POSIX locks on files hold between the nodes of a cluster too. They belong to the process:
    closing a second opening of the file would end the lock of the first.
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


def read_s4(root):
    """All clips that S4's table below `root` names, in its order. Their files are not opened."""
    rows = _rows(root, "s4")
    return [s4_clip(root, row["name"], row["category"], row["split"]) for row in rows]


def read_ms3(root):
    """All clips that MS3's table below `root` names, in its order. Their files are not opened."""
    return [ms3_clip(root, row["video_id"], row["split"]) for row in _rows(root, "ms3")]


READERS = {"s4": read_s4, "ms3": read_ms3}


def _rows(root, dataset):
    path = Path(root, CSVS[dataset])
    if not path.is_file():
        what = f"no {dataset.upper()} tree in {root}: {path} is missing"
        raise AtlasError(f"{what}; set data_root to the folder of {path.parent.name}/")
    return read_rows(path, COLUMNS[dataset])


def read_rows(path, columns):
    """The rows of a table of clips. The first of `columns` is the id; all are plain file names."""
    rows = read_table(path, columns)
    seen = set()
    for row in rows:
        name = row[columns[0]]
        for value in (row[column] for column in columns):
            if value in ("", ".", "..") or "/" in value:
                raise AtlasError(f"{path}: {value!r} of clip {name!r} is no plain file name")
        if row["split"] not in SPLITS:
            raise AtlasError(f"{path}: the split of clip {name} is {row['split']!r}, no {SPLITS}")
        if name in seen:
            raise AtlasError(f"{path}: the clip id {name} stands twice; remove or rename one")
        seen.add(name)
    return rows


def read_table(path, columns):
    """The rows of a table that holds `columns` and maybe others: dicts of strings without blanks.

    Comma, semicolon or tab part the values. The text is UTF-8, or UTF-16 as Excel writes it. Blank
    rows are skipped; in all others each column has its value, which may be empty.
    """
    try:
        content = Path(path).read_bytes()
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
        if "\0" in text or not text.strip() or content.startswith(POINTER):
            raise ValueError("it holds no text")
    except (OSError, ValueError) as error:
        why = why_unreadable(path, error)
        raise AtlasError(f"cannot read the table {path}: {why}; save it as UTF-8 CSV") from None
    mark = max(",;\t", key=text.lstrip().split("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    rows = []
    try:
        for cells in lines:
            row = [cell.strip() for cell in cells]
            if not any(row):
                continue
            rows.append(row)
            width = len(rows[0])
            if len(row) < width or any(row[width:]):
                raise csv.Error(f"{len(row)} values in {width} columns")
    except csv.Error as error:
        raise AtlasError(f"{path}, line {lines.line_num}: {error}; write this row anew") from None
    header = rows[0]
    for column in columns:
        if header.count(column) != 1:
            found = f"{path} holds the columns {', '.join(header)[:200]}"
            raise AtlasError(f"{found}; it must hold {column} once")
    if not rows[1:]:
        raise AtlasError(f"{path} holds no row below the names of its columns")
    return [dict(zip(header, row)) for row in rows[1:]]


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

    Refused are several frames, transparent pixels, 32 bits a channel and more than PIXELS pixels.
    `image.info["deep"]` says whether the file holds 16 bits a channel.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.info["deep"] = ";16" in str(image.tile)
            refused = _refused(image)
            if not refused:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # whatever a broken file makes Pillow raise
        why = why_unreadable(path, error)
        raise AtlasError(f"the picture {path} is not readable: {why}") from None
    if refused:
        raise AtlasError(f"the picture {path} {refused}; save it anew as PNG or JPEG")
    return image


def _refused(image):
    if image.width * image.height > PIXELS:
        return f"is too large, with {image.width}x{image.height} pixels"
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a camera's JPEG
        return f"holds {image.n_frames} frames"
    if image.mode in ("I", "F", "LAB"):
        return "has 32 bits a channel, or colours that are not RGB"
    if image.has_transparency_data:
        if image.mode == "I;16" or image.convert("RGBA").getextrema()[3][0] < 255:
            return "has transparent pixels"
    return None


def read_frame(path):
    """The picture in `path` as RGB uint8 [H, W, 3]: grey, palette, CMYK and 16 bits converted."""
    image = open_picture(path)
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    return np.asarray(image.convert("RGB"))


def read_mask(path):
    """The mask in `path` as bool [H, W], True on the sounding object.

    Black is 0; white is 255, 1 or 65535. Any other grey and any colour is refused.
    """
    image = open_picture(path)
    if image.mode == "L" or image.mode.startswith("I;16"):
        grey = np.asarray(image)
    else:
        colours = read_frame(path)
        grey = colours[..., 0]
        if image.info["deep"] or (colours != grey[..., None]).any():
            raise AtlasError(f"the mask {path} holds colours; save it as a black and white PNG")
    white = grey.max()
    if white not in (0, 1, 255, 65535) or not ((grey == 0) | (grey == white)).all():
        what = f"the mask {path} holds the values {np.unique(grey)[:6].tolist()}"
        raise AtlasError(f"{what}; a mask holds 0 and 255 only, without smoothing")
    return grey > 0


def refuse_other_size(path, mask, frame):
    """A mask [H, W] must have its frame's size."""
    if mask.shape != frame.shape[:2]:
        sizes = f"is {mask.shape} pixels high and wide, its frame {frame.shape[:2]}"
        raise AtlasError(f"the mask {path} {sizes}; make them equal")


def load_clip(clip, size):
    """A clip's frames [T, size, size, 3] uint8 (bilinear) and masks [T, size, size] bool (nearest;
    zero where a frame has none)."""
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
