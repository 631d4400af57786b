"""Overlays of videos that PyAV makes here, 64 x 48 and a few seconds long.

Except in the last tests the model is rigged, so that masks and what is heard are known.
"""

import contextlib
import re
import sys
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from unittest.mock import patch

import av
import numpy as np
import pytest
import soundfile
import torch
from av.stream import Disposition

import eval as script
import train
from atlas.audio import RATE, LogMel, encode_wave, read_wave
from atlas.clips import T
from atlas.errors import AtlasError, one_line_errors
from atlas.report import masks, video

GREY = 90
WHITE = 235
TEN = range(0, 400, 40)


def tone(seconds, rate=44100, hertz=440):
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def make(path, ticks=range(0, 3000, 40), size=(64, 48), sounds=(), **sound):
    """A grey video with a white corner, top left; a frame at each of `ticks` milliseconds.

    sounds: of each track the samples, the last one the default. sound: rate, codec, and `at`, the
    seconds at which they begin.
    """
    width, height = size
    rate = sound.get("rate", 44100)
    with av.open(str(path), "w") as output:
        film = output.add_stream("libx264", rate=25, options={"crf": "12", "preset": "ultrafast"})
        film.width, film.height = size
        film.pix_fmt = "yuv444p" if width % 2 else "yuv420p"
        film.time_base = film.codec_context.time_base = Fraction(1, 1000)
        tracks = []
        for _ in sounds:
            tracks.append(output.add_stream(sound.get("codec", "aac"), rate=rate, layout="mono"))
            tracks[-1].disposition = Disposition(0)
        if tracks:
            tracks[-1].disposition = Disposition.default
        for track, samples in zip(tracks, sounds):
            for k in range(0, len(samples), 1024):
                block = samples[None, k : k + 1024].astype(np.float32)
                frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                frame.sample_rate = rate
                frame.pts = k + round(sound.get("at", 0) * rate)
                frame.time_base = Fraction(1, rate)
                output.mux(track.encode(frame))
            output.mux(track.encode(None))
        picture = np.full((height, width, 3), GREY, np.uint8)
        picture[: height // 3, : width // 4] = WHITE
        for tick in ticks:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = tick
            frame.time_base = Fraction(1, 1000)
            output.mux(film.encode(frame))
        output.mux(film.encode(None))
    return path


def frames_of(path):
    """[(seconds, picture [H, W, 3])]"""
    with av.open(str(path)) as container:
        decoded = container.decode(video=0)
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in decoded]


def sound_of(path):
    """(first time, samples in ±1, rate)"""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=frames[0].sample_rate)
    time = frames[0].time
    parts = [part for frame in [*frames, None] for part in resampler.resample(frame)]
    samples = np.concatenate([part.to_ndarray()[0] for part in parts])
    return time, samples, parts[0].sample_rate


class Rigged:
    """A learner whose model masks rows 8 to 15 and columns 16 to 23 of its 32 x 32.

    It remembers what it was shown and heard.
    """

    device = "cpu"
    config = SimpleNamespace(image_size=32)
    autocast = contextlib.nullcontext

    def __init__(self):
        self.seconds = []
        self.context = []
        self.shown = []

    def model(self, batch):
        frames, second = batch["frames"], batch["second"]
        assert frames.shape[1:] == (3, 32, 32) and frames.dtype == torch.uint8
        assert len(frames) == len(second) == 1 and not batch["clip"].any()
        self.seconds += second.tolist()
        self.context += [batch["context"][0]] * len(second)
        self.shown += list(frames)
        logits = torch.full((len(frames), 32, 32), -4.0)
        logits[:, 8:16, 16:24] = 4.0
        return {"masks": logits}


def draw(source, out, sound=None):
    """(what film returns, the rigged learner)"""
    rigged = Rigged()
    with contextlib.ExitStack() as files:
        tracks = video.Tracks(source, sound, files)
        return video.film(rigged, LogMel(), tracks, out), rigged


