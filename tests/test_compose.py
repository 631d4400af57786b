"""Open AVS sets: sources never cross splits, truth is every pixel of the heard class, the silent picture has none of it."""
import csv
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from atlas.clips import SPLITS, s4_clip
from atlas.compose import compose_s4
from atlas.scan import VOC, load_sound, read_class_map
from atlas.errors import AtlasError

OPENAVS = Path(__file__).parents[2] / "shared" / "openavs"
COLOUR = {"dog": (220, 30, 30), "cat": (30, 220, 30), "cow": (30, 30, 220), "bird": (220, 220, 30), "sofa": (220, 30, 220)}
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
    image.putpalette([v for k in range(256) for v in (k, 255 - k, 7 * k % 256)])  # so that converting it to RGB or L would be seen
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
            flat_picture(folder, f"cat-walk{k}_a/{t:05d}", {"cat": (16 + 6 * t, 20, 46 + 6 * t, 70)}, (128, 80), "Annotations/480p", 1 + 254 * (k % 2))
    flat_picture(folder, "nobody-knows/00000", {"cow": (30, 20, 66, 64)}, (128, 80), "Annotations/480p", 1)
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
                soundfile.write(folder / "audio" / file, rng.normal(0, 0.01 * (k + 1), (int(rate * seconds), channels)), rate)
                rows.append([file, 1, 0, category, False, f"{category}{k}", take])
    with open(folder / "meta" / "esc50.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    root = tmp_path_factory.mktemp("flat")
    sources = {"voc": flat_voc(root / "voc"), "davis": flat_davis(root / "davis"), "esc": noise_esc(root / "esc")}
    settings = dict(**sources, clips=8, val=4, test=4, size=64, progress=False)
    return root, settings, compose_s4(root / "set", seed=3, **settings)


def bytes_of(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


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
    assert [r["name"] for r in rows] == [c["id"] for c in report["clips"]] and len({r["name"][:11] for r in rows}) == len(rows)
    assert Counter((r["category"], r["split"]) for r in rows) == {(c, s): n for c in ("cat", "cow", "dog") for s, n in zip(SPLITS, (8, 4, 4))}
    for row in rows:
        clip = s4_clip(root / "set", row["name"], row["category"], row["split"])
        assert len(list(Path(clip.masks[0]).parent.iterdir())) == (1 if row["split"] == "train" else 5)
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
            assert np.array_equal((mask > 0)[sure], heard[sure])  # all of it, no void, none of it in the silent half
            half = np.s_[:, :32] if entry["side"] == "left" else np.s_[:, 32:]
            assert (mask[half] > 0).sum() == (mask > 0).sum()


def test_pictures_videos_and_recordings_never_cross_splits(flat):
    _, _, report = flat
    assert_no_leak(report)
    sources = {clip["heard"]: clip["heard_source"] for clip in report["clips"]}
    assert {sources.get(f"cat-walk{k}_a", f"davis/cat-walk{k // 2}") for k in range(4)} == {"davis/cat-walk0", "davis/cat-walk1"}
    assert all(source == ("voc/" + name if name.startswith("2007") else "voc/" + name[:2]) for name, source in sources.items() if "walk" not in name)
    assert all(clip["recording"].split("-")[1] == clip["recording_source"] for clip in report["clips"])


def test_silent_pictures_come_from_the_same_pool(flat):
    _, _, report = flat
    silent, sides = Counter(c["silent_class"] for c in report["clips"]), Counter(c["side"] for c in report["clips"])
    assert silent["sofa"] + silent["bird"] < silent["dog"] + silent["cat"] + silent["cow"]
    assert {c["heard"] for c in report["clips"]} & {c["silent"] for c in report["clips"]}
    assert min(sides["left"], sides["right"]) > 0.25 * len(report["clips"])
    assert not [c for c in report["clips"] if c["class"] in ("dog", "cow") and "both" in c["silent"]]


def test_dropped_and_unknown_are_named(flat):
    _, _, report = flat
    assert set(report["kept"]) == {"cat", "cow", "dog"}
    assert "1 of the 3 picture sources" in report["dropped"]["bird"] and "0 of the 3 recordings" in report["dropped"]["sofa"]
    assert report["unknown"] == ["nobody-knows"]
    assert str(flat[0]) not in json.dumps(report)  # no absolute path


def test_seed_decides_everything(flat):
    root, settings, report = flat
    again, other = root / "again", root / "other"
    compose_s4(again, seed=3, **settings)
    differing = compose_s4(other, seed=4, **settings)
    assert bytes_of(again) == bytes_of(root / "set")
    splits = [{clip["heard_source"]: clip["split"] for clip in r["clips"]} for r in (report, differing)]
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
    report = compose_s4(tmp_path / "y", **settings | {"voc": tmp_path / "cats", "davis": None, "clips": 1, "val": None, "test": None})
    assert set(report["kept"]) == {"cat"} and {clip["silent_class"] for clip in report["clips"]} == {"sofa"}


def test_sounds_are_cut_looped_resampled_and_levelled(tmp_path):
    time = np.arange(44100) / 44100
    bark = np.concatenate([np.zeros(44100), np.sin(2 * np.pi * 1000 * time), np.zeros(3 * 44100)])
    soundfile.write(tmp_path / "bark.wav", np.stack([bark, bark], 1) * 0.3, 44100)
    wave = load_sound(tmp_path / "bark.wav")
    assert wave.shape == (80000,) and np.abs(np.fft.rfft(wave[16000:32000])).argmax() == 1000
    assert np.allclose([np.sqrt(np.mean(w**2)) for w in wave.reshape(5, -1)], 0.05, rtol=0.05)  # it sounds in every second
    soundfile.write(tmp_path / "none.wav", np.zeros(100), 16000)
    with pytest.raises(AtlasError, match="none.wav is silent"):
        load_sound(tmp_path / "none.wav")


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
    change = {key: root / v if key in ("voc", "esc", "class_map", "out") and v else v for key, v in change.items()}
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


def test_the_class_map_is_checked(tmp_path):
    for text, message in [("dog: {voc: [dogs]}", "VOC does not have"), ("dog: {vocc: [dog]}", "nothing else"), ("- dog", "expected"), ("a: [", "cannot")]:
        (tmp_path / "map.yaml").write_text(text)
        with pytest.raises(AtlasError, match=message):
            read_class_map(tmp_path / "map.yaml")


@pytest.mark.skipif(not OPENAVS.is_dir(), reason="the shared photos and sounds are not here")
def test_real_photos_and_sounds(tmp_path):
    report = compose_s4(tmp_path / "set", OPENAVS / "VOC2012", OPENAVS / "DAVIS", OPENAVS / "ESC-50", clips=4, size=64, progress=False)
    assert set(report["kept"]) == {"person", "car", "dog", "motorbike"}
    assert {"cow", "bird", "horse"} <= set(report["dropped"])
    assert_no_leak(report)
    for clip in report["clips"]:
        assert not (clip["silent"].startswith("scooter") and clip["class"] in ("person", "motorbike"))
