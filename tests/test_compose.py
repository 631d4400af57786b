"""Open AVS sets: sources never cross splits, truth is every pixel of what is heard, silent pictures have none of it."""

import csv
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import run
from PIL import Image
from test_scan import BACKGROUND, COLOUR, VOID, flat_davis, flat_picture, flat_voc, noise_esc

import atlas.prepare.compose
from atlas.audio import draw_schedule, gate
from atlas.clips import SPLITS, T, read_ms3, s4_clip
from atlas.errors import AtlasError
from atlas.prepare.compose import compose_ms3, compose_s4

OPENAVS = Path(__file__).parents[2] / "shared" / "openavs"


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    root = tmp_path_factory.mktemp("flat")
    sources = {
        "voc": flat_voc(root / "voc"),
        "davis": flat_davis(root / "davis"),
        "esc": noise_esc(root / "esc"),
    }
    settings = dict(**sources, clips=8, val=4, test=4, size=64, progress=False)
    return root, settings, compose_s4(root / "set", seed=3, **settings)


def bytes_of(root):
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def read(path):
    return np.array(Image.open(path))


def assert_no_leak(report):
    for kinds in (("heard_source", "silent_source"), ("recording_source",)):
        where = defaultdict(set)
        for clip in report["clips"]:
            for kind in kinds:
                where[clip[kind]].add(clip["split"])
        assert where and all(len(splits) == 1 for splits in where.values())


