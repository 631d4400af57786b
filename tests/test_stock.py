"""A stock of folders by class: reading it, and what its check finds. Makes one for other tests."""

import csv
import shutil

import numpy as np
import pytest
import soundfile
from conftest import run
from PIL import Image

from atlas.errors import AtlasError
from atlas.prepare.stock import COLUMNS, check_stock, read_rows, read_stock
from atlas.prepare.tree import write_table

COLOUR = {
    "dog": (220, 30, 30),
    "cat": (30, 220, 30),
    "cow": (30, 30, 220),
    "bird": (220, 220, 30),
    "sofa": (220, 30, 220),
}
BACKGROUND = (10, 10, 10)
BOX = (30, 20, 66, 64)


def flat_picture(boxes, number=0, size=(96, 80)):
    """A picture of flat rectangles {class: (x0, y0, x1, y1)} in their colours.

    The number decides the grey noise in a corner, so that no two pictures are the same.
    """
    frame = np.full((size[1], size[0], 3), BACKGROUND, np.uint8)
    frame[:8, :8] = np.random.default_rng(number).integers(0, 256, (8, 8, 1))
    for name, (x0, y0, x1, y1) in boxes.items():
        frame[y0:y1, x0:x1] = COLOUR[name]
    return Image.fromarray(frame)


def flat_mask(box, size=(96, 80)):
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 255
    return Image.fromarray(mask)


def made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Stock:
    """Writes a stock file by file."""

    def __init__(self, root):
        self.root = root
        self.rows = {"pictures": {}, "sounds": {}}
        self.rng = np.random.default_rng(0)

    def picture(self, category, name, boxes=None, source=None, also="", mask="drawn"):
        boxes = boxes or {category: BOX}
        picture = flat_picture(boxes, sum(name.encode()))
        picture.save(made(self.root / "pictures" / category / f"{name}.png"))
        flat_mask(boxes[category]).save(made(self.root / "masks" / category / f"{name}.png"))
        row = {"class": category, "picture": f"{name}.png", "source": source or name}
        self.rows["pictures"][category, name] = row | {"also": also, "mask": mask}

    def video(self, category, name, source):
        for k in range(7):
            box = (16 + 5 * k, 20, 46 + 5 * k, 70)
            frame = flat_picture({category: box}, sum(name.encode()))
            frame.save(made(self.root / "pictures" / category / name / f"{k:05d}.png"))
            flat_mask(box).save(made(self.root / "masks" / category / name / f"{k:05d}.png"))
        row = {"class": category, "picture": name, "source": source}
        self.rows["pictures"][category, name] = row

    def sound(self, category, name, source):
        rate, seconds, channels = [(44100, 1.5, 2), (16000, 6, 1)][len(self.rows["sounds"]) % 2]
        wave = self.rng.normal(0, 0.02, (int(rate * seconds), channels))
        soundfile.write(made(self.root / "sounds" / category / f"{name}.wav"), wave, rate)
        row = {"class": category, "sound": f"{name}.wav", "source": source}
        self.rows["sounds"][category, name] = row

    def tables(self):
        for kind, rows in self.rows.items():
            write_table(self.root / f"{kind}.csv", COLUMNS[kind], rows.values())
        return self.root


def flat_stock(root):
    """Dog, cat and cow of ten sources each; sofa is only seen, bird has too few."""
    stock = Stock(root)
    for k in range(9):
        stock.picture("dog", f"dog{k}", mask="made" if k % 2 else "drawn")
        stock.picture("cow", f"cow{k}")
        stock.picture("cat", f"cat{k}")
    for k in range(3):  # photos that show two classes and serve both
        boxes = {"dog": (18, 10, 46, 70), "cow": (50, 10, 78, 70)}
        stock.picture("dog", f"both{k}", boxes, also="cow")
        stock.picture("cow", f"both{k}", boxes, also="dog")
        stock.picture("sofa", f"sofa{k}")
    for k in range(2):  # two cuts of one video
        stock.video("cat", f"walk{k}", "walk")
        stock.picture("bird", f"bird{k}")
    for category in ("dog", "cat", "cow", "bird"):
        for k in range(10):
            stock.sound(category, f"{category}{k}_a", f"{category}_sound{k}")
        stock.sound(category, f"{category}0_b", f"{category}_sound0")  # a second take
    return stock.tables()


def test_a_stock_is_read_with_its_tables(tmp_path):
    pictures, sounds = read_stock(flat_stock(tmp_path))
    assert len(pictures) == 3 * 9 + 3 * 3 + 2 * 2
    found = {(item.category, item.name): item for item in pictures}
    both = found["cow", "both1.png"]
    assert both.source == found["dog", "both1.png"].source == "both1"
    assert both.also == {"dog"} and found["dog", "dog1.png"].mask == "made"
    walk = found["cat", "walk0"]
    assert walk.source == "walk" and walk.mask == "drawn"
    stems = ["00000", "00002", "00003", "00004", "00006"]  # five of seven, evenly
    assert [path.stem for path in walk.files] == [path.stem for path in walk.masks] == stems
    assert len(sounds) == 44 and len({sound.source for sound in sounds}) == 40