UNEVEN = [0, 33, 100, 133, 700, 1000, 1001, 2500, 2980]
ROUND = {
    "plain": ("a.mp4", {"sounds": [tone(3)]}),
    "odd size, uncompressed": (
        "a.mkv",
        {"size": (63, 47), "sounds": [tone(3)], "codec": "pcm_s16le"},
    ),
    "uneven frames, late sound": ("a.mkv", {"ticks": UNEVEN, "sounds": [tone(2.5)], "at": 0.5}),
    "a start at 1 s": ("a.mkv", {"ticks": range(1000, 3000, 40), "sounds": [tone(2)], "at": 1}),
}


@pytest.mark.parametrize("kind", ROUND)
def test_frames_times_and_sound_are_kept(tmp_path, kind):
    name, options = ROUND[kind]
    source, out = make(tmp_path / name, **options), tmp_path / "new" / "out.mp4"
    done, _ = draw(source, out)
    before, after = frames_of(source), frames_of(out)
    first = before[0][0]
    assert done["frames"] == len(after) == len(before)
    np.testing.assert_allclose([t for t, _ in after], [t - first for t, _ in before], atol=1e-4)
    height, width = before[0][1].shape[:2]
    assert after[0][1].shape == (height + height % 2, width + width % 2, 3)
    (start, sound, rate), (new_start, new_sound, new_rate) = sound_of(source), sound_of(out)
    assert new_rate == video.PLAYED and new_start == pytest.approx(0, abs=0.03)
    assert len(new_sound) / new_rate == pytest.approx(done["seconds"], abs=0.05)
    length = min(len(sound) / rate, done["seconds"] - 0.1)
    seconds = np.arange(0.1, length - 0.1, 1e-4)  # of the source's sound
    was = np.interp(seconds, np.arange(len(sound)) / rate, sound)
    place = seconds + start - first - new_start
    now = np.interp(place, np.arange(len(new_sound)) / new_rate, new_sound)
    assert np.corrcoef(was, now)[0, 1] > 0.98  # the same, and in its place
    assert done["seconds"] == pytest.approx(before[-1][0] - first + 0.04, abs=0.07)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("size", [(96, 64), (95, 63)])
