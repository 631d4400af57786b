import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARED, real
from PIL import Image

from atlas import data
from atlas.audio import build_audio_encoder
from atlas.clips import built_beside, load_clip, read_mask, read_s4
from atlas.data import ClipDataset, augmented, collate, loader, pack, swap_partners
from atlas.errors import AtlasError


@pytest.fixture
def own(tree, tmp_path):
    """A copy of the tree that a test may damage."""
    return Path(shutil.copytree(tree, tmp_path / "own"))


def packed(root, where, size=32):
    return pack(read_s4(root), root, where, size, build_audio_encoder("logmel", False), "logmel")


def test_the_cache_holds_what_the_files_hold(tree, cache):
    clips = {clip.id: clip for clip in read_s4(tree)}
    for i in (0, len(cache.clips) - 1):
        clip, item = clips[cache.clips[i]["id"]], cache[i]
        frames, masks = load_clip(clip, cache.size)
        kept = [t for t in range(5) if clip.masks[t]]
        assert (
            item["second"].tolist() == kept == ([0] if clip.split == "train" else [0, 1, 2, 3, 4])
        )
        np.testing.assert_array_equal(item["frames"].permute(0, 2, 3, 1).numpy(), frames[kept])
        np.testing.assert_array_equal(item["masks"].numpy(), masks[kept])
        raw = np.asarray(Image.open(clip.masks[0]))
        np.testing.assert_array_equal(item["masks"][0].numpy(), raw == 255)


def test_a_changed_file_or_setting_makes_a_new_cache(own, tmp_path):
    first = packed(own, tmp_path / "c")
    assert packed(own, tmp_path / "c") == first and packed(own, tmp_path / "c", size=48) != first
    frame = Path(read_s4(own)[0].frames[0])
    os.utime(frame, ns=(1, 1))
    assert packed(own, tmp_path / "c") != first
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.startswith(".")]


def test_a_killed_pack_goes_on_after_the_clips_that_it_has(own, tmp_path, monkeypatch):
    """The cache is the same to the byte, no clip is decoded twice, and a row that was cut off in the middle is written again."""
    whole, decoded = packed(own, tmp_path / "whole"), []

    class Killed(BaseException):
        pass

    def watched(clip, size):
        if len(decoded) == 5:
            decoded.append(None)
            raise Killed
        decoded.append(clip.id)
        return load_clip(clip, size)

    monkeypatch.setattr(data, "load_clip", watched)
    with pytest.raises(Killed):
        packed(own, tmp_path / "c")
    (part,) = (tmp_path / "c").iterdir()
    with open(part / "frames.npy", "ab") as file:
        file.write(b"half a row")
    again = packed(own, tmp_path / "c")
    decoded.remove(None)
    assert (
        len(decoded) == len(set(decoded)) == len(read_s4(own))
        and again.name == whole.name
        and list((tmp_path / "c").iterdir()) == [again]
    )
    for file in whole.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_masks_other_than_0_and_255_are_refused(tmp_path):
    for values, right in (
        ([0, 255], [False, True]),
        ([0, 1], [False, True]),
        ([0, 0], [False, False]),
        ([0, 128, 255], None),
        ([0, 1, 255], None),
    ):
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / "m.png")
        if right is None:
            with pytest.raises(AtlasError, match="m.png"):
                read_mask(tmp_path / "m.png")
        else:
            assert read_mask(tmp_path / "m.png").tolist() == [right]
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[False, True]]


@pytest.mark.parametrize(
    "damage, what",
    [
        ("missing", "is missing"),
        ("truncated", "not readable"),
        ("mask value", "holds the values"),
        ("mask size", "must be equal"),
    ],
)
def test_damage_is_named_with_its_file(own, tmp_path, damage, what):
    clip = read_s4(own)[0]
    path = Path(clip.masks[0] if damage.startswith("mask") else clip.frames[2])
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    else:
        Image.fromarray(
            np.full(
                (32, 32) if damage == "mask value" else (16, 16),
                77 if damage == "mask value" else 255,
                np.uint8,
            )
        ).save(path)
    with pytest.raises(AtlasError, match=what) as error:
        packed(own, tmp_path / "c")
    assert path.name in str(error.value)
    assert not list((tmp_path / "c").glob("*")) if (tmp_path / "c").exists() else True


