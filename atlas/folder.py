"""The folder of a run: its lock, its files written whole, what stands in it after a kill."""

import os
import shutil
from pathlib import Path

import torch
import yaml

from atlas import parallel, results
from atlas.clips import locked, why_unreadable
from atlas.config import Config, as_dict, load_config, run_name
from atlas.errors import AtlasError
from atlas.learner import writing


@parallel.first_only
def write_text(path, text):
    """Write beside and rename: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def is_used(folder):
    """Whether a folder holds anything but the lock and what a kill left half written."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def refuse_used_folder(config):
    """A cheap look before the heavy work: `Run.open` is what decides."""
    folder = Path(config.out_dir, run_name(config))
    if is_used(folder):
        how = "choose another name=..., go on with --resume, or remove it"
        raise AtlasError(f"the run folder {folder} is not empty and is never overwritten; {how}")


def take_folder(folder, config, resume):
    """Make the folder of a run, or open it, and lock it; returns the lock, to be held on to."""
    folder.mkdir(parents=True, exist_ok=True)
    in_use = f"the run folder {folder} is in use; wait for it, or choose another name=..."
    lock = locked(folder / ".lock", in_use)
    if not resume:
        refuse_used_folder(config)
    elif is_used(folder):
        refuse_other_keys(folder, config)
    for half in folder.glob(".task_*.tmp"):  # a kill while a checkpoint was written
        shutil.rmtree(half)
    return lock


def refuse_other_keys(folder, config):
    """A begun run goes on with its own keys: those of config.yaml or, where that is torn, those of
    results.json, from which it is written anew."""
    path = folder / "config.yaml"
    try:
        wrong = differing(load_config([path]), config)
    except AtlasError as error:
        wrong = str(error)
    if not wrong:
        return
    try:
        torn = not differing(Config(**results.read_results(folder)["config"]), config)
    except (AtlasError, TypeError):  # damaged too, or of a version with other keys
        torn = False
    if not torn:
        raise AtlasError(f"{folder} cannot be resumed: {wrong}; choose another name=...")
    print(f"{path} is written anew from results.json: {wrong}", flush=True)
    write_config(folder, config)


def differing(old, new):
    """The keys in which two configs differ, in words; "" where there are none."""
    old, new = as_dict(old), as_dict(new)
    found = [f"{k} ({old[k]} there, {new[k]} here)" for k in new if old[k] != new[k]]
    return ", ".join(found)


def write_config(folder, config):
    text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    write_text(folder / "config.yaml", text)


def checkpoints(folder):
    """The numbers of the tasks whose checkpoint folders are there."""
    found = [path.name[5:] for path in Path(folder).glob("task_*") if path.is_dir()]
    return sorted(int(number) for number in found if number.isdigit())


def read_or_none(folder):
    """The results of a folder; None where there are none, or, with a line, damaged ones."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    try:
        return results.read_results(folder)
    except AtlasError as error:
        print(f"{path} is written anew from the checkpoints: {error}", flush=True)
        return None


def save_torch(path, state):
    """torch.save beside and renamed, by the first process."""
    if parallel.rank():
        return
    beside = path.with_name(f".{path.name}.tmp")
    with writing(path.parent):
        torch.save(state, beside)
        os.replace(beside, path)


def read_progress(path):
    """The state in a file of `save_torch`; None where it is missing, or, with a line, damaged."""
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes torch raise
        reason = why_unreadable(path, error).split("\n")[0][:100] or type(error).__name__
        print(f"{path} is damaged ({reason}) and is not used", flush=True)
        return None


# ---- a first task that another run has learned ---------------------------------------------------

FREE = {  # keys that do not shape a first task
    *("name", "out_dir", "cache_dir", "device", "workers", "joint_run", "first_task", "method"),
    *("strength", "epochs", "lr", "protocol"),
}


def first_task(run):
    """The results of the finetune run config.first_task, whose first task this run takes over.

    It is refused where anything that shapes a first task differs. None where none is named.
    """
    path = run.config.first_task
    if not path:
        return None
    first = results.read_results(path)
    there = shaping(first)
    differing = []
    for name, here in shaping(run.results).items():
        if there.get(name) != here:
            told = f" ({there.get(name)} there, {here} here)" if len(str(here)) < 50 else ""
            differing.append(name + told)
    if first["method"] != "finetune" or len(first["matrix"]["J"]) < 2:
        differing.append("it is no finetune run that has learned a task")
    if differing:
        why = ", ".join(differing)
        raise AtlasError(f"first_task={path} is not this run's: {why}; set first_task=null")
    return first


def shaping(found):
    """What shapes a first task: settings, data, weights, versions, processor and precision."""
    config = {k: v for k, v in found["config"].items() if k not in FREE and k[:4] != "lra_"}
    machine = {k: v for k, v in found["environment"].items() if k != "date"}
    return config | machine | {"tasks": found["tasks"], "weights": found["weights"]}


def first_rows(found, rows):
    """The first rows of every matrix of some results, with what they took."""
    spent = found["seconds"]
    classes = found.get("class_matrix")
    return {
        "matrix": {name: matrix[:rows] for name, matrix in found["matrix"].items()},
        "val_matrix": {"J": found["val_matrix"]["J"][:rows]},
        "class_matrix": classes and classes | {"J": classes["J"][:rows]},
        "seconds": {
            "train": spent["train"][: rows - 1],
            "consolidate": spent["consolidate"][: rows - 1],
            "evaluate": spent["evaluate"][:rows],
        },
    }