def test_the_mask_lands_on_the_pixels_it_is_about(tmp_path, size):
    width, height = size
    source = make(tmp_path / "a.mp4", TEN, size, sounds=[tone(1)])
    done, _ = draw(source, tmp_path / "o.mp4")
    picture = frames_of(tmp_path / "o.mp4")[5][1][:height, :width].astype(int)
    top, bottom, left, right = (round(x) for x in (height / 4, height / 2, width / 2, 0.75 * width))
    inside = np.zeros((height, width), bool)
    near = np.zeros((height, width), bool)
    # chroma is at half the resolution, and lines are drawn at the edge
    inside[top + 5 : bottom - 5, left + 5 : right - 5] = True
    near[top - 5 : bottom + 5, left - 5 : right + 5] = True
    expected = (1 - masks.OPACITY) * GREY + masks.OPACITY * np.array(masks.FILL)
    assert np.abs(picture[inside] - expected).max() <= 12
    corner = np.zeros_like(near)
    corner[: height // 3 + 3, : width // 4 + 3] = True
    assert np.abs(picture - GREY)[~near & ~corner].max() <= 12
    assert np.abs(picture - WHITE)[2 : height // 3 - 3, 2 : width // 4 - 3].max() <= 12
    edge = picture[top - 4 : top + 4, (left + right) // 2]
    assert edge.min() < 50 and edge.max() > 170  # a dark line and a light one
    assert done["area"] == pytest.approx(1 / 16, rel=0.1)


def test_the_drawing_leaves_the_rest_alone():
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    mask, white, black = (np.zeros((40, 50), bool) for _ in range(3))
    mask[10:20, 15:30] = white[9:21, 14:31] = black[8:22, 13:32] = True
    drawn = masks.overlaid(picture, mask)
    assert (drawn[~black] == picture[~black]).all()
    assert (drawn[white & ~mask] == 255).all() and (drawn[black & ~white] == 0).all()
    blend = (1 - masks.OPACITY) * picture[mask] + masks.OPACITY * np.array(masks.FILL)
    assert (drawn[mask] == blend.round()).all()
    assert (masks.overlaid(picture, np.zeros_like(mask)) == picture).all()


def test_a_phones_video_is_shown_upright(tmp_path):
    """The display matrix of a quarter turn clockwise, written into the file by hand.

    Right goes down, so top left goes top right.
    """
    source, out = make(tmp_path / "a.mp4", TEN, sounds=[tone(0.5)]), tmp_path / "o.mp4"
    content = bytearray(source.read_bytes())
    matrix = content.index(b"tkhd") + 44
    assert content[matrix : matrix + 4] == b"\0\1\0\0"
    content[matrix : matrix + 20] = np.array([0, 1 << 16, 0, -(1 << 16), 0], ">i4").tobytes()
    source.write_bytes(content)
    _, rigged = draw(source, out)
    picture = frames_of(out)[3][1]
    assert picture.shape == (64, 48, 3)
    assert picture[3, -4].min() > 200 > 120 > max(picture[3, 3].max(), picture[-4, -4].max())
    assert rigged.shown[0][0, 1, -2] > 200 > 120 > rigged.shown[0][0, 1, 1]


def test_a_second_is_conditioned_on_its_own_sound_in_clips_as_in_training(tmp_path):
    """7.4 s: a clip of five seconds, and one of 2.4 whose last patch is repeated."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(7.4 * RATE))
    ticks = range(0, 9000, 200)
    source = make(tmp_path / "a.mkv", ticks, sounds=[noise], rate=RATE, codec="pcm_s16le")
    _, rigged = draw(source, tmp_path / "o.mp4")
    assert rigged.seconds == [t // 1000 % T for t in ticks]
    wave = torch.from_numpy(sound_of(source)[1])
    heard = [encode_wave(LogMel(), clip, T)[0] for clip in (wave[: 5 * RATE], wave[5 * RATE :])]
    for t, context in zip(ticks, rigged.context):
        assert (context.numpy() == heard[t // 5000]).all()
    assert (heard[1][2:] == heard[1][1]).all() and (heard[0][4] != heard[0][3]).any()


@pytest.mark.parametrize("ticks", [range(0, 16000, 4000), range(0, 40000, 20000), [0]])
def test_less_than_a_frame_a_second(tmp_path, ticks):
    source = make(tmp_path / "a.mkv", ticks, sounds=[tone(13)])
    done, rigged = draw(source, tmp_path / "o.mkv")
    assert rigged.seconds == [t // 1000 % T for t in ticks] and done["frames"] == len(ticks)
    assert [round(1000 * t) for t, _ in frames_of(tmp_path / "o.mkv")] == list(ticks)
    clip = [t // 5000 for t in ticks]
    for k in range(1, len(ticks)):  # what is heard changes with the clip alone
        same = (rigged.context[k] == rigged.context[k - 1]).all()
        assert same == (clip[k] == clip[k - 1])


def test_of_several_sound_tracks_the_default_one_is_heard_and_played(tmp_path):
    sounds = [tone(2, hertz=300), tone(2, hertz=2000)]
    source = make(tmp_path / "a.mkv", range(0, 2000, 100), sounds=sounds)
    _, rigged = draw(source, tmp_path / "o.mkv")
    _, sound, rate = sound_of(tmp_path / "o.mkv")
    loudest = np.abs(np.fft.rfft(sound[4000 : 4000 + rate])).argmax()
    assert loudest == pytest.approx(2000, abs=20)
    alone = make(tmp_path / "b.mkv", TEN, sounds=sounds[1:])
    assert (draw(alone, tmp_path / "o.mkv")[1].context[0] == rigged.context[0]).all()


def test_the_sound_is_what_training_reads_whatever_its_form(tmp_path):
    """Stereo at 44.1 kHz, read piece by piece, is the sound that read_wave gives as a whole.

    Before its start and after its end there is silence.
    """
    both = np.random.default_rng(0).uniform(-0.5, 0.5, (44100 * 12, 2))
    soundfile.write(tmp_path / "a.wav", both, 44100, subtype="PCM_24")
    whole = read_wave(tmp_path / "a.wav").numpy()
    source = make(tmp_path / "v.mp4", ticks=[0])

    def clips(start, count):
        with contextlib.ExitStack() as files:
            tracks = video.Tracks(source, tmp_path / "a.wav", files)
            heard = video.clips_of(tracks.sounds[0][0], Fraction(start), RATE)
            return [next(heard) for _ in range(count)]

    found = clips(0, 4)
    assert [len(clip) for clip in found] == [5 * RATE, 5 * RATE, 2 * RATE, 0]
    early, late = clips("-1/2", 1)[0], clips("1/2", 1)[0]
    found = np.concatenate(found)
    # in its first millisecond a resampler depends on the length of the first block
    np.testing.assert_allclose(found[20:], whole[20:], atol=1e-6)
    assert not early[: RATE // 2 - 20].any()
    np.testing.assert_array_equal(early[RATE // 2 :], found[: 4 * RATE + RATE // 2])
    np.testing.assert_array_equal(late, found[RATE // 2 : 5 * RATE + RATE // 2])


def test_another_sound_is_heard_and_played(tmp_path):
    source = make(tmp_path / "a.mp4", sounds=[tone(3)])
    for name, seconds in (("long.wav", 9), ("short.wav", 1)):
        soundfile.write(tmp_path / name, tone(seconds, 16000, 2000), 16000)
        _, rigged = draw(source, tmp_path / "o.mp4", tmp_path / name)
        _, sound, rate = sound_of(tmp_path / "o.mp4")
        assert len(sound) / rate == pytest.approx(3, abs=0.05)  # as long as the video
        heard = np.flatnonzero(np.abs(sound) > 0.01)[-1] / rate
        assert heard == pytest.approx(min(seconds, 3), abs=0.1)
        loudest = np.abs(np.fft.rfft(sound[12000:36000])).argmax() * rate / 24000
        assert loudest == pytest.approx(2000, abs=20) and len(frames_of(tmp_path / "o.mp4")) == 75
        expected = encode_wave(LogMel(), read_wave(tmp_path / name)[: 5 * RATE], T)[0]
        np.testing.assert_allclose(rigged.context[0], expected, atol=2e-3)
    mute = make(tmp_path / "mute.mp4", TEN)
    assert draw(mute, tmp_path / "o.mp4", source)[0]["frames"] == 10  # the sound of another video


def test_no_more_than_a_clip_is_decoded_ahead(tmp_path, monkeypatch):
    """The reader of the frames is at what is drawn, those of the sound at most a clip ahead."""
    source = make(tmp_path / "a.mp4", range(0, 16000, 100), sounds=[tone(16)])
    read = {"video": 0.0, "audio": 0.0}
    ahead = {name: [] for name in read}
    decoded, overlaid = video.decoded, video.overlaid

    def watch(stream):
        for frame in decoded(stream):
            read[stream.type] = float(frame.pts * frame.time_base)
            yield frame

    def look(*words):
        for name in read:
            ahead[name].append(read[name] - 0.1 * len(ahead[name]))
        return overlaid(*words)

    monkeypatch.setattr(video, "decoded", watch)
    monkeypatch.setattr(video, "overlaid", look)
    draw(source, tmp_path / "o.mp4")
    assert len(ahead["video"]) == 160 and max(ahead["video"]) < 0.01
    assert 0 < max(ahead["audio"]) <= T + 0.1


@pytest.mark.parametrize("broken", ["model", "video", "sound"])
def test_nothing_is_left_of_an_overlay_that_failed_midway(tmp_path, monkeypatch, broken):
    source, out = make(tmp_path / "a.mp4", sounds=[tone(3)]), tmp_path / "o.mp4"
    out.write_bytes(b"of old")

    def fails(self, batch):
        raise AtlasError("out of luck")

    def breaks(frames):
        for k, frame in enumerate(frames):
            if k == 20:
                raise av.InvalidDataError(1094995529, "out of luck")
            yield frame

    if broken == "model":
        monkeypatch.setattr(Rigged, "model", fails)
    else:
        plain = video.decoded
        kind = {"video": "video", "sound": "audio"}[broken]

        def decoded(stream):
            with video.reading(stream):
                frames = plain(stream)
                yield from breaks(frames) if stream.type == kind else frames

        monkeypatch.setattr(video, "decoded", decoded)
    with pytest.raises(AtlasError, match="out of luck"):
        draw(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "o.mp4"]
    assert out.read_bytes() == b"of old"


def test_a_sound_that_is_no_number(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    source = make(tmp_path / "v.mp4", TEN)
    with pytest.raises(AtlasError, match="a.wav cannot be read .*not finite"):
        draw(source, tmp_path / "o.mp4", tmp_path / "a.wav")
    assert not (tmp_path / "o.mp4").exists()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder of files that are no video with sound."""
    where = tmp_path_factory.mktemp("wrong")
    make(where / "mute.mp4", TEN)
    whole = make(where / "whole.mp4", TEN, sounds=[tone(0.5)]).read_bytes()
    (where / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (where / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (where / "file").write_text("")
    soundfile.write(where / "sound.wav", tone(1), 44100)
    return where


@pytest.mark.parametrize(
    "words, said",
    [
        ("--video none.mp4 --out o.mp4", "none.mp4 cannot be read .*No such file"),
        ("--video mute.mp4 --out o.mp4", "holds no sound; .*--audio"),
        ("--video sound.wav --out o.mp4", "holds no video"),
        ("--video mute.mp4 --out o.mp4 --audio mute.mp4", "holds no sound"),
        ("--video cut.mp4 --out o.mp4", "cut.mp4 cannot be read"),
        ("--video noise.mp4 --out o.mp4", "noise.mp4 cannot be read"),
        ("--video mute.mp4 --out o.mp4 --audio noise.mp4", "noise.mp4 cannot be read"),
        ("--video mute.mp4 --out o.mp4 --audio none.wav", "none.wav cannot be read .*No such file"),
        ("--video whole.mp4 --out whole.mp4", "is the file to read"),
        ("--video whole.mp4 --out o.gif", "name one"),
        ("--video whole.mp4", "--out"),
        ("--video whole.mp4 --out o.mp4 --rescore", "for one run"),
        ("--audio sound.wav", "go with --video"),
        ("--task 1", "go with --video"),
        ("--video whole.mp4 --out o.mp4", "no results.json"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(wrong, capfd, words, said):
    words = [str(wrong / word) if "." in word else word for word in words.split()]
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
    assert not [path for path in wrong.iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def til(config, tmp_path_factory):
    """The folder of a tiny TIL run with a classification branch, and no data beside it."""
    where = tmp_path_factory.mktemp("til")
    own = {"protocol": "til", "method": "finetune", "classify": True, "base": 3}
    train.main(replace(config, **own, out_dir=str(where), name="run"))
    path = where / "run" / "config.yaml"
    path.write_text(path.read_text().replace(f"data_root: {config.data_root}", "data_root: gone"))
    return where / "run"


def test_a_run_masks_what_its_own_model_masks(til, tmp_path, capsys):
    """The masks are the model's on the clip; the newest head's, or that of --task."""
    sound = {"rate": RATE, "codec": "pcm_s16le"}
    source = make(tmp_path / "a.mkv", range(0, 5000, 500), sounds=[tone(5, RATE)], **sound)
    seen = []
    plain = video.mask_of

    def recording(learner, *words):
        seen.append((learner.model.decoder.active, words, plain(learner, *words)))
        return seen[-1][-1]

    with patch.object(video, "mask_of", recording):
        for words in ((), ("--task", "1")):
            given = [str(til), "--video", str(source), "--out", str(tmp_path / "o.mp4"), *words]
            with patch.object(sys, "argv", ["eval.py", *given]):
                assert script.main(script.parse()) == 0
    said = capsys.readouterr().out
    assert "o.mp4: 10 frames, 4.5 s, mean masked area" in said and "after task 2" in said
    assert [head for head, _, _ in seen] == [1] * 10 + [0] * 10
    learner, _, learned = video.open_trained(til, 1)
    assert learned == 2
    _, (picture, second, (context, tokens)), mask = seen[13]
    assert second == 1
    batch = {
        "frames": torch.tensor(video.resized(picture, 32)).permute(2, 0, 1)[None],
        "clip": torch.tensor([0]),
        "second": torch.tensor([second]),
        "context": torch.from_numpy(context).float()[None],
        "tokens": torch.from_numpy(tokens).float()[None],
    }
    with torch.inference_mode():
        logits = learner.model(batch)["masks"][:, None]
    large = torch.nn.functional.interpolate(logits, (48, 64), mode="bilinear")[0, 0]
    sure = large.abs() > 1e-4
    assert (torch.from_numpy(mask) == (large > 0))[sure].all()
    with pytest.raises(AtlasError, match="heads for the tasks 1 to 2"):
        video.open_trained(til, 3)
