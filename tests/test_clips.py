"""The readers of pictures and tables, the names of clips, the lock."""

import multiprocessing
import os
import shutil

import numpy as np
import pytest
from conftest import SHARED, real
from PIL import Image

from atlas import clips
from atlas.clips import (
    built_beside,
    locked,
    read_frame,
    read_mask,
    read_s4,
    read_table,
)
from atlas.errors import AtlasError

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
MASK = np.zeros((8, 12), bool)
MASK[2:5, 3:11] = True
WHITE = np.uint8(MASK) * 255


def with_alpha(mode, alpha):
    """COLOURS, or its first channel, with one `alpha` everywhere."""
    image = Image.fromarray(COLOURS if mode == "RGBA" else GREY).convert(mode)
    image.putalpha(alpha)
    return image


def palette(indices, colours):
    """A palette picture of `indices` [H, W] into grey `colours`."""
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette(np.repeat(np.array(colours, np.uint8), 3).tolist())
    return image


def turned(array, path):
    """Save `array` lying on its side, with the EXIF note that says so."""
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise by 90 degrees
    Image.fromarray(np.ascontiguousarray(np.rot90(array))).save(path, exif=exif)


def refuses(read, path, *words):
    with pytest.raises(AtlasError) as error:
        read(path)
    line = str(error.value)
    assert str(path) in line and all(word in line for word in words), line


# ---- frames --------------------------------------------------------------------------------------

grey_rgb = np.repeat(GREY[..., None], 3, 2)
FRAMES = {
    "rgb": (Image.fromarray(COLOURS), COLOURS),
    "grey": (Image.fromarray(GREY), grey_rgb),
    "grey of 16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257), grey_rgb),
    "opaque alpha": (with_alpha("RGBA", 255), COLOURS),
    "opaque grey alpha": (with_alpha("LA", 255), grey_rgb),
    "palette": (palette(GREY, GREY.ravel()[::-1]), 255 - grey_rgb),
    "one bit": (Image.fromarray(GREY > 100), (grey_rgb > 100) * np.uint8(255)),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_a_frame_means_the_same_in_any_mode(tmp_path, kind):
    image, right = FRAMES[kind]
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_frame(tmp_path / "a.png"), right)


