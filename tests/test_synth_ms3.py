"""The synthetic MS3: sounds and masks follow the schedules."""

import json

import numpy as np
import pytest
import soundfile
from conftest import one_line, run

from atlas.audio import RATE
from atlas.clips import T, load_clip, read_ms3
from atlas.errors import AtlasError
from atlas.prepare.synth import SCENES, draw_cast, make_ms3_clip, make_set
from atlas.prepare.things import CLASSES, draw_background, draw_scene, paint


@pytest.fixture(scope="module")
def scenes(ms3_tree):
    return json.loads((ms3_tree / "Multi-sources" / "scenes.json").read_text())


def test_the_tree_is_as_released(ms3_tree):
    clips = read_ms3(ms3_tree)
    assert [sum(c.split == s for c in clips) for s in ("train", "val", "test")] == [24, 4, 8]
    data = ms3_tree / "Multi-sources" / "ms3_data"
    for clip in clips:
        assert (data / "visual_frames" / clip.id / f"{clip.id}.mp4_1.png").is_file() and (
            data / "gt_masks" / clip.split / clip.id / f"{clip.id}_5.png"
        ).is_file()
        assert clip.category is None and all(clip.masks)


def test_clips_of_a_source_share_their_cast_and_stay_in_a_split(ms3_tree, scenes):
    clips = read_ms3(ms3_tree)
    splits, casts = {}, {}
    for clip in clips:
        splits.setdefault(clip.source, set()).add(clip.split)
        casts.setdefault(clip.source, set()).add(
            (tuple(scenes[clip.id]["heard"]), tuple(scenes[clip.id]["silent"]))
        )
    assert len(splits) == len(clips) / 2 and all(
        len(found) == 1 for found in [*splits.values(), *casts.values()]
    )


def test_sound_and_mask_follow_the_schedule(ms3_tree, scenes):
    """A second in which nothing is heard is silent and has an empty mask. The others do not."""
    silent = 0
    for clip in read_ms3(ms3_tree):
        _, masks = load_clip(clip, 32)
        wave, rate = soundfile.read(clip.audio)
        assert rate == RATE and len(wave) == T * RATE
        for t in range(T):
            heard = any(t in seconds for seconds in scenes[clip.id]["heard"].values())
            silent += not heard
            assert (
                masks[t].any() == heard
                and (np.abs(wave[t * RATE : (t + 1) * RATE]).max() > 0.01) == heard
            )
    assert 0 < silent < 0.3 * T * 36


def test_the_mask_is_the_union_of_what_is_heard():
    heard, silent = ["helicopter", "playing_piano"], ["dog_barking"]
    frames, masks, wave, schedules = make_ms3_clip(heard, silent, np.random.default_rng(3), 64)
    again = make_ms3_clip(heard, silent, np.random.default_rng(3), 64)
    np.testing.assert_array_equal(frames, again[0])
    np.testing.assert_array_equal(masks, again[1])
    rng = np.random.default_rng(3)
    things, backdrop = draw_scene([*heard, *silent], rng), draw_background(rng, 64)
    _, visible = paint(things, backdrop, rng)
    order = [thing.name for thing in things]
    for t in range(T):
        expected = np.zeros((64, 64), bool)
        for name in heard:
            if schedules[name][t]:
                expected |= visible[t, order.index(name)]
        np.testing.assert_array_equal(masks[t], expected)
    assert (
        np.abs(wave).max() <= 1
        and set(schedules) == set(heard)
        and all(schedule.any() for schedule in schedules.values())
    )


def test_every_class_is_in_one_scene_and_a_cast_is_of_one():
    assert sorted(name for scene in SCENES for name in scene) == sorted(CLASSES)
    sizes = set()
    for seed in range(200):
        heard, silent = draw_cast(np.random.default_rng(seed), list(CLASSES))
        assert any(set(heard) <= set(scene) for scene in SCENES) and not set(heard) & set(silent)
        sizes.add((len(heard), len(heard) + len(silent)))
    assert sizes == {(1, 2), (1, 3), (2, 2), (2, 3)}


def test_a_larger_set_begins_with_the_same_clips_and_other_trees_stay(ms3_tree, tmp_path):
    (tmp_path / "Single-source").mkdir()
    make_set("ms3", tmp_path, size=32, train=2, val=0, test=2, classes=list(CLASSES[:6]))
    small, large = read_ms3(tmp_path), {clip.id: clip for clip in read_ms3(ms3_tree)}
    for clip in small:
        for a, b in zip(load_clip(clip, 32), load_clip(large[clip.id], 32)):
            np.testing.assert_array_equal(a, b)
    assert (tmp_path / "Single-source").is_dir()


def test_bad_requests_say_what_is_wrong(ms3_tree, tmp_path):
    with pytest.raises(AtlasError, match="Multi-sources is there already"):
        make_set("ms3", ms3_tree)
    with pytest.raises(AtlasError, match="kazoo: give two classes or more of"):
        make_set("ms3", tmp_path, classes=["helicopter", "kazoo"])
    one_line(
        run("prepare_data.py", "synth", "--dataset", "ms3", "--out", ms3_tree), "there already"
    )


def test_it_is_a_command(tmp_path):
    words = ["--size", 32, "--train", 3, "--val", 1, "--test", 1]
    done = run("prepare_data.py", "synth", "--dataset", "ms3", "--out", tmp_path / "s", *words)
    assert done.returncode == 0 and len(read_ms3(tmp_path / "s")) == 5, done.stderr
