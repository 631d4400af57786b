"""The code of docs/extend.md, as it is printed there: a method, a data set and a protocol."""

import importlib
import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LIGHT, ROOT, TINY
from PIL import Image

import atlas.methods
import train
from atlas import clips, protocols
from atlas.config import FIELDS, load_config
from atlas.errors import AtlasError
from atlas.methods import METHODS
from atlas.results import read_results

Blocks = namedtuple("Blocks", "method entry reader readers dataset protocol protocols choice")
TEXT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
BLOCKS = Blocks(*re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S))


def module(folder, name, *parts):
    """A module of some text, imported from `folder`."""
    (folder / f"{name}.py").write_text("\n".join(parts), encoding="utf-8")
    specification = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    made = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(made)
    return made


@pytest.fixture
def allow():
    """allow(key, choice): a new choice of a key of the config, until the test ends."""
    allowed = []

    def add(name, choice):
        FIELDS[name].metadata["choices"].append(choice)
        allowed.append(name)

    yield add
    for name in allowed:
        FIELDS[name].metadata["choices"].pop()


def choice_of(printed):
    """(key, its new choice) of a printed line of config.py, which adds that alone to the real."""
    name = re.match(r"\s*(\w+):", printed)[1]
    source = (ROOT / "atlas" / "config.py").read_text(encoding="utf-8")
    real = re.search(rf"^    {name}: .*", source, re.M)[0]
    head, choice = re.fullmatch(r"(.*) (\w+)", printed.rstrip(') "\n'), re.S).groups()
    assert "".join(f'{head}")'.split()) == "".join(real.split())
    return name, choice


def trained(tmp_path, tree, *words):
    """The results of a tiny run over `tree`, an epoch a task."""
    places = [f"data_root={tree}", f"cache_dir={tmp_path}/cache", f"out_dir={tmp_path}", "name=run"]
    words = [*TINY, f"visual={LIGHT}", *places, "epochs=1", "epochs_first=1", *words]
    config = load_config([], words)
    train.main(config)
    return read_results(tmp_path / "run")


# ---- a method ----------------------------------------------------------------------------------


@pytest.fixture
def averaging(tmp_path, monkeypatch, allow):
    """The class of the page, in a file of its own and in the table METHODS."""
    (tmp_path / "averaging.py").write_text(BLOCKS.method, encoding="utf-8")
    monkeypatch.setattr(atlas.methods, "__path__", [*atlas.methods.__path__, str(tmp_path)])
    head = "from atlas.methods import Entry"
    entries = module(tmp_path, "entries", head, "ENTRIES = {", BLOCKS.entry, "}").ENTRIES
    for name, entry in entries.items():
        monkeypatch.setitem(METHODS, name, entry)
        allow("method", name)
    importlib.invalidate_caches()
    yield importlib.import_module("atlas.methods.averaging").Averaging
    del sys.modules["atlas.methods.averaging"]


def test_the_method_holds_the_mean_of_what_the_tasks_have_learned(averaging):
    weight = torch.nn.Parameter(torch.zeros(1, 2))
    group = {"lora": {"weight": weight}, "fusion": {}}
    method = averaging(SimpleNamespace(device="cpu", groups=lambda: group))
    mean = torch.zeros(1, 2)
    for t, learned in enumerate(([1.0, 2.0], [3.0, 0.0], [5.0, 4.0]), start=1):
        weight.data.copy_(torch.tensor([learned]))
        mean += (torch.tensor([learned]) - mean) / t
        method.end_task(None)
        torch.testing.assert_close(weight.data, mean)
    torch.testing.assert_close(weight.data, torch.tensor([[3.0, 2.0]]))


def test_the_method_trains_from_the_command_line(averaging, tmp_path, tree):
    results = trained(tmp_path, tree, "method=averaging")
    assert results["complete"] and len(results["matrix"]["J"]) == 4
    assert results["method_memory_bytes"] > 4 * results["parameters"]["lora"]
    log = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8")
    assert log.count('"moved"') == 3
    with pytest.raises(AtlasError, match="must be told where tasks begin"):
        load_config([], ["method=averaging", "protocol=tfcl", "lra_trigger=plateau"])


# ---- a data set --------------------------------------------------------------------------------


def test_the_reader_gives_clips_that_a_run_learns(tmp_path, tree, monkeypatch, allow):
    for clip in clips.read_s4(tree):
        folder = tmp_path / "mine" / clip.split / clip.category / clip.id
        folder.mkdir(parents=True)
        for k, (frame, mask) in enumerate(zip(clip.frames, clip.masks), start=1):
            Image.open(frame).save(folder / f"frame_{k}.jpg")
            shutil.copy(mask or clip.masks[0], folder / f"mask_{k}.png")
        shutil.copy(clip.audio, folder / "sound.wav")
    table = BLOCKS.readers
    read = module(tmp_path, "reader", "from atlas.clips import *", BLOCKS.reader, table).READERS
    assert read.keys() - clips.READERS.keys() == {"folders"}
    with pytest.raises(AtlasError, match="check data_root"):
        read["folders"](tmp_path / "nothing")
    monkeypatch.setitem(clips.READERS, "folders", read["folders"])
    allow(*choice_of(BLOCKS.dataset))
    results = trained(tmp_path, tmp_path / "mine", "dataset=folders", "method=finetune")
    assert results["complete"] and sum(len(task["classes"]) for task in results["tasks"]) == 4
    (tmp_path / "mine" / "dev" / "dog" / "a").mkdir(parents=True)
    with pytest.raises(AtlasError, match="dev is no split"):
        read["folders"](tmp_path / "mine")


# ---- a protocol --------------------------------------------------------------------------------


def test_the_protocol_learns_a_class_at_a_time(tmp_path, tree, monkeypatch, allow):
    head = "from atlas.protocols import *"
    parts = [head, BLOCKS.protocol, "ADDED = {", BLOCKS.protocols, "}"]
    added = module(tmp_path, "protocol", *parts).ADDED
    own = {"b": 1, "c": 3, "a": 1}
    listed = [{"category": name, "split": "train"} for name in own for _ in range(own[name])]
    listed += [{"category": "a", "split": split} for split in ("val", "test", "test", "test")]

    def select(split, names):  # each split has some clip
        return [i for i, clip in enumerate(listed) if clip["category"] in names]

    cache = SimpleNamespace(clips=listed, select=select)
    assert [task.name for task in added["size"](cache, None)] == ["c", "a", "b"]
    for name, function in added.items():
        monkeypatch.setitem(protocols.PROTOCOLS, name, function)
    allow(*choice_of(BLOCKS.choice))
    results = trained(tmp_path, tree, "protocol=size", "method=finetune")
    names = sorted(Path(tree, "Single-source/s4_data/gt_masks/train").iterdir())
    assert [task["name"] for task in results["tasks"]] == [path.name for path in names]
