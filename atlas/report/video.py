"""What a trained model hears, drawn over a video of any length, frame rate and size.

From its first frame on, it is a row of clips of T seconds, as in training. Frames are read one by
one, sound clip by clip, so memory does not grow. Times are seconds, as fractions."""

import contextlib
import itertools
import math
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from atlas.audio import LOUDEST, RATES, build_audio_encoder, encode_wave, fingerprint
from atlas.clips import RATE, T, resized
from atlas.config import load_config
from atlas.data import to_device
from atlas.encoders import merged
from atlas.errors import AtlasError
from atlas.learner import Learner
from atlas.prepare.extract import best_stream
from atlas.report.masks import overlaid
from atlas.results import read_results
from atlas.runs import refuse_other_encoders

CONTAINERS = (".mp4", ".mov", ".mkv")  # what H.264 goes into
QUALITY = {"crf": "18", "preset": "veryfast"}  # x264's
PLAYED = 48000  # samples a second of the overlay's sound, mono


def overlay(run, source, out, sound=None, task=None):
    """Draw what the last model of the run's folder hears in `source` into the video `out`.

    sound: another file to hear and to play. task: in TIL, whose head masks, from 1; None: the
    newest. Returns {"frames", "seconds", "area": mean masked share, "task": the last one learned}.
    """
    out = Path(out)
    if out.suffix.lower() not in CONTAINERS:
        raise AtlasError(f"--out {out}: the overlay is an {', '.join(CONTAINERS)} file; name one")
    if any(os.path.realpath(out) == os.path.realpath(path) for path in (source, sound) if path):
        raise AtlasError(f"--out {out} is the file to read; choose another name")
    with contextlib.ExitStack() as files:
        tracks = Tracks(source, sound, files)  # first: what is wrong with them is said at once
        learner, encoder, learned = open_trained(run, task)
        with torch.inference_mode(), merged(learner.model):
            return film(learner, encoder, tracks, out) | {"task": learned}


def film(learner, encoder, tracks, out):
    """Write the overlay into `out`; returns {"frames", "seconds", "area"}."""
    count, area, clip, wave = 0, 0.0, -1, None
    heard, played = (clips_of(s, tracks.sound_start, rate) for s, rate in tracks.sounds)
    with written_beside(out) as output:
        pictures = add_pictures(output, tracks)
        sounds = output.add_stream("aac", rate=PLAYED, layout="mono")
        frames = itertools.chain([tracks.first], tracks.frames)
        for frame in tqdm(frames, "overlay", unit=" frames", leave=False, disable=None):
            now, second = divmod(math.floor(time_of(frame) - tracks.start), T)
            while clip < now:
                if clip >= 0:
                    output.mux(sounds.encode(sound_frame(wave, clip, T)))
                clip += 1
                wave, features = next(played), encode_wave(encoder, torch.tensor(next(heard)), T)
            picture = tracks.picture(frame)
            mask = mask_of(learner, picture, second, features)
            count += 1
            area += float(mask.mean())
            drawn = overlaid(picture, mask, max(1, round(min(mask.shape) / 240)))
            output.mux(pictures.encode(tracks.encodable(drawn, frame)))
        end = time_of(frame) + 1 / rate_of(tracks.video) - tracks.start
        output.mux(sounds.encode(sound_frame(wave, clip, min(T, end - clip * T))))
        for stream in (pictures, sounds):
            output.mux(stream.encode(None))
    return {"frames": count, "seconds": float(end), "area": area / count}


def open_trained(run, task=None):
    """(Learner after the last task of a run, its audio encoder, the number of that task)."""
    found = read_results(run)
    config = load_config([Path(run, "config.yaml")])
    learned = len(found["matrix"]["J"]) - 1
    if learned < 1:
        raise AtlasError(f"{run} has not learned a task yet")
    encoder = build_audio_encoder(config.audio, config.audio_weights)
    classes = [each["classes"] for each in found["tasks"]] if config.classify else None
    dims = [x.shape[-1] for x in encode_wave(encoder, torch.zeros(T * RATE), T)]
    learner = Learner(config, dims, classes)
    refuse_other_encoders(run, found, learner.visual_sha, fingerprint(encoder))
    learner.load(Path(run, f"task_{learned:02d}"))
    decoder = learner.model.eval().decoder
    heads = len(decoder.heads)
    if task not in (None, *range(1, heads + 1)):
        raise AtlasError(f"--task {task}: {run} has heads for the tasks 1 to {heads}")
    decoder.use_head((task or heads) - 1)
    return learner, encoder, learned


def mask_of(learner, picture, second, sound):
    """The mask [H, W] bool, True on what sounds, of a picture [H, W, 3] in this second of a clip
    whose sound is (context [T, D_a], tokens [T, N, D_u])."""
    small = torch.tensor(resized(picture, learner.config.image_size)).permute(2, 0, 1)
    context, tokens = (torch.from_numpy(x).float()[None] for x in sound)
    batch = {"frames": small[None], "second": torch.tensor([second]), "clip": torch.tensor([0])}
    batch |= {"context": context, "tokens": tokens}
    with learner.autocast():
        logits = learner.model(to_device(batch, learner.device))["masks"].float()
    large = F.interpolate(logits[:, None], picture.shape[:2], mode="bilinear")
    return (large[0, 0] > 0).cpu().numpy()


