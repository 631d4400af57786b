"""Clips as files: AVSBench's tree as released, reading and writing it.

Shapes: T seconds (= frames, 5), H W pixels. Masks are 1 on the sounding object.

    DATA_ROOT/Single-source/s4_meta_data.csv                                            name,start,category,split
    DATA_ROOT/Single-source/s4_data/visual_frames/SPLIT/CATEGORY/VIDEO/VIDEO_{1..5}.png
    DATA_ROOT/Single-source/s4_data/gt_masks/SPLIT/CATEGORY/VIDEO/VIDEO_{1..5}.png      (train: only _1)
    DATA_ROOT/Single-source/s4_data/audio_wav/SPLIT/CATEGORY/VIDEO.wav

    DATA_ROOT/Multi-sources/ms3_meta_data.csv                                           video_id,split
    DATA_ROOT/Multi-sources/ms3_data/visual_frames/VIDEO/VIDEO.mp4_{1..5}.png           (no split here)
    DATA_ROOT/Multi-sources/ms3_data/gt_masks/SPLIT/VIDEO/VIDEO_{1..5}.png              (train: all five)
    DATA_ROOT/Multi-sources/ms3_data/audio_wav/SPLIT/VIDEO.wav
"""

import contextlib
import csv
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from atlas.errors import AtlasError

T = 5  # seconds = frames of a clip
RATE = 16000  # samples a second, of every sound ATLAS writes or hears
SPLITS = ("train", "val", "test")
CSVS = {"s4": "Single-source/s4_meta_data.csv", "ms3": "Multi-sources/ms3_meta_data.csv"}
DOMAINS = {  # the line breaks of AVSBench's own class list; the names of the groups are ours
    "human": ("baby_laughter", "female_singing", "male_speech"),
    "animal": ("dog_barking", "cat_meowing", "lions_roaring", "horse_clip-clop", "coyote_howling", "mynah_bird_singing"),
    "instrument": ("playing_acoustic_guitar", "playing_tabla", "playing_violin", "playing_piano", "playing_ukulele", "playing_glockenspiel"),
    "vehicle": ("helicopter", "race_car", "driving_buses", "ambulance_siren"),
    "tool": ("typing_on_computer_keyboard", "chainsawing_trees", "cap_gun_shooting", "lawn_mowing"),
}  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """One record. `frames` and `masks` are T paths; a mask is None where the frame is not annotated (S4 train: all but the first)."""

    id: str
    source: str  # the video it was cut from; AVSBench: the first 11 characters of the name, a YouTube id
    split: str
    category: str | None  # MS3 has none
    frames: tuple
    masks: tuple
    audio: str


def s4_clip(root, name, category, split):
    """The paths of one S4 clip below `root` (the folder that holds Single-source/), whether or not they exist."""
    data = Path(root, "Single-source", "s4_data")
    folder = Path(split, category, name)
    return Clip(
        id=name, source=name[:11], split=split, category=category,
        frames=tuple(str(data / "visual_frames" / folder / f"{name}_{k}.png") for k in range(1, T + 1)),
        masks=tuple(str(data / "gt_masks" / folder / f"{name}_{k}.png") if k == 1 or split != "train" else None for k in range(1, T + 1)),
        audio=str(data / "audio_wav" / split / category / f"{name}.wav"),
    )  # fmt: skip


def ms3_clip(root, name, split):
    """The paths of one MS3 clip below `root` (the folder that holds Multi-sources/), whether or not they exist."""
    data = Path(root, "Multi-sources", "ms3_data")
    return Clip(
        id=name, source=name[:11], split=split, category=None,
        frames=tuple(str(data / "visual_frames" / name / f"{name}.mp4_{k}.png") for k in range(1, T + 1)),
        masks=tuple(str(data / "gt_masks" / split / name / f"{name}_{k}.png") for k in range(1, T + 1)),
        audio=str(data / "audio_wav" / split / f"{name}.wav"),
    )  # fmt: skip


def write_clip(clip, frames, masks, wave, rate=RATE):
    """Write a clip's files: frames [T, H, W, 3] uint8, masks [T, H, W] bool (those it has a path for), wave [samples] in ±1; return the clip."""
    for path in (clip.frames[0], clip.masks[0], clip.audio):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    for path, frame in zip(clip.frames, frames):
        Image.fromarray(frame).save(path, compress_level=1)
    for path, mask in zip(clip.masks, masks):
        if path:
            Image.fromarray(mask.astype(np.uint8) * 255, mode="L").save(path)
    soundfile.write(clip.audio, np.clip(wave, -1, 1), rate, subtype="PCM_16")
    return clip


