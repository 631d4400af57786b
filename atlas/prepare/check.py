"""Read a whole tree, file by file, and report what would stop or bend a run."""

from collections import Counter, defaultdict
from pathlib import Path

import soundfile
from tqdm import tqdm

from atlas.audio import read_wave
from atlas.clips import (
    CSVS,
    DOMAINS,
    RATE,
    READERS,
    SPLITS,
    T,
    read_frame,
    read_mask,
    refuse_other_size,
)
from atlas.errors import AtlasError

PUBLISHED = {  # AVSBench's own counts
    "s4": {"train": 3452, "val": 740, "test": 740},
    "ms3": {"train": 296, "val": 64, "test": 64},
}
PUBLISHED_CLASSES = dict(zip(sum(DOMAINS.values(), ()), (  # S4: train, val, test, counted
    (63, 14, 14), (214, 46, 45), (155, 33, 34), (182, 39, 39), (126, 27, 27), (175, 37, 37),
    (134, 29, 29), (44, 9, 9), (140, 30, 30), (209, 45, 45), (194, 41, 41), (205, 44, 44),
    (208, 45, 45), (137, 30, 30), (154, 33, 33), (217, 47, 47), (143, 31, 31), (105, 22, 22),
    (138, 29, 29), (193, 42, 42), (173, 37, 37), (86, 18, 18), (57, 12, 12),
)))  # fmt: skip


def check(root):
    """(counts, errors, warnings), lists of lines, over the S4 and MS3 trees that are in `root`."""
    present = [dataset for dataset, table in CSVS.items() if Path(root, table).is_file()]
    if not present:
        what = f"neither {' nor '.join(CSVS.values())} in {root}"
        raise AtlasError(f"{what}; give the folder of Single-source/ or Multi-sources/")
    found = [check_tree(root, dataset) for dataset in present]
    return tuple(sum(lines, []) for lines in zip(*found))


def check_tree(root, dataset):
    """(counts, errors, warnings) of one tree.

    An error stops or falsifies a run: what a reader refuses, or in S4 a source video in two splits.
    (MS3 was released with such videos, and runs report the other clips apart.) A warning is worth
    knowing: an empty mask (MS3: all five), a sound that is converted, padded, cut or silent.
    """
    errors, warnings = [], []
    clips = _tried(errors, READERS[dataset], root)
    if clips is None:
        return [], errors, warnings
    for clip in tqdm(clips, f"checking {dataset.upper()}", unit="clip", disable=None):
        _check_pictures(clip, errors, warnings)
        _check_sound(clip.audio, errors, warnings)
    crossing = shared_sources(clips)
    if dataset == "s4":
        for source, splits in crossing.items():
            where = " and ".join(sorted(splits))
            errors.append(f"the source video {source} is in {where}: a leak")
        return counted(clips, dataset), errors, warnings
    for split in ("val", "test"):
        mine = [clip for clip in clips if clip.split == split]
        shared = sum("train" in crossing.get(clip.source, ()) for clip in mine)
        if shared:
            what = f"{shared} of {len(mine)} {split} clips share their source video with a train"
            warnings.append(f"{what} clip; runs report the others apart (source_disjoint)")
    return counted(clips, dataset), errors, warnings


def shared_sources(clips):
    """{source video: its splits} of the sources that are in more than one split."""
    videos = defaultdict(set)
    for clip in clips:
        videos[clip.source].add(clip.split)
    return {source: found for source, found in videos.items() if len(found) > 1}


def counted(clips, dataset):
    """Lines: the clips of each split and class, beside the published numbers where they differ."""
    splits, published = Counter(clip.split for clip in clips), PUBLISHED[dataset]

    def listed(numbers):
        return ", ".join(f"{split} {numbers[split]}" for split in SPLITS)

    lines = [f"{dataset.upper()}: {len(clips)} clips, {listed(splits)}"]
    if splits != published:
        lines.append(f"(AVSBench's {dataset.upper()} as released: {listed(published)})")
    per_class = Counter((clip.category, clip.split) for clip in clips)
    for name in sorted({clip.category for clip in clips if clip.category}):
        found = tuple(per_class[name, split] for split in SPLITS)
        line = f"  {name:<32} " + " ".join(f"{n:5d}" for n in found)
        known = PUBLISHED_CLASSES.get(name, found)
        if len(clips) == sum(published.values()) and known != found:
            line += f"   (as released: {known})"
        lines.append(line)
    return lines


def _tried(errors, work, *words):
    """work(*words), or None where it refuses; why is added to `errors`."""
    try:
        return work(*words)
    except AtlasError as error:
        errors.append(str(error))


def _check_pictures(clip, errors, warnings):
    here = "/".join(filter(None, (clip.split, clip.category, clip.id)))
    sizes, empty = set(), []
    for frame_path, mask_path in zip(clip.frames, clip.masks):
        frame = _tried(errors, read_frame, frame_path)
        mask = _tried(errors, read_mask, mask_path) if mask_path else None
        if frame is not None:
            sizes.add(frame.shape)
            if mask is not None:
                _tried(errors, refuse_other_size, mask_path, mask, frame)
        if mask is not None and not mask.any():
            empty.append(mask_path)
    if clip.category is None:  # MS3, where a silent second has an empty mask
        warnings += [f"{here}: none of its masks holds anything"] * (len(empty) == T)
    else:
        warnings += [f"{path}: nothing is masked, but S4's object always sounds" for path in empty]
    if len(sizes) > 1:
        warnings.append(f"{here}: its frames differ in size")


def _check_sound(path, errors, warnings):
    wave = _tried(errors, read_wave, path)
    if wave is None:
        return
    file = soundfile.info(path)
    notes = {
        f"{file.samplerate} Hz, is resampled to {RATE}": file.samplerate != RATE,
        f"{file.channels} channels, are averaged": file.channels > 1,
        f"{file.duration:.2f} s, is padded to {T} s": file.duration < T - 0.2,
        f"{file.duration:.2f} s, of which the first {T} are heard": file.duration > T + 0.2,
        "silent throughout": not wave.any(),
    }
    warnings += [f"{path}: {what}" for what, holds in notes.items() if holds]
