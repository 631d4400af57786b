"""Read a whole tree, file by file, and report what would stop or bend a run."""

from collections import Counter, defaultdict
from pathlib import Path

from tqdm import tqdm

from atlas.audio import read_wave
from atlas.clips import CSVS, RATE, READERS, SPLITS, T, read_frame, read_mask, refuse_other_size
from atlas.errors import AtlasError


def check(root):
    """(counts, errors, warnings), lists of lines, over the S4 and MS3 trees that are in `root`.

    An error stops or falsifies a run. (AVSBench's MS3 has source videos in two splits.)
    """
    present = [dataset for dataset, table in CSVS.items() if Path(root, table).is_file()]
    if not present:
        what = f"neither {' nor '.join(CSVS.values())} in {root}"
        raise AtlasError(f"{what}; give the folder of Single-source/ or Multi-sources/")
    counts, errors, warnings = [], [], []
    for dataset in present:
        clips = _tried(errors, READERS[dataset], root) or []
        for clip in tqdm(clips, f"checking {dataset.upper()}", unit="clip", disable=None):
            _check_clip(clip, errors, warnings)
        counts += counted(clips, dataset) if clips else []
        for source, splits in shared_sources(clips).items():
            line = f"the source video {source} is in {' and '.join(sorted(splits))}"
            if dataset == "s4":
                errors.append(f"{line}: a leak")
            else:
                warnings.append(f"{line}; runs report the other clips apart (source_disjoint)")
    return counts, errors, warnings


def shared_sources(clips):
    """{source video: its splits, if several}."""
    videos = defaultdict(set)
    for clip in clips:
        videos[clip.source].add(clip.split)
    return {source: found for source, found in videos.items() if len(found) > 1}


def counted(clips, dataset):
    numbers = Counter(clip.split for clip in clips)
    numbers.update((clip.category, clip.split) for clip in clips)
    listed = ", ".join(f"{split} {numbers[split]}" for split in SPLITS)
    lines = [f"{dataset.upper()}: {len(clips)} clips, {listed}"]
    for name in sorted({clip.category for clip in clips if clip.category}):
        lines.append(f"  {name:<32} " + " ".join(f"{numbers[name, s]:5d}" for s in SPLITS))
    return lines


def _tried(errors, work, *words):
    """work(*words), or None where it refuses; why is added to `errors`."""
    try:
        return work(*words)
    except AtlasError as error:
        errors.append(str(error))


def _check_clip(clip, errors, warnings):
    empty = []
    for frame_path, mask_path in zip(clip.frames, clip.masks):
        frame = _tried(errors, read_frame, frame_path)
        mask = _tried(errors, read_mask, mask_path) if mask_path else None
        if frame is not None and mask is not None:
            _tried(errors, refuse_other_size, mask_path, mask, frame)
        if mask is not None and not mask.any():
            empty.append(mask_path)
    if clip.category:
        warnings += [f"{path}: nothing is masked, but S4's object always sounds" for path in empty]
    elif len(empty) == T:  # in MS3 a second may be silent
        warnings.append(f"{clip.id}: none of its masks holds anything")
    wave = _tried(errors, read_wave, clip.audio)
    if wave is not None:
        seconds = len(wave) / RATE
        if abs(seconds - T) > 0.2:
            warnings.append(f"{clip.audio}: {seconds:.2f} s; it is cut or padded to {T} s")
        if not wave.any():
            warnings.append(f"{clip.audio}: silent throughout")
