"""Reading the folders: which pictures show which class, what a source is, and sounds of one loudness. Also the small folders other tests compose from."""

import csv
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from atlas.errors import AtlasError
from atlas.prepare.scan import (
    VOC,
    load_sound,
    read_class_map,
    scan_davis,
    scan_esc,
    scan_voc,
    shown,
)
from atlas.prepare.stock import CLASS_MAP

COLOUR = {
    "dog": (220, 30, 30),
    "cat": (30, 220, 30),
    "cow": (30, 30, 220),
    "bird": (220, 220, 30),
    "sofa": (220, 30, 220),
}
BACKGROUND, VOID = (10, 10, 10), (250, 250, 250)
CATEGORY = {"dog": "dog", "cat": "cat", "cow": "cow", "bird": "crow"}


def flat_picture(folder, stem, boxes, size=(96, 80), mask_folder="SegmentationClass", value=None):
    """A picture of flat rectangles {class or "void": (x0, y0, x1, y1)}, each in its class's colour, and its palette mask."""
    frame = np.full((size[1], size[0], 3), BACKGROUND, np.uint8)
    mask = np.zeros((size[1], size[0]), np.uint8)
    for name, (x0, y0, x1, y1) in boxes.items():
        frame[y0:y1, x0:x1] = VOID if name == "void" else COLOUR[name]
        mask[y0:y1, x0:x1] = 255 if name == "void" else value or VOC.index(name)
    images = folder / "JPEGImages" / ("480p" if value else "") / Path(stem).parent
    masks = folder / mask_folder / Path(stem).parent
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(images / f"{Path(stem).name}.jpg", quality=95, subsampling=0)
    image = Image.fromarray(mask, mode="P")
    image.putpalette(
        [v for k in range(256) for v in (k, 255 - k, 7 * k % 256)]
    )  # so that converting it to RGB or L would be seen
    image.save(masks / f"{Path(stem).name}.png")


def flat_voc(folder):
    one = (30, 20, 66, 64)
    for k in range(5):
        flat_picture(folder, f"2007_{k:06d}", {"dog": one, "void": (66, 20, 76, 64)})
        flat_picture(folder, f"0{k}_cat0", {"cat": one, "void": (20, 20, 30, 40)})
        flat_picture(folder, f"0{k}_cat1", {"cat": one})  # a second crop of the same photo
    for k in range(3):
        flat_picture(folder, f"1{k}_both", {"dog": (18, 10, 46, 70), "cow": (50, 10, 78, 70)})
        flat_picture(folder, f"2{k}_sofa", {"sofa": one})  # seen, never heard
    flat_picture(folder, "30_bird", {"bird": one})  # one source: too few
    flat_picture(folder, "31_bird", {"bird": (0, 0, 12, 80)})  # at the border: does not show it
    return folder


def flat_davis(folder):
    for k in range(4):
        for t in range(7):
            flat_picture(
                folder,
                f"cat-walk{k}_a/{t:05d}",
                {"cat": (16 + 6 * t, 20, 46 + 6 * t, 70)},
                (128, 80),
                "Annotations/480p",
                1 + 254 * (k % 2),
            )
    flat_picture(
        folder, "nobody-knows/00000", {"cow": (30, 20, 66, 64)}, (128, 80), "Annotations/480p", 1
    )
    rows = [f"cat-walk{k}_a,cat,cat-walk{k // 2}" for k in range(4)]
    (folder / "classes.csv").write_text("\n".join(["sequence,class,video", *rows]) + "\n")
    return folder


def noise_esc(folder):
    rng = np.random.default_rng(0)
    rows = [["filename", "fold", "target", "category", "esc10", "src_file", "take"]]
    (folder / "audio").mkdir(parents=True)
    (folder / "meta").mkdir()
    for name, category in [*CATEGORY.items(), ("", "helicopter")]:
        for k in range(4):
            for take in "AB":  # two takes of one recording
                file = f"1-{category}{k}-{take}-0.wav"
                channels, rate, seconds = [(2, 44100, 1.5), (1, 16000, 6)][k % 2]
                soundfile.write(
                    folder / "audio" / file,
                    rng.normal(0, 0.01 * (k + 1), (int(rate * seconds), channels)),
                    rate,
                )
                rows.append([file, 1, 0, category, False, f"{category}{k}", take])
    with open(folder / "meta" / "esc50.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_pictures_tell_what_they_contain_show_and_come_from(tmp_path):
    pictures = {
        p.name: p for p in scan_voc(flat_voc(tmp_path), read_class_map(CLASS_MAP), progress=False)
    }
    both, border = pictures["10_both"], pictures["31_bird"]
    assert both.contains == both.shows == {"dog", "cow"} and both.values == {
        "dog": [VOC.index("dog")],
        "cow": [VOC.index("cow")],
    }
    assert border.contains == {"bird"} and not border.shows  # at the border, so no fair target
    assert {pictures[name].source for name in ("00_cat0", "00_cat1")} == {"voc/00"} and pictures[
        "2007_000003"
    ].source == "voc/2007_000003"
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Segmentation" / "trainval.txt").write_text(
        "00_cat0\n10_both\nnot_there\n"
    )
    assert [p.name for p in scan_voc(tmp_path, read_class_map(CLASS_MAP), progress=False)] == [
        "00_cat0",
        "10_both",
    ]


