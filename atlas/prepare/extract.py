"""Videos as clips: mp4 files and a table -> frames and sounds in AVSBench's tree (clips.py).

Frames. AVSBench samples each second 16 times and keeps the 16th: with f = the frame rate rounded to
a whole number (ours: below 10 it is not rounded), second l = 0..4 is frame n = floor(l f + 15/16 f)
or else the last one, which is on display n / rate seconds after the first one.

Sound (ours). The mean of the default track's channels, T seconds from the first frame's time on,
silence where the sound begins after it. What ends early stays short.
"""

import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from tqdm import tqdm

from atlas.audio import mono
from atlas.clips import COLUMNS, CSVS, RATE, T, locked, ms3_clip, read_rows, resized, s4_clip
from atlas.errors import AtlasError
from atlas.prepare.tree import placed, write_clip, write_csv

STAGE = ".extract"  # of files that are not whole yet
SIZE = 224  # pixels of a side, as of AVSBench's masks; squeezed, not cropped


def extract(videos, out, table=None, dataset="s4"):
    """Extract every clip of the CSV `table` (default: the tree's own) into the tree below `out`.

    What is there is kept; the tree's CSV gains the new clips and loses none. Returns (how many were
    extracted, how many kept, [(bad video, why)] in the table's order).
    """
    own = Path(out, CSVS[dataset])
    table = Path(table or own)
    if not table.is_file():
        raise AtlasError(f"no CSV {table}; give AVSBench's {own.name}, or one like it, with --csv")
    if not Path(videos).is_dir():
        raise AtlasError(f"no folder {videos}; --videos holds SPLIT/CATEGORY/NAME.mp4 or NAME.mp4")
    make = {"s4": s4_clip, "ms3": ms3_clip}[dataset]
    columns = COLUMNS[dataset]
    key = columns[0]
    rows = read_rows(table, columns)
    kept, bad = 0, []

    def take(row):
        words = [row[column] for column in columns]
        return extract_clip(videos, make(out, *words), make(Path(out, STAGE), *words))

    with locked(placed(own.parent / ".extract.lock")), ThreadPoolExecutor() as pool:
        old = read_rows(own, columns) if own.is_file() else []
        known = {row[key]: row for row in old}
        rows = [known.get(row[key], {}) | row for row in rows]
        if len({"mask" in row for row in old + rows}) > 1:
            what = f"of {own} and {table}, one has a column mask"
            raise AtlasError(f"{what}: add it to the other; it holds drawn or made")
        bar = tqdm(rows, f"extracting {dataset.upper()}", unit="clip", disable=None)
        for row, (video, why) in zip(bar, pool.map(take, rows)):
            kept += video is None
            if why:
                bad.append((video, why))
            else:
                known[row[key]] = row
        shutil.rmtree(Path(out, STAGE), ignore_errors=True)
        write_csv(out, dataset, known.values())
    return len(rows) - len(bad) - kept, kept, bad


def extract_clip(videos, clip, staged):
    """Write a clip, first at `staged`: (its video, or None if it was there; why it is bad)."""
    files = *clip.frames, clip.audio
    if all(Path(path).is_file() for path in files):
        return None, None
    video = Path(videos, f"{clip.id}.mp4")
    if clip.category and not video.is_file():
        video = Path(videos, clip.split, clip.category, video.name)
    try:
        frames, wave = read_video(video)
    except AtlasError as error:
        return video, str(error)
    write_clip(staged, [resized(frame, SIZE) for frame in frames], (), wave)
    for source, path in zip((*staged.frames, staged.audio), files):
        os.replace(source, placed(path))  # what has its name is whole
    return video, None


def frame_numbers(rate):
    """The T frames AVSBench keeps of a video with `rate` frames a second."""
    f = rate if rate < 10 else round(rate)
    return [int(second * f + 15 / 16 * f) for second in range(T)]


def read_video(path):
    """(T frames [H, W, 3] uint8, sound [<= T * RATE] float32) of a video of T - 1 s or more."""
    if not path.is_file():
        raise AtlasError("missing")
    try:
        with av.open(path, metadata_errors="ignore") as file:
            frames, begin = _read_frames(file)
        with av.open(path, metadata_errors="ignore") as file:
            return frames, _read_sound(file, begin)
    except (av.FFmpegError, ValueError, OSError) as error:  # what broken files make decoders raise
        raise AtlasError(f"not readable: {getattr(error, 'strerror', None) or error}") from None


def _read_frames(file):
    """The T frames, and the time at which the file's first one is shown."""
    for kind, name in (("audio", "sound"), ("video", "pictures")):
        stream = best_stream(file, kind)
        if stream is None:
            raise AtlasError(f"no {name}: it has no {kind} stream")
    rate = float(stream.guessed_rate or stream.average_rate or 25)
    shown, chosen = None, []
    for k, frame in enumerate(file.decode(stream)):
        time = k / rate if frame.time is None else frame.time
        if shown is None:
            begin = time
            # a frame that comes later than half a frame late is the next one
            due = [begin + (n + 0.5) / rate for n in frame_numbers(rate)]
        while len(chosen) < T and time >= due[len(chosen)]:
            chosen.append(shown or frame)
        shown = frame
        if len(chosen) == T:
            break
    if shown is None:
        raise AtlasError("no pictures: its video stream is empty")
    end = time + 1 / rate - begin
    if len(chosen) < T and end < T - 1 + 1e-3:
        raise AtlasError(f"too short: its pictures end at {end:.2f} s of {T}")
    chosen += [shown] * (T - len(chosen))
    if any(frame.is_corrupt for frame in chosen):
        raise AtlasError("not readable: its pictures are damaged")
    arrays = [np.rot90(each.to_ndarray(format="rgb24"), each.rotation // 90) for each in chosen]
    return arrays, begin


def _read_sound(file, begin):
    """The sound from the time `begin` of the file on, [<= T * RATE]."""
    decoded = file.decode(best_stream(file, "audio"))
    frames = list(itertools.takewhile(lambda f: (f.time or 0.0) <= begin + T + 1, decoded))
    if not frames:
        raise AtlasError("no sound: its audio stream is empty")
    resampler = av.AudioResampler(format="fltp", rate=RATE)
    parts = itertools.chain(*map(resampler.resample, [*frames, None]))  # None empties it
    channels = np.concatenate([part.to_ndarray() for part in parts], 1)  # [channels, samples]
    skip = round((begin - (frames[0].time or 0.0)) * RATE)  # negative: silence before the sound
    channels = np.pad(channels[:, max(0, skip) :], ((0, 0), (max(0, -skip), 0)))[:, : T * RATE]
    if channels.shape[1] <= (T - 1) * RATE:
        raise AtlasError(f"too short: its sound ends at {channels.shape[1] / RATE:.2f} s of {T}")
    return mono(channels.T, "track")


def best_stream(container, kind):
    """The default stream of a kind, or else the first, or None. A cover picture is no video."""
    cover, default = Disposition.attached_pic, Disposition.default
    found = [s for s in container.streams if s.type == kind and not s.disposition & cover]
    return max(found, key=lambda s: bool(s.disposition & default), default=None)
