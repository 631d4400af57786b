import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atlas import data
from atlas.audio import build_audio_encoder
from atlas.clips import CSVS, load_clip, locked, read_s4
from atlas.data import ClipDataset, PackedClips, augmented, collate, loader, pack, swap_partners
from atlas.errors import AtlasError


@pytest.fixture
def own(tree, tmp_path):
    """Eight clips of the tree, which a test may damage."""
    root = Path(shutil.copytree(tree, tmp_path / "own"))
    table = root / CSVS["s4"]
    table.write_text("\n".join(table.read_text().splitlines()[:9]) + "\n")
    return root


def packed(root, where, size=32):
    return pack(read_s4(root), root, where, size, build_audio_encoder("logmel", False))


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
    assert {path.suffix for path in (tmp_path / "c").glob(".*")} == {".lock"}


def test_a_killed_pack_leaves_nothing_that_is_used(own, tmp_path, monkeypatch):
    whole, left = packed(own, tmp_path / "whole"), [5]

    class Killed(BaseException):
        pass

    def watched(clip, size):
        left[0] -= 1
        if not left[0]:
            raise Killed
        return load_clip(clip, size)

    monkeypatch.setattr(data, "load_clip", watched)
    with pytest.raises(Killed):
        packed(own, tmp_path / "c")
    torn = tmp_path / "c" / f".{whole.name}.1.tmp"
    torn.mkdir()  # as SIGKILL leaves it
    (torn / "frames.npy").write_bytes(b"half a row")
    again = packed(own, tmp_path / "c")
    assert again.name == whole.name and list((tmp_path / "c").glob("[!.]*")) == [again]
    for file in whole.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    "damage, what",
    [
        ("missing", "is missing"),
        ("truncated", "not readable"),
        ("mask value", "holds the values"),
        ("mask size", "make them equal"),
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
        value, side = (77, 32) if damage == "mask value" else (255, 16)
        Image.fromarray(np.full((side, side), value, np.uint8)).save(path)
    with pytest.raises(AtlasError, match=what) as error:
        packed(own, tmp_path / "c")
    assert path.name in str(error.value)
    assert {path.suffix for path in (tmp_path / "c").glob("*")} <= {".lock"}


def test_two_processes_that_pack_the_same_cache_make_one_whole_one(own, tmp_path):
    """The second waits for the first, whose lock is on a file, and packs what is not there yet."""
    whole, said = packed(own, tmp_path / "whole"), tmp_path / "said"

    def other():
        with open(said, "w", buffering=1) as sys.stderr:
            packed(own, tmp_path / "c")

    (tmp_path / "c").mkdir()
    with locked(tmp_path / "c" / f".{whole.name}.lock"):
        child = multiprocessing.get_context("fork").Process(target=other)
        child.start()
        while not (said.exists() and "waiting for the process" in said.read_text()):
            assert child.is_alive()
            time.sleep(0.01)
        assert not list((tmp_path / "c").glob("*.tmp"))
    made = packed(own, tmp_path / "c")
    child.join()
    assert child.exitcode == 0
    for file in whole.iterdir():
        assert file.read_bytes() == (made / file.name).read_bytes(), file.name


def test_rows_that_another_process_added_are_noticed_before_the_cache_is_used(
    own, tmp_path, monkeypatch
):
    fill = data._fill

    def disturbed(build, *others):
        fill(build, *others)
        with open(build / "frames.npy", "ab") as file:
            file.write(bytes(5 * 32 * 32 * 3))

    monkeypatch.setattr(data, "_fill", disturbed)
    with pytest.raises(AtlasError, match="frames.npy .*damaged.*another size.*; delete"):
        packed(own, tmp_path / "c")


@pytest.mark.parametrize(
    "name", ["index", "frames", "masks", "annotated", "context", "mute_tokens"]
)
def test_a_torn_cache_is_named_and_packed_anew(own, tmp_path, name):
    folder = packed(own, tmp_path / "c")
    (path,) = folder.glob(f"{name}.*")
    whole = path.read_bytes()
    for content, word in (
        (whole[: len(whole) // 2], "damaged"),
        (whole[:-1], "damaged"),
        (whole + b"x", "damaged"),
        (b"", "the file is empty"),
        (b"[" * 10**5, "damaged"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (whole.replace(b'"test"', b'"val"'), "damaged"),
        (whole[:128].replace(b"(8, ", b"(7, ") + whole[128:], "damaged"),
        (None, "the file is missing"),
    ):
        if content == whole:
            continue
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(AtlasError, match=f"{path.name} .*{word}.*; delete the folder") as error:
            PackedClips(folder)
        assert "\n" not in str(error.value)
        path.write_bytes(whole)
    assert len(PackedClips(folder).clips) == len(read_s4(own))
    shutil.rmtree(folder)
    assert packed(own, tmp_path / "c") == folder and path.read_bytes() == whole


def test_batches_of_workers_are_the_same_and_need_no_shared_memory(cache, monkeypatch):
    dataset = ClipDataset(cache, list(range(8)), (0, 1, 1))
    pairs = zip(loader(dataset, 3), loader(dataset, 3, workers=2))
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            same = torch.equal(value, theirs[name]) if torch.is_tensor(value) else None
            assert same or value == theirs[name]
            assert same is None or not theirs[name].is_shared()


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


@pytest.mark.parametrize("word, kept", [("drawn", "drawn"), ("made", "made"), (None, None)])
def test_the_kind_of_a_mask_reaches_the_cache(own, tmp_path, word, kept):
    table = own / CSVS["s4"]
    head, *rows = table.read_text().splitlines()
    if word:
        head, rows = f"{head},mask", [f"{row},{word}" for row in rows]
    table.write_text("\n".join([head, *rows]) + "\n")
    cache = PackedClips(packed(own, tmp_path / "c"))
    assert {clip["mask"] for clip in cache.clips} == {kept}
    if word == "made":
        table.write_text(table.read_text().replace(",made", ",m"))
        with pytest.raises(AtlasError, match="mask"):
            read_s4(own)
