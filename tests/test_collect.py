"""A stock from folders as they are downloaded: VOC, COCO, DAVIS, ESC-50 and folders of sounds."""

import csv
import json

import numpy as np
import pytest
import soundfile
from conftest import SHARED, run
from PIL import Image
from test_stock import flat_picture, made

from atlas.clips import read_mask
from atlas.errors import AtlasError
from atlas.prepare import collect
from atlas.prepare.collect import CLASS_MAP, VOC, fill_stock, read_class_map
from atlas.prepare.stock import check_stock, read_rows, read_stock

DOMAINS = {  # OpenAVS: what is to be heard
    "human": "person",
    "animal": "bird cat cow dog elephant horse rooster sheep",
    "vehicle": "aeroplane bus car helicopter motorbike train",
    "instrument": "guitar saxophone",
    "tool": "clock",
}


def palette_mask(path, boxes, size=(96, 80)):
    """Boxes {value: (x0, y0, x1, y1)} as palette indices; the colours are of no meaning."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    for value, (x0, y0, x1, y1) in boxes.items():
        mask[y0:y1, x0:x1] = value
    image = Image.fromarray(mask)
    image.putpalette([v for k in range(256) for v in (k, 255 - k, 7 * k % 256)])
    image.save(made(path))


def voc(root):
    """A dog with a void border, a dog and a cow, a bird that is a speck, dogs, and sofas."""
    dog, cow, bird, sofa = (VOC.index(name) for name in ("dog", "cow", "bird", "sofa"))
    left, right = (8, 10, 44, 70), (50, 10, 88, 70)
    pictures = {
        "2007_000001": {255: (4, 6, 48, 74), dog: left},
        "2007_000002": {dog: left, cow: right},
        "2007_000003": {bird: (0, 0, 8, 8), cow: right},
        "2007_000005": {dog: left},
        "2007_000006": {dog: right},
        "2007_000004": {sofa: left},
    }
    for k, (stem, boxes) in enumerate(pictures.items()):
        palette_mask(root / "SegmentationClass" / f"{stem}.png", boxes)
        flat_picture({}, k).save(made(root / "JPEGImages" / f"{stem}.jpg"))
    return root


def coco(root):
    """A horse of two polygons, a crowd of people, an RLE dog, a chair, and a lost picture."""

    def square(x, y, side):
        return [x, y, x + side, y, x + side, y + side, x, y + side]

    def region(image, category, segmentation, crowd=0):
        return {
            "image_id": image,
            "category_id": category,
            "segmentation": segmentation,
            "iscrowd": crowd,
        }

    rle = {"counts": [0, 7680], "size": [80, 96]}
    data = {
        "categories": [
            {"id": 1, "name": "person"},
            {"id": 18, "name": "dog"},
            {"id": 19, "name": "horse"},
            {"id": 62, "name": "chair"},
        ],
        "images": [
            {"id": k, "file_name": f"{k:012d}.jpg", "width": 96, "height": 80} for k in range(1, 7)
        ],
        "annotations": [
            region(1, 19, [square(10, 10, 30), square(60, 10, 20)]),
            region(1, 1, [square(0, 60, 6)]),
            region(1, 62, rle, 1),  # of no class of the map
            region(2, 18, [square(10, 10, 40)]),
            region(2, 1, rle, 1),
            region(3, 18, rle),
            region(4, 62, [square(10, 10, 40)]),
            region(5, 18, [square(10, 10, 40)]),
            region(6, 18, [square(10, 10, 40), [1, 1, 5, 5]]),
        ],
    }
    file = made(root / "annotations" / "instances_val2017.json")
    file.write_text(json.dumps(data))
    for k in (1, 2, 3, 4, 6):
        flat_picture({}, 100 + k).save(made(root / "val2017" / f"{k:012d}.jpg"))
    return root


def davis(root):
    """A scooter of 2016 (0 and 255), cows of 2017 (an index an object), and what nobody knows."""
    for name, values in {"scooter-gray": [255], "cows": [1, 2], "unknown": [1]}.items():
        for t in range(9):
            boxes = {v: (4 * t + 20 * k, 20, 4 * t + 20 * k + 25, 60) for k, v in enumerate(values)}
            path = f"480p/{name}/{t:05d}"
            palette_mask(root / "Annotations" / f"{path}.png", boxes)
            flat_picture({}, t).save(made(root / "JPEGImages" / f"{path}.jpg"))
    return root


def esc(root):
    """Two takes of a dog, a rooster, a helicopter that is lost, and rain."""
    rows = [
        ("1-100-A-0.wav", "dog", "100"),
        ("1-100-B-0.wav", "dog", "100"),
        ("2-200-A-1.wav", "rooster", "200"),
        ("3-300-A-40.wav", "helicopter", "300"),
        ("4-400-A-10.wav", "rain", "400"),
    ]
    for k, (name, _, _) in enumerate(rows):
        if "300" not in name:
            wave = np.random.default_rng(k).normal(0, 0.1, 8000)
            soundfile.write(made(root / "audio" / name), wave, 16000)
    with open(made(root / "meta" / "esc50.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
        writer.writerows([name, 1, 0, what, False, source, "A"] for name, what, source in rows)
    return root


def sounds(root):
    for k, name in enumerate(
        ("guitar/a.wav", "Acoustic_guitar/b.flac", "clock/c.WAV", "dog/d.txt")
    ):
        path = made(root / name)
        if path.suffix == ".txt":
            path.write_text("no sound")
        else:
            soundfile.write(path, np.random.default_rng(k + 9).normal(0, 0.1, 8000), 16000)
    return root


def test_voc_masks_are_palette_indices_and_void_is_nothing(tmp_path):
    added, left, missing = fill_stock(tmp_path / "stock", {"voc": voc(tmp_path / "voc")})
    assert added == {("dog", "pictures"): 4, ("cow", "pictures"): 2, ("sofa", "pictures"): 1}
    assert left == {"pictures in which the class is small": 1} and not missing
    rows = read_rows(tmp_path / "stock", "pictures")
    assert rows["dog", "voc_2007_000002"]["also"] == "cow"
    assert rows["cow", "voc_2007_000003"]["also"] == "bird"
    assert rows["dog", "voc_2007_000002"]["source"] == rows["cow", "voc_2007_000002"]["source"]
    mask = read_mask(tmp_path / "stock" / "masks" / "dog" / "voc_2007_000001.png")
    expected = np.zeros((80, 96), bool)
    expected[10:70, 8:44] = True
    assert np.array_equal(mask, expected)


def test_coco_polygons_are_filled_and_crowds_left_out(tmp_path):
    added, left, _ = fill_stock(tmp_path / "stock", {"coco": coco(tmp_path / "coco")})
    assert added == {("horse", "pictures"): 1, ("dog", "pictures"): 1}
    assert left == {
        "COCO pictures with a crowd or RLE region": 2,
        "COCO pictures that are not there": 1,
        "pictures in which the class is small": 1,
    }
    rows = read_rows(tmp_path / "stock", "pictures")
    assert rows["horse", "coco_1"]["also"] == "person"
    assert rows["horse", "coco_1"]["path"] == "val2017/000000000001.jpg"
    mask = read_mask(tmp_path / "stock" / "masks" / "horse" / "coco_1.png")
    assert mask[10:40, 10:40].all() and mask[10:30, 60:80].all()
    assert abs(mask.sum() - 30**2 - 20**2) < 120  # the border itself is Pillow's


def test_davis_sequences_are_videos(tmp_path):
    stock = tmp_path / "stock"
    added, left, _ = fill_stock(stock, {"davis": davis(tmp_path / "davis")})
    assert added == {("motorbike", "pictures"): 1, ("cow", "pictures"): 1}
    assert left == {"DAVIS videos of no known class": 1}
    pictures, _ = read_stock(stock)
    cows, scooter = pictures
    assert [len(cows.files), len(cows.masks), scooter.also] == [5, 5, {"person", "car"}]
    mask = read_mask(cows.masks[1])  # the third of nine frames: both objects are one mask
    assert mask[20:60, 8:53].all() and mask.sum() == 40 * 45
    assert [cows.source, scooter.source] == ["davis_cows", "davis_scooter-gray"]


def test_esc_takes_share_their_source(tmp_path):
    stock = tmp_path / "stock"
    added, left, _ = fill_stock(stock, {"esc": esc(tmp_path / "esc")})
    assert added == {("dog", "sounds"): 2, ("rooster", "sounds"): 1}
    assert left == {"ESC-50 sounds that are not there": 1}
    assert {s.source for s in read_stock(stock)[1] if s.category == "dog"} == {"esc_100"}
    copied = (stock / "sounds" / "dog" / "esc_1-100-A-0.wav").read_bytes()
    assert copied == (tmp_path / "esc" / "audio" / "1-100-A-0.wav").read_bytes()


def test_a_stock_grows_and_nothing_is_overwritten(tmp_path):
    stock = tmp_path / "stock"
    fill_stock(stock, {"sounds": sounds(tmp_path / "mine")})
    assert {(s.category, s.source) for s in read_stock(stock)[1]} == {
        ("guitar", "mine_a"),
        ("guitar", "mine_b"),
        ("clock", "mine_c"),
    }
    fill_stock(stock, {"voc": voc(tmp_path / "voc")})
    rows = (stock / "pictures.csv").read_text().replace("cow,drawn", "cow horse,made")
    (stock / "pictures.csv").write_text(rows)
    picture = stock / "pictures" / "dog" / "voc_2007_000002.jpg"
    picture.write_bytes(b"mine")
    folders = {
        "voc": tmp_path / "voc",
        "coco": coco(tmp_path / "coco"),
        "esc": esc(tmp_path / "esc"),
    }
    added, _, _ = fill_stock(stock, folders)
    assert added == {
        ("horse", "pictures"): 1,
        ("dog", "pictures"): 1,
        ("dog", "sounds"): 2,
        ("rooster", "sounds"): 1,
    }
    assert picture.read_bytes() == b"mine"
    assert read_rows(stock, "pictures")["dog", "voc_2007_000002"]["also"] == "cow horse"
    assert len(read_rows(stock, "sounds")) == 6


def test_no_more_than_the_most(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "MOST", 1)
    added, left, _ = fill_stock(tmp_path / "stock", {"voc": voc(tmp_path / "voc")})
    assert added["dog", "pictures"] == added["cow", "pictures"] == 1
    assert left["pictures of a class above 1"] == 4


def test_a_list_takes_what_it_names_and_says_what_is_missing(tmp_path):
    (tmp_path / "lists").mkdir()
    head = "class,picture,source,also,mask,dataset,repository,path\n"
    (tmp_path / "lists" / "p.csv").write_text(
        head
        + "dog,voc_2007_000002.jpg,photo,cow person,drawn,VOC photo,a/b@1,images/2.jpg\n"
        + "horse,coco_1.png,coco_1,,drawn,COCO,,val2017/1.jpg\n"
        + "clock,caltech_1.jpg,caltech_1,,made,Caltech-101,,watch/1.jpg\n"
    )
    (tmp_path / "lists" / "s.csv").write_text(
        "class,sound,source,dataset,repository,path\n"
        + "dog,esc10_100.ogg,esc10_100,ESC-10,karolpiczak/ESC-10@5,001 - Dog bark/1-100-A.ogg\n"
        + "guitar,x_b.ogg,x_b,some,me/mine@9,Acoustic_guitar/b.flac\n"
        + "clock,x_c.ogg,x_c,some,me/mine@9,clock/other.wav\n"
    )
    folders = {"voc": voc(tmp_path / "voc"), "coco": coco(tmp_path / "coco")}
    folders |= {"esc": esc(tmp_path / "esc")}
    sounds(tmp_path / "all" / "mine")
    folders["sounds"] = tmp_path / "all"
    lists = [tmp_path / "lists" / "p.csv", tmp_path / "lists" / "s.csv"]
    added, _, missing = fill_stock(tmp_path / "stock", folders, lists)
    assert added.total() == 4
    assert [row["source"] for row in missing] == ["caltech_1", "x_c"]
    rows = read_rows(tmp_path / "stock", "pictures")
    row = rows["dog", "voc_2007_000002"]
    assert (row["source"], row["also"], row["repository"]) == ("photo", "cow person", "a/b@1")
    rows = read_rows(tmp_path / "stock", "sounds")
    assert rows["dog", "esc10_100"]["sound"] == "esc10_100.wav"
    assert (tmp_path / "stock" / "sounds" / "guitar" / "x_b.flac").is_file()
    assert not check_stock(tmp_path / "stock")[1]


def lose_picture(root):
    (root / "JPEGImages" / "2007_000002.jpg").unlink()


def break_mask(root):
    (root / "SegmentationClass" / "2007_000002.png").write_bytes(b"no image")


def objects_for_classes(root):
    palette_mask(root / "SegmentationClass" / "2007_000002.png", {33: (8, 10, 44, 70)})


def colour_mask(root):
    Image.new("RGB", (96, 80)).save(root / "SegmentationClass" / "2007_000002.png")


def other_size(root):
    palette_mask(root / "SegmentationClass" / "2007_000002.png", {12: (0, 0, 9, 9)}, (10, 10))


@pytest.mark.parametrize(
    "spoil", [lose_picture, break_mask, objects_for_classes, colour_mask, other_size]
)
def test_a_broken_voc_folder_is_named_and_the_tables_tell_what_was_done(tmp_path, spoil):
    spoil(voc(tmp_path / "voc"))
    with pytest.raises(AtlasError, match="2007_000002") as error:
        fill_stock(tmp_path / "stock", {"voc": tmp_path / "voc"})
    assert "\n" not in str(error.value)
    pictures, _ = read_stock(tmp_path / "stock")
    assert len(pictures) == len(read_rows(tmp_path / "stock", "pictures")) == 1
    voc(tmp_path / "voc")
    fill_stock(tmp_path / "stock", {"voc": tmp_path / "voc"})
    assert len(read_rows(tmp_path / "stock", "pictures")) == 7
    assert not check_stock(tmp_path / "stock")[1]


@pytest.mark.parametrize(
    "key, said",
    [
        ("voc", "no SegmentationClass"),
        ("coco", "no annotations/instances_"),
        ("davis", "no Annotations/480p"),
        ("esc", "esc50.csv"),
    ],
)
def test_a_folder_of_something_else_is_said(tmp_path, key, said):
    with pytest.raises(AtlasError, match=said):
        fill_stock(tmp_path / "stock", {key: tmp_path})
    with pytest.raises(AtlasError, match=f"no .* in .*none: check --{key}"):
        fill_stock(tmp_path / "stock", {key: tmp_path / "none"})
    with pytest.raises(AtlasError, match="one of --voc"):
        fill_stock(tmp_path / "stock", {})
    assert not (tmp_path / "stock").exists()


def test_a_list_names_no_file_outside_the_stock(tmp_path):
    head = "class,sound,source,dataset,repository,path\n"
    (tmp_path / "s.csv").write_text(head + "../cow,x.wav,x,some,,guitar/a.wav\n")
    folders = {"sounds": sounds(tmp_path / "mine")}
    with pytest.raises(AtlasError, match="'../cow'"):
        fill_stock(tmp_path / "stock", folders, lists=[tmp_path / "s.csv"])


REGION = (
    '{"categories": [{"id": 1, "name": "dog"}], "images": [{"id": 1, "width": %s, "height": 9, '
    '"file_name": "1.jpg"}], '
    '"annotations": [{"category_id": 1, "image_id": 1, "segmentation": %s}]}'
)
BROKEN = ["{", "[]", "[" * 10**5, '{"images": [{}]}', '{"categories": [{"id": 1}]}']
BROKEN += [REGION % ('"wide"', "[]"), REGION % ("9", '[["x", 1, 2, 3, 4, 5]]')]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_coco_file_is_named(tmp_path, text):
    made(tmp_path / "annotations" / "instances_val2017.json").write_text(text)
    with pytest.raises(AtlasError, match="instances_val2017.json is not COCO's"):
        fill_stock(tmp_path / "stock", {"coco": tmp_path})


def test_the_class_map_has_all_classes(tmp_path):
    names = read_class_map(CLASS_MAP)
    heard = " ".join(DOMAINS.values()).split()
    assert len(heard) == 18 and set(heard) <= set(names)
    for kind in ("voc", "coco", "davis", "esc"):
        members = [member for entry in names.values() for member in entry[kind]]
        assert len(set(members)) == len(members)
    for name in heard:
        entry = names[name]
        assert entry["voc"] or entry["coco"] or name in (
            "rooster", "helicopter", "guitar", "saxophone",
        )  # fmt: skip
    for text in ("dog: {voc: [dogs]}", "dog: {vocc: [dog]}", "- dog", "a: [", "dog: {voc: dog}"):
        (tmp_path / "map.yaml").write_text(text)
        with pytest.raises(AtlasError, match="class map"):
            read_class_map(tmp_path / "map.yaml")


def test_it_is_a_command(tmp_path):
    words = ["--voc", voc(tmp_path / "voc"), "--esc", esc(tmp_path / "esc")]
    done = run("prepare_data.py", "collect", *words, "--out", tmp_path / "stock")
    assert done.returncode == 0, done.stderr
    for line in ("dog: 4 pictures added", "dog: 2 sounds added", "stock: 10 files added"):
        assert f"{line}\n" in done.stdout
    lists = [tmp_path / "stock" / "pictures.csv", tmp_path / "stock" / "sounds.csv"]
    done = run(
        "prepare_data.py", "collect", *words[:2], "--out", tmp_path / "two", "--list", *lists
    )
    assert done.returncode == 0, done.stderr
    assert "missing: dog/esc_1-100-A-0.wav (ESC-50, audio/1-100-A-0.wav)" in done.stdout
    assert done.stdout.endswith("two: 7 files added, 3 of the list missing\n")


@pytest.mark.skipif(not (SHARED / "openavs").is_dir(), reason="no real data beside the project")
def test_real_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "MOST", 5)
    added, left, _ = fill_stock(tmp_path / "stock", {"voc": SHARED / "openavs" / "VOC2012"})
    assert added["person", "pictures"] == added["dog", "pictures"] == 5
    assert not check_stock(tmp_path / "stock")[1]
