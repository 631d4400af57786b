"""prepare_data.py check: what it passes, pack reads; what pack refuses, it names."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import SHARED, one_line, real, run
from PIL import Image

from atlas.audio import build_audio_encoder
from atlas.clips import CSVS, read_ms3, read_s4
from atlas.data import pack
from atlas.errors import AtlasError
from atlas.prepare.check import check, counted, shared_sources

NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, (5 * 44100, 2)).astype(np.float32)
GREY = np.arange(1024, dtype=np.uint8).reshape(32, 32)


@pytest.fixture
def own(ms3_tree, tmp_path):
    return Path(shutil.copytree(ms3_tree, tmp_path / "own"))


@pytest.fixture
def own_s4(tree, tmp_path):
    """Three clips, one of each split."""
    root = Path(shutil.copytree(tree, tmp_path / "own"))
    table = root / CSVS["s4"]
    rows = table.read_text().splitlines()
    kept = [next(row for row in rows if row.endswith(split)) for split in ("train", "val", "test")]
    table.write_text("\n".join([rows[0], *kept]) + "\n")
    return root


def picture(array, **options):
    return lambda path: Image.fromarray(array).save(path, **options)


def sound(wave, rate=16000):
    return lambda path: soundfile.write(path, wave, rate, subtype="FLOAT")


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


REFUSED = {  # (whose file, what is done to it)
    "missing frame": ("frame", Path.unlink),
    "truncated frame": ("frame", cut),
    "transparent frame": ("frame", picture(np.full((32, 32, 4), 100, np.uint8))),
    "no frame": ("frame", lambda path: path.write_text("version https://git-lfs.github.com")),
    "missing mask": ("mask", Path.unlink),
    "grey mask": ("mask", picture(GREY)),
    "grey mask of 16 bits": ("mask", picture(GREY.astype(np.uint16) * 200 + 400)),
    "mask of another size": ("mask", picture(np.full((16, 32), 255, np.uint8))),
    "missing sound": ("sound", Path.unlink),
    "truncated sound": ("sound", cut),
    "not a number": ("sound", sound(NOISE[:, 0] * np.nan)),
    "antiphase": ("sound", sound(NOISE[:, :1] * [1, -1])),
}
TAKEN = {  # (whose file, what is done to it, the warning)
    "grey frame of 16 bits": ("frame", picture(GREY.astype(np.uint16) * 257), None),
    "mask of 0 and 1": ("mask", picture((GREY > 9).astype(np.uint8)), None),
    "empty mask": ("mask", picture(GREY * 0), "nothing is masked"),
    "frame of another size": ("lone frame", picture(np.full((16, 16, 3), 9, np.uint8)), None),
    "stereo": ("sound", sound(NOISE[:80000]), None),
    "44.1 kHz": ("sound", sound(NOISE[:, 0], 44100), None),
    "44,099 Hz": ("sound", sound(NOISE[:, 0], 44099), None),
    "short": ("sound", sound(NOISE[:8000, 0]), "0.50 s; it is cut or padded to 5 s"),
    "long": ("sound", sound(NOISE[:, 0]), "13.78 s; it is cut or padded to 5 s"),
    "silent": ("sound", sound(NOISE[:80000, 0] * 0), "silent throughout"),
}


def change(root, whose, how):
    """Change a file of the first train clip of an S4 tree; its path."""
    clip = read_s4(root)[0]
    files = {"frame": clip.frames[0], "mask": clip.masks[0], "sound": clip.audio}
    path = Path(files.get(whose, clip.frames[1]))
    how(path)
    return path


def packed(root, where):
    return pack(read_s4(root), root, where, 32, build_audio_encoder("logmel", False))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_pack_refuses_check_names(own_s4, tmp_path, kind):
    path = change(own_s4, *REFUSED[kind])
    with pytest.raises(AtlasError) as error:
        packed(own_s4, tmp_path / "c")
    assert path.name in str(error.value) and "check --root" in str(error.value)
    errors = check(own_s4)[1]
    assert len(errors) == 1 and path.name in errors[0] and "\n" not in errors[0]


@pytest.mark.parametrize("kind", TAKEN)
def test_what_check_passes_pack_reads(own_s4, tmp_path, kind):
    whose, how, warning = TAKEN[kind]
    path = change(own_s4, whose, how)
    counts, errors, warnings = check(own_s4)
    assert not errors and counts[0] == "S4: 3 clips, train 1, val 1, test 1"
    assert [path.stem.split("_")[0] in w and warning in w for w in warnings] == [True] * (
        warning is not None
    )
    packed(own_s4, tmp_path / "c")


def test_a_wrong_table_is_an_error_of_check(own_s4):
    table = own_s4 / CSVS["s4"]
    text = table.read_text()
    table.write_text(text + text.splitlines()[1] + "\n")
    counts, errors, warnings = check(own_s4)
    assert not counts and len(errors) == 1 and "stands twice" in errors[0]
    table.write_bytes(text.replace(",", ";").encode("utf-16"))
    assert check(own_s4)[1:] == ([], [])


def test_a_source_video_in_two_splits_is_an_error_in_s4(own_s4):
    """Two clips are renamed to parts of one video."""
    clips = read_s4(own_s4)
    pair = clips[0], next(clip for clip in clips if clip.split == "test")
    table = own_s4 / CSVS["s4"]
    text = table.read_text()
    for number, clip in enumerate(pair):
        name = f"0d9u2CymIxc_{number}"
        text = text.replace(f"{clip.id},", f"{name},")
        for path in sorted(own_s4.rglob(f"{clip.id}*"), reverse=True):
            path.rename(path.with_name(path.name.replace(clip.id, name)))
    table.write_text(text)
    errors = check(own_s4)[1]
    assert errors == ["the source video 0d9u2CymIxc is in test and train: a leak"]


def test_a_good_ms3_tree_passes(ms3_tree):
    done = run("prepare_data.py", "check", "--root", ms3_tree)
    assert done.returncode == 0, done.stdout
    assert "0 errors, 0 warnings" in done.stdout
    assert "MS3: 36 clips, train 24, val 4, test 8" in done.stdout


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
    assert done.returncode == 0, done.stdout
    assert f"the source video {second.source} is in test and train; runs" in done.stdout


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
    assert counted(s4, "s4")[0] == "S4: 4932 clips, train 3452, val 740, test 740"
    assert counted(ms3, "ms3") == ["MS3: 424 clips, train 296, val 64, test 64"]
    assert len(counted(s4, "s4")) == 24
