"""Open sets: no source crosses splits, truth is every pixel of what is heard, the same seed the
same bytes. The stock is of flat rectangles, each in its class's colour.
"""

import json
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import SHARED, run
from PIL import Image
from test_stock import BACKGROUND, COLOUR, Stock, flat_stock

from atlas.clips import CSVS, SPLITS, T, read_ms3, read_s4, read_table
from atlas.errors import AtlasError
from atlas.prepare import compose
from atlas.prepare.check import check
from atlas.prepare.compose import Recipe, divide, load_sound, make_open_set
from atlas.prepare.tree import draw_schedule, gate

S4 = Recipe(seed=3, clips=8, size=64)
MS3 = Recipe("ms3", seed=3, clips=60, size=64)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return flat_stock(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def s4(stock, tmp_path_factory):
    root = tmp_path_factory.mktemp("s4") / "set"
    return root, make_open_set(stock, root, S4), read_s4(root)


@pytest.fixture(scope="module")
def ms3(stock, tmp_path_factory):
    root = tmp_path_factory.mktemp("ms3") / "set"
    return root, make_open_set(stock, root, MS3), read_ms3(root)


@pytest.fixture(params=["s4", "ms3"])
def made(request):
    return request.getfixturevalue(request.param)


def bytes_of(root):
    files = sorted(path for path in Path(root).rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def read(path):
    return np.array(Image.open(path))


def test_the_tree_is_avsbenchs_and_clean(made):
    root, report, clips = made
    assert json.loads((root / "compose.json").read_text()) == report
    assert [clip.id for clip in clips] == [entry["id"] for entry in report["clips"]]
    _, errors, warnings = check(root)
    assert not errors and not warnings
    for clip in clips:
        assert all(read(path).shape == (64, 64, 3) for path in clip.frames)
        assert all(set(np.unique(read(path))) <= {0, 255} for path in clip.masks if path)


def test_truth_is_every_pixel_of_what_is_heard(made):
    root, report, clips = made
    colours = np.array([*COLOUR.values(), BACKGROUND])
    for clip, entry in zip(clips, report["clips"]):
        for t, (frame, mask) in enumerate(zip(clip.frames, clip.masks)):
            if mask is None:
                continue
            frame, mask = read(frame).astype(int), read(mask) > 0
            distance = np.linalg.norm(frame[:, :, None] - colours, axis=-1)
            sure = distance.min(-1) < 25  # not a blend of two colours at an edge
            now = [p["class"] for p in entry["pictures"] if p["schedule"][t]]
            heard = np.isin(distance.argmin(-1), [list(COLOUR).index(name) for name in now])
            assert sure.mean() > 0.8 and np.array_equal(mask[sure], heard[sure])
            for picture in entry["pictures"]:
                column = mask[:, slice(*picture["columns"])]
                assert column.any() == bool(picture["schedule"][t])


def test_no_source_is_in_two_splits(made):
    _, report, clips = made
    for kind in ("source", "recording_source"):
        splits = defaultdict(set)
        for entry in report["clips"]:
            for picture in entry["pictures"]:
                splits[picture[kind]].add(entry["split"])
        splits.pop(None, None)
        assert splits and all(len(found) == 1 for found in splits.values())
    sources = {clip.source: entry["source"] for clip, entry in zip(clips, report["clips"])}
    assert len(set(sources.values())) == len(sources)  # a clip's name tells its source
    names = {p["source"] for entry in report["clips"] for p in entry["pictures"]}
    assert "walk" in names and names & {"both0", "both1", "both2"}


def test_a_silent_picture_never_contains_a_heard_class(made):
    _, report, _ = made
    both = 0
    for entry in report["clips"]:
        classes = {p["class"] for p in entry["pictures"]}
        both += any("both" in p["picture"] for p in entry["pictures"])
        for picture in entry["pictures"]:
            others = set(entry["heard"]) - {picture["class"]}
            assert not ("both" in picture["picture"] and others & {"dog", "cow"})
            assert (picture["recording"] is not None) == (picture["class"] in entry["heard"])
        assert len(classes) == len(entry["pictures"]) >= 2
    assert both


def test_few_sources_make_few_test_clips(s4, ms3):
    for _, report, _ in (s4, ms3):
        for name, splits in report["heard"].items():
            for split in ("val", "test"):
                about = [e for e in report["clips"] if e["split"] == split]
                about = [e for e in about if e["heard"][0] == name]
                sources = Counter(entry["source"] for entry in about)
                assert 1 <= len(about) <= 2 * splits[split]["picture_sources"]
                assert report is not s4[1] or max(sources.values()) <= 2
                assert 1 <= splits[split]["picture_sources"] <= splits[split]["clips"]
    train = [entry for entry in s4[1]["clips"] if entry["split"] == "train"]
    assert Counter(e["heard"][0] for e in train) == {"dog": 8, "cat": 8, "cow": 8}
    train = [entry for entry in ms3[1]["clips"] if entry["split"] == "train"]
    assert Counter(e["heard"][0] for e in train) == {"dog": 20, "cat": 20, "cow": 20}


def test_what_is_heard_is_what_has_enough(s4):
    report = s4[1]
    assert set(report["heard"]) == {"dog", "cat", "cow"}
    silent = Counter()
    for entry in report["clips"]:
        silent.update(p["class"] for p in entry["pictures"] if not p["recording"])
    assert 0 < silent["sofa"] + silent["bird"] < silent["dog"] + silent["cat"] + silent["cow"]


def test_people_drew_what_is_called_drawn(s4, ms3):
    for _, report, _ in (s4, ms3):
        for entry in report["clips"]:
            heard = [p for p in entry["pictures"] if p["recording"]]
            assert (entry["mask"] == "drawn") == all(p["mask"] == "drawn" for p in heard)
        assert {entry["mask"] for entry in report["clips"]} == {"drawn", "made"}


def test_the_table_says_whose_masks_they_are(made):
    root, report, clips = made
    table = Path(root, CSVS["s4" if clips[0].category else "ms3"])
    columns = ("split", "mask")
    assert [row["mask"] for row in read_table(table, columns)] == [
        e["mask"] for e in report["clips"]
    ]
    shown = {entry["id"][:11]: entry["source"] for entry in report["clips"]}
    assert all(shown[entry["id"][:11]] == entry["source"] for entry in report["clips"])
    assert len(set(shown.values())) == len(shown)


def test_the_seed_decides_everything(stock, s4, tmp_path):
    make_open_set(stock, tmp_path / "again", S4)
    assert bytes_of(tmp_path / "again") == bytes_of(s4[0])
    for name in ("one", "two"):
        make_open_set(stock, tmp_path / name, replace(MS3, clips=4))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    splits = []
    for seed in (3, 4):
        pools = compose.gather(stock, replace(S4, seed=seed))
        splits.append({picture.source for picture in pools["test"].pictures})
    assert splits[0] != splits[1]


def test_loudness_and_place_do_not_tell(s4):
    _, report, clips = s4
    first = 0
    for clip, entry in zip(clips, report["clips"]):
        wave, rate = soundfile.read(clip.audio)
        assert (len(wave), rate) == (80000, 16000)
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(0.05, rel=0.02)
        first += bool(entry["pictures"][0]["recording"])
    assert 0.25 < first / len(clips) < 0.75


def test_ms3_sounds_follow_their_schedules(ms3):
    _, report, clips = ms3
    seconds, shown, heard = [], Counter(), Counter()
    for clip, entry in zip(clips, report["clips"]):
        on = np.array([p["schedule"] for p in entry["pictures"]]).sum(0)  # [T] heard at once
        wave, _ = soundfile.read(clip.audio)
        loudness = np.sqrt(np.mean(wave.reshape(T, -1) ** 2, axis=1))
        assert on.any() and not loudness[on == 0].any() and (loudness[on > 0] > 0.04).all()
        assert np.allclose(loudness[on == 2], 0.05 * 2**0.5, rtol=0.1)
        seconds.append(on)
        shown[len(entry["pictures"])] += 1
        heard[len(entry["heard"])] += 1
    assert 0.03 < (np.array(seconds) == 0).mean() < 0.2
    assert shown.keys() == {2, 3} and heard.keys() == {1, 2}


def test_some_pictures_are_alone(stock, tmp_path):
    report = make_open_set(stock, tmp_path / "set", replace(S4, alone=0.5))
    alone = [len(entry["pictures"]) == 1 for entry in report["clips"]]
    assert 0.2 < np.mean(alone) < 0.8
    for entry in report["clips"]:
        if len(entry["pictures"]) == 1:
            assert entry["pictures"][0]["columns"] == [0, 64] and entry["pictures"][0]["recording"]


def test_classes_can_be_chosen(stock, tmp_path):
    report = make_open_set(stock, tmp_path / "set", replace(S4, classes=("cat", "cow")))
    assert set(report["heard"]) == {"cat", "cow"}


def test_a_source_of_several_classes_is_in_one_split():
    sources = {
        "dog": {f"d{k}" for k in range(20)} | {"both"},
        "cat": {f"c{k}" for k in range(9)} | {"both"},
        "sofa": {"s"},
    }
    for seed in range(10):
        split_of = divide(sources, ["cat", "dog"], np.random.default_rng(seed))
        assert split_of.keys() == set().union(*sources.values())
        for name in ("dog", "cat"):
            found = Counter(split_of[source] for source in sources[name])
            assert set(found) == set(SPLITS)
        assert 11 <= Counter(split_of[f"d{k}"] for k in range(20))["train"] <= 14
    with pytest.raises(AtlasError, match="cat shares its sources"):
        divide({"cat": {"a", "b"}}, ["cat"], np.random.default_rng(0))


def test_things_that_are_too_small_are_left_out(stock, tmp_path):
    small = Stock(tmp_path / "small")
    small.picture("dog", "speck", {"dog": (40, 40, 46, 46)})
    small.picture("dog", "dog")
    pictures, _ = compose.read_stock(small.root)
    assert [compose.large_enough(picture) for picture in pictures] == [True, False]


def test_sounds_are_trimmed_looped_and_levelled(tmp_path):
    tone = np.sin(2 * np.pi * 1000 * np.arange(44100) / 44100)
    wave = np.concatenate([np.zeros(44100), tone, np.zeros(3 * 44100)]) * 0.3
    soundfile.write(tmp_path / "bark.wav", np.stack([wave, wave], 1), 44100)
    wave = load_sound(tmp_path / "bark.wav")
    assert wave.shape == (80000,) and np.abs(np.fft.rfft(wave[16000:32000])).argmax() == 1000
    loudness = [np.sqrt(np.mean(second**2)) for second in wave.reshape(5, -1)]
    assert np.allclose(loudness, 0.05, rtol=0.05)
    soundfile.write(tmp_path / "none.wav", np.zeros(100), 16000)
    with pytest.raises(AtlasError, match="none.wav"):
        load_sound(tmp_path / "none.wav")


def test_a_sum_of_sounds_is_scaled_not_clipped(stock, tmp_path, monkeypatch):
    monkeypatch.setattr(compose, "load_sound", lambda path: np.full(80000, 0.9, np.float32))
    report = make_open_set(stock, tmp_path / "set", replace(MS3, clips=24))
    for clip, entry in zip(read_ms3(tmp_path / "set"), report["clips"]):
        on = np.array([p["schedule"] for p in entry["pictures"]]).sum(0)
        middle = soundfile.read(clip.audio)[0].reshape(T, -1)[:, 8000]
        assert np.allclose(middle, on * 0.5 if on.max() == 2 else on * 0.9, atol=1e-3)


def test_a_recordings_own_silence_is_silence():
    wave = np.concatenate([np.ones(16000), np.full(16000, 0.01), np.ones(16000), np.zeros(32000)])
    drawn = [draw_schedule(wave, 0.5, np.random.default_rng(seed)) for seed in range(50)]
    drawn = np.array(drawn)
    assert drawn.any(1).all() and drawn[:, [0, 2]].any(0).all() and not drawn[:, [1, 3, 4]].any()


def test_gates_fade_inside_their_seconds():
    loudness = gate(np.array([0, 1, 1, 0, 1], bool))
    assert loudness.shape == (80000,)
    assert not loudness[:16000].any() and not loudness[48000:64000].any()
    assert (loudness[16320:47680] == 1).all() and (loudness[64320:79680] == 1).all()  # 20 ms
    assert np.abs(np.diff(loudness, prepend=0, append=0)).max() < 0.004
    assert not gate(np.zeros(5, bool)).any()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"classes": ("dog", "dgo")}, "too few sources of pictures or of sounds, 3 needed: dgo"),
        ({"classes": ("bird",)}, "3 needed: bird"),
        ({"clips": 2}, "--clips of 4"),
        ({"size": 16}, "--size of 32"),
        ({"alone": 1.5}, "--alone of 0 to 1"),
        ({"seed": -1}, "--seed of 0"),
    ],
)
def test_bad_recipes_are_one_clear_line(stock, tmp_path, change, said):
    with pytest.raises(AtlasError, match=said) as error:
        make_open_set(stock, tmp_path / "set", replace(S4, **change))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_nothing_is_written_over_and_nothing_half_done_is_left(stock, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(AtlasError, match="there already"):
        make_open_set(stock, tmp_path / "set", S4)
    alone = Stock(tmp_path / "alone")
    for k in range(10):
        alone.picture("cat", f"cat{k}")
        alone.sound("cat", f"cat{k}", f"cat{k}")
    with pytest.raises(AtlasError, match="no picture without cat"):
        make_open_set(alone.tables(), tmp_path / "new", S4)
    (tmp_path / "alone" / "pictures" / "cat" / "cat3.png").write_bytes(b"no picture")
    with pytest.raises(AtlasError, match="cat3.png"):
        make_open_set(alone.root, tmp_path / "new", replace(S4, alone=1.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "set"]


def test_it_is_a_command(stock, tmp_path):
    words = ["--stock", stock, "--out", tmp_path / "open", "--dataset", "ms3", "--clips", 6]
    done = run("prepare_data.py", "compose", *words, "--size", 32, "--alone", 0.5)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "open" / "compose.json").read_text())
    assert f"{len(report['clips'])} clips" in done.stdout and "cat" in done.stdout
    assert report["recipe"]["alone"] == 0.5


@pytest.mark.skipif(not (SHARED / "stock").is_dir(), reason="no real stock beside the project")
def test_the_real_stock_has_eighteen_classes():
    pools = compose.gather(SHARED / "stock", Recipe(seed=100))
    assert len(pools["test"].heard) == 18 and not {"boat", "piano"} & set(pools["test"].heard)
    for split, least in (("train", 6), ("val", 2), ("test", 3)):
        pool = pools[split]
        for items in (pool.pictures, pool.sounds):
            sources = compose.sources_of(items)
            assert min(len(sources[name]) for name in pool.heard) >= least
        plan = Counter(pool.plan(split, Recipe()))
        assert set(plan) == set(pool.heard) and max(plan.values()) <= 40
