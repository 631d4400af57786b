"""Read a whole tree, file by file, and report what would stop or bend a run."""

from collections import Counter, defaultdict
from pathlib import Path

import soundfile
from tqdm import tqdm

from atlas import clips as files
from atlas.audio import read_wave
from atlas.clips import CSVS, RATE, SPLITS, T
from atlas.errors import AtlasError


def check(root):
    """(counts, errors, warnings), lists of lines, over the S4 and MS3 trees that are in `root`.

    An error stops or falsifies a run: what a reader refuses, or in S4 a source video in two splits.
    (MS3 was released with such videos, and runs report the other clips apart.) A warning is worth
    knowing: an empty mask (MS3: all five), a sound that is converted, padded, cut or silent.
    """
    present = [dataset for dataset, table in CSVS.items() if Path(root, table).is_file()]
    if not present:
        what = f"neither {' nor '.join(CSVS.values())} in {root}"
        raise AtlasError(f"{what}; give the folder of Single-source/ or Multi-sources/")
    counts, errors, warnings = [], [], []
    for dataset in present:
        clips = _tried(errors, files.READERS[dataset], root) or []
        for clip in tqdm(clips, f"checking {dataset.upper()}", unit="clip", disable=None):
            _check_pictures(clip, errors, warnings)
            _check_sound(clip.audio, errors, warnings)
        if clips:
            counts += counted(clips, dataset)
            _check_sources(clips, dataset, errors, warnings)
    return counts, errors, warnings


def shared_sources(clips):
    """{source video: its splits} of the sources that are in more than one split."""
    videos = defaultdict(set)
    for clip in clips:
        videos[clip.source].add(clip.split)
    return {source: found for source, found in videos.items() if len(found) > 1}


def counted(clips, dataset):
    """Lines: the clips of each split, and of each class and split."""
    numbers = Counter(clip.split for clip in clips)
    listed = ", ".join(f"{split} {numbers[split]}" for split in SPLITS)
    lines = [f"{dataset.upper()}: {len(clips)} clips, {listed}"]
    numbers = Counter((clip.category, clip.split) for clip in clips)
    for name in sorted({clip.category for clip in clips if clip.category}):
        lines.append(f"  {name:<32} " + " ".join(f"{numbers[name, s]:5d}" for s in SPLITS))
    return lines


def _tried(errors, work, *words):
    """work(*words), or None where it refuses; why is added to `errors`."""
    try:
        return work(*words)
    except AtlasError as error:
        errors.append(str(error))


def _check_sources(clips, dataset, errors, warnings):
    crossing = shared_sources(clips)
    if dataset == "s4":
        for source, splits in crossing.items():
            where = " and ".join(sorted(splits))
            errors.append(f"the source video {source} is in {where}: a leak")
        return
    for split in ("val", "test"):
        mine = [clip for clip in clips if clip.split == split]
        shared = sum("train" in crossing.get(clip.source, ()) for clip in mine)
        if shared:
            what = f"{shared} of {len(mine)} {split} clips share their source video with a train"
            warnings.append(f"{what} clip; runs report the others apart (source_disjoint)")


def _check_pictures(clip, errors, warnings):
    sizes, empty = set(), []
    for frame_path, mask_path in zip(clip.frames, clip.masks):
        frame = _tried(errors, files.read_frame, frame_path)
        mask = _tried(errors, files.read_mask, mask_path) if mask_path else None
        if frame is not None:
            sizes.add(frame.shape)
            if mask is not None:
                _tried(errors, files.refuse_other_size, mask_path, mask, frame)
        if mask is not None and not mask.any():
            empty.append(mask_path)
    if clip.category:
        warnings += [f"{path}: nothing is masked, but S4's object always sounds" for path in empty]
    elif len(empty) == T:  # in MS3 a second may be silent
        warnings.append(f"{clip.id}: none of its masks holds anything")
    if len(sizes) > 1:
        warnings.append(f"{clip.id}: its frames differ in size")


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