def test_no_tree_and_bad_csv(tmp_path):
    with pytest.raises(AtlasError, match="data_root"):
        read_s4(tmp_path)
    (tmp_path / "Single-source").mkdir()
    csv = tmp_path / "Single-source" / "s4_meta_data.csv"
    csv.write_text("a,b\n1,2\n")
    with pytest.raises(AtlasError, match="columns"):
        read_s4(tmp_path)
    csv.write_text("name,start,category,split\nx,0,dog,dev\n")
    with pytest.raises(AtlasError, match="'dev'"):
        read_s4(tmp_path)


def test_the_loser_of_two_builders_uses_the_winners(tmp_path):
    with built_beside(tmp_path / "x") as mine:
        (mine / "who").write_text("loser")
        with built_beside(tmp_path / "y"):
            pass
        os.mkdir(tmp_path / "x")
        (tmp_path / "x" / "who").write_text("winner")
    assert (tmp_path / "x" / "who").read_text() == "winner" and sorted(
        p.name for p in tmp_path.iterdir()
    ) == ["x", "y"]


def test_collate_says_whose_each_frame_is(cache):
    test, train = (
        cache.select("test", [cache.clips[0]["category"]])[0],
        cache.select("train", [cache.clips[0]["category"]])[0],
    )
    batch = collate([cache[train], cache[test]])
    assert batch["clip"].tolist() == [0, 1, 1, 1, 1, 1] and batch["second"].tolist() == [
        0,
        0,
        1,
        2,
        3,
        4,
    ]
    assert (
        batch["frames"].shape == (6, 3, 32, 32)
        and batch["context"].shape == (2, 5, 128)
        and batch["index"] == [train, test]
    )


def test_augmentation_depends_on_the_draw_and_the_clip_alone(cache):
    indices = [0, 1, 2, 3]
    one = [
        item
        for batch in loader(ClipDataset(cache, indices, (0, 1, 1)), 4)
        for item in batch["frames"]
    ]
    two = [
        item
        for batch in loader(ClipDataset(cache, indices[::-1], (0, 1, 1)), 1)
        for item in batch["frames"]
    ][::-1]
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    other = [
        item
        for batch in loader(ClipDataset(cache, indices, (0, 1, 2)), 4)
        for item in batch["frames"]
    ]
    assert not all(torch.equal(a, b) for a, b in zip(one, other))


def test_frames_and_masks_are_augmented_alike():
    """A white square on black stays where its mask is."""
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 10:30, 5:25] = True
    item = {"frames": masks[:, None].expand(-1, 3, -1, -1).to(torch.uint8) * 255, "masks": masks}
    for seed in range(8):
        out = augmented(item, np.random.default_rng(seed))
        agree = ((out["frames"][:, 0] > 90) == out["masks"]).float().mean()
        assert agree > 0.97 and torch.equal(out["masks"][0], out["masks"][1])


def test_swap_partners_are_of_another_category_and_fixed(cache, tasks):
    partners = swap_partners(cache, tasks)
    assert partners == swap_partners(cache, tasks)
    assert all(
        cache.clips[i]["category"] != cache.clips[j]["category"]
        and cache.clips[j]["split"] == "test"
        for i, j in partners.items()
    )


@real
def test_the_released_csv_reads_with_its_published_counts(tmp_path):
    (tmp_path / "Single-source").mkdir()
    shutil.copy(SHARED / "avsbench_meta" / "s4_meta_data.csv", tmp_path / "Single-source")
    clips = read_s4(tmp_path)
    assert [sum(c.split == s for c in clips) for s in ("train", "val", "test")] == [3452, 740, 740]
    assert len({c.category for c in clips}) == 23 and len({c.source for c in clips}) == 4932
