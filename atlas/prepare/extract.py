"""Videos as clips: mp4 files and AVSBench's CSV -> frames and sounds in AVSBench's tree (clips.py).

Frames. AVSBench samples each second 16 times and keeps the 16th: with f = the frame rate rounded to
a whole number (ours: below 10 it is not rounded), second l = 0..4 is frame n = floor(l f + 15/16 f)
or else the last one, counted from 0: 23, 48, 73, 98, 123 at 25 a second. Frame n is on display
n / rate seconds after the first one, as in ffmpeg's conversion to a constant rate. 224 x 224
pixels, squeezed, not cropped.

Sound. 16 kHz and 16 bit. Ours: the mean of all channels of the default track, T seconds from the
first frame's time on, silence where the sound begins after it. What ends early stays short.

A video is bad where it is missing or damaged, or where its pictures or its sound do not reach the
clip's last second.
"""

import concurrent.futures
import csv
import functools
import io
import itertools
import multiprocessing
import os
import re
import signal
import threading
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image
from tqdm import tqdm

from atlas.audio import best_stream, mono
from atlas.clips import COLUMNS, CSVS, RATE, T, locked, ms3_clip, read_rows, resized, s4_clip
from atlas.errors import AtlasError

HEADERS = {"s4": ("name", "start", "category", "split"), "ms3": ("video_id", "split")}
SAMPLES = 16  # a second; the last is kept
SLOW = 10  # frames a second


def extract(videos, out, table=None, dataset="s4", size=224, jobs=1, whole=False):
    """Extract every clip of the CSV `table` (default: the tree's own) into the tree below `out`.

    The videos are VIDEOS/SPLIT/CATEGORY/NAME.mp4 or VIDEOS/NAME.mp4. A clip whose six files are
    there, in this size, is kept. A file appears under its name only when it is whole, so that a
    kill costs the clips in hand at most. `whole`: the videos were not trimmed; a clip begins at
    the CSV's `start` (seconds). The tree's CSV is written last: it gains the clips that are there
    now and loses none. Returns {"extracted", "kept": how many, "bad": [(video, reason)] in the
    table's order, "list": the file that names these, or None}.
    """
    own = Path(out, CSVS[dataset])
    table = Path(table or own)
    if not table.is_file():
        raise AtlasError(f"no CSV {table}; give AVSBench's {own.name}, or one like it, with --csv")
    if not Path(videos).is_dir():
        raise AtlasError(f"no folder {videos}; --videos holds SPLIT/CATEGORY/NAME.mp4 or NAME.mp4")
    if size < 1:
        raise AtlasError(f"a size of {size} pixels; frames need the size of the masks")
    rows = _rows(table, dataset, whole)
    own.parent.mkdir(parents=True, exist_ok=True)
    busy = f"another process is extracting into {own.parent}; wait for it"
    with locked(own.parent / ".extract.lock", busy):
        clips = [_clip(out, row, dataset) for row in rows]
        missing = [i for i, clip in enumerate(clips) if not complete(clip, size)]
        tasks = []
        for i in missing:
            start = float(rows[i]["start"]) if whole else 0.0
            tasks.append((clips[i], find_video(videos, clips[i]), start))
        done = _mapped(functools.partial(_extract_clip, size=size), tasks, jobs)
        bar = {"unit": "clip", "total": len(tasks), "disable": None}
        reasons = list(tqdm(done, f"extracting {dataset.upper()}", **bar))
        bad = {i: reason for i, reason in zip(missing, reasons) if reason}
        _extend_csv(own, dataset, [row for i, row in enumerate(rows) if i not in bad])
        report = own.parent / "bad_videos.txt"
        report.unlink(missing_ok=True)
        listed = [(str(find_video(videos, clips[i])), reason) for i, reason in bad.items()]
        if bad:
            _write(report, "".join(f"{video}: {why}\n" for video, why in listed).encode())
    counts = {"extracted": len(missing) - len(bad), "kept": len(clips) - len(missing)}
    return counts | {"bad": listed, "list": report if bad else None}


def complete(clip, size):
    """Whether all frames are there, `size` pixels wide and high, and the sound is."""
    try:
        for path in clip.frames:
            with Image.open(path) as image:  # reads the header only
                if image.size != (size, size):
                    return False
    except OSError:
        return False
    return Path(clip.audio).is_file()


def find_video(videos, clip):
    """VIDEOS/NAME.mp4 where that is there or the clip has no category, else AVSBench's place."""
    flat = Path(videos, f"{clip.id}.mp4")
    if clip.category is None or flat.is_file():
        return flat
    return Path(videos, clip.split, clip.category, flat.name)


def frame_numbers(rate):
    """The T frames AVSBench keeps of a video with `rate` frames a second."""
    f = rate if rate < SLOW else round(rate)
    return [int(second * f + (SAMPLES - 1) / SAMPLES * f) for second in range(T)]


