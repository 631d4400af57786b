"""prepare_data.py extract, on videos whose pictures tell their number and whose sound its time."""

import multiprocessing
import time
import types
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from av.stream import Disposition
from conftest import one_line, run

from atlas.clips import ms3_clip, read_frame, read_ms3, read_s4, s4_clip
from atlas.errors import AtlasError
from atlas.prepare.check import check
from atlas.prepare.extract import best_stream, extract, frame_numbers, read_video

KEPT = {
    25: [23, 48, 73, 98, 123],
    30: [28, 58, 88, 118, 148],
    Fraction(30000, 1001): [28, 58, 88, 118, 148],
    Fraction(24000, 1001): [22, 46, 70, 94, 118],
}


def picture(number):
    """`number` in eight bits, a black or white square of 16 pixels each, in two rows; 32 x 64."""
    bits = [(number >> b) & 1 for b in range(8)]
    grey = np.kron(np.array(bits, np.uint8).reshape(2, 4) * 255, np.ones((16, 16), np.uint8))
    return np.repeat(grey[..., None], 3, 2)


def number_in(frame):
    """What picture() wrote, from an image of any size."""
    cells = (
        frame.astype(float)
        .mean(2)
        .reshape(2, frame.shape[0] // 2, 4, frame.shape[1] // 4)
        .mean((1, 3))
    )
    return int(sum((value > 127) << b for b, value in enumerate(cells.ravel())))


def tone(seconds, hertz, base=500):
    """A tone of 1, 2, 3, ... times `base` Hz in its first, second, third, ... second."""
    clock = np.arange(round(seconds * hertz)) / hertz
    return (0.5 * np.sin(2 * np.pi * base * (1 + np.floor(clock)) * clock)).astype(np.float32)


def write_pictures(file, stream, count, rate, drop):
    for k in range(count):
        if k not in drop:
            frame = av.VideoFrame.from_ndarray(picture(k), format="rgb24")
            frame.pts, frame.time_base = k, 1 / Fraction(rate)
            file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def write_sound(file, stream, channels, hertz, late):
    """channels [C, samples], that begin `late` seconds after the pictures."""
    for begin in range(0, channels.shape[1], 1024):
        part = np.ascontiguousarray(channels[:, begin : begin + 1024])
        layout = "stereo" if len(channels) == 2 else "mono"
        frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
        frame.sample_rate, frame.time_base = hertz, Fraction(1, hertz)
        frame.pts = begin + round(late * hertz)
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def make(
    path,
    rate=25,
    seconds=5.0,
    sound=5.0,
    hertz=44100,
    right=0.0,
    drop=(),
    late=0.0,
    turn=0,
    tracks=1,
):
    """An mp4 whose k-th frame shows k. Its left channel is a tone, its right one `right` times that
    (None: mono). Of several `tracks`, the last is the default; track n has n times the pitch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as file:
        if seconds:
            video = file.add_stream("mpeg4", rate=rate)
            video.width, video.height, video.pix_fmt, video.bit_rate = 64, 32, "yuv420p", 2_000_000
            if turn:
                video.set_display_rotation(turn)
        sounds = []
        for number in range(tracks if sound else 0):
            layout = "mono" if right is None else "stereo"
            sounds.append(file.add_stream("aac", rate=hertz, layout=layout))
            is_default = number == tracks - 1
            sounds[-1].disposition = Disposition.default if is_default else Disposition(0)
        if seconds:
            write_pictures(file, video, round(seconds * rate), rate, drop)
        for number, stream in enumerate(sounds, 1):
            left = tone(sound, hertz, 500 * number)
            channels = np.stack([left] if right is None else [left, right * left])
            write_sound(file, stream, channels, hertz, late)
    return path


def loudest(wave, rate=16000):
    """The strongest frequency, in Hz, in the middle half of each second of a sound."""
    seconds = wave[: len(wave) // rate * rate].reshape(-1, rate)[:, rate // 4 : 3 * rate // 4]
    return (np.abs(np.fft.rfft(seconds)).argmax(1) * 2).tolist()


def table(folder, names, dataset="s4"):
    rows = (
        ["name,start,category,split", *(f"{n},0,dog_barking,train" for n in names)]
        if dataset == "s4"
        else ["video_id,split", *(f"{n},test" for n in names)]
    )
    path = folder / f"{dataset}.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def contents(root):
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in root.rglob("*")
        if p.is_file() and p.name != ".extract.lock"
    }


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make(tmp_path_factory.mktemp("videos") / "good.mp4")


@pytest.mark.parametrize("rate", KEPT)
def test_the_16th_of_each_seconds_16_samples_is_kept(tmp_path, rate):
    assert frame_numbers(float(rate)) == KEPT[rate]
    frames, wave = read_video(make(tmp_path / "a.mp4", rate))
    assert [number_in(frame) for frame in frames] == KEPT[rate]
    assert frames[0].shape == (32, 64, 3)


@pytest.mark.parametrize(
    "hertz, right, level", [(44100, 0.0, 0.25), (48000, None, 0.5), (16000, None, 0.5)]
)
def test_the_sound_is_five_seconds_of_mono_at_16_khz_and_in_time(tmp_path, hertz, right, level):
    path = make(tmp_path / "a.mp4", sound=6, seconds=6, hertz=hertz, right=right)
    wave = read_video(path)[1]
    assert wave.shape == (80000,) and loudest(wave) == [500, 1000, 1500, 2000, 2500]
    wrong = np.abs(wave - level * 2 * tone(5, 16000)).reshape(5, 16000)[:, 4000:12000]
    assert wrong.mean(1).max() < 0.1 * level  # AAC's own; a sample's shift makes .6 at 2500 Hz


def test_a_sound_that_begins_after_the_pictures_stays_in_time(tmp_path):
    wave = read_video(make(tmp_path / "a.mp4", late=1.0, sound=5))[1]
    assert (
        len(wave) == 80000
        and np.abs(wave[:15000]).max() < 1e-3
        and loudest(wave)[1:] == [500, 1000, 1500, 2000]
    )


def test_the_default_track_is_heard_and_antiphase_is_bad(tmp_path):
    wave = read_video(make(tmp_path / "a.mp4", tracks=2))[1]
    assert loudest(wave) == [1000, 2000, 3000, 4000, 5000]
    with pytest.raises(AtlasError, match="channels of the sound track cancel"):
        read_video(make(tmp_path / "b.mp4", right=-1.0))


def test_the_stream_of_a_video_is_the_default_one():
    def stream(kind, disposition):
        return types.SimpleNamespace(type=kind, disposition=disposition)

    first, chosen = stream("audio", Disposition(0)), stream("audio", Disposition.default)
    cover = stream("video", Disposition.attached_pic | Disposition.default)
    film = stream("video", Disposition(0))
    file = types.SimpleNamespace(streams=[cover, first, chosen, film])
    assert best_stream(file, "audio") is chosen and best_stream(file, "video") is film
    assert best_stream(types.SimpleNamespace(streams=[first, cover]), "audio") is first
    assert best_stream(types.SimpleNamespace(streams=[first, cover]), "video") is None


@pytest.mark.parametrize(
    "rate, kept",
    [
        (Fraction(1), [0, 1, 2, 3, 4]),
        (Fraction(1, 2), [0, 0, 1, 1, 2]),
        (Fraction(1, 5), [0, 0, 0, 0, 0]),
        (Fraction(3, 2), [1, 2, 4, 5, 7]),
    ],
)
def test_slow_videos_keep_their_time(tmp_path, rate, kept):
    """What is on display at 15/16 of each second, also where that is one picture for all."""
    frames = read_video(make(tmp_path / "a.mp4", rate, seconds=6))[0]
    assert frame_numbers(float(rate)) == kept == [number_in(frame) for frame in frames]


def test_dropped_frames_do_not_shift_the_time_and_a_short_end_repeats_the_last_frame(tmp_path):
    frames = read_video(make(tmp_path / "a.mp4", drop={*range(30, 49), 73}))[0]
    assert [number_in(frame) for frame in frames] == [23, 29, 72, 98, 123]
    frames = read_video(make(tmp_path / "b.mp4", seconds=4.4))[0]
    assert [number_in(frame) for frame in frames] == [23, 48, 73, 98, 109]


def test_a_turned_video_is_turned_back(tmp_path):
    path = make(tmp_path / "a.mp4", turn=90)  # to be shown turned counter-clockwise
    frame = read_video(path)[0][0]
    assert frame.shape == (64, 32, 3) and number_in(np.rot90(frame, -1)) == 23


def test_the_tree_is_the_one_clips_reads(tmp_path, video):
    """Both places of a video, S4 and MS3, through the command."""
    folder = tmp_path / "v"
    for place in ("train/dog_barking/abc.mp4", "def_1.mp4"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(video.read_bytes())
    done = run(
        "prepare_data.py",
        "extract",
        "--videos",
        folder,
        "--csv",
        table(tmp_path, ["abc", "def_1"]),
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert "out: 2 clips extracted, 0 were there already, 0 are bad\n" in done.stdout
    clips = read_s4(tmp_path / "out")
    assert clips == [
        s4_clip(tmp_path / "out", name, "dog_barking", "train") for name in ("abc", "def_1")
    ]
    for clip in clips:
        assert (
            read_frame(clip.frames[0]).shape == (224, 224, 3)
            and [number_in(read_frame(p)) for p in clip.frames] == KEPT[25]
        )
        info = soundfile.info(clip.audio)
        assert (info.samplerate, info.channels, info.subtype, info.frames) == (
            16000,
            1,
            "PCM_16",
            80000,
        )
    extract(folder, tmp_path / "out", table(tmp_path, ["def_1"], "ms3"), "ms3")
    assert (
        read_ms3(tmp_path / "out") == [ms3_clip(tmp_path / "out", "def_1", "test")]
        and number_in(read_frame(read_ms3(tmp_path / "out")[0].frames[4])) == 123
    )
    assert {e.split()[-2:][0] + " " + e.split()[-1] for e in check(tmp_path / "out")[1]} == {
        "is missing"
    }  # the masks: nothing else is wrong


def test_finished_clips_are_kept_and_a_lost_file_is_made_again(tmp_path, video):
    folder, out = tmp_path / "v", tmp_path / "out"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.mp4").write_bytes(video.read_bytes())
    words = folder, out, table(tmp_path, "abc")
    assert extract(*words) == (3, 0, [])
    before, times = (
        contents(out),
        {p: p.stat().st_mtime_ns for p in out.rglob("*.*g") if "b_" not in p.name},
    )
    clip = read_s4(out)[1]
    for lost in (clip.frames[3], clip.audio):
        Path(lost).unlink()
        assert extract(*words) == (1, 2, [])
    assert contents(out) == before and all(p.stat().st_mtime_ns == t for p, t in times.items())
    assert extract(folder, out) == (0, 3, []) and contents(out) == before  # the tree's own CSV


def test_bad_videos_are_listed_and_skipped(tmp_path, video):
    folder = tmp_path / "v"
    folder.mkdir()
    content = video.read_bytes()
    (folder / "good.mp4").write_bytes(content)
    (folder / "junk.mp4").write_bytes(b"no video" * 100)
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "holed.mp4").write_bytes(
        content[:2000] + bytes(len(content) // 2) + content[2000 + len(content) // 2 :]
    )
    make(folder / "mute.mp4", sound=0)
    make(folder / "blind.mp4", seconds=0)
    make(folder / "short.mp4", seconds=3)
    make(folder / "hushed.mp4", sound=3)
    make(folder / "last.mp4", rate=30)
    names = ["good", "junk", "cut", "empty", "mute", "blind", "short", "hushed", "gone", "last"]
    words = [
        "prepare_data.py",
        "extract",
        "--videos",
        folder,
        "--csv",
        table(tmp_path, names),
    ]
    done = run(*words, "--out", tmp_path / "one")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.endswith("one: 2 clips extracted, 0 were there already, 8 are bad")
    lines = [line.removeprefix("bad: ").split(": ", 1) for line in lines]
    reasons = {Path(video).stem: why for video, why in lines}
    assert list(reasons) == [
        "junk",
        "cut",
        "empty",
        "mute",
        "blind",
        "short",
        "hushed",
        "gone",
    ]  # the table's order
    assert all("not readable" in reasons[name] for name in ("junk", "cut", "empty")), reasons
    assert (
        "no audio" in reasons["mute"]
        and "no video" in reasons["blind"]
        and reasons["gone"] == "missing"
    )
    assert "pictures end at 3.00 s" in reasons["short"] and "sound ends at 3.0" in reasons["hushed"]
    assert [clip.id for clip in read_s4(tmp_path / "one")] == ["good", "last"]

    make(folder / "short.mp4")  # repaired: the clip and its row come, the rest stays
    done = run(*words, "--out", tmp_path / "one")
    assert "1 clips extracted, 2 were there already" in done.stdout and {
        c.id for c in read_s4(tmp_path / "one")
    } == {"good", "last", "short"}
    try:  # a hole in the middle: a listed reason or five frames, never a traceback
        assert len(read_video(folder / "holed.mp4")[0]) == 5
    except AtlasError:
        pass


def test_a_column_mask_is_kept_and_tables_with_and_without_it_are_not_mixed(tmp_path, video):
    folder, out = tmp_path / "v", tmp_path / "out"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.mp4").write_bytes(video.read_bytes())
    (tmp_path / "mask.csv").write_text(
        "name,category,split,mask\na,dog_barking,train,drawn\nb,dog_barking,train,made\n"
    )
    extract(folder, out, tmp_path / "mask.csv")
    before = contents(out)
    assert [clip.mask for clip in read_s4(out)] == ["drawn", "made"]
    for words in ((), (table(tmp_path, "ab"),)):
        assert extract(folder, out, *words) == (0, 2, []) and contents(out) == before
    with pytest.raises(AtlasError, match="one has a column mask"):
        extract(folder, out, table(tmp_path, "abc"))
    assert contents(out) == before


def test_a_kill_leaves_nothing_half_and_the_next_run_finishes(tmp_path, video):
    folder = tmp_path / "v"
    folder.mkdir()
    names = [f"v{k:02d}" for k in range(24)]
    for name in names:
        (folder / f"{name}.mp4").write_bytes(video.read_bytes())
    words = folder, tmp_path / "a", table(tmp_path, names)
    killed = multiprocessing.get_context("fork").Process(target=extract, args=words)
    killed.start()
    clips = [s4_clip(tmp_path / "a", name, "dog_barking", "train") for name in names]
    while not Path(clips[3].audio).is_file():
        assert killed.is_alive()
        time.sleep(0.005)
    killed.kill()
    killed.join()

    def there():
        found = (tmp_path / "a" / "Single-source").rglob("[!.]*.*")
        return {p: p.read_bytes() for p in found if p.is_file()}

    left = there()
    assert 0 < len(left) < 6 * len(names)
    extracted, kept, _ = extract(*words)
    assert kept > 0 and extracted + kept == len(names)
    extract(folder, tmp_path / "b", table(tmp_path, names))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert all(there()[path] == content for path, content in left.items())


def test_wrong_words_are_one_line(tmp_path, video):
    words = ["prepare_data.py", "extract", "--videos", video.parent, "--out", tmp_path / "out"]
    one_line(run(*words), "s4_meta_data.csv", "--csv")
    for text, what in (
        ("name,split\na,train\n", "category"),
        ("name,start,category,split\n../../a,0,dog_barking,train\n", "plain file name"),
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(AtlasError, match=what):
            extract(video.parent, tmp_path / "out", tmp_path / "x.csv")
    with pytest.raises(AtlasError, match="no folder"):
        extract(tmp_path / "nowhere", tmp_path / "out", table(tmp_path, ["a"]))
