"""Videos as clips: mp4 files and AVSBench's CSV -> the frames and sounds of AVSBench's tree (atlas/clips.py), by PyAV.

Frames. AVSBench (preprocess_scripts/preprocess_s4.py and _ms3.py, FACTS.md §1) samples each second 16 times and keeps the 16th: with f = the frame rate rounded
to a whole number, second l = 0..4 is frame n = ⌊l f + 15/16 f⌋ of the video, counted from 0, and its last frame where there is none of that number: 23, 48, 73, 98, 123
at 25 a second; 28, 58, 88, 118, 148 at 30 and at 29.97. Frame n is the one on display n / rate seconds after the first one, which in a video of constant rate is
frame n itself, and elsewhere the one that ffmpeg's conversion to a constant rate (AVSBench's reader) would make it. 224 x 224 pixels, squeezed, not cropped.

Sound. 16 kHz and 16 bit as AVSBench's. Ours: one channel, the mean of all (AVSBench's writer, moviepy, makes two, and VGGish's front end averages them), and T seconds from the
first frame's time on, silence where the sound begins after it; AVSBench keeps whatever the file holds. What ends early stays short, as there.

A video is bad where it is missing, cannot be decoded, has no pictures or no sound, or where either does not reach the clip's last second.
"""

import concurrent.futures
import csv
import fcntl
import functools
import io
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import av
import numpy as np
import soundfile
from PIL import Image
from tqdm import tqdm

from atlas.clips import CSVS, RATE, T, ms3_clip, read_rows, s4_clip
from atlas.errors import AtlasError

COLUMNS = {"s4": ("name", "start", "category", "split"), "ms3": ("video_id", "split")}  # AVSBench's
SAMPLES = 16  # a second; the last is kept


def extract(videos, out, table=None, dataset="s4", size=224, jobs=1, whole=False):
    """Extract every clip of the CSV `table` (default: the tree's own) from VIDEOS/SPLIT/CATEGORY/NAME.mp4 or VIDEOS/NAME.mp4 into the tree below `out`.

    A clip whose six files are there, in this size, is kept as it is. A file appears under its name only when it is whole, so that a kill at any time costs the clips in hand at most.
    `whole`: the videos were not trimmed, the clip begins at the CSV's `start` (seconds). The tree's CSV is written last: it gains the clips that are there now and loses none.
    Returns {"extracted", "kept": how many, "bad": [(video, reason)] in the table's order, "list": the file that names these, None where there are none}.
    """
    own = Path(out, CSVS[dataset])
    table = Path(table or own)
    if not table.is_file():
        raise AtlasError(
            f"no CSV {table}; give AVSBench's {own.name}, or one with the columns {','.join(COLUMNS[dataset])}, with --csv"
        )
    if not Path(videos).is_dir():
        raise AtlasError(f"no folder {videos}; --videos holds SPLIT/CATEGORY/NAME.mp4 or NAME.mp4")
    if size < 1:
        raise AtlasError(
            f"a size of {size} pixels; frames need 1 at least, and the size of the masks to be of use"
        )
    rows = _rows(table, dataset, whole)
    own.parent.mkdir(parents=True, exist_ok=True)
    with open(own.parent / ".extract.lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AtlasError(
                f"another process is extracting into {own.parent}; wait for it"
            ) from None
        clips = [_clip(out, row, dataset) for row in rows]
        missing = [i for i, clip in enumerate(clips) if not complete(clip, size)]
        tasks = [
            (clips[i], find_video(videos, clips[i]), float(rows[i]["start"]) if whole else 0.0)
            for i in missing
        ]
        progress = functools.partial(
            tqdm,
            desc=f"extracting {dataset.upper()}",
            unit="clip",
            total=len(missing),
            disable=None,
        )
        reasons = list(progress(_mapped(functools.partial(_extract_clip, size=size), tasks, jobs)))
        bad = {i: reason for i, reason in zip(missing, reasons) if reason}
        _extend_csv(own, dataset, [row for i, row in enumerate(rows) if i not in bad])
        report = own.parent / "bad_videos.txt"
        report.unlink(missing_ok=True)
        lines = [(str(find_video(videos, clips[i])), reason) for i, reason in bad.items()]
        if lines:
            _write(report, "".join(f"{video}: {reason}\n" for video, reason in lines).encode())
    return {
        "extracted": len(missing) - len(bad),
        "kept": len(clips) - len(missing),
        "bad": lines,
        "list": report if lines else None,
    }


def complete(clip, size):
    """All frames are there, `size` pixels wide and high, and the sound is."""
    try:
        for path in clip.frames:
            with Image.open(path) as image:  # reads the header only
                if image.size != (size, size):
                    return False
    except OSError:
        return False
    return Path(clip.audio).is_file()


def find_video(videos, clip):
    """VIDEOS/SPLIT/CATEGORY/NAME.mp4 (AVSBench's raw_videos of S4), or VIDEOS/NAME.mp4 where that is there."""
    flat = Path(videos, f"{clip.id}.mp4")
    return (
        flat
        if clip.category is None or flat.is_file()
        else Path(videos, clip.split, clip.category, flat.name)
    )


def frame_numbers(rate):
    """The T frames AVSBench keeps of a video with `rate` frames a second."""
    f = round(rate)
    return [int(second * f + (SAMPLES - 1) / SAMPLES * f) for second in range(T)]


