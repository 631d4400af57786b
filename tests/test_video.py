"""Overlays of videos that PyAV makes here, 64 x 48 and a few seconds long. Except for the last tests the model is rigged, so that masks and what is heard are known."""

import contextlib
import re
import sys
from dataclasses import replace
from fractions import Fraction
from unittest.mock import patch

import av
import numpy as np
import pytest
import soundfile
import torch

import eval as script
import train
from atlas.audio import RATE, LogMel, encode_wave, read_wave
from atlas.clips import T
from atlas.errors import AtlasError, one_line_errors
from atlas.report import video

GREY, WHITE = 90, 235


def make(
    path,
    width=64,
    height=48,
    ticks=range(0, 75 * 40, 40),
    sound=None,
    rate=44100,
    codec="aac",
    sound_at=0,
):
    """A grey video with a white corner, top left; a frame at each of `ticks` milliseconds; `sound` [samples] of `rate` Hz begins at `sound_at` seconds."""
    with av.open(str(path), "w") as output:
        film = output.add_stream("libx264", rate=25, options={"crf": "12"})
        film.width, film.height, film.pix_fmt = (
            width,
            height,
            "yuv444p" if width % 2 or height % 2 else "yuv420p",
        )
        film.time_base = film.codec_context.time_base = Fraction(1, 1000)
        track = None if sound is None else output.add_stream(codec, rate=rate, layout="mono")
        picture = np.full((height, width, 3), GREY, np.uint8)
        picture[: height // 3, : width // 4] = WHITE
        for k in range(0, 0 if sound is None else len(sound), 1024):
            frame = av.AudioFrame.from_ndarray(
                sound[None, k : k + 1024].astype(np.float32), format="fltp", layout="mono"
            )
            frame.rate, frame.pts, frame.time_base = (
                rate,
                k + round(sound_at * rate),
                Fraction(1, rate),
            )
            output.mux(track.encode(frame))
        if track:
            output.mux(track.encode(None))
        for tick in ticks:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 1000)
            output.mux(film.encode(frame))
        output.mux(film.encode(None))
    return path


