"""prepare_data.py check: reading a tree file by file. Damaged S4 trees are in test_errors.py."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED, one_line, real, run
from PIL import Image

from atlas.clips import read_ms3, read_s4
from atlas.prepare.check import counted, shared_sources


@pytest.fixture
def own(ms3_tree, tmp_path):
    return Path(shutil.copytree(ms3_tree, tmp_path / "own"))


def test_a_good_ms3_tree_passes(ms3_tree):
    done = run("prepare_data.py", "check", "--root", ms3_tree)
    assert (
        done.returncode == 0
        and "0 errors, 0 warnings" in done.stdout
        and "MS3: 36 clips, train 24, val 4, test 8" in done.stdout
    ), done.stdout


def test_what_is_wrong_in_an_ms3_tree_is_found(own):
    clips = read_ms3(own)
    Path(clips[0].frames[4]).unlink()
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(clips[1].masks[2])
    for path in clips[2].masks:
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(path)
    done = run("prepare_data.py", "check", "--root", own)
    assert done.returncode == 1 and "2 errors, 1 warnings" in done.stdout
    assert all(
        what in done.stdout
        for what in (
            Path(clips[0].frames[4]).name,
            Path(clips[1].masks[2]).name,
            f"{clips[2].id}: none of its masks",
        )
    )


def test_shared_source_videos_are_a_warning_in_ms3(own):
    table = own / "Multi-sources" / "ms3_meta_data.csv"
    second = next(
        clip for clip in read_ms3(own) if clip.split == "train" and clip.id.endswith("_2")
    )
    data = own / "Multi-sources" / "ms3_data"
    for kind in ("gt_masks", "audio_wav"):
        for path in (data / kind / "train").glob(f"{second.id}*"):
            (data / kind / "test").mkdir(exist_ok=True)
            path.rename(data / kind / "test" / path.name)
    table.write_text(table.read_text().replace(f"{second.id},train", f"{second.id},test"))
    done = run("prepare_data.py", "check", "--root", own)
    assert done.returncode == 0 and "1 of 9 test clips share their source video" in done.stdout, (
        done.stdout
    )


def test_neither_tree_is_one_line(tmp_path):
    one_line(run("prepare_data.py", "check", "--root", tmp_path), "Single-source", "Multi-sources")


@real
def test_the_released_lists_hold_the_published_counts_and_38_of_64_test_clips_share_a_source(
    tmp_path,
):
    for name, folder in (
        ("s4_meta_data.csv", "Single-source"),
        ("ms3_meta_data.csv", "Multi-sources"),
    ):
        (tmp_path / folder).mkdir()
        shutil.copy(SHARED / "avsbench_meta" / name, tmp_path / folder)
    s4, ms3 = read_s4(tmp_path), read_ms3(tmp_path)
    crossing = shared_sources(ms3)
    shared = {
        split: sum("train" in crossing.get(c.source, ()) for c in ms3 if c.split == split)
        for split in ("val", "test")
    }
    assert shared == {"val": 41, "test": 38} and len(crossing) == 56 and shared_sources(s4) == {}
    assert (
        "as released" not in "".join(counted(s4, "s4") + counted(ms3, "ms3"))
        and len(counted(s4, "s4")) == 24
    )
