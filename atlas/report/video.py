"""What a trained model hears, drawn over a video of any length, frame rate and size.

Counted from its first frame, the video is a row of clips of T seconds, as in training. A frame of
second k is conditioned on the sound of second k, and attends to the sound of all of its clip. Past
its end, a sound is silent.

Frames, the sound to hear and the sound to play have a reader each, which is little ahead. So memory
does not grow with the video.

Shapes: T seconds of a clip, H W pixels of the video. Times are seconds, as fractions.
"""

import contextlib
import heapq
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

from atlas import audio
from atlas.audio import RATE, best_stream, encode_wave
from atlas.clips import T, resized
from atlas.config import load_config
from atlas.data import to_device
from atlas.encoders import merged
from atlas.errors import AtlasError
from atlas.learner import Learner
from atlas.results import read_results
from atlas.runs import refuse_other_encoders

PIECE = 8  # frames decoded, masked and encoded at a time
FILL = (230, 159, 0)  # Okabe and Ito's orange
EDGE = (255, 255, 255)  # inside the mask's outline
RIM = (0, 0, 0)  # outside; on any picture one of the two shows
OPACITY = 0.45
CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}  # what H.264 goes into
QUALITY = {"crf": "18", "preset": "veryfast"}  # x264's
JITTER = RATE // 10  # samples that a sound's timestamps may be off; more is a gap


def overlay(run, source, out, sound=None, task=None):
    """Draw what the last model of the run's folder hears in `source` into the video `out`.

    sound: another file to hear and to play. task: in TIL, whose head masks, from 1; None: the
    newest. Returns {"frames", "seconds", "area": the mean share of the frame that is masked,
    "task": the last one that the model has learned}.
    """
    out = Path(out)
    if out.suffix.lower() not in CONTAINERS:
        raise AtlasError(f"--out {out}: the overlay is an {', '.join(CONTAINERS)} file; name one")
    for path in filter(None, (source, sound)):
        if not Path(path).is_file():
            raise AtlasError(f"there is no file {path}")
        if out.exists() and out.samefile(path):
            raise AtlasError(f"--out {out} is the file to read; choose another name")
    with contextlib.ExitStack() as files:
        tracks = Tracks(source, sound, files)  # first: what is wrong with them is said at once
        learner, encoder, learned = open_trained(run, task)
        with torch.inference_mode(), merged(learner.model):
            return film(learner, encoder, tracks, out) | {"task": learned}


def film(learner, encoder, tracks, out):
    """Write the overlay into `out`; returns {"frames", "seconds", "area"}."""
    done = {"frames": 0, "area": 0.0, "end": Fraction(0)}
    with written_beside(out) as output:
        pictures = filmed(learner, encoder, tracks, add_video(output, tracks), done)
        for packet in heapq.merge(pictures, add_sound(output, tracks), key=decoding_time):
            if tracks.replaced and decoding_time(packet) >= done["end"]:
                break  # the other sound is longer than the video
            output.mux(packet)
    seconds = float(done["end"] + tracks.late - tracks.start)
    return {"frames": done["frames"], "seconds": seconds, "area": done["area"] / done["frames"]}


def filmed(learner, encoder, tracks, target, done):
    """The packets of the overlay's video, and how far it is, in `done`."""
    sounds = heard_clips(tracks, encoder)
    heard = -1  # the clip whose sound is at hand
    bar = {"unit": f" x {PIECE} frames", "leave": False, "disable": None}
    for clip, frames in tqdm(pieces(tracks), "overlay", **bar):
        while heard < clip:
            sound = next(sounds)
            heard += 1
        pictures = [tracks.picture(frame) for frame in frames]
        seconds = [tracks.second(frame) % T for frame in frames]
        masks = masks_of(learner, pictures, seconds, sound)
        for frame, picture, mask in zip(frames, pictures, masks):
            length = (frame.duration or 0) * frame.time_base or 1 / rate_of(tracks.video)
            done["frames"] += 1
            done["area"] += float(mask.mean())
            done["end"] = time_of(frame) - tracks.late + length
            yield from target.encode(encodable(drawn(picture, mask), frame, tracks.late))
    yield from target.encode(None)


# ---- the model ---------------------------------------------------------------------------------


def open_trained(run, task=None):
    """(Learner after the last task of a run, its audio encoder, the number of that task)"""
    found = read_results(run)
    config = load_config([Path(run, "config.yaml")])
    learned = len(found["matrix"]["J"]) - 1
    if learned < 1:
        raise AtlasError(f"{run} has not learned a task yet, so there is no model to show")
    if task is not None and config.protocol != "til":
        raise AtlasError(f"--task chooses a head of a TIL run; {run} is {config.protocol.upper()}")
    encoder = audio.build_audio_encoder(config.audio, config.audio_weights)
    classes = [each["classes"] for each in found["tasks"]] if config.classify else None
    learner = Learner(config, (encoder.context_dim, encoder.token_dim), classes)
    refuse_other_encoders(run, found, learner.visual_sha, audio.fingerprint(encoder))
    learner.load(Path(run, f"task_{learned:02d}"))
    decoder = learner.model.eval().decoder
    heads = len(decoder.heads)
    if task is not None and not 1 <= task <= heads:
        raise AtlasError(f"--task {task}: {run} has heads for the tasks 1 to {heads}")
    decoder.use_head((task or heads) - 1)
    return learner, encoder, learned


