"""A stock (stock.py) from data sets that anyone can download: VOC, COCO, DAVIS, ESC-50, sounds.

A class map (configs/class_map.yaml) says which class is what in each set. A picture is taken for a
class that covers LEAST of it or more, and scaled down to LONGEST pixels; sounds are copied. What
has a row in the stock's tables is skipped, so another source, or the same one again, only adds.
"""

import json
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw
from tqdm import tqdm

from atlas.clips import T, open_picture, read_frame, read_table
from atlas.errors import AtlasError
from atlas.prepare.stock import COLUMNS, read_rows, write_rows

CLASS_MAP = Path(__file__).parents[2] / "configs" / "class_map.yaml"
VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor""".split()  # by palette index; 255 is void
LEAST = 0.05  # of a picture
LONGEST = 512  # pixels of a side
SOUNDS = (".wav", ".ogg", ".flac", ".mp3")


@dataclass
class Found:
    """A photo, a video (several files and masks) or a sound, for one class."""

    category: str
    name: str
    row: dict  # source, also, dataset, path
    files: list
    masks: list = ()  # [H, W] bool; a sound has none


def fill_stock(out, folders, class_map=None, most=200, lists=()):
    """Fill the stock `out` from `folders`: {"voc" | "coco" | "davis" | "esc" | "sounds": folder}.

    At most `most` pictures, or sounds, of a class are taken from a folder. With `lists` (the tables
    of another stock) exactly what these name is taken, under their names. Returns (Counter of what
    was added, by (class, kind); {why: how many were left out}; [listed rows still missing]).
    """
    if not folders:
        raise AtlasError(f"collect needs a folder: one of --{', --'.join(READERS)}")
    names = read_class_map(class_map or CLASS_MAP)
    rows = {kind: read_rows(out, kind) for kind in COLUMNS}
    listed = read_lists(lists)
    added, left = Counter(), Counter()
    try:
        for key, folder in folders.items():
            if not Path(folder).is_dir():
                raise AtlasError(f"there is no folder {folder}: check --{key}")
            items = READERS[key](Path(folder), names, left)
            if lists and key in ("esc", "sounds"):
                items = from_list(Path(folder), listed["sounds"])
            taken = Counter()
            for item in tqdm(items, key, unit="file", disable=None):
                kind = "pictures" if item.masks else "sounds"
                place = item.category, item.name
                if place in rows[kind] or (lists and place not in listed[kind]):
                    continue
                shares = [mask.mean() for mask in item.masks] or [1]
                if not lists and (not min(shares) or np.mean(shares) < LEAST):
                    left["pictures in which the class is small"] += 1
                elif not lists and taken[item.category] == most:
                    left[f"{kind} of a class above --most"] += 1
                else:
                    known = {"class": item.category, "mask": "drawn", kind[:-1]: write(out, item)}
                    rows[kind][place] = item.row | listed[kind].get(place, {}) | known
                    taken[item.category] += 1
                    added[item.category, kind] += 1
    finally:
        for kind in COLUMNS:
            if rows[kind]:
                write_rows(out, kind, rows[kind])
    missing = [
        row for kind in COLUMNS for place, row in listed[kind].items() if place not in rows[kind]
    ]
    return added, left, missing


def read_lists(paths):
    """{"pictures" | "sounds": {(class, name without suffix): row}} of tables like a stock's."""
    listed = {kind: {} for kind in COLUMNS}
    for path in paths:
        kind = "pictures" if "picture" in read_table(path, ("class", "source"))[0] else "sounds"
        for row in read_table(path, COLUMNS[kind]):
            listed[kind][row["class"], Path(row[kind[:-1]]).stem] = row
    return listed


def write(out, item):
    """Write the files of an item and return its name in the table."""
    if any(name in ("", ".", "..") or "/" in name for name in (item.category, item.name)):
        raise AtlasError(f"{item.category!r} and {item.name!r} cannot name a folder and a file")
    if not item.masks:
        name = f"{item.name}{item.files[0].suffix.lower()}"
        shutil.copyfile(item.files[0], _made(out, "sounds", item.category, name))
        return name
    video = len(item.files) > 1
    for k, (path, mask) in enumerate(zip(item.files, item.masks)):
        image = Image.fromarray(read_frame(path))
        if image.size != mask.shape[::-1]:
            raise AtlasError(f"the picture {path} and its mask differ in size: fetch both again")
        scale = min(1, LONGEST / max(image.size))
        size = [max(1, round(side * scale)) for side in image.size]
        name = f"{item.name}/{k:05d}" if video else item.name
        image = image.resize(size, Image.Resampling.LANCZOS)
        image.save(_made(out, "pictures", item.category, f"{name}.jpg"), quality=95)
        mask = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.NEAREST)
        mask.save(_made(out, "masks", item.category, f"{name}.png"))
    return item.name if video else f"{item.name}.jpg"


