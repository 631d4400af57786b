"""What the folders hold: pictures and videos with masks (PASCAL VOC, DAVIS) and recordings (ESC-50), by the classes of a class map.

A picture *shows* a class when the class covers a tenth of the picture's middle half (columns W/4 to 3W/4). Only these count as the class's
pictures: an object cut off at the border, or a speck, is no fair target. A source is what must stay in one split: a VOC stem `\\d{4}_\\d{6}`
is its own, any other is the text before its first `_`; a DAVIS source is the `video` column of classes.csv, else the sequence; a recording's is
ESC-50's `src_file`.

Known weakness: DAVIS labels one object and has no classes. A sequence is taken to contain its own class and what the class map says it
`carries`; bystanders of any class may be in it without a label, so for an exact truth use VOC alone.

Shapes: T frames (5), H W pixels of the picture.
"""

import csv
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from atlas.audio import RATE, read_wave
from atlas.clips import T, read_frame
from atlas.errors import AtlasError

VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train
tvmonitor""".split()  # the palette index of a VOC mask is the position here; 255 is void and belongs to nothing
MIDDLE = 0.10  # a picture shows a class that covers this much of its middle half ...
VISIBLE = 0.02  # ... and in a clip the class covers at least this much of every frame
RMS = 0.05  # of a loaded recording


@dataclass(frozen=True)
class Picture:
    """A photo (one frame) or a video (T frames) with masks. `values`: class -> its mask values; None = anything but 0."""

    name: str
    source: str
    frames: tuple
    masks: tuple
    values: dict
    contains: frozenset  # classes with any pixel
    shows: frozenset  # classes it can be heard for


def read_class_map(path):
    """{class: {"voc": [...], "davis": [...], "esc": [...], "carries": {sequence: [...]}}}, checked."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AtlasError(f"cannot read the class map {path}: {error}") from error
    kinds = {"voc": list, "davis": list, "esc": list, "carries": dict}
    if not isinstance(loaded, dict) or not loaded:
        raise AtlasError(
            f"class map {path}: expected `class: {{voc: [...], davis: [...], esc: [...]}}` for every class"
        )
    for name, entry in loaded.items():
        if not isinstance(entry, dict) or any(
            not isinstance(v, kinds.get(key, ())) for key, v in entry.items()
        ):
            raise AtlasError(
                f"class map {path}: {name} must have lists under voc, davis, esc, may have a mapping under carries, and nothing else"
            )
        if wrong := set(entry.get("voc", ())) - set(VOC[1:]):
            raise AtlasError(
                f"class map {path}: {name} names {', '.join(map(str, wrong))}, which VOC does not have; it has {', '.join(VOC[1:])}"
            )
    return {
        name: {key: entry.get(key, kind()) for key, kind in kinds.items()}
        for name, entry in loaded.items()
    }


def canonical(name, names):
    """The class to which a VOC name, or a class in classes.csv, belongs: itself where the map has no entry."""
    return (
        name
        if name in names
        else next((c for c, entry in names.items() if name in entry["voc"]), name)
    )


def scan_voc(root, names, progress):
    """The pictures of a VOC folder that have a segmentation mask (and are listed, where there is a trainval.txt)."""
    root = Path(root)
    masks = {
        path.stem: path
        for path in sorted(_folder(root / "SegmentationClass", "--voc").glob("*.png"))
    }
    listed = root / "ImageSets" / "Segmentation" / "trainval.txt"
    stems = (
        [s for s in sorted(set(listed.read_text().split())) if s in masks]
        if listed.is_file()
        else list(masks)
    )
    values = defaultdict(list)
    for index, name in enumerate(VOC[1:], 1):
        values[canonical(name, names)].append(index)
    pictures = []
    for stem in tqdm(stems, "VOC masks", unit="picture", disable=not progress):
        image = root / "JPEGImages" / f"{stem}.jpg"
        if not image.is_file():
            raise AtlasError(
                f"{image} is missing, though {masks[stem].name} is there: is the VOC folder complete?"
            )
        source = stem if re.fullmatch(r"\d{4}_\d{6}", stem) else stem.split("_")[0]
        mask = read_mask(masks[stem])
        if wrong := set(np.unique(mask).tolist()) - set(range(len(VOC))) - {255}:
            raise AtlasError(
                f"{masks[stem]}: value {min(wrong)} is no VOC class (0 to 20, 255 = void): is it a SegmentationObject mask?"
            )
        contains = {c: v for c, v in values.items() if np.isin(mask, v).any()}
        shows = frozenset(c for c, v in contains.items() if shown(np.isin(mask, v)[None]))
        pictures.append(
            Picture(
                stem,
                f"voc/{source}",
                (image,),
                (masks[stem],),
                contains,
                frozenset(contains),
                shows,
            )
        )
    return pictures