def write_csv(root, clips, dataset="s4"):
    """AVSBench's s4_meta_data.csv or ms3_meta_data.csv for `clips`, written last: a tree without it is not finished."""
    with open(Path(root, CSVS[dataset]), "w", newline="") as file:
        writer = csv.writer(file)
        if dataset == "s4":
            writer.writerow(["name", "start", "category", "split"])
            writer.writerows([clip.id, 0, clip.category, clip.split] for clip in clips)
        else:
            writer.writerow(["video_id", "split"])
            writer.writerows([clip.id, clip.split] for clip in clips)


@contextlib.contextmanager
def built_beside(final, inside="."):
    """Yield an empty folder beside `final` and rename it (what lies `inside` it) to `final` at the end; on failure nothing is left.

    Of two processes that build the same thing, the one that finishes last drops its own and uses the other's.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        try:
            os.rename(temporary / inside, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_s4(root):
    """All clips named by s4_meta_data.csv below `root`, in the file's order. Files are not opened here."""
    return [
        s4_clip(root, row["name"], row["category"], row["split"])
        for row in _read_csv(root, "s4", ("name", "category", "split"))
    ]


def read_ms3(root):
    """All clips named by ms3_meta_data.csv below `root`, in the file's order. Files are not opened here."""
    return [
        ms3_clip(root, row["video_id"], row["split"])
        for row in _read_csv(root, "ms3", ("video_id", "split"))
    ]


def _read_csv(root, dataset, columns):
    path = Path(root, CSVS[dataset])
    if not path.is_file():
        raise AtlasError(
            f"no {dataset.upper()} tree in {root}: {path} is missing; set data_root to the folder that holds {path.parent.name}/, or synth=true"
        )
    return read_rows(path, columns)


def read_rows(path, columns):
    """The rows of a CSV of clips, as dicts; it holds `columns` at least, and every row's split is train, val or test."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not set(columns) <= rows[0].keys():
        raise AtlasError(f"{path} does not hold the columns {','.join(columns)}")
    strange = [row for row in rows if row["split"] not in SPLITS]
    if strange:
        raise AtlasError(
            f"{path}: clip {strange[0][columns[0]]} is in split {strange[0]['split']!r}, not train, val or test"
        )
    return rows


def read_table(path, columns):
    """The rows of a CSV table as dicts of stripped strings. It must hold `columns`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            lost = [column for column in columns if column not in (reader.fieldnames or ())]
            if lost:
                raise AtlasError(f"{path} lacks the column {', '.join(lost)}")
            return [{k: (v or "").strip() for k, v in row.items() if k} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AtlasError(f"cannot read the table {path}: {error}") from None


READERS = {"s4": read_s4, "ms3": read_ms3}


def read_frame(path):
    """The picture in `path` as RGB uint8 [H, W, 3]."""
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


def read_mask(path):
    """The mask in `path` as bool [H, W], True on the sounding object. Grey values other than 0 and 255 (or 0 and 1) are an error."""
    with _opened(path) as image:
        grey = np.asarray(image.convert("L"))
    values = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))
    if not (set(values) <= {0, 255} or set(values) <= {0, 1}):
        raise AtlasError(
            f"the mask {path} holds the values {values[:6].tolist()}; a mask holds 0 and 255 only, without smoothing"
        )
    return grey > 127 if values[-1] > 1 else grey > 0


@contextlib.contextmanager
def _opened(path):
    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except FileNotFoundError:
        raise AtlasError(f"the file {path} is missing") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on a broken file
        raise AtlasError(f"the picture {path} is not readable ({error})") from None


def load_clip(clip, size):
    """Decode one clip: frames [T, size, size, 3] uint8 (bilinear), masks [T, size, size] bool (nearest; zero where not annotated)."""
    frames = np.zeros((T, size, size, 3), np.uint8)
    masks = np.zeros((T, size, size), bool)
    for t, (frame_path, mask_path) in enumerate(zip(clip.frames, clip.masks)):
        frame = read_frame(frame_path)
        frames[t] = resized(frame, size, Image.Resampling.BILINEAR)
        if mask_path:
            mask = read_mask(mask_path)
            if mask.shape != frame.shape[:2]:
                raise AtlasError(
                    f"the mask {mask_path} is {mask.shape[1]}x{mask.shape[0]}, its frame {frame.shape[1]}x{frame.shape[0]}; they must be equal"
                )
            masks[t] = resized(mask.astype(np.uint8), size, Image.Resampling.NEAREST)
    return frames, masks


def resized(array, size, how=Image.Resampling.BILINEAR):
    """A picture [H, W, ...] at size x size."""
    return (
        array
        if array.shape[:2] == (size, size)
        else np.asarray(Image.fromarray(array).resize((size, size), how))
    )
