"""The folder of a run: its lock, its files written whole, what stands in it after a kill."""

import os
import shutil
from pathlib import Path

import torch
import yaml

from atlas import parallel, results
from atlas.clips import locked, why_unreadable
from atlas.config import as_dict, load_config, run_name
from atlas.errors import AtlasError
from atlas.learner import writing


@parallel.first_only
def write(path, content):
    """A text, or what torch saves; beside its place first: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.tmp")
    with writing(path.parent):
        if isinstance(content, str):
            beside.write_text(content, encoding="utf-8")
        else:
            torch.save(content, beside)
        os.replace(beside, path)


def is_used(folder):
    """Whether it holds anything but the lock and what a kill left half written."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def refuse_used_folder(config):
    folder = Path(config.out_dir, run_name(config))
    if is_used(folder):
        how = "choose another name=..., go on with --resume, or remove it"
        raise AtlasError(f"the run folder {folder} is not empty and is never overwritten; {how}")


@parallel.first_only
def take_folder(folder, config, resume):
    """Make or open the folder; returns its lock, to be held on to."""
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
    """The run's own are in config.yaml or, where that is torn, in results.json."""
    try:
        wrong = differing(as_dict(load_config([folder / "config.yaml"])), as_dict(config))
    except AtlasError as error:
        wrong = [str(error)]
    if wrong:
        found, why = read_or_none(folder), ", ".join(wrong)
        if not found or differing(found["config"], as_dict(config)):
            raise AtlasError(f"{folder} cannot be resumed: {why}; choose another name=...")
        print(f"config.yaml is written anew from results.json: {why}", flush=True)
        write_config(folder, config)


def differing(old, new):
    """The keys in which a dict differs from `new`, in words."""
    found = []
    for name, here in new.items():
        if old.get(name) != here:
            long = len(str(here)) > 50
            found.append(name if long else f"{name} ({old.get(name)} there, {here} here)")
    return found


def write_config(folder, config):
    text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    write(folder / "config.yaml", text)


def checkpoints(folder):
    found = [path.name[5:] for path in folder.glob("task_*") if path.is_dir()]
    return sorted(int(number) for number in found if number.isdigit())


def read_or_none(folder):
    """The results of a folder; None where there are none, or, with a line, damaged ones."""
    path = folder / "results.json"
    try:
        return results.read_results(folder) if path.is_file() else None
    except AtlasError as error:
        print(f"{path} is written anew from the checkpoints: {error}", flush=True)
        return None


def read_progress(path):
    """The state in a file of torch's; None where it is missing, or, with a line, damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
    except Exception as error:  # whatever a broken file makes torch raise
        reason = why_unreadable(path, error).split("\n")[0][:100] or type(error).__name__
        print(f"{path} is damaged ({reason}) and is not used", flush=True)
        return None


# keys that do not shape a first task; neither do those of LRA
FREE = "name out_dir cache_dir device workers joint_run first_task method strength epochs lr"
FREE = (*FREE.split(), "protocol")


def first_task(run):
    """The results of the finetune run config.first_task, refused where anything that shapes a first
    task differs; None where none is named."""
    path = run.config.first_task
    if not path:
        return None
    first = results.read_results(path)
    wrong = differing(shaping(first), shaping(run.results))
    if first["method"] != "finetune" or len(first["matrix"]["J"]) < 2:
        wrong.append("it is no finetune run that has learned a task")
    if wrong:
        why = ", ".join(wrong)
        raise AtlasError(f"first_task={path} is not this run's: {why}; set first_task=null")
    return first


def shaping(found):
    """What shapes a first task: settings, data, weights, versions, processor and precision."""
    config = {k: v for k, v in found["config"].items() if k not in FREE and k[:4] != "lra_"}
    machine = {k: v for k, v in found["environment"].items() if k != "date"}
    return config | machine | {"tasks": found["tasks"], "weights": found["weights"]}