def scan_davis(root, names, unknown, progress):
    """The sequences of a DAVIS folder, T evenly spaced frames of each. Sequences whose class nobody tells are appended to `unknown`."""
    root = Path(root)
    folders = sorted(
        p for p in _folder(root / "Annotations" / "480p", "--davis").iterdir() if p.is_dir()
    )
    of_sequence = {
        s: {"class": c, "video": s} for c, entry in names.items() for s in entry["davis"]
    }
    carries = {s: also for entry in names.values() for s, also in entry["carries"].items()}
    if (root / "classes.csv").is_file():
        of_sequence |= {
            row["sequence"]: row
            for row in _rows(root / "classes.csv", ("sequence", "class", "video"))
        }
    pictures = []
    for folder in tqdm(folders, "DAVIS masks", unit="sequence", disable=not progress):
        masks = sorted(folder.glob("*.png"))
        if folder.name not in of_sequence or not masks:
            unknown.append(folder.name)
            continue
        masks = tuple(masks[k] for k in np.linspace(0, len(masks) - 1, T).round().astype(int))
        frames = tuple(
            root / "JPEGImages" / "480p" / folder.name / f"{path.stem}.jpg" for path in masks
        )
        if lost := [path for path in frames if not path.is_file()]:
            raise AtlasError(
                f"{lost[0]} is missing, though its mask is there: is the DAVIS folder complete?"
            )
        row = of_sequence[folder.name]
        name = canonical(row["class"], names)
        arrays = [read_mask(path) > 0 for path in masks]
        if len({a.shape for a in arrays}) > 1:
            raise AtlasError(f"{folder}: masks of several sizes in one sequence")
        contains = frozenset([name, *carries.get(row["video"], ())])
        shows = frozenset([name] if shown(np.stack(arrays)) else [])
        pictures.append(
            Picture(
                folder.name, f"davis/{row['video']}", frames, masks, {name: None}, contains, shows
            )
        )
    return pictures


def scan_esc(root, names):
    """[(file, source, class)] of the recordings in an ESC-50 folder whose category the map knows."""
    root = Path(root)
    of_category = {category: c for c, entry in names.items() for category in entry["esc"]}
    rows = _rows(
        _folder(root, "--esc") / "meta" / "esc50.csv", ("filename", "category", "src_file")
    )
    recordings = [
        (root / "audio" / r["filename"], r["src_file"], of_category[r["category"]])
        for r in rows
        if r["category"] in of_category
    ]
    if lost := [path for path, _, _ in recordings if not path.is_file()]:
        raise AtlasError(
            f"{lost[0]} is missing, though meta/esc50.csv names it ({len(lost)} such): is the ESC-50 folder complete?"
        )
    return sorted(recordings)


def shown(mask):
    """Whether the class of mask [T, H, W] can be heard here: MIDDLE of the picture's middle half on average, and never nearly out of sight."""
    height, width = mask.shape[1:]
    middle = mask[:, :, width // 4 : width - width // 4].mean()
    return bool(
        middle >= MIDDLE and mask.sum((1, 2)).min() >= 1.5 * VISIBLE * min(height, 2 * width) ** 2
    )


def load_sound(path):
    """A recording as T seconds of mono at RATE in one loudness: [T * RATE] float32. Silence at both ends is cut off, what is short is looped."""
    wave = read_wave(path).numpy()
    audible = np.flatnonzero(np.abs(wave) > 1e-3 * np.abs(wave).max(initial=0))
    if not len(audible):
        raise AtlasError(f"{path} is silent or empty: remove its row from meta/esc50.csv")
    wave = wave[audible[0] : audible[-1] + 1]
    wave = np.tile(wave, -(-T * RATE // len(wave)))[: T * RATE]
    return wave * min(RMS / np.sqrt(np.mean(wave**2)), 1 / np.abs(wave).max())


def read_mask(path):
    """Mask values [H, W] uint8: palette indices where there is a palette."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise AtlasError(
                    f"{path} is an {image.mode} image; a mask must be a palette or grey PNG"
                )
            return np.array(image).astype(np.uint8)
    except (OSError, SyntaxError) as error:
        raise AtlasError(f"cannot read the mask {path}: {error}") from error


def read_image(path, size):
    """An RGB picture of (W, H) `size`, its mask's."""
    image = Image.fromarray(read_frame(path))
    if image.size != size:
        raise AtlasError(
            f"{path} is {image.size[0]}x{image.size[1]} and its mask {size[0]}x{size[1]}: they must match"
        )
    return image


def _folder(path, option):
    if not path.is_dir():
        raise AtlasError(f"{path} is not there: check {option}")
    return path


def _rows(path, columns):
    """The rows of a CSV file that must have these columns."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if lost := set(columns) - set(reader.fieldnames or ()):
                raise AtlasError(f"{path} lacks the column {', '.join(sorted(lost))}")
            return list(reader)
    except FileNotFoundError as error:
        raise AtlasError(f"{path} is not there: is the folder complete?") from error
