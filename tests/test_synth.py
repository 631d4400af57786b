"""The synthetic S4: one seed one set of bytes, things in sight, only the sound tells them apart."""

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from atlas import prepare
from atlas.audio import log_mel
from atlas.clips import CSVS, DOMAINS
from atlas.errors import AtlasError
from atlas.prepare import synth, things
from atlas.prepare.synth import CLASSES, make_clip, make_set
from atlas.prepare.timbres import TIMBRES, sound

SMALL = dict(
    size=48, train=2, val=1, test=1, classes=("helicopter", "dog_barking", "playing_piano")
)


def tree(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_set("s4", tmp_path_factory.mktemp("synth") / "data", **SMALL)


def test_seed_makes_the_bytes(small, tmp_path):
    assert tree(make_set("s4", tmp_path / "again", **SMALL)) == tree(small)
    other = tree(make_set("s4", tmp_path / "other", seed=1, **SMALL))
    assert other.keys() == tree(small).keys()
    same = [path for path, content in tree(small).items() if other[path] == content]
    assert same == ["Single-source/s4_meta_data.csv"]


def test_more_clips_begin_with_the_same(small, tmp_path):
    more = tree(make_set("s4", tmp_path / "more", **{**SMALL, "train": 3, "test": 2}))
    before = {path: content for path, content in tree(small).items() if not path.endswith(".csv")}
    assert len(more) > len(before) + 1 and before.items() <= more.items()


def test_tree_is_avsbench(small):
    with open(small / "Single-source" / "s4_meta_data.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "start", "category", "split"]
    assert len(rows) - 1 == 3 * 4 == len({row[0][:11] for row in rows[1:]})
    expected, data = {"Single-source/s4_meta_data.csv"}, "Single-source/s4_data"
    for name, _, category, split in rows[1:]:
        clip = f"{split}/{category}/{name}"
        expected |= {f"{data}/visual_frames/{clip}/{name}_{k}.png" for k in range(1, 6)} | {
            f"{data}/audio_wav/{clip}.wav"
        }
        expected |= {
            f"{data}/gt_masks/{clip}/{name}_{k}.png"
            for k in ((1,) if split == "train" else range(1, 6))
        }
    assert set(tree(small)) == expected


def test_files_are_what_avsbench_holds(small):
    data = small / "Single-source" / "s4_data"
    for path in data.glob("visual_frames/**/*.png"):
        with Image.open(path) as image:
            assert image.mode == "RGB" and image.size == (48, 48)
    for path in data.glob("gt_masks/**/*.png"):
        with Image.open(path) as image:
            mask = np.asarray(image)
            assert image.mode == "L" and set(np.unique(mask)) == {0, 255}
        assert (
            0.03 < (mask > 127).mean() < 0.19
        )  # the pixels of a 48 px frame are coarse; exact bounds below
    for path in data.glob("audio_wav/**/*.wav"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.frames, info.subtype) == (
            16000,
            1,
            80000,
            "PCM_16",
        )


def test_the_classes_are_avsbenchs_and_differ():
    assert len(set(CLASSES)) == 23 and [len(names) for names in DOMAINS.values()] == [
        3,
        6,
        6,
        4,
        4,
    ]
    assert set(CLASSES) == set(things.LOOKS) == set(TIMBRES)
    assert (
        len({look[:2] for look in things.LOOKS.values()}) == 23
    )  # shape with texture is enough; no single cue is
    assert all(len({look[cue] for look in things.LOOKS.values()}) < 23 for cue in range(4))
    assert {look[0] for look in things.LOOKS.values()} == set(things.SHAPES) and {
        look[1] for look in things.LOOKS.values()
    } == set(things.TEXTURES)


@pytest.mark.parametrize("name", CLASSES)
def test_heard_thing_is_in_sight_and_every_second_sounds(name):
    frames, masks, wave = make_clip(name, np.random.default_rng(7))
    assert (
        frames.shape == (5, 96, 96, 3)
        and frames.dtype == np.uint8
        and masks.shape == (5, 96, 96)
        and masks.dtype == bool
    )
    assert ((0.035 < masks.mean((1, 2))) & (masks.mean((1, 2)) < 0.175)).all()
    assert np.abs(frames[1:].astype(int) - frames[:-1]).max((1, 2, 3)).min() > 20  # something moves
    seconds = np.sqrt((wave.reshape(5, -1) ** 2).mean(1))
    assert np.abs(wave).max() <= 1 and seconds.min() > 0.4 * seconds.max() and seconds.min() > 0.01


@pytest.mark.parametrize("name", CLASSES)
def test_area_is_what_was_drawn(name):
    thing = things.draw_object(name, np.random.default_rng(3))
    thing.path[:] = 0.5
    _, masks = things.render_frame([thing], 2, np.zeros((192, 192, 3), np.float32))
    assert masks.mean() == pytest.approx(thing.area[2], rel=0.04)


def test_the_later_thing_hides_the_earlier():
    rng = np.random.default_rng(0)
    back, front = things.draw_object("playing_tabla", rng), things.draw_object("playing_piano", rng)
    back.path[:], front.path[:] = 0.5, 0.55
    grid = np.zeros((96, 96, 3), np.float32)
    _, both = things.render_frame([back, front], 0, grid)
    (alone_back,), (alone_front,) = (
        things.render_frame([back], 0, grid)[1],
        things.render_frame([front], 0, grid)[1],
    )
    assert (
        (both[1] == alone_front).all()
        and (both[0] == alone_back & ~alone_front).all()
        and both[0].sum() < alone_back.sum()
    )


def test_the_scene_does_not_depend_on_the_size():
    small, large = (make_clip("race_car", np.random.default_rng(5), size)[1] for size in (48, 192))
    assert (small ^ large[:, 2::4, 2::4]).mean() < 0.01


def test_only_the_sound_tells_which_thing_is_heard():
    """Heard and silent things have the same area, place, travel and layer on average."""
    rng, measured = np.random.default_rng(0), {True: [], False: []}
    for _ in range(200):
        names = rng.choice(CLASSES, 2 + rng.integers(2), replace=False).tolist()
        scene = things.draw_scene(names, rng)
        for layer, thing in enumerate(scene):
            travel = np.hypot(*(thing.path[-1] - thing.path[0]))
            measured[thing.name == names[0]].append(
                (thing.area.mean(), *thing.path.mean(0), travel, layer / (len(scene) - 1))
            )
    heard, silent = np.array(measured[True]), np.array(measured[False])
    error = np.sqrt(heard.var(0) / len(heard) + silent.var(0) / len(silent))
    assert (np.abs(heard.mean(0) - silent.mean(0)) < 4 * error).all()
    assert heard[:, 0].mean() / silent[:, 0].mean() == pytest.approx(1, abs=0.06)


def log_mel_statistics(name, seed):
    """Per second, mean and standard deviation over time of a sound's log-mel bands, [5, 128]."""
    wave = sound(name, np.random.default_rng(seed))
    patches = log_mel(torch.from_numpy(wave), 5)[:, 0].numpy()
    return np.concatenate([patches.mean(1), patches.std(1)], axis=1)


def test_one_second_tells_the_class():
    features = []
    for split, count in enumerate((6, 3)):
        for c, name in enumerate(CLASSES):
            features += [log_mel_statistics(name, [split, c, i]) for i in range(count)]
    features = np.array(features)
    learnt = features[: 23 * 6].reshape(23, -1, 128)
    held_out = features[23 * 6 :].reshape(23, -1, 128)
    spread = learnt.reshape(-1, 128).std(0)
    distance = ((held_out[:, :, None] - learnt.mean(1)) / spread) ** 2
    nearest = distance.sum(-1).argmin(-1)  # [23, seconds]
    assert (nearest == np.arange(23)[:, None]).mean() > 0.93


def test_bad_requests_say_what_is_wrong(small, tmp_path):
    with pytest.raises(AtlasError, match=str(small)):
        make_set("s4", small, **SMALL)
    with pytest.raises(AtlasError, match="kazoo: give two classes or more of"):
        make_set("s4", tmp_path / "a", classes=("helicopter", "kazoo"))
    with pytest.raises(AtlasError, match="helicopter: give two classes"):
        make_set("s4", tmp_path / "a", classes=("helicopter",))
    with pytest.raises(AtlasError, match="size 8"):
        make_set("s4", tmp_path / "a", size=8)
    assert not any(tmp_path.iterdir())


def test_a_broken_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "write_csv", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_set("s4", tmp_path / "data", **SMALL)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_missing_set_is_made_once(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(synth, "make_set", lambda *words: made.append(words))
    config = SimpleNamespace(synth=False, dataset="s4", data_root=str(tmp_path))
    prepare.make_missing(config)
    assert not made
    config.synth = True
    prepare.make_missing(config)
    assert made == [("s4", str(tmp_path))] and "making the synthetic S4" in capsys.readouterr().out
    (tmp_path / CSVS["s4"]).parent.mkdir()
    (tmp_path / CSVS["s4"]).touch()
    prepare.make_missing(config)
    assert len(made) == 1


def test_the_sets_are_named(tmp_path):
    small = {**SMALL, "size": 32}
    make_set("s4", tmp_path, **small)
    make_set("ms3", tmp_path, **small)
    assert all((tmp_path / csv).is_file() for csv in CSVS.values())