def tone(seconds, rate=44100, hertz=440):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def frames_of(path):
    """[(seconds, picture [H, W, 3])]"""
    with av.open(str(path)) as container:
        return [
            (frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
        ]


def sound_of(path):
    """(first time, samples, rate)"""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    return (
        frames[0].time,
        np.concatenate([video.samples_of(frame) for frame in frames]),
        frames[0].rate,
    )


def packets_of(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


class Rigged:
    """A model that masks rows 8 to 15 and columns 16 to 23 of its 32 x 32, and remembers what it was shown and heard."""

    def __init__(self):
        self.seconds, self.context, self.shown = [], [], []

    def __call__(self, frames, second, context, tokens):
        assert (
            frames.shape[1:] == (3, 32, 32)
            and frames.dtype == torch.uint8
            and len(frames) == len(second) <= video.PIECE
        )
        self.seconds += second.tolist()
        self.context += [context] * len(second)
        self.shown += list(frames)
        logits = torch.full((len(frames), 32, 32), -4.0)
        logits[:, 8:16, 16:24] = 4.0
        return logits


def draw(source, out, sound=None):
    """(what film returns, the rigged model)"""
    rigged = Rigged()
    with contextlib.ExitStack() as files:
        return video.film(
            rigged,
            LogMel(),
            32,
            *video.open_streams(source, sound, files),
            out,
            replaced=sound is not None,
        ), rigged


UNEVEN = [0, 33, 100, 133, 700, 1000, 1001, 2500, 2980]
ROUND = {
    "plain": dict(name="a.mp4", sound=tone(3)),
    "odd size, uncompressed": dict(
        name="a.mkv", width=63, height=47, sound=tone(3), codec="pcm_s16le"
    ),
    "uneven frames, late sound": dict(name="a.mkv", ticks=UNEVEN, sound=tone(2.5), sound_at=0.5),
    "a start at 1 s": dict(name="a.mkv", ticks=range(1000, 3000, 40), sound=tone(2), sound_at=1),
}


@pytest.mark.parametrize("kind", ROUND)
def test_frames_times_and_sound_are_kept(tmp_path, kind):
    options = dict(ROUND[kind])
    source, out = make(tmp_path / options.pop("name"), **options), tmp_path / "new" / "out.mp4"
    done, _ = draw(source, out)
    before, after = frames_of(source), frames_of(out)
    late = 1 if kind.startswith("a start") else 0
    assert done["frames"] == len(after) == len(before)
    np.testing.assert_allclose([t for t, _ in after], [t - late for t, _ in before], atol=1e-4)
    height, width = before[0][1].shape[:2]
    assert after[0][1].shape == (height + height % 2, width + width % 2, 3)
    (start, sound, rate), (new_start, new_sound, new_rate) = sound_of(source), sound_of(out)
    assert (
        new_rate == rate
        and abs(len(new_sound) - len(sound)) <= 1024
        and new_start == pytest.approx(start - late, abs=0.03)
    )
    if options.get("codec") is None:
        assert packets_of(out) == packets_of(source)
    else:  # in AAC, and still in its place
        assert np.corrcoef(sound[2000:90000], new_sound[2000:90000])[0, 1] > 0.99
    assert done["seconds"] == pytest.approx(before[-1][0] - before[0][0] + 0.04, abs=0.07) and list(
        out.parent.iterdir()
    ) == [out]


@pytest.mark.parametrize("width, height", [(96, 64), (95, 63)])
def test_the_mask_lands_on_the_pixels_it_is_about(tmp_path, width, height):
    source, out = (
        make(tmp_path / "a.mp4", width, height, range(0, 400, 40), tone(1)),
        tmp_path / "o.mp4",
    )
    done, _ = draw(source, out)
    picture = frames_of(out)[5][1][:height, :width].astype(int)
    top, bottom, left, right = (round(x) for x in (height / 4, height / 2, width / 2, 0.75 * width))
    inside, near = np.zeros((height, width), bool), np.zeros((height, width), bool)
    inside[top + 5 : bottom - 5, left + 5 : right - 5] = (
        True  # chroma is at half the resolution, and lines are drawn at the edge
    )
    near[top - 5 : bottom + 5, left - 5 : right + 5] = True
    expected = (1 - video.OPACITY) * GREY + video.OPACITY * np.array(video.FILL)
    assert np.abs(picture[inside] - expected).max() <= 12
    original = np.full((height, width, 3), GREY)
    original[: height // 3, : width // 4] = WHITE
    corner = np.zeros_like(near)
    corner[: height // 3 + 3, : width // 4 + 3] = True
    assert (
        np.abs(picture - original)[~near & ~corner].max() <= 12
        and np.abs(picture - original)[2 : height // 3 - 3, 2 : width // 4 - 3].max() <= 12
    )
    middle = (left + right) // 2
    assert (
        picture[top - 4 : top + 4, middle].min() < 50
        and picture[top - 4 : top + 4, middle].max() > 170
    )  # a dark line and a light one
    assert done["area"] == pytest.approx(1 / 16, rel=0.1)


def test_the_drawing_leaves_the_rest_alone():
    picture, mask = (
        np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8),
        np.zeros((40, 50), bool),
    )
    mask[10:20, 15:30] = True
    drawn = video.drawn(picture, mask)
    outer, inner = np.zeros_like(mask), np.zeros_like(mask)
    outer[9:21, 14:31] = inner[11:19, 16:29] = True
    assert (
        (drawn[~outer] == picture[~outer]).all()
        and (drawn[mask & ~inner] == video.EDGE).all()
        and (drawn[outer & ~mask] == video.RIM).all()
    )
    assert (
        drawn[inner]
        == ((1 - video.OPACITY) * picture[inner] + video.OPACITY * np.array(video.FILL)).round()
    ).all()
    assert (video.drawn(picture, np.zeros_like(mask)) == picture).all() and (
        video.drawn(picture, ~np.zeros_like(mask))[0] != video.EDGE
    ).any()


def test_a_phones_video_is_shown_upright(tmp_path):
    """The display matrix of a quarter turn clockwise, written into the file by hand: right goes down, so top left goes top right."""
    source, out = (
        make(tmp_path / "a.mp4", ticks=range(0, 400, 40), sound=tone(0.5)),
        tmp_path / "o.mp4",
    )
    content = bytearray(source.read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert content[matrix : matrix + 4] == b"\0\1\0\0"
    content[matrix : matrix + 20] = np.array([0, 1 << 16, 0, -(1 << 16), 0], ">i4").tobytes()
    source.write_bytes(content)
    _, rigged = draw(source, out)
    picture = frames_of(out)[3][1]
    assert (
        picture.shape == (64, 48, 3)
        and picture[3, -4].min() > 200
        and picture[3, 3].max() < 120
        and picture[-4, -4].max() < 120
    )
    assert rigged.shown[0][0, 1, -2] > 200 > 120 > rigged.shown[0][0, 1, 1]


def test_a_second_is_conditioned_on_its_own_sound_in_clips_as_in_training(tmp_path):
    """7.4 s: a clip of five seconds, and one of 2.4 whose last patch is repeated, as of AVSBench's short sounds."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(7.4 * RATE))
    source = make(
        tmp_path / "a.mkv", ticks=range(0, 9000, 200), sound=noise, rate=RATE, codec="pcm_s16le"
    )
    _, rigged = draw(source, tmp_path / "o.mp4")
    assert rigged.seconds == [t // 1000 % T for t in range(0, 9000, 200)]
    wave = torch.from_numpy(sound_of(source)[1])
    heard = [encode_wave(LogMel(), clip, T)[0] for clip in (wave[: 5 * RATE], wave[5 * RATE :])]
    assert all(
        (context.numpy() == heard[t // 5000]).all()
        for t, context in zip(range(0, 9000, 200), rigged.context)
    )
    assert (heard[1][2:] == heard[1][1]).all() and (heard[0][4] != heard[0][3]).any()


def test_the_sound_is_what_training_reads_whatever_its_form(tmp_path):
    """Stereo at 44.1 kHz, resampled piece by piece, is the very sound that read_wave gives as a whole; before its start and after its end there is silence."""
    both = np.random.default_rng(0).uniform(-0.5, 0.5, (44100 * 12, 2))
    soundfile.write(tmp_path / "a.wav", both, 44100, subtype="PCM_24")
    whole = read_wave(tmp_path / "a.wav")

    class Ear(LogMel):
        context_dim = 5 * RATE

    with (
        contextlib.ExitStack() as files,
        patch.object(
            video, "encode_wave", lambda encoder, wave, seconds: (wave.numpy(), wave.numpy())
        ),
    ):
        source = make(tmp_path / "v.mp4", ticks=[0])
        _, heard, _ = video.open_streams(source, tmp_path / "a.wav", files)
        clips = [
            wave for (wave, _), _ in zip(video.heard_clips(heard, Fraction(0), Ear()), range(4))
        ]
        assert [len(clip) for clip in clips] == [5 * RATE, 5 * RATE, 2 * RATE, 0]
        np.testing.assert_allclose(np.concatenate(clips), whole, atol=1e-6)
        _, heard, _ = video.open_streams(source, tmp_path / "a.wav", files)
        early = next(video.heard_clips(heard, Fraction(-1, 2), Ear()))[0]
        _, heard, _ = video.open_streams(source, tmp_path / "a.wav", files)
        late = next(video.heard_clips(heard, Fraction(1, 2), Ear()))[0]
    assert not early[: RATE // 2 - 20].any()
    np.testing.assert_allclose(early[RATE // 2 + 20 :], whole[20 : 4 * RATE + RATE // 2], atol=1e-6)
    np.testing.assert_allclose(late[20:], whole[RATE // 2 + 20 : 5 * RATE + RATE // 2], atol=1e-6)


def test_another_sound_is_heard_and_played(tmp_path):
    source = make(tmp_path / "a.mp4", sound=tone(3))
    for name, seconds in (("long.wav", 9), ("short.wav", 1)):
        soundfile.write(tmp_path / name, tone(seconds, 16000, 2000), 16000)
        _, rigged = draw(source, tmp_path / "o.mp4", tmp_path / name)
        _, sound, rate = sound_of(tmp_path / "o.mp4")
        assert rate == 16000 and len(sound) / rate == pytest.approx(min(seconds, 3), abs=0.13)
        loudest = np.abs(np.fft.rfft(sound[4000:12000])).argmax() * rate / 8000
        assert loudest == pytest.approx(2000, abs=20) and len(frames_of(tmp_path / "o.mp4")) == 75
        expected = encode_wave(LogMel(), read_wave(tmp_path / name)[: 5 * RATE], T)[0]
        np.testing.assert_allclose(rigged.context[0], expected, atol=2e-3)
    mute = make(tmp_path / "mute.mp4", ticks=range(0, 400, 40))
    assert draw(mute, tmp_path / "o.mp4", source)[0]["frames"] == 10  # the sound of another video


def test_no_more_than_a_piece_is_decoded_ahead(tmp_path, monkeypatch):
    """The reader of the frames is never more than a piece and a frame ahead of what is drawn, that of the sound a clip and two seconds, that of the overlay's sound a packet."""
    source = make(tmp_path / "a.mp4", ticks=range(0, 16000, 100), sound=tone(16))
    read, decoded, copied, drawn = (
        {"video": 0.0, "audio": 0.0, "copy": 0.0},
        video.decoded,
        video.copied,
        video.drawn,
    )

    def watch(kind, items):
        for item in items:
            read[kind] = float(item.pts * item.time_base)
            yield item

    monkeypatch.setattr(video, "decoded", lambda stream: watch(stream.type, decoded(stream)))
    monkeypatch.setattr(video, "copied", lambda *words: watch("copy", copied(*words)))
    ahead, count = {name: [] for name in read}, 0

    def look(picture, mask):
        nonlocal count
        for name in read:
            ahead[name].append(read[name] - 0.1 * count)
        count += 1
        return drawn(picture, mask)

    monkeypatch.setattr(video, "drawn", look)
    draw(source, tmp_path / "o.mp4")
    assert (
        count == 160
        and max(ahead["video"]) <= 0.1 * video.PIECE + 0.01
        and max(ahead["audio"]) <= T + 2
        and max(ahead["copy"]) <= 0.1
    )
    assert max(ahead["audio"]) > 0


def test_nothing_is_left_of_an_overlay_that_failed(tmp_path):
    source, out = make(tmp_path / "a.mp4", sound=tone(3)), tmp_path / "o.mp4"
    out.write_bytes(b"of old")

    def fails(*words):
        raise AtlasError("out of luck")

    with pytest.raises(AtlasError, match="out of luck"), contextlib.ExitStack() as files:
        video.film(fails, LogMel(), 32, *video.open_streams(source, None, files), out)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "o.mp4"]
        and out.read_bytes() == b"of old"
    )


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder of files that are no video with sound."""
    where = tmp_path_factory.mktemp("wrong")
    make(where / "mute.mp4", ticks=range(0, 400, 40))
    whole = make(where / "whole.mp4", ticks=range(0, 400, 40), sound=tone(0.5)).read_bytes()
    (where / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (where / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (where / "file").write_text("")
    soundfile.write(where / "sound.wav", tone(1), 44100)
    return where


@pytest.mark.parametrize("words, said", [
    (("--video", "none.mp4", "--out", "o.mp4"), "no file .*none.mp4"),
    (("--video", "mute.mp4", "--out", "o.mp4"), "no sound track; .*--audio"),
    (("--video", "sound.wav", "--out", "o.mp4"), "holds no video"),
    (("--video", "mute.mp4", "--out", "o.mp4", "--audio", "mute.mp4"), "holds no sound"),
    (("--video", "cut.mp4", "--out", "o.mp4"), "cut.mp4 cannot be read"),
    (("--video", "noise.mp4", "--out", "o.mp4"), "noise.mp4 cannot be read"),
    (("--video", "mute.mp4", "--out", "o.mp4", "--audio", "noise.mp4"), "noise.mp4 cannot be read"),
    (("--video", "mute.mp4", "--out", "o.mp4", "--audio", "none.wav"), "no file .*none.wav"),
    (("--video", "whole.mp4", "--out", "whole.mp4"), "is the file to read"),
    (("--video", "whole.mp4", "--out", "o.gif"), "name one"),
    (("--video", "whole.mp4"), "--out"),
    (("--video", "whole.mp4", "--out", "o.mp4", "--rescore"), "for one run"),
    (("--audio", "sound.wav"), "go with --video"),
    (("--task", "1"), "go with --video"),
    (("--video", "whole.mp4", "--out", "o.mp4"), "no results.json"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(wrong, capfd, words, said):
    words = [str(wrong / word) if "." in word else word for word in words]
    before = sorted(wrong.iterdir())
    with (
        patch.object(sys, "argv", ["eval.py", str(wrong / "no run"), *words]),
        pytest.raises(SystemExit) as ended,
        one_line_errors(),
    ):
        script.main(script.parse())
    lines = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2 and sorted(wrong.iterdir()) == before
    assert len(lines) == 1 and re.match(f"error: .*{said}", lines[0]), lines


def test_a_folder_that_is_a_file_is_one_line(wrong):
    with pytest.raises(AtlasError, match="cannot write"):
        draw(wrong / "whole.mp4", wrong / "file" / "o.mp4")
    (wrong / "folder.mp4").mkdir(exist_ok=True)
    with pytest.raises(AtlasError, match="cannot write"):
        draw(wrong / "whole.mp4", wrong / "folder.mp4")
    assert not [p for p in wrong.iterdir() if p.name.startswith(".")]


@pytest.fixture(scope="module")
def til(config, tmp_path_factory):
    """The folder of a tiny TIL run with a classification branch, and no data beside it."""
    where = tmp_path_factory.mktemp("til")
    train.main(
        replace(
            config,
            protocol="til",
            method="finetune",
            classify=True,
            base=3,
            out_dir=str(where),
            name="run",
        )
    )
    path = where / "run" / "config.yaml"
    path.write_text(path.read_text().replace(f"data_root: {config.data_root}", "data_root: gone"))
    return where / "run"


def test_a_run_masks_what_its_own_model_masks(til, tmp_path, capsys):
    """The logits that are drawn are the model's on the clip, frame by frame; the newest head's, or that of --task; no data set is needed."""
    source = make(
        tmp_path / "a.mkv",
        ticks=range(0, 5000, 500),
        sound=tone(5, RATE),
        rate=RATE,
        codec="pcm_s16le",
    )
    seen, plain = {}, video.segmenter

    def recording(model, config):
        segment = plain(model, config)
        return lambda *words: (
            seen.setdefault(model.decoder.active, []).append((words, segment(*words)))
            or seen[model.decoder.active][-1][1]
        )

    with patch.object(video, "segmenter", recording):
        for words in ((), ("--task", "1")):
            with patch.object(
                sys,
                "argv",
                [
                    "eval.py",
                    str(til),
                    "--video",
                    str(source),
                    "--out",
                    str(tmp_path / "o.mp4"),
                    *words,
                ],
            ):
                assert script.main(script.parse()) == 0
    assert "o.mp4: 10 frames, 4.5 s, mean masked area" in capsys.readouterr().out and list(
        seen
    ) == [1, 0]
    model, _, config, stage = video.open_trained(til, 1)
    assert stage == 2
    frames, second, context, tokens = (
        torch.cat([words[k] for words, _ in seen[0]]) if k < 2 else seen[0][0][0][k]
        for k in range(4)
    )
    with torch.inference_mode():
        batch = {
            "frames": frames,
            "second": second,
            "clip": torch.zeros_like(second),
            "context": context[None],
            "tokens": tokens[None],
        }
        torch.testing.assert_close(
            model(batch)["masks"],
            torch.cat([logits for _, logits in seen[0]]),
            atol=1e-4,
            rtol=1e-4,
        )
    with pytest.raises(AtlasError, match="heads for the tasks 1 to 2"):
        video.open_trained(til, 3)
