"""Read a whole tree, file by file, and report what would stop or bend a run."""
from collections import Counter, defaultdict
from pathlib import Path

import soundfile
from tqdm import tqdm

from atlas.audio import RATE
from atlas.clips import SPLITS, T, read_frame, read_mask, read_s4
from atlas.errors import AtlasError

PUBLISHED = {"train": 3452, "val": 740, "test": 740}  # S4, AVSBench's own counts


def check_s4(root):
    """(counts, errors, warnings), lists of lines. An error would stop or falsify a run; a warning is handled, but worth knowing.

    Checked: every frame, mask and sound is there and readable; masks have their frame's size, hold 0 and 255 only, and are not empty;
    sounds last T seconds, are mono, at 16 kHz and not silent (others are converted or padded when packed); no clip id stands twice;
    no source video is in two splits.
    """
    clips, errors, warnings = read_s4(root), [], []
    for clip in tqdm(clips, "checking", unit="clip"):
        here = f"{clip.split}/{clip.category}/{clip.id}"
        sizes = {}
        for k, path in enumerate(clip.frames):
            frame = _tried(read_frame, path, errors)
            sizes[k] = None if frame is None else frame.shape[:2]
        for k, path in enumerate(clip.masks):
            mask = _tried(read_mask, path, errors) if path else None
            if mask is None:
                continue
            if sizes[k] and mask.shape != sizes[k]:
                errors.append(f"{path}: the mask is {mask.shape[1]}x{mask.shape[0]}, its frame {sizes[k][1]}x{sizes[k][0]}")
            if not mask.any():
                warnings.append(f"{path}: nothing is masked, but in S4 the object sounds all the time")
        _check_sound(clip.audio, errors, warnings)
        if len({size for size in sizes.values() if size}) > 1:
            warnings.append(f"{here}: its frames differ in size")
    splits, videos = Counter(clip.split for clip in clips), defaultdict(set)
    for clip in clips:
        videos[clip.source].add(clip.split)
    errors += [f"the clip id {name} stands {n} times in the CSV" for name, n in Counter(clip.id for clip in clips).items() if n > 1]
    errors += [f"the source video {source} is in {' and '.join(sorted(found))}: a leak" for source, found in videos.items() if len(found) > 1]
    counts = [f"{len(clips)} clips of {len({c.category for c in clips})} categories; " + ", ".join(f"{s} {splits[s]}" for s in SPLITS)]
    if splits != PUBLISHED:
        counts.append("(AVSBench's S4 as released: train 3452, val 740, test 740)")
    per_class = Counter((clip.category, clip.split) for clip in clips)
    counts += [f"  {name:<32} " + " ".join(f"{per_class[name, s]:5d}" for s in SPLITS) for name in sorted({c.category for c in clips})]
    return counts, errors, warnings


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
    found = [f"{rate} Hz, is resampled to {RATE}"] * (rate != RATE) + [f"{wave.shape[1]} channels, are averaged"] * (wave.shape[1] > 1)
    found += [f"{len(wave) / rate:.2f} s, is padded to {T} s"] * (len(wave) / rate < T - 0.2) + ["silent throughout"] * (not wave.any())
    warnings += [f"{path}: {what}" for what in found]