def masks_of(learner, pictures, seconds, sound):
    """Masks [H, W] bool, True on what sounds, of pictures [H, W, 3] of one clip.

    seconds: of each. sound: the clip's (context [T, D_a], tokens [T, N, D_u]).
    """
    small = [resized(picture, learner.config.image_size) for picture in pictures]
    batch = {
        "frames": torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2),
        "clip": torch.zeros(len(pictures), dtype=torch.long),
        "second": torch.tensor(seconds),
        "context": sound[0][None],
        "tokens": sound[1][None],
    }
    with learner.autocast():
        logits = learner.model(to_device(batch, learner.device))["masks"].float().cpu()
    masks = []
    for x in logits[:, None, None]:  # one at a time: a picture may be large
        x = F.interpolate(x, pictures[0].shape[:2], mode="bilinear")
        masks.append((x[0, 0] > 0).numpy())
    return masks


# ---- reading -----------------------------------------------------------------------------------


class Tracks:
    """The streams to read, and their clocks.

    start: the time of the first frame; sound_start: the same by the clock of the sound. late: when
    the file begins; the overlay begins at 0. Another file's sound begins with the first frame.
    files: an ExitStack that closes all.
    """

    def __init__(self, source, sound, files):
        self.video = opened(source, "video", files)
        self.heard = opened(sound or source, "audio", files)
        self.played = opened(sound or source, "audio", files)
        self.replaced = sound is not None
        frames = decoded(self.video)
        self.first = next(frames, None)
        if self.first is None:
            raise AtlasError(f"{source} holds no frame that can be decoded")
        self.frames = itertools.chain([self.first], frames)
        self.start = time_of(self.first)
        self.late = beginning(self.video)
        self.sound_start = beginning(self.played) if self.replaced else self.start
        self.turns = round(self.first.rotation / 90) % 4  # of a phone's video, counterclockwise
        self.shape = self.picture(self.first).shape[:2]

    def picture(self, frame):
        """A frame upright, [H, W, 3] uint8, in the size of the first."""
        first = self.first
        with reading(self.video):
            picture = frame.to_ndarray(format="rgb24", width=first.width, height=first.height)
        return np.ascontiguousarray(np.rot90(picture, self.turns))

    def second(self, frame):
        return math.floor(time_of(frame) - self.start)


def pieces(tracks):
    """(number of a clip, at most PIECE of its frames), one after the other."""
    for clip, frames in itertools.groupby(tracks.frames, lambda frame: tracks.second(frame) // T):
        while piece := list(itertools.islice(frames, PIECE)):
            yield clip, piece


@contextlib.contextmanager
def reading(source):
    """What a broken file makes PyAV raise, as one line. source: a path or a stream."""
    try:
        yield
    except (av.FFmpegError, ValueError) as error:
        path = source.container.name if isinstance(source, av.stream.Stream) else source
        why = getattr(error, "strerror", None) or error
        why = f"{path} cannot be read as video or sound: {why}; does it play?"
        raise AtlasError(why) from None


def opened(path, kind, files):
    """The stream, "video" or "audio", that a player takes."""
    with reading(path):
        container = files.enter_context(av.open(str(path), metadata_errors="ignore"))
    stream = best_stream(container, kind)
    if stream is None:
        what = "video" if kind == "video" else "sound; give one to hear with --audio FILE"
        raise AtlasError(f"{path} holds no {what}")
    if kind == "audio" and stream.rate not in audio.RATES:
        raise AtlasError(f"{path} has {stream.rate} samples a second; give an ordinary sound")
    return stream


def decoded(stream):
    """The frames of a stream; those of a video have timestamps that rise."""
    last = None
    with reading(stream):
        for frame in stream.container.decode(stream):
            if stream.type == "video":
                if frame.pts is None or (last is not None and frame.pts <= last):
                    step = max(1, round(1 / (rate_of(stream) * frame.time_base)))
                    frame.pts = 0 if last is None else last + step
                last = frame.pts
            yield frame


def rate_of(stream):
    """Frames a second, by the header."""
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def time_of(frame):
    return frame.pts * frame.time_base


def decoding_time(packet):
    return packet.dts * packet.time_base


def beginning(stream):
    """When the file of a stream begins."""
    return Fraction(max(0, stream.container.start_time or 0), av.time_base)


# ---- hearing -----------------------------------------------------------------------------------


def waves(stream, start):
    """The sound from `start` on, mono at 16 kHz, in blocks of float32; gaps are silent."""
    resampler = av.AudioResampler(format="fltp", rate=RATE)
    given = 0  # samples so far
    at = None  # where the resampler's next sample belongs
    for frame in itertools.chain(decoded(stream), [None]):
        if frame is not None and frame.pts is not None:
            due = round((time_of(frame) - start) * RATE)
            if at is None or abs(due - at) > JITTER:
                at = due
        with reading(stream):
            blocks = [part.to_ndarray().mean(0) for part in resampler.resample(frame)]
            if not all(np.abs(block).max(initial=0) <= audio.LOUDEST for block in blocks):
                raise ValueError("its samples are not finite and within ±1")
        for block in blocks:
            at = at or 0
            for left in range(at - given, 0, -RATE):
                yield np.zeros(min(left, RATE), np.float32)
            given = max(given, at)
            yield block[given - at :]
            at += len(block)
            given = max(given, at)


def heard_clips(tracks, encoder):
    """What the encoder hears of each clip, (context [T, D_a], tokens [T, N, D_u]), without end."""
    blocks = waves(tracks.heard, tracks.sound_start)
    wave = np.zeros(0, np.float32)
    while True:
        parts = [wave]
        while sum(map(len, parts)) < T * RATE and (block := next(blocks, None)) is not None:
            parts.append(block)
        wave = np.concatenate(parts)
        heard = encode_wave(encoder, torch.from_numpy(wave[: T * RATE]), T)
        yield tuple(torch.from_numpy(x).float() for x in heard)
        wave = wave[T * RATE :]


# ---- drawing -----------------------------------------------------------------------------------


def drawn(picture, mask):
    """A picture [H, W, 3] uint8 with the mask [H, W] in FILL, outlined by EDGE and RIM."""
    width = max(1, round(min(mask.shape) / 240))  # of the lines, in pixels
    result = picture.copy()
    result[mask] = ((1 - OPACITY) * picture[mask] + OPACITY * np.array(FILL)).round()
    result[mask & grown(~mask, width)] = EDGE
    result[~mask & grown(mask, width)] = RIM
    return result


def grown(mask, width):
    """The mask [H, W] and all that is within `width` pixels of it, by rows and columns."""
    x = torch.from_numpy(mask)[None].float()
    x = F.max_pool2d(x, (2 * width + 1, 1), 1, (width, 0))
    return F.max_pool2d(x, (1, 2 * width + 1), 1, (0, width))[0].bool().numpy()


# ---- writing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def written_beside(out):
    """A container that becomes the file `out` when all is written, and leaves nothing before."""
    beside = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(beside), "w", format=CONTAINERS[out.suffix.lower()]) as output:
            yield output
        beside.replace(out)
    except (av.FFmpegError, OSError) as error:
        raise AtlasError(f"cannot write {out}: {error.strerror}") from None
    finally:
        if beside.exists():
            beside.unlink()


