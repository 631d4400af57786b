"""The folder of a run: its lock, files written whole, what a kill leaves."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas import folder as folders
from atlas.config import Config, as_dict, load_config
from atlas.errors import AtlasError
from atlas.folder import checkpoints, read_progress, refuse_used_folder, take_folder, write
from atlas.results import read_or_none


@pytest.fixture
def config(tmp_path):
    return Config(out_dir=str(tmp_path), name="run")


@pytest.fixture
def folder(config):
    return Path(config.out_dir, "run")


def begun(folder, config):
    """A folder in which a run of this config began."""
    folder.mkdir()
    lines = [f"{key}: {'null' if v is None else v}\n" for key, v in as_dict(config).items()]
    (folder / "config.yaml").write_text("".join(lines))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write(path, "old")

    def fail(*paths):
        raise OSError("no room")

    monkeypatch.setattr(folders.os, "replace", fail)
    for content in ("new", {}):
        with pytest.raises(AtlasError, match="no room.*--resume"):
            write(path, content)
    assert path.read_text() == "old"


def test_a_new_folder_is_made_and_a_used_one_refused(folder, config):
    refuse_used_folder(config)
    take_folder(folder, config, resume=False).close()
    for left in (".lock", ".config.yaml.tmp"):  # of a run that was killed before its first file
        (folder / left).touch()
    refuse_used_folder(config)
    take_folder(folder, config, resume=False).close()
    (folder / "log.jsonl").touch()
    with pytest.raises(AtlasError, match="not empty and is never overwritten.*--resume"):
        refuse_used_folder(config)
    with pytest.raises(AtlasError, match="not empty"):
        take_folder(folder, config, resume=False)


def test_resume_takes_a_new_folder_one_that_holds_nothing_or_the_same_config(folder, config):
    take_folder(folder, config, resume=True).close()
    (folder / ".config.yaml.tmp").touch()
    take_folder(folder, config, resume=True).close()
    (folder / "notes.txt").touch()
    with pytest.raises(AtlasError, match="cannot be resumed: config file.*choose another name"):
        take_folder(folder, config, resume=True)


def test_resume_refuses_another_config_by_its_keys(folder, config):
    begun(folder, config)
    take_folder(folder, config, resume=True).close()
    other = replace(config, lr=0.5, heads=4)
    with pytest.raises(AtlasError, match=r"heads \(8 there, 4 here\), lr \(None there, 0.5 here"):
        take_folder(folder, other, resume=True)


@pytest.mark.parametrize("text", [None, "", "version https://git-lfs\n", "seed: 0\nseed: 0\n"])
def test_a_torn_config_is_written_anew_from_the_results(folder, config, text, capsys):
    config = replace(config, width=64)
    begun(folder, config)
    (folder / "log.jsonl").touch()
    path = folder / "config.yaml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(AtlasError, match="cannot be resumed.*choose another name"):
        take_folder(folder, config, resume=True)
    found = {"schema": 1, "complete": False, "config": as_dict(config)}
    found |= {"tasks": [], "matrix": {}, "val_matrix": {}, "seconds": {}, "environment": {}}
    found |= {"method": "lra", "protocol": "cil", "seed": 0}
    (folder / "results.json").write_text(json.dumps(found))
    with pytest.raises(AtlasError, match="cannot be resumed"):
        take_folder(folder, replace(config, seed=3), resume=True)
    capsys.readouterr()
    take_folder(folder, config, resume=True).close()
    assert "config.yaml is written anew from results.json" in capsys.readouterr().out
    assert load_config([path]) == config


def test_what_a_kill_left_of_a_checkpoint_is_removed(folder, config):
    begun(folder, config)
    for name in (".task_02.17.tmp", "task_01"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half of it")
    take_folder(folder, config, resume=True).close()
    assert checkpoints(folder) == [1]
    assert not list(folder.glob(".task*"))


def test_a_folder_in_use_is_refused_until_its_process_ends(folder, config):
    """The other process is a child that holds the lock until it is told to end."""
    to_parent, to_child = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        lock = take_folder(folder, config, resume=True)
        os.write(to_parent[1], b"1")
        os.read(to_child[0], 1)
        os._exit(lock is None)
    os.read(to_parent[0], 1)
    try:
        for resume in (False, True):
            with pytest.raises(AtlasError, match="is in use"):
                take_folder(folder, config, resume)
    finally:
        os.write(to_child[1], b"1")
        os.waitpid(child, 0)
    take_folder(folder, config, resume=True).close()


def test_checkpoints_are_counted_by_their_numbers(tmp_path):
    for name in ("task_02", "task_10", "task_x", ".task_03.1.tmp", "figures"):
        (tmp_path / name).mkdir()
    (tmp_path / "task_04").touch()
    assert checkpoints(tmp_path) == [2, 10]


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1}', "\xff", "[]", "[" * 10**5])
def test_damaged_results_are_said_and_not_used(tmp_path, capsys, text):
    assert read_or_none(tmp_path) is None
    assert capsys.readouterr().out == ""
    (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
    assert read_or_none(tmp_path) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert "results.json is written anew from the checkpoints" in line


def test_damaged_progress_is_said_and_not_used(tmp_path, capsys):
    path = tmp_path / "progress.pt"
    assert read_progress(path) is None
    state = {"task": 1, "weights": {"a": torch.arange(100.0)}}
    write(path, state)
    assert torch.equal(read_progress(path)["weights"]["a"], state["weights"]["a"])
    assert capsys.readouterr().out == ""
    whole = path.read_bytes()
    for torn in (b"", whole[:100], whole[: len(whole) // 2], b"x" * 1000, whole[:-1]):
        path.write_bytes(torn)
        assert read_progress(path) is None
        (line,) = capsys.readouterr().out.splitlines()
        assert "progress.pt is damaged" in line and "not used" in line
