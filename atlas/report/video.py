"""What a trained model hears, drawn over a video of any length, frame rate and size: `python eval.py RUN --video clip.mp4 --out overlay.mp4`.

The model is shown what it was trained on. Counted from its first frame, the video is a row of clips of T seconds; a frame of second k is conditioned on the sound of second k and
attends to the sound of all of its clip, which is cut into log-mel patches as a clip's of AVSBench is. Of a last, shorter clip the last patch is repeated; past its end, a sound is silent.

One reader decodes the frames, one what the model hears, one what goes into the overlay. Each is only a few frames, or a clip's sound, ahead, so an hour takes little more memory than a minute (the index of an mp4 grows).
Shapes: M frames, T seconds of a clip, H W pixels of the video, S the model's image_size. Times are seconds, as fractions.
"""

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

from atlas.audio import RATE, build_audio_encoder, encode_wave, fingerprint, resampled
from atlas.clips import T, resized
from atlas.errors import AtlasError
from atlas.methods.baselines import build_method
from atlas.model import build_model, merged
from atlas.results import read_results
from atlas.runs import (
    autocast_of,
    frozen_fingerprint,
    load_checkpoint,
    pick_device,
    read_run_config,
    refuse_other_encoders,
)

PIECE = 8  # frames decoded, masked and encoded at a time
FILL, EDGE, RIM = (
    (230, 159, 0),
    (255, 255, 255),
    (0, 0, 0),
)  # Okabe and Ito's orange; a light line inside the mask and a dark one around it show on any picture
OPACITY = 0.45
CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}  # what H.264 goes into
QUALITY = {"crf": "18", "preset": "veryfast"}  # x264's
JITTER = Fraction(1, 10)  # a sound's timestamps may be off by less than this; more is a gap


def overlay(run, source, out, sound=None, task=None):
    """Draw what the run's last model hears in `source` into the video `out`; {"frames", "seconds", "area": mean share of the frame that is masked, "stage"}.

    `sound`: a file that it hears instead, and that the overlay sounds like. `task`: TIL: whose head, from 1; the newest where not given.
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
        streams = open_streams(
            source, sound, files
        )  # before the model: what is wrong with them is said at once
        model, encoder, config, stage = open_trained(run, task)
        with torch.inference_mode(), merged(model):
            return film(
                segmenter(model, config),
                encoder,
                config.image_size,
                *streams,
                out,
                replaced=sound is not None,
            ) | {"stage": stage}


# ---- the model -------------------------------------------------------------------------------------------------------


def open_trained(run, task=None):
    """(the model after the last task of a run, its audio encoder, its config, the number of that task); of its files and the frozen weights alone, no clip is needed."""
    results, config = read_results(run), read_run_config(run)
    stage = len(results["matrix"]["J"]) - 1
    if stage < 1:
        raise AtlasError(f"{run} has not learned a task yet, so there is no model to show")
    if task is not None and config.protocol != "til":
        raise AtlasError(
            f"--task chooses a head of a TIL run; {run} is {config.protocol.upper()}, which has one head"
        )
    encoder = build_audio_encoder(config.audio, config.audio_weights)
    classes = [each["classes"] for each in results["tasks"]] if config.classify else None
    model = build_model(config, encoder.context_dim, encoder.token_dim, classes)
    refuse_other_encoders(run, results, frozen_fingerprint(model), fingerprint(encoder))
    model.to(pick_device(config)).eval()
    method = build_method(config, model)  # some keep what they folded into the frozen weights
    load_checkpoint(Path(run, f"task_{stage:02d}"), model, method)
    heads = len(model.decoder.heads)
    if task is not None and not 1 <= task <= heads:
        raise AtlasError(f"--task {task}: {run} has heads for the tasks 1 to {heads}")
    model.decoder.use_head((task or heads) - 1)
    return model, encoder, config, stage


def segmenter(model, config):
    """A function (frames [M, 3, S, S] uint8, second [M], context [T, D_a], tokens [T, N, D_u]) -> logits [M, S, S] of frames of one clip."""
    device, autocast = pick_device(config), autocast_of(config)

    def segment(frames, second, context, tokens):
        batch = {
            "frames": frames,
            "clip": torch.zeros_like(second),
            "second": second,
            "context": context[None],
            "tokens": tokens[None],
        }
        with autocast():
            return (
                model({name: value.to(device) for name, value in batch.items()})["masks"]
                .float()
                .cpu()
            )

    return segment


# ---- reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path):
    """PyAV's errors as one line."""
    try:
        yield
    except av.FFmpegError as error:
        raise AtlasError(
            f"{path} cannot be read as video or sound: {error.strerror}; is it whole, and does it play?"
        ) from None