def add_video(output, tracks):
    """A stream of H.264 in the time base, shape and colours of the source."""
    first = tracks.first
    target = output.add_stream("libx264", rate=rate_of(tracks.video), options=QUALITY)
    target.height, target.width = (n + n % 2 for n in tracks.shape)
    target.pix_fmt = "yuv420p"
    target.time_base = target.codec_context.time_base = first.time_base
    target.codec_context.color_range = 1  # limited, as encodable makes it
    for name in ("colorspace", "color_primaries", "color_trc"):
        setattr(target.codec_context, name, getattr(first, name))
    if aspect := tracks.video.sample_aspect_ratio:  # of a pixel
        target.codec_context.sample_aspect_ratio = 1 / aspect if tracks.turns % 2 else aspect
    return target


def encodable(picture, frame, late):
    """A picture [H, W, 3] as the frame to encode in place of `frame`, earlier by `late`."""
    height, width = picture.shape[:2]
    odd = ((0, height % 2), (0, width % 2), (0, 0))  # H.264 wants even sizes
    picture = np.pad(picture, odd, mode="edge")
    new = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=frame.colorspace, dst_color_range=1
    )
    new.time_base = frame.time_base
    new.pts = frame.pts - math.floor(late / frame.time_base)
    new.duration = frame.duration
    return new


def add_sound(output, tracks):
    """The packets of the sound: copied where the container takes the codec, else AAC."""
    source = tracks.played
    shift = tracks.start - tracks.late - tracks.sound_start  # by which the sound is later
    codec = source.codec_context.codec
    if codec.canonical_name in output.supported_codecs and not codec.name.startswith("pcm_"):
        return copied(source, output.add_stream_from_template(source), shift)
    rate = source.rate if source.rate in av.Codec("aac", "w").audio_rates else 48000
    layout = "mono" if source.channels == 1 else "stereo"
    target = output.add_stream("aac", rate=rate, layout=layout, bit_rate=192_000)
    return encoded(source, target, shift)


def copied(source, target, shift):
    with reading(source):
        for packet in source.container.demux(source):
            if packet.dts is not None:  # None: the end
                moved = math.floor(shift / packet.time_base)
                packet.pts = moved + (packet.dts if packet.pts is None else packet.pts)
                packet.dts += moved
                packet.stream = target
                yield packet


def encoded(source, target, shift):
    for frame in itertools.chain(decoded(source), [None]):
        if frame is not None and frame.pts is not None:
            frame.pts += math.floor(shift / frame.time_base)
        with reading(source):  # a sound may change its form midway
            packets = target.encode(frame)
        yield from packets