def test_the_tree_is_avsbench_s4s(flat):
    root, _, report = flat
    with open(root / "set" / "Single-source" / "s4_meta_data.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert json.loads((root / "set" / "compose.json").read_text()) == report
    assert [r["name"] for r in rows] == [c["id"] for c in report["clips"]] and len(
        {r["name"][:11] for r in rows}
    ) == len(rows)
    assert Counter((r["category"], r["split"]) for r in rows) == {
        (c, s): n for c in ("cat", "cow", "dog") for s, n in zip(SPLITS, (8, 4, 4))
    }
    for row in rows:
        clip = s4_clip(root / "set", row["name"], row["category"], row["split"])
        assert len(list(Path(clip.masks[0]).parent.iterdir())) == (
            1 if row["split"] == "train" else 5
        )
        for frame in clip.frames:
            assert read(frame).shape == (64, 64, 3)
        wave, rate = soundfile.read(clip.audio, always_2d=True)
        assert (wave.shape, rate) == ((80000, 1), 16000)
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(0.05, rel=0.02)  # loudness tells nothing


def test_truth_is_every_pixel_of_the_heard_class_and_nothing_else(flat):
    root, _, report = flat
    colours = np.array([*COLOUR.values(), BACKGROUND, VOID])
    for entry in report["clips"]:
        clip = s4_clip(root / "set", entry["id"], entry["class"], entry["split"])
        for frame, mask in zip(clip.frames, clip.masks):
            if mask is None:
                continue
            frame, mask = read(frame).astype(int), read(mask)
            assert set(np.unique(mask)) == {0, 255} and (mask > 0).mean() >= 0.02
            nearest = np.linalg.norm(frame[:, :, None] - colours, axis=-1)
            sure = nearest.min(-1) < 25  # not a blend of two colours at an edge
            heard = nearest.argmin(-1) == list(COLOUR).index(entry["class"])
            assert sure.mean() > 0.85
            assert np.array_equal(
                (mask > 0)[sure], heard[sure]
            )  # all of it, no void, none of it in the silent half
            half = np.s_[:, :32] if entry["side"] == "left" else np.s_[:, 32:]
            assert (mask[half] > 0).sum() == (mask > 0).sum()


def test_pictures_videos_and_recordings_never_cross_splits(flat):
    _, _, report = flat
    assert_no_leak(report)
    sources = {clip["heard"]: clip["heard_source"] for clip in report["clips"]}
    assert {sources.get(f"cat-walk{k}_a", f"davis/cat-walk{k // 2}") for k in range(4)} == {
        "davis/cat-walk0",
        "davis/cat-walk1",
    }
    assert all(
        source == ("voc/" + name if name.startswith("2007") else "voc/" + name[:2])
        for name, source in sources.items()
        if "walk" not in name
    )
    assert all(
        clip["recording"].split("-")[1] == clip["recording_source"] for clip in report["clips"]
    )


def test_silent_pictures_come_from_the_same_pool(flat):
    _, _, report = flat
    silent, sides = (
        Counter(c["silent_class"] for c in report["clips"]),
        Counter(c["side"] for c in report["clips"]),
    )
    assert silent["sofa"] + silent["bird"] < silent["dog"] + silent["cat"] + silent["cow"]
    assert {c["heard"] for c in report["clips"]} & {c["silent"] for c in report["clips"]}
    assert min(sides["left"], sides["right"]) > 0.25 * len(report["clips"])
    assert not [
        c for c in report["clips"] if c["class"] in ("dog", "cow") and "both" in c["silent"]
    ]


def test_dropped_and_unknown_are_named(flat):
    _, _, report = flat
    assert set(report["kept"]) == {"cat", "cow", "dog"}
    assert (
        "1 of the 3 picture sources" in report["dropped"]["bird"]
        and "0 of the 3 recordings" in report["dropped"]["sofa"]
    )
    assert report["unknown"] == ["nobody-knows"]
    assert str(flat[0]) not in json.dumps(report)  # no absolute path


def test_seed_decides_everything(flat):
    root, settings, report = flat
    again, other = root / "again", root / "other"
    compose_s4(again, seed=3, **settings)
    differing = compose_s4(other, seed=4, **settings)
    assert bytes_of(again) == bytes_of(root / "set")
    splits = [
        {clip["heard_source"]: clip["split"] for clip in r["clips"]} for r in (report, differing)
    ]
    assert splits[0] != splits[1]


def test_one_picture_source_is_enough_and_classes_can_be_chosen(flat, tmp_path):
    _, settings, _ = flat
    report = compose_s4(tmp_path / "voc", **settings | {"davis": None, "classes": ["cat", "dog"]})
    assert set(report["kept"]) == {"cat", "dog"} and report["dropped"]["cow"] == "not in --classes"
    for k in range(3):
        flat_picture(tmp_path / "cats", f"0{k}_cat", {"cat": (30, 20, 66, 64)})
    with pytest.raises(AtlasError, match="pictures of cat, and of others to stand beside it"):
        compose_s4(tmp_path / "x", **settings | {"voc": tmp_path / "cats", "davis": None})
    for k in range(3):
        flat_picture(tmp_path / "cats", f"1{k}_sofa", {"sofa": (30, 20, 66, 64)})
    report = compose_s4(
        tmp_path / "y",
        **settings
        | {"voc": tmp_path / "cats", "davis": None, "clips": 1, "val": None, "test": None},
    )
    assert set(report["kept"]) == {"cat"} and {
        clip["silent_class"] for clip in report["clips"]
    } == {"sofa"}


@pytest.mark.parametrize("change, message", [
    ({"voc": None, "davis": None}, "compose needs pictures and sounds"),
    ({"voc": "missing"}, "missing.*is not there: check --voc"),
    ({"esc": "missing"}, "missing.*is not there: check --esc"),
    ({"esc": "voc"}, "esc50.csv is not there"),
    ({"classes": ["dog", "dgo"]}, "unknown class dgo .*aeroplane, bird"),
    ({"classes": ["bird"]}, "no class is left .*bird: 1 of the 3"),
    ({"class_map": "missing"}, "cannot read the class map"),
    ({"clips": 0}, "at least one clip"),
    ({"out": "set"}, "set exists and is not an empty folder"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(flat, tmp_path, change, message):
    root, settings, _ = flat
    change = {
        key: root / v if key in ("voc", "esc", "class_map", "out") and v else v
        for key, v in change.items()
    }
    with pytest.raises(AtlasError, match=message) as error:
        compose_s4(**{"out": tmp_path / "x"} | settings | change)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_an_unreadable_picture_is_named_and_nothing_is_left(flat, tmp_path):
    _, settings, _ = flat
    voc = flat_voc(tmp_path / "voc")
    for path in (voc / "JPEGImages").glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(AtlasError, match="the picture .*jpg is not readable"):
        compose_s4(tmp_path / "x", **settings | {"voc": voc, "davis": None})
    (voc / "SegmentationClass" / "10_both.png").write_bytes(b"no image")
    with pytest.raises(AtlasError, match="cannot read the mask .*10_both.png"):
        compose_s4(tmp_path / "x", **settings | {"voc": voc, "davis": None})
    assert [p.name for p in tmp_path.iterdir()] == ["voc"]


@pytest.fixture(scope="module")
def flat_ms3(flat):
    root, settings, _ = flat
    voc = flat_voc(root / "voc_ms3")
    for k in range(3):
        flat_picture(
            voc, f"4{k}_cow", {"cow": (30, 20, 66, 64)}
        )  # so that a cow can stand beside a dog, but in no picture of both
    settings = settings | dict(voc=voc, clips=40, val=9, test=9)
    return root / "ms3", settings, compose_ms3(root / "ms3", seed=3, **settings)


def sounding(entry):
    """[pictures, T] bool: which picture of a clip is heard in which second."""
    return np.array([p["schedule"] for p in entry["pictures"]], bool)


def test_the_tree_is_avsbench_ms3s(flat_ms3):
    root, _, report = flat_ms3
    clips = read_ms3(root)
    assert json.loads((root / "compose.json").read_text()) == report
    assert [c.id for c in clips] == [e["id"] for e in report["clips"]] and len(
        {c.source for c in clips}
    ) == len(clips)
    assert Counter(c.split for c in clips) == {"train": 40, "val": 9, "test": 9}
    for clip in clips:
        assert all(read(path).shape == (64, 64, 3) for path in clip.frames)
        assert all(
            read(path).shape == (64, 64) and set(np.unique(read(path))) <= {0, 255}
            for path in clip.masks
        )  # all five, in train too
        assert (
            soundfile.info(clip.audio).samplerate == 16000
            and soundfile.info(clip.audio).frames == 80000
        )


def test_ms3_truth_is_every_pixel_of_what_is_heard_in_that_second(flat_ms3):
    root, _, report = flat_ms3
    colours = np.array([*COLOUR.values(), BACKGROUND, VOID])
    for clip, entry in zip(read_ms3(root), report["clips"]):
        on, classes = sounding(entry), [p["class"] for p in entry["pictures"]]
        for t, (frame, mask) in enumerate(zip(clip.frames, clip.masks)):
            frame, mask = read(frame).astype(int), read(mask) > 0
            nearest = np.linalg.norm(frame[:, :, None] - colours, axis=-1)
            sure = nearest.min(-1) < 25  # not a blend of two colours at an edge
            heard = np.isin(
                nearest.argmin(-1),
                [list(COLOUR).index(c) for c, now in zip(classes, on[:, t]) if now],
            )
            assert sure.mean() > 0.8 and np.array_equal(mask[sure], heard[sure])
            for picture, now in zip(entry["pictures"], on[:, t]):
                column = mask[:, slice(*picture["columns"])]
                assert (column.sum() >= 0.02 * mask.size) if now else not column.any()


def test_ms3_sounds_follow_their_schedules(flat_ms3):
    root, _, report = flat_ms3
    for clip, entry in zip(read_ms3(root), report["clips"]):
        on = sounding(entry).sum(0)  # [T] pictures heard in each second
        loudness = np.sqrt(np.mean(soundfile.read(clip.audio)[0].reshape(T, -1) ** 2, axis=1))
        assert on.any() and (loudness[on == 0] == 0).all() and (loudness[on > 0] > 0.04).all()
        assert np.allclose(loudness[on == 2], 0.05 * 2**0.5, rtol=0.1)  # the sum of two recordings


def test_ms3_clips_are_two_or_three_classes_of_which_one_dominates(flat_ms3):
    _, _, report = flat_ms3
    for entry in report["clips"]:
        classes = [p["class"] for p in entry["pictures"]]
        assert len(set(classes)) == len(classes) in (2, 3)
        assert [p["columns"] for p in entry["pictures"]] == {
            2: [[0, 32], [32, 64]],
            3: [[0, 21], [21, 43], [43, 64]],
        }[len(classes)]
        assert (
            {p["class"] for p in entry["pictures"] if any(p["schedule"])}
            == set(entry["heard"])
            == {p["class"] for p in entry["pictures"] if p["recording"]}
        )
        assert len(entry["heard"]) in (1, 2) and set(entry["heard"]) <= {"cat", "cow", "dog"}
    for split in SPLITS:
        here = [e for e in report["clips"] if e["split"] == split]
        first, ever = (
            Counter(e["heard"][0] for e in here),
            Counter(name for e in here for name in e["heard"]),
        )
        assert max(first.values()) - min(first.values()) <= 1
        assert {c: splits[split]["clips"] for c, splits in report["kept"].items()} == ever
    on = np.array([sounding(e).any(0) for e in report["clips"]])
    assert 0.03 < 1 - on.mean() < 0.2  # silent seconds
    assert (
        Counter(len(e["pictures"]) for e in report["clips"]).keys()
        == Counter(len(e["heard"]) + 1 for e in report["clips"]).keys()
        == {2, 3}
    )


def test_no_ms3_picture_contains_the_class_of_another(flat_ms3):
    _, _, report = flat_ms3
    with_both = [e for e in report["clips"] if any("both" in p["picture"] for p in e["pictures"])]
    dog_and_cow = [
        e for e in report["clips"] if {"dog", "cow"} <= {p["class"] for p in e["pictures"]}
    ]
    assert with_both and dog_and_cow and not [e for e in with_both if e in dog_and_cow]


def test_ms3_sources_never_cross_splits(flat_ms3):
    _, _, report = flat_ms3
    for kind in ("source", "recording_source"):
        where = defaultdict(set)
        for entry in report["clips"]:
            for picture in entry["pictures"]:
                where[picture[kind]].add(entry["split"])
        where.pop(None, None)  # a silent picture's recording
        assert where and all(len(splits) == 1 for splits in where.values())


def test_ms3_seed_decides_everything(flat_ms3, tmp_path):
    _, settings, _ = flat_ms3
    small = settings | dict(clips=5, val=2, test=2)
    for name, seed in (("one", 4), ("two", 4), ("three", 5)):
        compose_ms3(tmp_path / name, seed=seed, **small)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two") != bytes_of(tmp_path / "three")


def test_a_sum_of_sounds_is_scaled_not_clipped(flat, tmp_path, monkeypatch):
    monkeypatch.setattr(
        atlas.prepare.compose, "load_sound", lambda path: np.full(80000, 0.9, np.float32)
    )
    report = compose_ms3(tmp_path / "set", **flat[1] | dict(clips=20, val=1, test=1))
    for clip, entry in zip(read_ms3(tmp_path / "set"), report["clips"]):
        on = sounding(entry).sum(0)
        middle = soundfile.read(clip.audio)[0].reshape(T, -1)[:, 8000]
        assert np.allclose(middle, on * 0.5 if on.max() == 2 else on * 0.9, atol=1e-3)


def test_a_recordings_own_silence_is_silence():
    wave = np.concatenate([np.ones(16000), np.full(16000, 0.01), np.ones(16000), np.zeros(32000)])
    drawn = np.array([draw_schedule(wave, 0.5, np.random.default_rng(seed)) for seed in range(50)])
    assert drawn.any(1).all() and drawn[:, [0, 2]].any(0).all() and not drawn[:, [1, 3, 4]].any()


def test_gates_fade_inside_their_seconds():
    loudness = gate(np.array([0, 1, 1, 0, 1], bool))
    assert (
        loudness.shape == (80000,)
        and not loudness[:16000].any()
        and not loudness[48000:64000].any()
    )
    assert (loudness[16320:47680] == 1).all() and (
        loudness[64320:79680] == 1
    ).all()  # 20 ms; none between two seconds of a stretch
    assert (
        np.abs(np.diff(loudness, prepend=0, append=0)).max() < 0.004
        and not gate(np.zeros(5, bool)).any()
    )


def test_ms3_needs_two_classes_that_can_stand_together(flat, tmp_path):
    _, settings, _ = flat
    with pytest.raises(
        AtlasError, match="only cat is left of the 2 classes needed .*dog: not in --classes"
    ):
        compose_ms3(tmp_path / "x", **settings | {"classes": ["cat"]})
    with pytest.raises(
        AtlasError,
        match="pictures of (cow|dog), and of others to stand beside it, cannot be divided",
    ):
        compose_ms3(tmp_path / "x", **settings | {"classes": ["cow", "dog"]})
    with pytest.raises(AtlasError, match="at least one clip"):
        compose_ms3(tmp_path / "x", **settings | {"clips": 0})
    assert not list(tmp_path.iterdir())


def test_the_command_line_builds_either_set(flat, tmp_path):
    _, settings, _ = flat
    sources = [word for key in ("voc", "davis", "esc") for word in (f"--{key}", settings[key])]
    done = run(
        "prepare_data.py",
        "compose",
        "--dataset",
        "ms3",
        *sources,
        "--out",
        tmp_path / "open",
        "--clips",
        6,
        "--size",
        32,
    )
    assert done.returncode == 0, done.stderr
    assert "kept     cat: train" in done.stdout and len(read_ms3(tmp_path / "open")) == 6 + 1 + 2


@pytest.mark.skipif(not OPENAVS.is_dir(), reason="the shared photos and sounds are not here")
def test_real_photos_and_sounds(tmp_path):
    report = compose_s4(
        tmp_path / "set",
        OPENAVS / "VOC2012",
        OPENAVS / "DAVIS",
        OPENAVS / "ESC-50",
        clips=4,
        size=64,
        progress=False,
    )
    assert set(report["kept"]) == {"person", "car", "dog", "motorbike"}
    assert {"cow", "bird", "horse"} <= set(report["dropped"])
    assert_no_leak(report)
    for clip in report["clips"]:
        assert not (
            clip["silent"].startswith("scooter") and clip["class"] in ("person", "motorbike")
        )
    report = compose_ms3(
        tmp_path / "ms3",
        OPENAVS / "VOC2012",
        OPENAVS / "DAVIS",
        OPENAVS / "ESC-50",
        clips=12,
        size=64,
        progress=False,
    )
    assert (
        set(report["kept"]) == {"person", "car", "dog", "motorbike"}
        and len(report["clips"]) == 12 + 2 + 3
    )