def open_streams(source, sound, files):
    """(video, heard, played): streams of `source`, and of `sound` where there is one, each with a reader of its own, to be closed with `files`."""

    def stream(path, kind):
        with reading(path):
            container = files.enter_context(av.open(str(path)))
        found = [
            each
            for each in container.streams
            if each.type == kind and not each.disposition & av.stream.Disposition.attached_pic
        ]  # a cover is no video
        if not found and kind == "audio" and not sound:
            raise AtlasError(
                f"{path} has no sound track; give the model something to hear with --audio FILE"
            )
        if not found:
            raise AtlasError(f"{path} holds no {'sound' if kind == 'audio' else 'video'}")
        return found[0]

    return (
        stream(source, "video"),
        stream(sound or source, "audio"),
        stream(sound or source, "audio"),
    )


def decoded(stream):
    """The frames of a video or sound stream, with timestamps that rise."""
    last = None
    with reading(stream.container.name):
        for frame in stream.container.decode(stream):
            if stream.type == "video":
                if frame.pts is None or (last is not None and frame.pts <= last):
                    frame.pts = (
                        0
                        if last is None
                        else last + max(1, round(1 / (rate_of(stream) * frame.time_base)))
                    )
                last = frame.pts
            yield frame


def rate_of(stream):
    """Frames a second of a video, by its header."""
    return stream.average_rate or stream.guessed_rate or Fraction(25)


def time_of(frame):
    return frame.pts * frame.time_base


def pieces(frames, start):
    """(number of the clip, [(second, frame), ...]): video frames, at most PIECE and of one clip at a time; counted from `start`."""
    piece, clip = [], 0
    for frame in frames:
        number, second = divmod(math.floor(time_of(frame) - start), T)
        if piece and (number != clip or len(piece) == PIECE):
            yield clip, piece
            piece = []
        clip = number
        piece.append((second, frame))
    if piece:
        yield clip, piece


def picture_of(frame, height, width):
    """A frame as it is to be seen, upright, [H, W, 3] uint8; `height`, `width`: as stored."""
    return np.ascontiguousarray(
        np.rot90(frame.to_ndarray(format="rgb24", height=height, width=width), quarters(frame))
    )


def quarters(frame):
    """Quarter turns counterclockwise that a frame is shown with: a phone's."""
    return round(frame.rotation / 90) % 4


def samples_of(frame):
    """The samples of a sound frame in ±1, channels averaged, [samples] float32."""
    x = frame.to_ndarray()
    x = x if frame.format.is_planar else x.reshape(-1, frame.layout.nb_channels).T
    if x.dtype.kind in "iu":
        largest = 2 ** (8 * x.dtype.itemsize - 1)
        x = x / np.float64(largest) - (x.dtype.kind == "u")
    return x.mean(0).astype(np.float32)


def mono(stream, start):
    """The sound of a stream from the time `start` on, at its own rate, in blocks [samples] float32 of a second at most; gaps are silent."""
    rate, at = stream.rate, 0  # samples so far
    for frame in decoded(stream):
        block = samples_of(frame)
        early = at - round((time_of(frame) - start) * rate) if frame.pts is not None else 0
        if not at or abs(early) > JITTER * rate:
            for left in range(-early, 0, -rate):
                yield np.zeros(min(left, rate), np.float32)
            at, block = at + max(0, -early), block[max(0, early) :]
        at += len(block)
        for k in range(0, len(block), rate):
            yield block[k : k + rate]