def read_video(path, start=0.0):
    """(the T frames, [H, W, 3] uint8 each, the mono sound [samples <= T * RATE] float32 at 16 kHz) from `start` seconds on; AtlasError says why not."""
    if not path.is_file():
        raise AtlasError("missing")
    try:
        with av.open(path, metadata_errors="ignore") as file:
            if not file.streams.video:
                raise AtlasError("no pictures: it has no video stream")
            if not file.streams.audio:
                raise AtlasError("no sound: it has no audio stream")
            frames, begin = _read_frames(file, start)
        with av.open(path, metadata_errors="ignore") as file:
            return frames, _read_sound(file, begin)
    except (av.FFmpegError, ValueError) as error:  # whatever broken files make the decoders raise
        raise AtlasError(f"not readable: {getattr(error, 'strerror', None) or error}") from None


def _read_frames(file, start):
    """(T frames as arrays, the time in the file at which the clip begins)."""
    stream = file.streams.video[0]
    rate = float(stream.guessed_rate or stream.average_rate or 25)
    begin, shown, chosen, time = None, None, [], 0.0
    for k, frame in enumerate(file.decode(stream)):
        time = frame.time if frame.time is not None else k / rate
        if begin is None:
            begin = time + start
            due = [
                begin + (n + 0.5) / rate for n in frame_numbers(rate)
            ]  # a frame that comes later than half a frame late is the next one
        while len(chosen) < T and time >= due[len(chosen)]:
            chosen.append(shown or frame)
        shown = frame
        if len(chosen) == T:
            break
    if shown is None:
        raise AtlasError("no pictures: its video stream is empty")
    if len(chosen) < T and time < begin + T - 1:
        raise AtlasError(
            f"too short: its pictures end at {max(0.0, time + 1 / rate - begin):.2f} s of {T}"
        )
    chosen += [shown] * (T - len(chosen))
    return [
        np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in chosen
    ], begin


def _read_sound(file, begin):
    """The sound from the time `begin` of the file on, [samples <= T * RATE]."""
    resampler = av.AudioResampler(format="fltp", rate=RATE)
    parts, count, skip = (
        [],
        0,
        None,
    )  # skip: samples before the clip; negative: of silence before the sound
    for frame in _and_none(file.decode(file.streams.audio[0])):
        if skip is None and frame is not None:
            skip = round((begin - (frame.time or 0.0)) * RATE)
            if skip < 0:
                parts.append(np.zeros(-skip, np.float32))
        for piece in resampler.resample(frame):
            parts.append(piece.to_ndarray().mean(0))
            count += len(parts[-1])
        if skip is not None and count >= skip + T * RATE:
            break
    wave = np.concatenate(parts)[max(0, skip) :][: T * RATE] if parts else np.zeros(0, np.float32)
    if len(wave) <= (T - 1) * RATE:
        raise AtlasError(f"too short: its sound ends at {len(wave) / RATE:.2f} s of {T}")
    return wave


def _and_none(frames):
    """Decoded frames, then None, which empties the resampler."""
    yield from frames
    yield None


def _extract_clip(task, size):
    """Write one clip's frames and sound; None, or why it cannot be."""
    clip, video, start = task
    try:
        frames, wave = read_video(video, start)
    except AtlasError as error:
        return str(error)
    for path, frame in zip(clip.frames, frames):
        picture = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(frame)).resize(
            (size, size), Image.Resampling.BILINEAR
        ).save(picture, "PNG", compress_level=1)
        _write(Path(path), picture.getvalue())
    sound = io.BytesIO()
    soundfile.write(sound, np.clip(wave, -1, 1), RATE, format="WAV", subtype="PCM_16")
    _write(Path(clip.audio), sound.getvalue())


def _write(path, content):
    """Beside and renamed: what has its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(content)
    os.replace(beside, path)


def _mapped(function, tasks, jobs):
    """map(function, tasks) in `jobs` processes, in order."""
    if jobs <= 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(jobs, len(tasks)), initializer=_end_with_parent
    )
    try:
        yield from pool.map(function, tasks)
    except concurrent.futures.process.BrokenProcessPool:
        raise AtlasError(
            "a worker process was killed (no memory?); run the same command again, with fewer --jobs: what was finished is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent():
    """A worker leaves Ctrl-C to its parent and ends when that is killed, instead of waiting for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()


def _rows(table, dataset, whole):
    """The rows of the CSV, each clip once."""
    names = _names(dataset)
    if whole and dataset == "ms3":
        raise AtlasError(
            "MS3's CSV has no column start, so its videos cannot be cut; trim them first"
        )
    rows = read_rows(table, COLUMNS[dataset] if whole else names)
    for row in rows:
        if any(Path(row[column] or "..").name != row[column] for column in names):
            raise AtlasError(
                f"{table}: the row {','.join(map(str, row.values()))} has an empty field, or one that is no plain file name"
            )
        try:
            float(row["start"] if whole else 0)
        except (TypeError, ValueError):
            raise AtlasError(
                f"{table}: the start of {row['name']} is {row['start']!r}, which is no number of seconds"
            ) from None
    return list({tuple(row[column] for column in names): row for row in rows}.values())


def _names(dataset):
    return [column for column in COLUMNS[dataset] if column != "start"]


def _clip(root, row, dataset):
    return (
        s4_clip(root, row["name"], row["category"], row["split"])
        if dataset == "s4"
        else ms3_clip(root, row["video_id"], row["split"])
    )


def _extend_csv(path, dataset, rows):
    """Add to the tree's CSV the rows it does not hold."""
    key = lambda row: tuple(row[column] for column in _names(dataset))
    old = read_rows(path, _names(dataset)) if path.is_file() else []
    known = {key(row) for row in old}
    new = [row for row in rows if key(row) not in known]
    if new:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS[dataset], restval=0, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(old + new)
        _write(path, text.getvalue().encode())