def test_videos_are_five_frames_of_one_class(tmp_path):
    unknown = []
    videos = scan_davis(flat_davis(tmp_path), read_class_map(CLASS_MAP), unknown, progress=False)
    assert unknown == ["nobody-knows"]
    assert [v.source for v in videos] == [
        "davis/cat-walk0",
        "davis/cat-walk0",
        "davis/cat-walk1",
        "davis/cat-walk1",
    ]
    assert [path.stem for path in videos[0].frames] == [
        "00000",
        "00002",
        "00003",
        "00004",
        "00006",
    ]  # of seven
    (tmp_path / "classes.csv").write_text(
        "sequence,class,video\nnobody-knows,scooter-gray,scooter-gray\ncat-walk0_a,cat,scooter-gray\n"
    )
    carried = scan_davis(tmp_path, read_class_map(CLASS_MAP), [], progress=False)[0]
    assert carried.contains == {
        "cat",
        "person",
        "car",
    }  # what the map says the video carries without a label


def test_recordings_of_known_categories_only(tmp_path):
    recordings = scan_esc(noise_esc(tmp_path), read_class_map(CLASS_MAP))
    assert len(recordings) == 32 and {name for _, _, name in recordings} == set(
        CATEGORY
    )  # no helicopter
    assert ("1-crow2-A-0.wav", "crow2", "bird") in [
        (path.name, source, name) for path, source, name in recordings
    ]
    recordings[0][0].unlink()
    with pytest.raises(AtlasError, match="is missing, though meta/esc50.csv names it .1 such"):
        scan_esc(tmp_path, read_class_map(CLASS_MAP))


def test_shown_means_a_tenth_of_the_middle_and_never_out_of_sight():
    mask = np.zeros((5, 80, 80), bool)
    mask[:, :80, 20:24] = True  # a tenth of columns 20 to 59
    assert shown(mask)
    assert not shown(np.roll(mask, -20, axis=2))  # the same, at the border
    mask[4] = False
    mask[:4, :, 20:40] = True
    assert not shown(mask)  # gone in one frame


@pytest.mark.parametrize("spoil, message", [
    (lambda voc: (voc / "JPEGImages" / "10_both.jpg").unlink(), "10_both.jpg is missing, though"),
    (lambda voc: (voc / "SegmentationClass" / "10_both.png").write_bytes(b"no image"), "cannot read the mask .*10_both.png"),
    (lambda voc: Image.fromarray(np.full((80, 96), 33, np.uint8)).save(voc / "SegmentationClass" / "10_both.png"), "value 33 is no VOC class"),
    (lambda voc: Image.fromarray(np.zeros((80, 96, 3), np.uint8)).save(voc / "SegmentationClass" / "10_both.png"), "RGB image; a mask must be"),
])  # fmt: skip
def test_a_broken_folder_is_named_in_one_line(tmp_path, spoil, message):
    spoil(flat_voc(tmp_path))
    with pytest.raises(AtlasError, match=message) as error:
        scan_voc(tmp_path, read_class_map(CLASS_MAP), progress=False)
    assert "\n" not in str(error.value)


def test_sounds_are_cut_looped_resampled_and_levelled(tmp_path):
    time = np.arange(44100) / 44100
    bark = np.concatenate([np.zeros(44100), np.sin(2 * np.pi * 1000 * time), np.zeros(3 * 44100)])
    soundfile.write(tmp_path / "bark.wav", np.stack([bark, bark], 1) * 0.3, 44100)
    wave = load_sound(tmp_path / "bark.wav")
    assert wave.shape == (80000,) and np.abs(np.fft.rfft(wave[16000:32000])).argmax() == 1000
    assert np.allclose(
        [np.sqrt(np.mean(w**2)) for w in wave.reshape(5, -1)], 0.05, rtol=0.05
    )  # it sounds in every second
    soundfile.write(tmp_path / "none.wav", np.zeros(100), 16000)
    with pytest.raises(AtlasError, match="none.wav is silent"):
        load_sound(tmp_path / "none.wav")


def test_the_class_map_is_checked(tmp_path):
    for text, message in [
        ("dog: {voc: [dogs]}", "VOC does not have"),
        ("dog: {vocc: [dog]}", "nothing else"),
        ("- dog", "expected"),
        ("a: [", "cannot"),
    ]:
        (tmp_path / "map.yaml").write_text(text)
        with pytest.raises(AtlasError, match=message):
            read_class_map(tmp_path / "map.yaml")