def heard_clips(stream, start, encoder):
    """What a frozen encoder hears in T seconds of a sound after the other, (context [T, D_a], tokens [T, N, D_u]) float32, without end: silence follows.

    A second of sound on both sides goes through the resampler with a clip's own, so that the cuts leave no trace.
    """
    rate, blocks = stream.rate, mono(stream, start)
    before, wave = np.zeros(rate, np.float32), np.zeros(0, np.float32)
    while True:
        ready = [wave]
        while sum(map(len, ready)) < (T + 1) * rate and (block := next(blocks, None)) is not None:
            ready.append(block)
        wave = np.concatenate(ready)
        own = wave[: T * rate]
        clip = resampled(torch.from_numpy(np.concatenate([before, wave[: (T + 1) * rate]])), rate)[
            RATE : RATE - (-len(own) * RATE // rate)
        ]
        yield tuple(torch.from_numpy(x).float() for x in encode_wave(encoder, clip, T))
        before, wave = np.concatenate([before, own])[-rate:], wave[T * rate :]


# ---- writing ---------------------------------------------------------------------------------------------------------


def film(segment, encoder, size, video, heard, played, out, replaced=False):
    """Write the overlay; {"frames", "seconds", "area"}. `segment`: of segmenter; `size`: S; the three streams: of open_streams; `replaced`: the sound is not the video's own.

    The frames keep their timestamps, but a file that starts late starts at 0. Another sound starts with the first frame and ends with the last.
    """
    frames = decoded(video)
    first = next(frames, None)
    if first is None:
        raise AtlasError(f"{video.container.name} holds no frame that can be decoded")
    late = max(Fraction(0), Fraction(video.container.start_time or 0, av.time_base))
    began = (
        max(Fraction(0), Fraction(played.container.start_time or 0, av.time_base))
        if replaced
        else time_of(first)
    )  # in the clock of the sound, with the first frame
    sounds, at = heard_clips(heard, began, encoder), -1
    count, area, ended = 0, 0.0, Fraction(0)
    shown = picture_of(first, first.height, first.width).shape[:2]
    with written_beside(out) as output:
        target = add_video(output, video, first, shown)
        packets = add_sound(output, played, time_of(first) - late - began if replaced else -late)
        for clip, piece in tqdm(
            pieces(itertools.chain([first], frames), time_of(first)),
            "overlay",
            unit=f" x {PIECE} frames",
            leave=False,
            disable=None,
        ):
            while at < clip:
                (context, tokens), at = next(sounds), at + 1
            pictures = [picture_of(frame, first.height, first.width) for _, frame in piece]
            small = torch.from_numpy(
                np.stack([resized(picture, size) for picture in pictures])
            ).permute(0, 3, 1, 2)
            logits = segment(small, torch.tensor([second for second, _ in piece]), context, tokens)
            for (_, frame), picture, x in zip(piece, pictures, logits):
                mask = (
                    F.interpolate(x[None, None], size=shown, mode="bilinear", align_corners=False)[
                        0, 0
                    ]
                    > 0
                ).numpy()
                count, area = count + 1, area + mask.mean()
                ended = (
                    time_of(frame)
                    - late
                    + (frame.duration * frame.time_base if frame.duration else 1 / rate_of(video))
                )
                packets = mux_until(output, packets, time_of(frame) - late)
                output.mux(target.encode(encodable(drawn(picture, mask), frame, late)))
        output.mux(target.encode(None))
        mux_until(output, packets, ended if replaced else math.inf)
    return {
        "frames": count,
        "seconds": float(ended + late - time_of(first)),
        "area": float(area / count),
    }


@contextlib.contextmanager
def written_beside(out):
    """A container that becomes the file `out` when all is written, and of which nothing is left otherwise."""
    beside = out.with_name(f".{os.getpid()}.{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(beside), "w", format=CONTAINERS[out.suffix.lower()]) as output:
            yield output
        os.replace(beside, out)
    except (av.FFmpegError, OSError) as error:
        raise AtlasError(f"cannot write {out}: {error.strerror}") from None
    finally:
        if beside.exists():
            beside.unlink()


def add_video(output, source, first, shown):
    """The overlay's video stream: H.264 in the time base, shape and colours of the source; `first`: a frame of it; `shown`: H, W."""
    target = output.add_stream("libx264", rate=rate_of(source), options=QUALITY)
    target.height, target.width = (n + n % 2 for n in shown)
    target.pix_fmt = "yuv420p"
    target.time_base = target.codec_context.time_base = first.time_base
    target.codec_context.colorspace, target.codec_context.color_range = (
        first.colorspace,
        1,
    )  # 1: limited, as encodable makes it
    target.codec_context.color_primaries, target.codec_context.color_trc = (
        first.color_primaries,
        first.color_trc,
    )
    if aspect := source.sample_aspect_ratio:  # of a pixel
        target.codec_context.sample_aspect_ratio = 1 / aspect if quarters(first) % 2 else aspect
    return target


def encodable(picture, frame, late):
    """A picture [H, W, 3] as the frame to encode in place of `frame`, earlier by `late`. H.264 wants even sizes: an odd last row or column is there twice."""
    height, width = picture.shape[:2]
    picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    new = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=frame.colorspace, dst_color_range=1
    )
    new.pts, new.time_base, new.duration = (
        frame.pts - math.floor(late / frame.time_base),
        frame.time_base,
        frame.duration,
    )
    return new


def drawn(picture, mask):
    """picture [H, W, 3] uint8, mask [H, W] bool (True: sounding) -> the picture with the mask in FILL, an EDGE inside its outline and a RIM outside, [H, W, 3] uint8."""
    width = max(1, round(min(mask.shape) / 240))  # of the lines, in pixels
    result = picture.copy()
    result[mask] = ((1 - OPACITY) * picture[mask] + OPACITY * np.array(FILL)).round()
    result[mask & grown(~mask, width)] = EDGE
    result[~mask & grown(mask, width)] = RIM
    return result


def grown(mask, width):
    """The mask [H, W] and all that is within `width` pixels of it, by rows and columns."""
    for axis in (0, 1):
        padded = np.pad(mask, [(width, width) if a == axis else (0, 0) for a in (0, 1)])
        mask = np.lib.stride_tricks.sliding_window_view(padded, 2 * width + 1, axis).any(-1)
    return mask


def add_sound(output, source, shift):
    """The packets of a new sound stream of `output`, in order: copied from `source` where the container takes its codec, else (and of uncompressed sound) AAC; later by `shift`."""
    codec = source.codec_context.codec
    if codec.canonical_name in output.supported_codecs and not codec.name.startswith("pcm_"):
        return copied(source, output.add_stream_from_template(source), shift)
    rates = av.Codec("aac", "w").audio_rates
    target = output.add_stream(
        "aac",
        rate=source.rate if source.rate in rates else 48000,
        layout="mono" if source.channels == 1 else "stereo",
        bit_rate=192_000,
    )
    return encoded(source, target, shift)


def copied(source, target, shift):
    with reading(source.container.name):
        for packet in source.container.demux(source):
            if packet.dts is not None:  # None: the end
                moved = math.floor(shift / packet.time_base)
                packet.pts, packet.dts, packet.stream = (
                    packet.pts + moved,
                    packet.dts + moved,
                    target,
                )
                yield packet


def encoded(source, target, shift):
    for frame in decoded(source):
        if frame.pts is not None:
            frame.pts += math.floor(shift / frame.time_base)
        yield from target.encode(frame)
    yield from target.encode(None)


def mux_until(output, packets, end):
    """Write the sound's packets that begin before `end`; the ones that are left."""
    for packet in packets:
        if packet.pts * packet.time_base >= end:
            return itertools.chain([packet], packets)
        output.mux(packet)
    return iter(())
