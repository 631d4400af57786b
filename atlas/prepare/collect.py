"""A stock (stock.py) from data sets that anyone can download: VOC, COCO, DAVIS, ESC-50, sounds.

configs/class_map.yaml says which class is what in each set. A reader yields, of the files `found`
below `root`, (class, name, row of the table, files, masks [H, W] bool): a sound has no masks.
"""

import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw
from tqdm import tqdm

from atlas.clips import open_picture, read_frame, read_table, refuse_other_size
from atlas.errors import AtlasError
from atlas.prepare.stock import COLUMNS, by_place, evenly, read_rows
from atlas.prepare.tree import placed, write_table

CLASS_MAP = Path(__file__).parents[2] / "configs" / "class_map.yaml"
VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
motorbike person pottedplant sheep sofa train tvmonitor""".split()  # by palette index; 255 is void
LEAST = 0.05  # of a picture, that its class covers
MOST = 200  # pictures, or sounds, of a class from a folder
SOUNDS = (".wav", ".ogg", ".flac", ".mp3")


def fill_stock(out, folders, lists=()):
    """Add to the stock `out` from `folders`: {"voc" | "coco" | "davis" | "esc" | "sounds": folder}.

    With `lists`, the tables of another stock, exactly what these name is taken. Returns (Counter of
    what was added, by (class, kind); {why: how many were left out}; [listed rows still missing]).
    """
    if not folders:
        raise AtlasError(f"collect needs a folder: one of --{', --'.join(READERS)}")
    class_map = read_class_map(CLASS_MAP)
    rows = {kind: read_rows(out, kind) for kind in COLUMNS}
    listed = {kind: {} for kind in COLUMNS}
    for path in lists:
        kind = "pictures" if "picture" in read_table(path, ("class",))[0] else "sounds"
        listed[kind] |= by_place(read_table(path, COLUMNS[kind]), kind)
    added, left = Counter(), Counter()
    try:
        for key, folder in folders.items():
            read, pattern = READERS[key]
            found = sorted(Path(folder).glob(pattern))
            if not found:
                raise AtlasError(f"there is no {pattern} in {folder}: check --{key}")
            items = read(Path(folder), found, class_map, left)
            if lists and key in ("esc", "sounds"):
                items = from_list(Path(folder), listed["sounds"])
            taken = Counter()
            for item in tqdm(items, key, unit="file", disable=None):
                name, stem, row, _, masks = item
                kind = "pictures" if masks else "sounds"
                place = name, stem
                if place in rows[kind] or (lists and place not in listed[kind]):
                    continue
                shares = [mask.mean() for mask in masks] or [1]
                if not lists and (not min(shares) or np.mean(shares) < LEAST):
                    left["pictures in which the class is small"] += 1
                elif not lists and taken[name] == MOST:
                    left[f"{kind} of a class above {MOST}"] += 1
                else:
                    known = {"class": name, "mask": "drawn", kind[:-1]: write(out, *item)}
                    rows[kind][place] = row | listed[kind].get(place, {}) | known
                    taken[name] += 1
                    added[name, kind] += 1
    finally:
        for kind, known in rows.items():
            if known:
                table = [known[place] for place in sorted(known)]
                write_table(Path(out, f"{kind}.csv"), COLUMNS[kind], table)
    missing = [listed[kind][p] for kind in COLUMNS for p in listed[kind] if p not in rows[kind]]
    return added, left, missing


def write(out, category, name, row, files, masks):
    """Copy the files of an item, write its masks, and return its name in the table."""
    if any(word in ("", ".", "..") or "/" in word for word in (category, name)):
        raise AtlasError(f"{category!r} and {name!r} cannot name a folder and a file")
    video = len(files) > 1
    for k, path in enumerate(files):
        place = Path(category, name, f"{k:05d}" if video else "")
        if masks:
            refuse_other_size(f"of {path}", masks[k], read_frame(path))
            Image.fromarray(masks[k]).convert("L").save(placed(Path(out, "masks", f"{place}.png")))
        kind = "pictures" if masks else "sounds"
        shutil.copyfile(path, placed(Path(out, kind, f"{place}{path.suffix.lower()}")))
    return name if video else f"{name}{path.suffix.lower()}"


def from_voc(root, found, class_map, left):
    for path in found:
        labels = read_labels(path)
        if not np.isin(labels, [*range(len(VOC)), 255]).all():
            raise AtlasError(f"{path}: 0 to 20 and 255 are VOC's classes, it has others")
        shown = {}
        for category, entry in class_map.items():
            shown[category] = np.isin(labels, [VOC.index(name) for name in entry["voc"]])
        row = {"dataset": "PASCAL VOC", "path": f"JPEGImages/{path.stem}.jpg"}
        yield from _photo(f"voc_{path.stem}", root, row, shown)


def from_coco(root, found, class_map, left):
    """Pictures without crowds and RLE regions. Polygons [x, y, x, y, ...] are filled."""
    class_of = _classes(class_map, "coco")
    for file in found:
        for number, name, size, regions in read_instances(file, class_of):
            row = {"dataset": "COCO", "path": f"{file.stem.removeprefix('instances_')}/{name}"}
            if not (root / row["path"]).is_file():
                left["COCO pictures that are not there"] += 1
            elif not all(isinstance(polygons, list) for _, polygons in regions):
                left["COCO pictures with a crowd or RLE region"] += 1
            else:
                planes = {category: Image.new("1", size) for category, _ in regions}
                for category, polygons in regions:
                    for polygon in polygons:
                        if len(polygon) >= 6:
                            ImageDraw.Draw(planes[category]).polygon(polygon, fill=1)
                shown = {category: np.array(plane) for category, plane in planes.items()}
                yield from _photo(f"coco_{number}", root, row, shown)


def read_instances(file, class_of):
    """[(id, file name, (W, H), [(class, segmentation)])] of the pictures of known classes."""
    regions = defaultdict(list)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        category = {c["id"]: class_of.get(c["name"]) for c in data["categories"]}
        for region in data["annotations"]:
            name = category[region["category_id"]]
            if name:
                polygons = region["segmentation"]  # a dict where it is RLE
                if isinstance(polygons, list):
                    polygons = [list(map(float, polygon)) for polygon in polygons]
                regions[region["image_id"]].append((name, polygons))
        images = [image for image in data["images"] if image["id"] in regions]
        sizes = [(int(image["width"]), int(image["height"])) for image in images]
        return [(i["id"], i["file_name"], s, regions[i["id"]]) for i, s in zip(images, sizes)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise AtlasError(f"{file} is not COCO's instances json: {error!r}") from None


def _photo(name, root, row, shown):
    """Yield the photo of a row for each class of {class: mask} that has a pixel."""
    present = sorted(category for category, mask in shown.items() if mask.any())
    for category in present:
        also = " ".join(other for other in present if other != category)
        own = row | {"source": name, "also": also}
        yield category, name, own, [root / row["path"]], [shown[category]]


def from_davis(root, found, class_map, left):
    """T evenly spaced frames of each sequence; all its objects are one mask."""
    class_of = _classes(class_map, "davis")
    for name in sorted({path.parent.name for path in found}):
        if name not in class_of:
            left["DAVIS videos of no known class"] += 1
            continue
        masks = evenly([path for path in found if path.parent.name == name])
        place, category = f"JPEGImages/480p/{name}", class_of[name]
        also = " ".join(class_map[category]["carries"].get(name, []))
        row = {"source": f"davis_{name}", "also": also, "dataset": "DAVIS", "path": place}
        files = [root / place / f"{mask.stem}.jpg" for mask in masks]
        yield category, row["source"], row, files, [read_labels(mask) > 0 for mask in masks]


def from_esc(root, found, class_map, left):
    """Takes of one recording share its `src_file`: their source."""
    class_of = _classes(class_map, "esc")
    for given in read_table(found[0], ("filename", "category", "src_file")):
        category = class_of.get(given["category"])
        path = root / "audio" / Path(given["filename"]).name
        if category and path.is_file():
            row = {"source": f"esc_{given['src_file']}", "dataset": "ESC-50"}
            yield category, f"esc_{path.stem}", row | {"path": f"audio/{path.name}"}, [path], []
        elif category:
            left["ESC-50 sounds that are not there"] += 1


def from_sounds(root, found, class_map, left):
    """DIR/CLASS/NAME.wav, as one sorts FSD50K. Every file is its own source."""
    class_of = _classes(class_map, "sounds") | {name: name for name in class_map}
    for path in found:
        folder, name = path.parent.name, f"{root.name}_{path.stem}"
        if folder in class_of and path.suffix.lower() in SOUNDS:
            row = {"source": name, "dataset": root.name, "path": f"{folder}/{path.name}"}
            yield class_of[folder], name, row, [path], []


def from_list(root, listed):
    """Listed sounds: ROOT/PATH, ROOT/REPOSITORY/PATH or, of ESC-10, the same take in ESC-50."""
    takes = {path.stem.rpartition("-")[0]: path for path in root.glob("audio/*.wav")}
    for (category, name), row in listed.items():
        repository = row["repository"].partition("@")[0].rpartition("/")[2]
        paths = [root / row["path"], root / repository / row["path"]]
        paths.append(takes.get(Path(row["path"]).stem, root))
        paths = [path for path in paths if path.is_file() and path.suffix.lower() in SOUNDS]
        if paths:
            yield category, name, row, paths[:1], []


READERS = {  # and what a folder of each must hold
    "voc": (from_voc, "SegmentationClass*/*.png"),
    "coco": (from_coco, "annotations/instances_*.json"),
    "davis": (from_davis, "Annotations/480p/*/*.png"),
    "esc": (from_esc, "meta/esc50.csv"),
    "sounds": (from_sounds, "*/*"),
}


def read_class_map(path):
    """{class: {"voc", "coco", "davis", "esc", "sounds": [...], "carries": {sequence: [...]}}}."""
    empty = {key: [] for key in READERS} | {"carries": {}}
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        class_map = {str(name): empty | entry for name, entry in loaded.items()}
        for name, entry in class_map.items():
            wrong = [key for key in entry if type(entry[key]) is not type(empty[key])]
            wrong += set(entry["voc"]) - set(VOC[1:])
            if wrong:
                raise ValueError(f"{name}: {wrong[0]}")
    except (OSError, ValueError, KeyError, yaml.YAMLError, AttributeError, TypeError) as error:
        raise AtlasError(f"the class map {path} is not readable: {error!r}") from None
    return class_map


def _classes(class_map, key):
    return {value: name for name, entry in class_map.items() for value in entry[key]}


def read_labels(path):
    """A data set's own mask [H, W] uint8: palette indices where it has a palette."""
    image = open_picture(path)
    if image.mode not in ("P", "L", "1"):
        raise AtlasError(f"the mask {path} is an {image.mode} image; it must have one channel")
    return np.array(image).astype(np.uint8)