def _made(*parts):
    path = Path(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---- the data sets: each yields what it has, as Found


def from_voc(root, names, left):
    """JPEGImages/ and SegmentationClass/ or, of SBD, SegmentationClassAug/."""
    masks = {path.stem: path for path in root.glob("SegmentationClass*/*.png")}
    indices = {c: [VOC.index(v) for v in entry["voc"]] for c, entry in names.items()}
    for stem in _some(sorted(masks), f"SegmentationClass/*.png in {root}"):
        labels = read_labels(masks[stem])
        if not np.isin(labels, [*range(len(VOC)), 255]).all():
            raise AtlasError(f"{masks[stem]}: 0 to 20 and 255 are VOC's classes, it has others")
        photo = stem if re.fullmatch(r"\d{4}_\d{6}", stem) else stem.split("_")[0]  # or its crop
        row = {"source": f"voc_{photo}", "dataset": "PASCAL VOC", "path": f"JPEGImages/{stem}.jpg"}
        shown = {c: np.isin(labels, values) for c, values in indices.items()}
        yield from _photo(f"voc_{stem}", row, root / row["path"], shown)


def from_coco(root, names, left):
    """annotations/instances_SET.json, and the pictures in SET/ or images/SET/.

    A picture in which a class of the map is a crowd, or run-length encoded, is left out.
    """
    class_of = _classes(names, "coco")
    files = sorted(root.glob("annotations/instances_*.json"))
    for file in _some(files, f"annotations/instances_*.json in {root}"):
        folder = file.stem.removeprefix("instances_")
        for number, file_name, size, regions in read_instances(file, class_of):
            paths = [root / folder / file_name, root / "images" / folder / file_name]
            paths = [path for path in paths if path.is_file()]
            if not paths:
                left["COCO pictures that are not in the folder"] += 1
            elif not all(isinstance(polygons, list) for _, polygons in regions):
                left["COCO pictures with a crowd, or a region without polygons"] += 1
            else:
                name = f"coco_{number}"
                row = {"source": name, "dataset": "COCO", "path": f"{folder}/{file_name}"}
                yield from _photo(name, row, paths[0], fill(regions, size))


def read_instances(file, class_of):
    """[(id, file name, (W, H), [(class, segmentation)])] of the pictures with known classes."""
    regions = defaultdict(list)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        category = {c["id"]: class_of.get(c["name"]) for c in data["categories"]}
        for region in data["annotations"]:
            name = category[region["category_id"]]
            if name:
                regions[region["image_id"]].append((name, region["segmentation"]))
        images = [image for image in data["images"] if image["id"] in regions]
        return [
            (i["id"], i["file_name"], (i["width"], i["height"]), regions[i["id"]]) for i in images
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AtlasError(f"{file} is not COCO's instances json: {error!r}") from None


def fill(regions, size):
    """{class: mask [H, W] bool} of [(class, polygons [x, y, x, y, ...])] in a picture (W, H)."""
    planes = {}
    for category, polygons in regions:
        plane = planes.setdefault(category, Image.new("1", size))
        for polygon in polygons:
            if len(polygon) >= 6:
                ImageDraw.Draw(plane).polygon(polygon, fill=1)
    return {category: np.array(plane) for category, plane in planes.items()}


def _photo(name, row, path, shown):
    """Yield the photo for each class of {class: mask} that has a pixel."""
    present = sorted(category for category, mask in shown.items() if mask.any())
    for category in present:
        also = " ".join(other for other in present if other != category)
        yield Found(category, name, row | {"also": also}, [path], [shown[category]])


def from_davis(root, names, left):
    """JPEGImages/480p/SEQUENCE/, Annotations/480p/SEQUENCE/: T evenly spaced frames of each.

    All objects of a sequence are one mask. It shows its class and what the map says it carries.
    """
    known = {s: {"class": c, "video": s} for s, c in _classes(names, "davis").items()}
    if (root / "classes.csv").is_file():
        table = read_table(root / "classes.csv", ("sequence", "class", "video"))
        known |= {row["sequence"]: row for row in table}
    carries = {s: also for entry in names.values() for s, also in entry["carries"].items()}
    folders = sorted(path for path in root.glob("Annotations/480p/*") if any(path.glob("*.png")))
    for folder in _some(folders, f"Annotations/480p/SEQUENCE/*.png in {root}"):
        if folder.name not in known:
            left["DAVIS videos whose class is not known"] += 1
            continue
        category, video = known[folder.name]["class"], known[folder.name]["video"]
        masks = sorted(folder.glob("*.png"))
        masks = [masks[k] for k in np.linspace(0, len(masks) - 1, T).round().astype(int)]
        path = f"JPEGImages/480p/{folder.name}"
        files = [root / path / f"{mask.stem}.jpg" for mask in masks]
        also = " ".join(carries.get(video, []))
        row = {"source": f"davis_{video}", "also": also, "dataset": "DAVIS", "path": path}
        masks = [read_labels(mask) > 0 for mask in masks]
        yield Found(category, f"davis_{folder.name}", row, files, masks)


def from_esc(root, names, left):
    """audio/ and meta/esc50.csv. Takes of one recording share its `src_file`: their source."""
    class_of = _classes(names, "esc")
    for given in read_table(root / "meta" / "esc50.csv", ("filename", "category", "src_file")):
        category = class_of.get(given["category"])
        path = root / "audio" / Path(given["filename"]).name
        if category and not path.is_file():
            left["ESC-50 sounds that are not in the folder"] += 1
        elif category:
            source, place = f"esc_{given['src_file']}", f"audio/{path.name}"
            row = {"source": source, "dataset": "ESC-50", "path": place}
            yield Found(category, f"esc_{path.stem}", row, [path])


def from_sounds(root, names, left):
    """DIR/CLASS/*.wav, ogg, flac or mp3, as one sorts FSD50K. Every file is its own source."""
    for category, entry in names.items():
        for folder in (category, *entry["sounds"]):
            for path in sorted(root.glob(f"{folder}/*")):
                if path.suffix.lower() in SOUNDS:
                    name = f"{root.name}_{path.stem}"
                    row = {"source": name, "dataset": root.name, "path": f"{folder}/{path.name}"}
                    yield Found(category, name, row, [path])


def from_list(root, listed):
    """The listed sounds: ROOT/PATH, ROOT/REPOSITORY/PATH or, of ESC-10, the same take in ESC-50."""
    takes = {path.stem.rpartition("-")[0]: path for path in root.glob("audio/*.wav")}
    for (category, name), row in listed.items():
        repository = row["repository"].split("@")[0].split("/")[-1]
        paths = [root / row["path"], root / repository / row["path"]]
        paths.append(takes.get(Path(row["path"]).stem, paths[0]))
        paths = [path for path in paths if path.is_file() and path.suffix.lower() in SOUNDS]
        if paths:
            yield Found(category, name, row, paths[:1])


READERS = {"voc": from_voc, "coco": from_coco, "davis": from_davis, "esc": from_esc,
    "sounds": from_sounds}  # fmt: skip


def read_class_map(path):
    """{class: {"voc", "coco", "davis", "esc", "sounds": [...], "carries": {sequence: [...]}}}."""
    empty = {key: [] for key in READERS} | {"carries": {}}
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        names = {str(name): empty | entry for name, entry in loaded.items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise AtlasError(f"the class map {path} is not readable: {error}") from None
    for name, entry in names.items():
        wrong = [k for k, v in entry.items() if k not in empty or type(v) is not type(empty[k])]
        if wrong or not set(entry["voc"]) <= set(VOC[1:]):
            keys = f"lists under {', '.join(READERS)} (VOC's own names under voc)"
            raise AtlasError(f"the class map {path}: {name} needs {keys}, a mapping under carries")
    return names


def _classes(names, key):
    """{what a data set calls it: class} of the class map."""
    return {value: name for name, entry in names.items() for value in entry[key]}


def read_labels(path):
    """The values of a data set's own mask [H, W] uint8: palette indices where it has a palette."""
    image = open_picture(path)
    if image.mode not in ("P", "L", "1"):
        raise AtlasError(f"the mask {path} is an {image.mode} image; it must have one channel")
    return np.array(image).astype(np.uint8)


def _some(found, wanted):
    if not found:
        raise AtlasError(f"there are no {wanted}: is it the right folder?")
    return found