class Tracks:
    """The frames of a video, and the sound to hear and to play: its own, or that of the file
    `sound`, which begins with the first frame. The ExitStack `files` closes all."""

    def __init__(self, source, sound, files):
        self.video = opened(source, "video", files)
        self.sounds = [(opened(sound or source, "audio", files), n) for n in (RATE, PLAYED)]
        self.frames = decoded(self.video)
        self.first = next(self.frames, None)
        if self.first is None:
            raise AtlasError(f"{source} holds no frame that can be decoded")
        self.start = self.sound_start = time_of(self.first)
        if sound:
            began = self.sounds[0][0].container.start_time or 0
            self.sound_start = Fraction(max(0, began), av.time_base)

    def picture(self, frame):
        """A frame upright, [H, W, 3] uint8, in the size of the first, made even for H.264."""
        width, height = self.first.width, self.first.height
        with reading(self.video):
            picture = frame.to_ndarray(format="rgb24", width=width, height=height)
        picture = np.rot90(picture, round(self.first.rotation / 90))  # of a phone's video
        return np.pad(picture, [(0, n % 2) for n in picture.shape[:2]] + [(0, 0)], mode="edge")

    def encodable(self, picture, frame):
        """A picture as the frame to encode in place of `frame`; the first one's time is 0."""
        new = av.VideoFrame.from_ndarray(picture, format="rgb24")
        new = new.reformat(format="yuv420p", dst_colorspace=frame.colorspace)
        new.time_base = frame.time_base
        new.pts = frame.pts - self.first.pts
        return new


@contextlib.contextmanager
def reading(source):
    """What a broken `source`, a path or a stream, makes PyAV raise, as one line."""
    try:
        yield
    except (av.FFmpegError, ValueError) as error:
        path = source.container.name if isinstance(source, av.stream.Stream) else source
        why = getattr(error, "strerror", None) or error
        said = f"{path} cannot be read as video or sound: {why}; does it play?"
        raise AtlasError(said) from None


def opened(path, kind, files):
    """The stream, "video" or "audio", that a player takes."""
    with reading(path):
        container = files.enter_context(av.open(str(path), metadata_errors="ignore"))
    stream = best_stream(container, kind)
    if stream is None:
        what = "video" if kind == "video" else "sound; give one to hear with --audio FILE"
        raise AtlasError(f"{path} holds no {what}")
    if kind == "audio" and stream.rate not in RATES:
        raise AtlasError(f"{path} has {stream.rate} samples a second; give an ordinary sound")
    return stream


def decoded(stream):
    """The frames of a stream; those of a video have timestamps that rise."""
    last = None
    with reading(stream):
        for frame in stream.container.decode(stream):
            if stream.type == "video":
                if last is None:
                    frame.pts = frame.pts or 0
                elif frame.pts is None or frame.pts <= last:
                    frame.pts = last + max(1, round(1 / (rate_of(stream) * frame.time_base)))
                last = frame.pts
            yield frame


def rate_of(stream):
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def time_of(frame):
    return frame.pts * frame.time_base


def waves(stream, start, rate):
    """The sound from `start` on, mono, in blocks of float32; gaps are silent."""
    resampler = av.AudioResampler(format="fltp", rate=rate)
    given, at = 0, None  # samples so far, and the place of the resampler's next one
    for frame in itertools.chain(decoded(stream), [None]):
        if frame is not None and frame.pts is not None:
            due = round((time_of(frame) - start) * rate)
            if at is None or abs(due - at) > rate // 10:  # more than jitter: a gap
                at = due
        with reading(stream):
            blocks = [part.to_ndarray().mean(0) for part in resampler.resample(frame)]
            if not all(np.abs(block).max(initial=0) <= LOUDEST for block in blocks):
                raise ValueError("its samples are not finite and within ±1")
        for block in blocks:
            at = at or 0
            for left in range(at - given, 0, -rate):
                yield np.zeros(min(left, rate), np.float32)
            yield block[max(0, given - at) :]
            at += len(block)
            given = max(given, at)


def clips_of(stream, start, rate):
    """The sound of one clip after the other, [at most T * rate samples], without end."""
    blocks = waves(stream, start, rate)
    wave = np.zeros(0, np.float32)
    while True:
        while len(wave) < T * rate and (block := next(blocks, None)) is not None:
            wave = np.concatenate([wave, block])
        yield wave[: T * rate]
        wave = wave[T * rate :]


@contextlib.contextmanager
def written_beside(out):
    """A container that becomes the file `out` when all is written."""
    beside = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(beside), "w") as output:
            yield output
        beside.replace(out)
    except (av.FFmpegError, OSError) as error:
        raise AtlasError(f"cannot write {out}: {error.strerror}") from None
    finally:
        if beside.exists():
            beside.unlink()


def add_pictures(output, tracks):
    """A stream of H.264 with the time base, shape and colours of the source."""
    first = tracks.first
    target = output.add_stream("libx264", rate=rate_of(tracks.video), options=QUALITY)
    target.height, target.width, _ = tracks.picture(first).shape
    target.pix_fmt = "yuv420p"
    target.time_base = target.codec_context.time_base = first.time_base
    for name in ("colorspace", "color_primaries", "color_trc"):
        setattr(target.codec_context, name, getattr(first, name))
    return target


def sound_frame(wave, clip, seconds):
    """So many seconds of the sound of a clip, with silence after its end."""
    length = round(seconds * PLAYED)
    samples = np.pad(wave[:length], (0, max(0, length - len(wave))))
    frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    frame.sample_rate = PLAYED
    frame.time_base = Fraction(1, PLAYED)
    frame.pts = clip * T * PLAYED
    return frame