def test_cmyk_and_exif_are_read_as_a_viewer_shows_them(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert np.abs(read_frame(tmp_path / "red.jpg") - np.array([255.0, 0, 0])).max() < 3
    turned(COLOURS, tmp_path / "a.png")
    np.testing.assert_array_equal(read_frame(tmp_path / "a.png"), COLOURS)


def test_frames_that_have_no_one_meaning_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    for mode in ("RGBA", "LA"):
        with_alpha(mode, 200).save(path)
        refuses(read_frame, path, "transparent")
    Image.fromarray(GREY).save(path, transparency=3)
    refuses(read_frame, path, "transparent")
    for kind in (np.int32, np.float32):
        Image.fromarray(GREY.astype(kind)).save(tmp_path / "a.tif")
        refuses(read_frame, tmp_path / "a.tif", "32 bits")
    for name in ("a.gif", "a.png", "a.webp"):
        other = Image.fromarray(255 - GREY)
        Image.fromarray(GREY).save(tmp_path / name, save_all=True, append_images=[other])
        refuses(read_frame, tmp_path / name, "2 frames")
    monkeypatch.setattr(clips, "PIXELS", 255)
    Image.fromarray(GREY).save(path)
    refuses(read_frame, path, "too large")


@pytest.mark.parametrize("read", [read_frame, read_mask])
def test_what_is_no_picture_is_named(tmp_path, read):
    path = tmp_path / "a.png"
    refuses(read, path, "is missing")
    refuses(read, tmp_path, "directory")
    for content, word in (
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not readable"),
    ):
        path.write_bytes(content)
        refuses(read, path, word)
    Image.fromarray(COLOURS).save(path)
    whole = path.read_bytes()
    for length in (len(whole) // 2, 30, 10):
        path.write_bytes(whole[:length])
        refuses(read, path, "not readable")


# ---- masks ---------------------------------------------------------------------------------------

MASKS = {
    "0 and 255": Image.fromarray(WHITE),
    "0 and 1": Image.fromarray(np.uint8(MASK)),
    "one bit": Image.fromarray(MASK),
    "16 bits, 0 and 65535": Image.fromarray(np.uint16(MASK) * 65535),
    "16 bits, 0 and 1": Image.fromarray(np.uint16(MASK)),
    "rgb": Image.fromarray(WHITE).convert("RGB"),
    "opaque alpha": Image.fromarray(WHITE).convert("RGBA"),
    "palette of black and white": palette(MASK, [0, 255]),
    "palette of white and black": palette(~MASK, [255, 0]),
    "palette of 0 and 1": palette(MASK, [0, 1]),
    "palette of all greys": palette(WHITE, range(256)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_means_the_same_in_any_mode(tmp_path, kind):
    MASKS[kind].save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), MASK)


def test_constant_masks_and_turned_masks(tmp_path):
    path = tmp_path / "m.png"
    for value, kind in ((0, np.uint8), (1, np.uint8), (255, np.uint8), (65535, np.uint16)):
        Image.fromarray(np.full((4, 4), value, kind)).save(path)
        assert (read_mask(path) == (value > 0)).all()
    turned(WHITE, path)
    np.testing.assert_array_equal(read_mask(path), MASK)


def sixteen(array, path):
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""
    import struct
    import zlib

    def chunk(kind, data):
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_colours_of_16_bits_are_scaled_in_a_frame_and_refused_in_a_mask(tmp_path):
    path = tmp_path / "a.png"
    sixteen(COLOURS.astype(np.uint16) * 257, path)
    np.testing.assert_array_equal(read_frame(path), COLOURS)
    sixteen(np.repeat(np.uint16(MASK)[..., None] * 200, 3, 2), path)  # looks empty in 8 bits
    refuses(read_mask, path, "colours")


def test_masks_that_are_not_binary_are_refused(tmp_path):
    path = tmp_path / "m.png"
    for values in ([0, 128, 255], [0, 1, 255], [130, 130, 130], [1, 255, 255]):
        Image.fromarray(np.array([values], np.uint8)).save(path)
        refuses(read_mask, path, "holds the values")
    for values in ([400, 60000], [0, 60000], [255, 65535]):
        Image.fromarray(np.array([values], np.uint16)).save(path)
        refuses(read_mask, path, "holds the values")
    palette(MASK, [0, 128]).save(path)
    refuses(read_mask, path, "holds the values")
    Image.fromarray(COLOURS).save(path)
    refuses(read_mask, path, "colours")
    image = Image.fromarray(WHITE).convert("RGBA")
    image.putalpha(Image.fromarray(WHITE))
    image.save(path)
    refuses(read_mask, path, "transparent")
    Image.fromarray(GREY).save(tmp_path / "m.jpg")
    refuses(read_mask, tmp_path / "m.jpg", "holds the values")


# ---- tables --------------------------------------------------------------------------------------

ROWS = [{"name": "a", "split": "train"}, {"name": "b, c", "split": ""}]
TABLES = {
    "plain": b'name,split\na,train\n"b, c",\n',
    "windows": b'name,split\r\na,train\r\n"b, c",\r\n',
    "blanks": b' name ,split\n\n a, train\n,\n"b, c", \n\n',
    "utf-8 with a mark": b'\xef\xbb\xbfname,split\na,train\n"b, c",\n',
    "semicolons": b"name;split\na;train\nb, c;\n",
    "tabs, utf-16": "name\tsplit\na\ttrain\nb, c\t\n".encode("utf-16"),
    "empty columns behind": b'name,split,,\na,train,,\n"b, c",,,\n',
    "longer rows of blanks": b'name,split\na,train,,\n"b, c",\n',
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_means_the_same_as_any_program_writes_it(tmp_path, kind):
    path = tmp_path / "t.csv"
    path.write_bytes(TABLES[kind])
    found = read_table(path, ("name", "split"))
    assert [{name: row[name] for name in ("name", "split")} for row in found] == ROWS


@pytest.mark.parametrize(
    "content, words",
    [
        (b"name,class\na,b\n", ["name, class", "split"]),
        (b"name,split,split\na,b,c\n", ["split"]),
        (b"name,split\na,train\n\nb\n", ["line 4", "1 values in 2 columns"]),
        (b"name,split\na,train,b\n", ["line 2", "3 values in 2 columns"]),
        (b'name,split\n"a,train\nb,test\n', ["line 3"]),
        (b"name,split\n\xe9,train\n", ["UTF-8"]),
        (b"name,split\n", ["0 rows"]),
        (b" \n\n", ["empty"]),
        (b"\x89PNG\r\n\x1a\n\0\0", ["UTF-8"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, content, words):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    refuses(lambda path: read_table(path, ("name", "split")), path, *words)


def test_a_table_of_clips_holds_names_splits_and_each_id_once(tmp_path):
    with pytest.raises(AtlasError, match="data_root"):
        read_s4(tmp_path)
    (tmp_path / "Single-source").mkdir()
    table = tmp_path / clips.CSVS["s4"]
    for rows, word in (
        ("x,0,dog,dev", "'dev'"),
        ("../x,0,dog,train", "plain file name"),
        ("x,0,,train", "plain file name"),
        ("x,0,dog,train\nx,0,cat,val", "x: its id stands twice"),
    ):
        table.write_text(f"name,start,category,split\n{rows}\n")
        with pytest.raises(AtlasError, match=word):
            read_s4(tmp_path)


def test_only_names_of_avsbenchs_form_are_cut():
    for name, source in {
        "0d9u2CymIxc": "0d9u2CymIxc",
        "xv7eM6-UmkY_36": "xv7eM6-UmkY",
        "__GOGlHL23s_4000_9000": "__GOGlHL23s",
        "m2000000003_2": "m2000000003",
        "playing_guitar_1": "playing_guitar_1",
        "barking_dog_1": "barking_dog_1",
        "recording_0001": "recording_0001",
        "0d9u2CymIxc_take": "0d9u2CymIxc_take",
        "baby_dog_2_1": "baby_dog_2_1",
    }.items():
        assert clips.ms3_clip("r", name, "val").source == source


@real
def test_the_released_csv_reads_with_its_published_counts(tmp_path):
    (tmp_path / "Single-source").mkdir()
    shutil.copy(SHARED / "avsbench_meta" / "s4_meta_data.csv", tmp_path / "Single-source")
    found = read_s4(tmp_path)
    counts = [sum(clip.split == split for clip in found) for split in clips.SPLITS]
    assert counts == [3452, 740, 740]
    assert len({c.category for c in found}) == 23 and len({c.source for c in found}) == 4932


# ---- locks and folders ---------------------------------------------------------------------------


def test_a_lock_holds_against_another_process_until_the_file_is_closed(tmp_path):
    def try_it(told):
        try:
            locked(tmp_path / "l", "it is in use")
            told.put("it is free")
        except AtlasError as error:
            told.put(str(error))

    def other():
        forked = multiprocessing.get_context("fork")
        told = forked.SimpleQueue()
        child = forked.Process(target=try_it, args=(told,))
        child.start()
        child.join()
        return told.get()

    with locked(tmp_path / "l"):
        assert other() == "it is in use"
    assert other() == "it is free"


def test_where_no_lock_is_to_be_had_a_line_says_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(clips.fcntl, "lockf", refuse)
    with pytest.raises(AtlasError, match="cannot lock .*Function not implemented.*choose"):
        locked(tmp_path / "l")


def test_the_loser_of_two_builders_uses_the_winners(tmp_path):
    with built_beside(tmp_path / "x") as mine:
        (mine / "who").write_text("loser")
        os.mkdir(tmp_path / "x")
        (tmp_path / "x" / "who").write_text("winner")
    assert (tmp_path / "x" / "who").read_text() == "winner"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
