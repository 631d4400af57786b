"""An open AVS set: pictures and videos with masks x environmental sounds, joined by shared class, written as an AVSBench S4 tree.

AVSBench is by e-mail request only; PASCAL VOC, DAVIS and ESC-50 are a download away. A clip is two pictures side by side and one recording.
One picture shows the heard class; the other is silent and does not contain that class. Truth = every pixel of the heard class in the frame.

What keeps it honest:
- Pictures, videos and recordings never cross splits. A VOC stem `\\d{4}_\\d{6}` is its own source, any other is the text before its first `_`;
  a DAVIS source is the `video` column of classes.csv, else the sequence; a recording's is ESC-50's `src_file`.
- Silent pictures are drawn from the heard pictures of the other classes (one in five: from classes that are never heard), cut and moved in the
  same way, so the picture does not tell whether it is heard; sounds have one loudness.
- A picture *shows* a class when the class covers a tenth of the picture's middle half (columns W/4 to 3W/4). Only these count as the
  class's pictures: an object cut off at the border, or a speck, is no fair target. A class of fewer than three sources is dropped.

Known weakness: DAVIS labels one object and has no classes. A sequence is taken to contain its own class and what the class map says it
`carries`; bystanders of any class may be in it without a label, so for an exact truth use VOC alone.

Shapes: T frames (5), H W pixels of the square frame; each picture fills a half, [T, H, W/2]. Masks are 1 on the sounding object.
"""
import csv
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from atlas.audio import RATE, read_wave
from atlas.clips import SPLITS, T, built_beside, read_frame, s4_clip, write_clip, write_csv
from atlas.errors import AtlasError