def test_tables_are_optional_and_written_by_people(tmp_path):
    flat_stock(tmp_path)
    (tmp_path / "sounds.csv").unlink()
    rows = "class,picture,source,also\ncow,both0.png,photo, dog; person \n"
    (tmp_path / "pictures.csv").write_text(rows)
    (tmp_path / "pictures" / "dog" / ".DS_Store").touch()
    pictures, sounds = read_stock(tmp_path)
    found = {(item.category, item.name): item for item in pictures}
    assert found["cow", "both0.png"].source == "photo"
    assert found["cow", "both0.png"].also == {"dog", "person"}
    assert found["dog", "both0.png"].source == "dog/both0.png"
    assert not found["dog", "both0.png"].also and ("dog", ".DS_Store") not in found
    assert len({item.source for item in pictures}) == len(pictures)
    assert len({item.source for item in sounds}) == len(sounds) == 44


def test_what_is_no_stock_is_said(tmp_path):
    with pytest.raises(AtlasError, match="is no stock"):
        read_stock(tmp_path)
    (tmp_path / "pictures" / "dog" / "walk").mkdir(parents=True)
    with pytest.raises(AtlasError, match="walk has no frames"):
        read_stock(tmp_path)


def test_a_stock_may_begin_with_pictures_alone(tmp_path):
    Stock(tmp_path).picture("dog", "dog")
    pictures, sounds = read_stock(tmp_path)
    assert [picture.name for picture in pictures] == ["dog.png"] and not sounds


def test_rows_come_back_as_written(tmp_path):
    row = dict.fromkeys(COLUMNS["sounds"], "x, y") | {"class": "dog", "sound": "a.wav"}
    write_table(tmp_path / "sounds.csv", COLUMNS["sounds"], [row])
    assert read_rows(tmp_path, "sounds") == {("dog", "a"): row}
    assert read_rows(tmp_path, "pictures") == {}
    with open(tmp_path / "sounds.csv", newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS["sounds"])


def test_a_good_stock_has_no_errors(tmp_path):
    counts, errors, warnings = check_stock(flat_stock(tmp_path))
    assert not errors and len(warnings) == 2
    assert "bird is too small" in warnings[0] and "sofa is too small" in warnings[1]
    assert any(line.split() == ["cat", "11", "11", "10", "11", "10"] for line in counts)


def spoil_mask(root):
    flat_mask((0, 0, 9, 9), (50, 50)).save(root / "masks" / "cow" / "cow1.png")


def grey_mask(root):
    grey = Image.fromarray(np.full((80, 96), 100, np.uint8))
    grey.paste(0, (0, 0, 9, 9))
    grey.save(root / "masks" / "cow" / "cow1.png")


def empty_mask(root):
    flat_mask((0, 0, 0, 0)).save(root / "masks" / "cow" / "cow1.png")


def twice_in_a_class(root):
    for kind in ("pictures", "masks"):
        shutil.copy(root / kind / "cow" / "cow1.png", root / kind / "cow" / "again.png")


def twice_of_two_sources(root):
    for kind in ("pictures", "masks"):
        shutil.copy(root / kind / "cow" / "cow1.png", root / kind / "dog" / "again.png")


def sound_twice(root):
    shutil.copy(root / "sounds" / "cow" / "cow1_a.wav", root / "sounds" / "dog" / "again.wav")


def silent_sound(root):
    soundfile.write(root / "sounds" / "cow" / "none.wav", np.zeros(100), 16000)


def broken_picture(root):
    (root / "pictures" / "cow" / "cow1.png").write_bytes(b"no picture")


def lost_mask(root):
    (root / "masks" / "cow" / "cow1.png").unlink()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return flat_stock(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (spoil_mask, "cow1.png"),
        (grey_mask, "100"),
        (empty_mask, "cow/cow1.png: its mask is empty"),
        (twice_in_a_class, "cow/again.png (source cow/again.png), cow/cow1.png (source cow1)"),
        (twice_of_two_sources, "dog/again.png"),
        (sound_twice, "cow/cow1_a.wav (source cow_sound1), dog/again.wav"),
        (silent_sound, "none.wav"),
        (broken_picture, "cow1.png"),
        (lost_mask, "cow1.png"),
    ],
)
def test_what_is_wrong_is_named(whole, tmp_path, spoil, said):
    root = tmp_path / "stock"
    shutil.copytree(whole, root)
    spoil(root)
    _, errors, _ = check_stock(root)
    assert len(errors) == 1 and said in errors[0] and "\n" not in errors[0]


def test_check_is_a_command(tmp_path):
    flat_stock(tmp_path)
    done = run("prepare_data.py", "check", "--stock", tmp_path)
    assert done.returncode == 0 and "0 errors, 2 warnings" in done.stdout, done.stderr
    sound_twice(tmp_path)
    done = run("prepare_data.py", "check", "--stock", tmp_path)
    assert done.returncode == 1 and "error: the same content" in done.stdout
    done = run("prepare_data.py", "check")
    assert done.returncode == 2 and "--root or --stock" in done.stderr
