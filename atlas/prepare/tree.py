"""Writing AVSBench's tree (clips.py), and when a composed sound is heard."""

import csv
import os
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from atlas.clips import CSVS, RATE, T

COLUMNS = {"s4": ("name", "start", "category", "split"), "ms3": ("video_id", "split")}
AUDIBLE = 0.1  # a second below this share of its recording's loudness (-20 dB) is silent
FADE = 0.02  # seconds


def placed(path):
    """The Path of a file to be written, in a folder that is there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Path(path)


def write_clip(clip, frames, masks, wave):
    """Write frames [T, H, W, 3] uint8, masks [T, H, W] bool and wave [samples] in ±1; the clip's
    row for write_csv."""
    for path, frame in zip(clip.frames, frames):
        Image.fromarray(frame).save(placed(path), compress_level=1)
    for path, mask in zip(clip.masks, masks):
        if path:
            Image.fromarray(mask).convert("L").save(placed(path))
    soundfile.write(placed(clip.audio), np.clip(wave, -1, 1), RATE, subtype="PCM_16")
    return {"name": clip.id, "video_id": clip.id} | vars(clip)


def write_csv(root, dataset, rows):
    """Write AVSBench's table, with a column `mask` where the rows have one."""
    columns = COLUMNS[dataset] + ("mask",) * any(row.get("mask") for row in rows)
    write_table(Path(root, CSVS[dataset]), columns, [{"start": 0} | row for row in rows])


def write_table(path, columns, rows):
    """Write the `columns` of rows, dicts, whole or not at all."""
    beside = path.with_suffix(".tmp")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def draw_schedule(wave, chance, rng):
    """[T] bool: where a recording [T * RATE] is let through, by `chance`, and is not silent."""
    loudness = np.sqrt(np.mean(wave.reshape(T, RATE) ** 2, axis=1))
    audible = loudness >= AUDIBLE * np.sqrt(np.mean(wave**2))
    while not (schedule := audible & (rng.random(T) < chance)).any():
        pass
    return schedule


def gate(schedule):
    """The loudness [T * RATE] of a schedule, which fades at both ends of a stretch."""
    steps = np.diff(schedule.astype(int), prepend=0, append=0)
    time = (np.arange(T * RATE) + 0.5) / RATE
    loudness = np.zeros(T * RATE)
    for start, stop in zip(np.flatnonzero(steps > 0), np.flatnonzero(steps < 0)):
        loudness += np.clip(np.minimum(time - start, stop - time) / FADE, 0, 1)
    return loudness