def read_video(path, start=0.0):
    """The clip of a video that begins `start` seconds after its first frame.

    Returns the T frames, [H, W, 3] uint8 each, and the sound [samples <= T * RATE] float32.
    An AtlasError says why there is none.
    """
    if not path.is_file():
        raise AtlasError("missing")
    try:
        with av.open(path, metadata_errors="ignore") as file:
            frames, begin = _read_frames(file, start)
        with av.open(path, metadata_errors="ignore") as file:
            return frames, _read_sound(file, begin)
    except (av.FFmpegError, ValueError, OSError) as error:  # what broken files make decoders raise
        raise AtlasError(f"not readable: {getattr(error, 'strerror', None) or error}") from None


def _read_frames(file, start):
    """The T frames as arrays, and the time in the file at which the clip begins."""
    stream = best_stream(file, "video")
    if stream is None:
        raise AtlasError("no pictures: it has no video stream")
    if best_stream(file, "audio") is None:
        raise AtlasError("no sound: it has no audio stream")
    rate = float(stream.guessed_rate or stream.average_rate or 25)
    begin, shown, chosen, time = None, None, [], 0.0
    for k, frame in enumerate(file.decode(stream)):
        time = frame.time if frame.time is not None else k / rate
        if begin is None:
            begin = time + start
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
        raise AtlasError(f"too short: its pictures end at {max(0.0, end):.2f} s of {T}")
    chosen += [shown] * (T - len(chosen))
    if any(frame.is_corrupt for frame in chosen):
        raise AtlasError("not readable: its pictures are damaged")
    arrays = [np.rot90(each.to_ndarray(format="rgb24"), each.rotation // 90) for each in chosen]
    return arrays, begin


def _read_sound(file, begin):
    """The sound of the default track from the time `begin` of the file on, [<= T * RATE]."""
    resampler = av.AudioResampler(format="fltp", rate=RATE)
    parts, count = [], 0
    skip = None  # samples before the clip; negative: of silence before the sound
    # None, at the end, empties the resampler
    for frame in itertools.chain(file.decode(best_stream(file, "audio")), [None]):
        if skip is None and frame is not None:
            skip = round((begin - (frame.time or 0.0)) * RATE)
        for piece in resampler.resample(frame):
            parts.append(piece.to_ndarray())  # [channels, samples]
            count += parts[-1].shape[1]
        if skip is not None and count >= skip + T * RATE:
            break
    if not parts:
        raise AtlasError("no sound: its audio stream is empty")
    channels = np.concatenate(parts, 1)[:, max(0, skip) :]
    channels = np.pad(channels, ((0, 0), (max(0, -skip), 0)))[:, : T * RATE]
    if channels.shape[1] <= (T - 1) * RATE:
        raise AtlasError(f"too short: its sound ends at {channels.shape[1] / RATE:.2f} s of {T}")
    return mono(channels.T, "track")


def _extract_clip(task, size):
    """Write one clip's frames and sound; None, or why it cannot be."""
    clip, video, start = task
    try:
        frames, wave = read_video(video, start)
    except AtlasError as error:
        return str(error)
    for path, frame in zip(clip.frames, frames):
        picture = io.BytesIO()
        small = resized(np.ascontiguousarray(frame), size)
        Image.fromarray(small).save(picture, "PNG", compress_level=1)
        _write(Path(path), picture.getvalue())
    sound = io.BytesIO()
    soundfile.write(sound, np.clip(wave, -1, 1), RATE, format="WAV", subtype="PCM_16")
    _write(Path(clip.audio), sound.getvalue())
    return None


def _write(path, content):
    """Write beside and rename: what has its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(content)
    os.replace(beside, path)


def _mapped(function, tasks, jobs):
    """map(function, tasks) in `jobs` processes, in order."""
    if jobs <= 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    jobs = min(jobs, len(tasks))
    pool = concurrent.futures.ProcessPoolExecutor(jobs, initializer=_end_with_parent)
    try:
        yield from pool.map(function, tasks)
    except concurrent.futures.process.BrokenProcessPool:
        what = "a worker process was killed (no memory?)"
        raise AtlasError(f"{what}; run the same command again, with fewer --jobs") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent():
    """A worker leaves Ctrl-C to its parent, and ends when that is killed."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _rows(table, dataset, whole):
    """The rows of the CSV; with `whole`, each has a number of seconds as its start."""
    if not whole:
        return read_rows(table, COLUMNS[dataset])
    if dataset == "ms3":
        raise AtlasError("MS3's CSV has no column start; trim its videos first")
    rows = read_rows(table, HEADERS[dataset])
    for row in rows:
        if not re.fullmatch(r"\d{1,6}(\.\d+)?", row["start"]):
            what = f"{table}: the start of {row['name']} is {row['start']!r}"
            raise AtlasError(f"{what}, which is no number of seconds")
    return rows


def _clip(root, row, dataset):
    if dataset == "s4":
        return s4_clip(root, row["name"], row["category"], row["split"])
    return ms3_clip(root, row["video_id"], row["split"])


def _extend_csv(path, dataset, rows):
    """Add to the tree's CSV the rows it does not hold."""
    old = read_rows(path, COLUMNS[dataset]) if path.is_file() else []
    known = [[row[name] for name in COLUMNS[dataset]] for row in old]
    new = [row for row in rows if [row[name] for name in COLUMNS[dataset]] not in known]
    if new:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, HEADERS[dataset], restval=0, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(old + new)
        _write(path, text.getvalue().encode())