CLASS_MAP = Path(__file__).parents[1] / "configs" / "class_map.yaml"
VOC = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train
tvmonitor""".split()  # the palette index of a VOC mask is the position here; 255 is void and belongs to nothing
SHARE = {"train": 0.6, "val": 0.2, "test": 0.2}  # of the sources of a class
MIDDLE = 0.10  # a picture shows a class that covers this much of its middle half ...
VISIBLE = 0.02  # ... and in a clip the class covers at least this much of every frame
DISTRACTORS = 0.2  # silent pictures of classes that are never heard
RMS = 0.05  # of the written sound
RESTARTS = 1000


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


def compose_s4(out, voc=None, davis=None, esc=None, seed=0, clips=24, val=None, test=None, size=128, classes=None, class_map=None, progress=True):
    """Build the set at `out` and return its report, which is also written to out/compose.json.

    clips, val, test: clips a class in each split (val: a quarter, test: half of `clips`). `classes`: only these; `class_map`: another map file.
    The report: seed, arguments, kept {class: {split: {"clips", "picture_sources", "recordings"}}}, dropped {class: reason},
    unknown [DAVIS sequences whose class nobody tells], clips [{id, split, class, side, name and source of both pictures and of the recording}].
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AtlasError(f"{out} exists and is not an empty folder: give another --out, or remove it first")
    if not (voc or davis) or not esc:
        raise AtlasError("compose needs pictures and sounds: give --esc, and --voc or --davis or both")
    counts = {"train": clips, "val": -(-clips // 4) if val is None else val, "test": -(-clips // 2) if test is None else test}
    if min(counts.values()) < 1 or size < 32 or size % 2 or seed < 0:
        raise AtlasError(f"compose: at least one clip a class and split, an even frame size of 32 or more, a seed from 0; got {counts}, {size}, {seed}")
    names = read_class_map(class_map or CLASS_MAP)
    if unknown := sorted(set(classes or ()) - set(names)):
        raise AtlasError(f"unknown class {', '.join(unknown)} in --classes; the class map knows {', '.join(sorted(names))}")

    pictures, unknown = scan_voc(voc, names, progress) if voc else [], []
    if davis:
        pictures += scan_davis(davis, names, unknown, progress)
    pictures = [p for p in pictures if p.shows]
    recordings = scan_esc(esc, names)
    seen = _by_source((p.source, c) for p in pictures for c in p.shows)
    heard = _by_source((source, c) for _, source, c in recordings)
    kept, dropped = choose_classes(seen, heard, names, classes)

    rng = np.random.default_rng(seed)
    picture_split = split_sources(seen, kept, rng, "pictures", pictures)
    sound_split = split_sources(heard, kept, rng, "recordings")
    report = {
        "seed": seed,
        "arguments": {**{key: path and Path(path).resolve().name for key, path in (("voc", voc), ("davis", davis), ("esc", esc))}, "clips": counts,
                      "size": size, "classes": sorted(classes) if classes else None, "class_map": Path(class_map or CLASS_MAP).name},
        "kept": {c: {split: {"clips": counts[split],
                             "picture_sources": sum(c in has and picture_split[source] == split for source, has in seen.items()),
                             "recordings": sum(c in has and sound_split[source] == split for source, has in heard.items())}
                     for split in SPLITS} for c in kept},
        "dropped": dropped, "unknown": unknown, "clips": [],
    }  # fmt: skip
    plan = plan_clips(pictures, recordings, picture_split, sound_split, kept, counts, rng)
    with built_beside(out) as folder:
        written = []
        for clip in tqdm(plan, "compose", len(kept) * sum(counts.values()), unit="clip", disable=not progress):
            split, name, heard_deck, (sound, sound_source, _), silent_class, silent_deck = clip
            heard, heard_frames, heard_masks = first_view(heard_deck, name, size, rng)
            silent, silent_frames, silent_masks = first_view(silent_deck, silent_class, size, rng)
            side = ("left", "right")[rng.integers(2)]
            order = 1 if side == "left" else -1
            frames = np.concatenate([heard_frames, silent_frames][::order], axis=2)
            masks = np.concatenate([heard_masks, np.zeros_like(silent_masks)][::order], axis=2)
            written.append(write_clip(s4_clip(folder, f"c{len(written):06d}", name, split), frames, masks, load_sound(sound), RATE))
            report["clips"].append({"id": written[-1].id, "split": split, "class": name, "side": side,
                                    "heard": heard.name, "heard_source": heard.source, "silent": silent.name, "silent_source": silent.source,
                                    "silent_class": silent_class, "recording": sound.name, "recording_source": sound_source})  # fmt: skip
        Path(folder, "compose.json").write_text(json.dumps(report, indent=1) + "\n")
        write_csv(folder, written)
    return report


def read_class_map(path):
    """{class: {"voc": [...], "davis": [...], "esc": [...], "carries": {sequence: [...]}}}, checked."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AtlasError(f"cannot read the class map {path}: {error}") from error
    kinds = {"voc": list, "davis": list, "esc": list, "carries": dict}
    if not isinstance(loaded, dict) or not loaded:
        raise AtlasError(f"class map {path}: expected `class: {{voc: [...], davis: [...], esc: [...]}}` for every class")
    for name, entry in loaded.items():
        if not isinstance(entry, dict) or any(not isinstance(v, kinds.get(key, ())) for key, v in entry.items()):
            raise AtlasError(f"class map {path}: {name} must have lists under voc, davis, esc, may have a mapping under carries, and nothing else")
        if wrong := set(entry.get("voc", ())) - set(VOC[1:]):
            raise AtlasError(f"class map {path}: {name} names {', '.join(map(str, wrong))}, which VOC does not have; it has {', '.join(VOC[1:])}")
    return {name: {key: entry.get(key, kind()) for key, kind in kinds.items()} for name, entry in loaded.items()}


def canonical(name, names):
    """The class to which a VOC name, or a class in classes.csv, belongs: itself where the map has no entry."""
    return name if name in names else next((c for c, entry in names.items() if name in entry["voc"]), name)


def scan_voc(root, names, progress):
    """The pictures of a VOC folder that have a segmentation mask (and are listed, where there is a trainval.txt)."""
    root = Path(root)
    masks = {path.stem: path for path in sorted(_folder(root / "SegmentationClass", "--voc").glob("*.png"))}
    listed = root / "ImageSets" / "Segmentation" / "trainval.txt"
    stems = [s for s in sorted(set(listed.read_text().split())) if s in masks] if listed.is_file() else list(masks)
    values = defaultdict(list)
    for index, name in enumerate(VOC[1:], 1):
        values[canonical(name, names)].append(index)
    pictures = []
    for stem in tqdm(stems, "VOC masks", unit="picture", disable=not progress):
        image = root / "JPEGImages" / f"{stem}.jpg"
        if not image.is_file():
            raise AtlasError(f"{image} is missing, though {masks[stem].name} is there: is the VOC folder complete?")
        source = stem if re.fullmatch(r"\d{4}_\d{6}", stem) else stem.split("_")[0]
        mask = read_mask(masks[stem])
        if wrong := set(np.unique(mask).tolist()) - set(range(len(VOC))) - {255}:
            raise AtlasError(f"{masks[stem]}: value {min(wrong)} is no VOC class (0 to 20, 255 = void): is it a SegmentationObject mask?")
        contains = {c: v for c, v in values.items() if np.isin(mask, v).any()}
        shows = frozenset(c for c, v in contains.items() if shown(np.isin(mask, v)[None]))
        pictures.append(Picture(stem, f"voc/{source}", (image,), (masks[stem],), contains, frozenset(contains), shows))
    return pictures


def scan_davis(root, names, unknown, progress):
    """The sequences of a DAVIS folder, T evenly spaced frames of each. Sequences whose class nobody tells are appended to `unknown`."""
    root = Path(root)
    folders = sorted(p for p in _folder(root / "Annotations" / "480p", "--davis").iterdir() if p.is_dir())
    of_sequence = {s: {"class": c, "video": s} for c, entry in names.items() for s in entry["davis"]}
    carries = {s: also for entry in names.values() for s, also in entry["carries"].items()}
    if (root / "classes.csv").is_file():
        of_sequence |= {row["sequence"]: row for row in _rows(root / "classes.csv", ("sequence", "class", "video"))}
    pictures = []
    for folder in tqdm(folders, "DAVIS masks", unit="sequence", disable=not progress):
        masks = sorted(folder.glob("*.png"))
        if folder.name not in of_sequence or not masks:
            unknown.append(folder.name)
            continue
        masks = tuple(masks[k] for k in np.linspace(0, len(masks) - 1, T).round().astype(int))
        frames = tuple(root / "JPEGImages" / "480p" / folder.name / f"{path.stem}.jpg" for path in masks)
        if lost := [path for path in frames if not path.is_file()]:
            raise AtlasError(f"{lost[0]} is missing, though its mask is there: is the DAVIS folder complete?")
        row = of_sequence[folder.name]
        name = canonical(row["class"], names)
        arrays = [read_mask(path) > 0 for path in masks]
        if len({a.shape for a in arrays}) > 1:
            raise AtlasError(f"{folder}: masks of several sizes in one sequence")
        contains = frozenset([name, *carries.get(row["video"], ())])
        shows = frozenset([name] if shown(np.stack(arrays)) else [])
        pictures.append(Picture(folder.name, f"davis/{row['video']}", frames, masks, {name: None}, contains, shows))
    return pictures


def scan_esc(root, names):
    """[(file, source, class)] of the recordings in an ESC-50 folder whose category the map knows."""
    root = Path(root)
    of_category = {category: c for c, entry in names.items() for category in entry["esc"]}
    rows = _rows(_folder(root, "--esc") / "meta" / "esc50.csv", ("filename", "category", "src_file"))
    recordings = [(root / "audio" / r["filename"], r["src_file"], of_category[r["category"]]) for r in rows if r["category"] in of_category]
    if lost := [path for path, _, _ in recordings if not path.is_file()]:
        raise AtlasError(f"{lost[0]} is missing, though meta/esc50.csv names it ({len(lost)} such): is the ESC-50 folder complete?")
    return sorted(recordings)


def shown(mask):
    """Whether the class of mask [T, H, W] can be heard here: MIDDLE of the picture's middle half on average, and never nearly out of sight."""
    height, width = mask.shape[1:]
    middle = mask[:, :, width // 4 : width - width // 4].mean()
    return bool(middle >= MIDDLE and mask.sum((1, 2)).min() >= 1.5 * VISIBLE * min(height, 2 * width) ** 2)


def choose_classes(seen, heard, names, classes):
    """(kept classes, {dropped class: why}): three picture sources and three recordings are the least that three splits need."""
    kept, dropped = [], {}
    for name in sorted(set(names).union(*seen.values())):
        have = {what: sum(name in has for has in of.values()) for what, of in (("picture sources", seen), ("recordings", heard))}
        if classes and name not in classes:
            dropped[name] = "not in --classes"
        elif min(have.values()) < 3:
            dropped[name] = ", ".join(f"{n} of the 3 {what} needed" for what, n in have.items() if n < 3)
        else:
            kept.append(name)
    if not kept:
        why = "; ".join(f"{c}: {reason}" for c, reason in dropped.items())
        raise AtlasError(f"no class is left ({why}): add pictures or sounds, or change the class map")
    return kept, dropped


def split_sources(sources, kept, rng, what, pictures=()):
    """{source: split} for sources {source: classes}: every kept class gets a source in every split, and else about SHARE of its sources.

    Every split also holds one of `pictures` without the class, to be silent beside it. Greedy, rarest class first; a source may serve
    several classes, so a bad draw is thrown away and drawn again.
    """
    of_class = {c: sorted(s for s, has in sources.items() if c in has) for c in kept}
    order = sorted(kept, key=lambda c: len(of_class[c]))
    rest = sorted(s for s, has in sources.items() if not has & set(kept))
    failures = Counter()
    for _ in range(RESTARTS):
        split_of = {}
        for mine in [*(of_class[c] for c in order), rest]:
            got = Counter(split_of[s] for s in mine if s in split_of)
            for source in rng.permutation([s for s in mine if s not in split_of]).tolist():
                split = max(("train", "test", "val"), key=lambda x: (not got[x], SHARE[x] * len(mine) - got[x]))
                split_of[source] = split
                got[split] += 1
        lacking = [c for c in order if len({split_of[s] for s in of_class[c]}) < len(SPLITS)]
        alone = [c for c in kept if pictures and len({split_of[p.source] for p in pictures if c not in p.contains}) < len(SPLITS)]
        if not lacking and not alone:
            return split_of
        failures[lacking[0] if lacking else f"{alone[0]}, and of others to be silent beside it,"] += 1
    raise AtlasError(f"the {what} of {failures.most_common(1)[0][0]} cannot be divided into train, val and test without sharing a source: "
                     "add some, or leave a class out with --classes")  # fmt: skip


def plan_clips(pictures, recordings, picture_split, sound_split, kept, counts, rng):
    """Yield (split, class, deck of its pictures, recording, silent class, deck of its pictures), one for each clip."""
    for split in SPLITS:
        here = [p for p in pictures if picture_split[p.source] == split]
        for name in kept:
            heard = _deck([(p.source, p) for p in here if name in p.shows], rng)
            sounds = _deck([(r[1], r) for r in recordings if r[2] == name and sound_split[r[1]] == split], rng)
            decks = {}  # silent class -> deck
            for other in sorted({c for p in here for c in p.shows}):
                if mine := [(p.source, p) for p in here if other in p.shows and name not in p.contains]:
                    decks[other] = _deck(mine, rng)
            usual, never_heard = [c for c in decks if c in kept], [c for c in decks if c not in kept]
            for _ in range(counts[split]):
                pool = never_heard if never_heard and (not usual or rng.random() < DISTRACTORS) else usual
                silent = pool[rng.integers(len(pool))]
                yield split, name, heard, next(sounds), silent, decks[silent]


def _deck(items, rng):
    """Endless draw from [(source, item)]: every source once a round, in a new order each time, and its items in turn."""
    piles = defaultdict(list)
    for source, item in items:
        piles[source].append(item)
    piles = {source: [pile[k] for k in rng.permutation(len(pile))] for source, pile in sorted(piles.items())}
    while piles:
        for source in rng.permutation(list(piles)).tolist():
            piles[source].append(piles[source].pop(0))
            yield piles[source][-1]


def first_view(deck, name, size, rng):
    """(picture, frames, masks) of the first picture of `deck` that can be cut so that class `name` stays in sight."""
    for _, picture in zip(range(50), deck):
        if found := view(picture, name, size, rng):
            return picture, *found
    raise AtlasError(f"{picture.name}: no part of it (or of the other pictures of its split) keeps {name} in sight; leave {name} out with --classes")


def view(picture, name, size, rng):
    """Five views of a picture by a window that pans and zooms a little: frames [T, H, W/2, 3] uint8 and class `name`'s masks [T, H, W/2] bool.

    The same window cuts frame and mask (bilinear and nearest). It is drawn at random around the class's pixels; after half of the tries it
    follows them from frame to frame. None if the class never keeps VISIBLE of the frame; heard and silent pictures are treated alike.
    """
    arrays = [read_mask(path) for path in picture.masks]
    values = picture.values[name]
    arrays = [a > 0 if values is None else np.isin(a, values) for a in arrays] * (T // len(arrays))
    height, width = arrays[0].shape
    masks = [Image.fromarray(a.astype(np.uint8)) for a in arrays]
    middle = np.array([[x.mean() + 0.5, y.mean() + 0.5] if len(x) else [width / 2, height / 2] for y, x in map(np.nonzero, arrays)])  # [T, 2]
    time = np.linspace(0, 1, T)[:, None]
    whole = min(height, 2 * width)  # of the tallest window; a window is half as wide as tall
    tries = 30
    for k in range(tries):
        path = middle if k >= tries // 2 else middle[0] * (1 - time) + middle[-1] * time
        first = rng.uniform(0.7, 1)
        tall = whole * np.clip(first * np.linspace(1, rng.uniform(0.92, 1.08), T), 0.6, 1)  # [T]
        extent = np.stack([tall / 2, tall], axis=1)  # [T, 2], x and y
        centre = path + rng.uniform(-0.25, 0.25, 2) * extent[0] + (time - 0.5) * rng.uniform(-0.06, 0.06, 2) * whole
        corner = np.clip(centre - extent / 2, 0, [width, height] - extent)
        boxes = np.concatenate([corner, corner + extent], axis=1).clip(0, [width, height] * 2).tolist()
        cut = np.stack([m.resize((size // 2, size), Image.NEAREST, box) for m, box in zip(masks, boxes)]) > 0
        if cut.mean((1, 2)).min() >= 2 * VISIBLE:  # of a half
            images = [read_image(path, (width, height)) for path in picture.frames] * (T // len(picture.frames))
            return np.stack([im.resize((size // 2, size), Image.BILINEAR, box) for im, box in zip(images, boxes)]), cut
    return None


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
                raise AtlasError(f"{path} is an {image.mode} image; a mask must be a palette or grey PNG")
            return np.array(image).astype(np.uint8)
    except (OSError, SyntaxError) as error:
        raise AtlasError(f"cannot read the mask {path}: {error}") from error


def read_image(path, size):
    """An RGB picture of (W, H) `size`, its mask's."""
    image = Image.fromarray(read_frame(path))
    if image.size != size:
        raise AtlasError(f"{path} is {image.size[0]}x{image.size[1]} and its mask {size[0]}x{size[1]}: they must match")
    return image


def _by_source(pairs):
    """{source: {class, ...}} from (source, class) pairs."""
    sources = defaultdict(set)
    for source, name in pairs:
        sources[source].add(name)
    return dict(sources)


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
