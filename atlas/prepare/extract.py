"""Videos as clips: mp4 files and AVSBench's CSV -> frames and sounds in AVSBench's tree (clips.py).

Frames. AVSBench samples each second 16 times and keeps the 16th: with f = the frame rate rounded to
a whole number (ours: below 10 it is not rounded), second l = 0..4 is frame n = floor(l f + 15/16 f)
or else the last one, which is on display n / rate seconds after the first one.

Sound (ours). The mean of all channels of the default track, T seconds from the first frame's time
on, silence where the sound begins after it. What ends early stays short.
"""

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
from atlas.prepare import tree

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
    good, kept, bad = [], 0, []
    columns = COLUMNS[dataset]
    rows = read_rows(table, columns)
    own.parent.mkdir(parents=True, exist_ok=True)
    with locked(own.parent / ".extract.lock"), ThreadPoolExecutor() as pool:
        done = pool.map(lambda row: extract_clip(videos, out, row), rows)
        bar = tqdm(done, f"extracting {dataset.upper()}", len(rows), unit="clip", disable=None)
        for row, (video, why) in zip(rows, bar):
            kept += video is None
            if why:
                bad.append((video, why))
            else:
                good.append(row)
        shutil.rmtree(Path(out, STAGE), ignore_errors=True)
        old = read_rows(own, columns) if own.is_file() else []
        known = {row[columns[0]]: row for row in old + good}
        tree.write_table(own, tree.COLUMNS[dataset], [{"start": 0} | row for row in known.values()])
    return len(good) - kept, kept, bad


def extract_clip(videos, out, row):
    """Write the clip of a row of the CSV: (its video, or None if it was there; why it is bad)."""
    clip, staged = clip_of(out, row), clip_of(Path(out, STAGE), row)
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
    frames = [resized(np.ascontiguousarray(frame), SIZE) for frame in frames]
    tree.write_clip(staged, frames, (), wave)
    for source, path in zip((*staged.frames, staged.audio), files):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, path)  # what has its name is whole
    return video, None


def clip_of(root, row):
    if "name" in row:
        return s4_clip(root, row["name"], row["category"], row["split"])
    return ms3_clip(root, row["video_id"], row["split"])


def frame_numbers(rate):
    """The T frames AVSBench keeps of a video with `rate` frames a second."""
    f = rate if rate < 10 else round(rate)
    return [int(second * f + 15 / 16 * f) for second in range(T)]


def read_video(path):
    """(T frames [H, W, 3] uint8, sound [samples <= T * RATE] float32) of a video that reaches the
    clip's last second."""
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
    """The T frames, and the time in the file at which its first one is shown."""
    stream = best_stream(file, "video")
    for kind, name in (("video", "pictures"), ("audio", "sound")):
        if best_stream(file, kind) is None:
            raise AtlasError(f"no {name}: it has no {kind} stream")
    rate = float(stream.guessed_rate or stream.average_rate or 25)
    begin, shown, chosen, time = None, None, [], 0.0
    for k, frame in enumerate(file.decode(stream)):
        time = frame.time if frame.time is not None else k / rate
        if begin is None:
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
    """The sound of the default track from the time `begin` of the file on, [<= T * RATE]."""
    frames, parts = [], []
    for frame in file.decode(best_stream(file, "audio")):
        if (frame.time or 0.0) > begin + T + 1:
            break
        frames.append(frame)
    if not frames:
        raise AtlasError("no sound: its audio stream is empty")
    resampler = av.AudioResampler(format="fltp", rate=RATE)
    for frame in [*frames, None]:  # None empties the resampler
        parts += [piece.to_ndarray() for piece in resampler.resample(frame)]  # [channels, samples]
    skip = round((begin - (frames[0].time or 0.0)) * RATE)  # negative: silence before the sound
    channels = np.concatenate(parts, 1)[:, max(0, skip) :]
    channels = np.pad(channels, ((0, 0), (max(0, -skip), 0)))[:, : T * RATE]
    if channels.shape[1] <= (T - 1) * RATE:
        raise AtlasError(f"too short: its sound ends at {channels.shape[1] / RATE:.2f} s of {T}")
    return mono(channels.T, "track")


def best_stream(container, kind):
    """The default stream of a kind, or else the first, or None. A cover picture is no video."""
    found = [s for s in container.streams if s.type == kind]
    found = [s for s in found if not s.disposition & Disposition.attached_pic]
    return max(found, key=lambda s: bool(s.disposition & Disposition.default), default=None)
