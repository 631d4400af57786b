"""Read a whole tree, file by file, and report what would stop or bend a run."""

from collections import Counter, defaultdict
from pathlib import Path

import soundfile
from tqdm import tqdm

from atlas.audio import RATE
from atlas.clips import CSVS, DOMAINS, READERS, SPLITS, T, read_frame, read_mask
from atlas.errors import AtlasError

PUBLISHED = {
    "s4": {"train": 3452, "val": 740, "test": 740},
    "ms3": {"train": 296, "val": 64, "test": 64},
}  # AVSBench's own counts
PUBLISHED_CLASSES = dict(zip(sum(DOMAINS.values(), ()), (  # S4: train, val, test, counted from the released CSV
    (63, 14, 14), (214, 46, 45), (155, 33, 34), (182, 39, 39), (126, 27, 27), (175, 37, 37), (134, 29, 29), (44, 9, 9), (140, 30, 30), (209, 45, 45),
    (194, 41, 41), (205, 44, 44), (208, 45, 45), (137, 30, 30), (154, 33, 33), (217, 47, 47), (143, 31, 31), (105, 22, 22), (138, 29, 29),
    (193, 42, 42), (173, 37, 37), (86, 18, 18), (57, 12, 12),
)))  # fmt: skip


def check(root):
    """(counts, errors, warnings), lists of lines, over the S4 and MS3 trees that are in `root`."""
    present = [dataset for dataset, csv in CSVS.items() if Path(root, csv).is_file()]
    if not present:
        raise AtlasError(
            f"neither an S4 nor an MS3 tree in {root}: {' and '.join(CSVS.values())} are missing; give the folder that holds Single-source/ or Multi-sources/"
        )
    parts = [check_tree(root, dataset) for dataset in present]
    return tuple(sum(lists, []) for lists in zip(*parts))


def check_tree(root, dataset):
    """(counts, errors, warnings) of one tree. An error would stop or falsify a run; a warning is handled, but worth knowing.

    Checked: every frame, mask and sound is there and readable; masks have their frame's size, hold 0 and 255 only, and are not empty (MS3: not all five);
    sounds last T seconds, are mono, at 16 kHz and not silent (others are converted or padded when packed); no clip id stands twice;
    no source video is in two splits (an error in S4; MS3 was released so, and runs report the source-disjoint clips apart).
    """
    clips, errors, warnings = READERS[dataset](root), [], []
    for clip in tqdm(clips, f"checking {dataset.upper()}", unit="clip", disable=None):
        here = "/".join(filter(None, (clip.split, clip.category, clip.id)))
        sizes, empty = {}, []
        for k, path in enumerate(clip.frames):
            frame = _tried(read_frame, path, errors)
            sizes[k] = None if frame is None else frame.shape[:2]
        for k, path in enumerate(clip.masks):
            mask = _tried(read_mask, path, errors) if path else None
            if mask is None:
                continue
            if sizes[k] and mask.shape != sizes[k]:
                errors.append(
                    f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]}, its frame {sizes[k][1]}x{sizes[k][0]}"
                )
            if not mask.any():
                empty.append(path)
        if dataset == "s4":
            warnings += [
                f"{path}: nothing is masked, but in S4 the object sounds all the time"
                for path in empty
            ]
        elif len(empty) == T:
            warnings.append(f"{here}: none of its masks holds anything")
        _check_sound(clip.audio, errors, warnings)
        if len({size for size in sizes.values() if size}) > 1:
            warnings.append(f"{here}: its frames differ in size")
    errors += [
        f"the clip id {name} stands {n} times in the CSV"
        for name, n in Counter(clip.id for clip in clips).items()
        if n > 1
    ]
    crossing = shared_sources(clips)
    if dataset == "s4":
        errors += [
            f"the source video {source} is in {' and '.join(sorted(found))}: a leak"
            for source, found in crossing.items()
        ]
    else:
        for split in ("val", "test"):
            mine = [clip for clip in clips if clip.split == split]
            shared = sum("train" in crossing.get(clip.source, ()) for clip in mine)
            if shared:
                warnings.append(
                    f"{shared} of {len(mine)} {split} clips share their source video with a train clip; runs report the others apart (source_disjoint)"
                )
    return counted(clips, dataset), errors, warnings


def shared_sources(clips):
    """{source video: its splits} of the sources that are in more than one split."""
    videos = defaultdict(set)
    for clip in clips:
        videos[clip.source].add(clip.split)
    return {source: found for source, found in videos.items() if len(found) > 1}


def counted(clips, dataset):
    """Lines: the clips of each split and, S4, of each category, against the published numbers."""
    splits, published = Counter(clip.split for clip in clips), PUBLISHED[dataset]
    lines = [
        f"{dataset.upper()}: {len(clips)} clips, " + ", ".join(f"{s} {splits[s]}" for s in SPLITS)
    ]
    if splits != published:
        lines.append(
            f"(AVSBench's {dataset.upper()} as released: "
            + ", ".join(f"{s} {n}" for s, n in published.items())
            + ")"
        )
    per_class = Counter((clip.category, clip.split) for clip in clips)
    for name in sorted({clip.category for clip in clips if clip.category}):
        found = tuple(per_class[name, s] for s in SPLITS)
        known = PUBLISHED_CLASSES.get(name) if len(clips) == sum(published.values()) else None
        lines.append(
            f"  {name:<32} "
            + " ".join(f"{n:5d}" for n in found)
            + (f"   (as released: {known})" if known and known != found else "")
        )
    return lines


def _tried(read, path, errors):
    try:
        return read(path)
    except AtlasError as error:
        errors.append(str(error))


def _check_sound(path, errors, warnings):
    if not Path(path).is_file():
        return errors.append(f"the file {path} is missing")
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        return errors.append(f"cannot read the sound {path}: {error}")
    if not len(wave):
        return errors.append(f"the sound {path} is empty")
    found = [f"{rate} Hz, is resampled to {RATE}"] * (rate != RATE) + [
        f"{wave.shape[1]} channels, are averaged"
    ] * (wave.shape[1] > 1)
    found += [f"{len(wave) / rate:.2f} s, is padded to {T} s"] * (len(wave) / rate < T - 0.2) + [
        "silent throughout"
    ] * (not wave.any())
    warnings += [f"{path}: {what}" for what in found]
