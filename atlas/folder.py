"""The folder of a run: its lock, files written whole, the log, and what a kill leaves of it."""

import contextlib
import json
import math
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

# keys that do not shape a first task; neither do those of LRA
FREE = "name out_dir cache_dir device workers joint_run first_task method strength epochs lr"
FREE = (*FREE.split(), "protocol")


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


def write_config(folder, config):
    text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)
    write(folder / "config.yaml", text)


def is_used(folder):
    """Whether it holds anything but the lock and what a kill left half written."""
    return folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())


def refuse_used_folder(config):
    folder = Path(config.out_dir, run_name(config))
    if is_used(folder):
        raise AtlasError(f"{folder} is not empty and is never overwritten; name=other, or --resume")


@parallel.first_only
def take_folder(folder, config, resume):
    """Make or open the folder; returns its lock, to be held on to."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder / ".lock", f"{folder} is in use; wait for it, or choose another name")
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
        why = differing(as_dict(load_config([folder / "config.yaml"])), as_dict(config))
    except AtlasError as error:
        why = str(error)
    if why:
        found = results.read_or_none(folder)
        if not found or differing(found["config"], as_dict(config)):
            raise AtlasError(f"{folder} cannot be resumed: {why}; choose another name=...")
        print(f"config.yaml is written anew from results.json: {why}", flush=True)
        write_config(folder, config)


def differing(old, new):
    """The keys in which a dict differs from `new`, in words."""
    wrong = [name for name, here in new.items() if old.get(name) != here]
    return ", ".join(f"{name} ({old.get(name)} there, {new[name]} here)"[:99] for name in wrong)


def checkpoints(folder):
    found = [path.name[5:] for path in folder.glob("task_*") if path.is_dir()]
    return sorted(int(number) for number in found if number.isdigit())


def read_progress(path):
    """The state in a file of torch's; None where it is missing, or, with a line, damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
    except Exception as error:  # whatever a broken file makes torch raise
        why = why_unreadable(path, error).split("\n")[0][:100] or type(error).__name__
        print(f"{path} is damaged ({why}) and is not used", flush=True)
        return None


def first_task(run):
    """The results of config.first_task, if any; refused unless it is a finetune run that is alike
    in all that shapes a first task."""
    path = run.config.first_task
    if not path:
        return None
    first = results.read_results(path)
    why = differing(shaping(first), shaping(run.results))
    if first["method"] != "finetune" or len(first["matrix"]["J"]) < 2:
        why = "it is no finetune run that has learned a task"
    if why:
        raise AtlasError(f"first_task={path} is not this run's: {why}; set first_task=null")
    return first


def shaping(found):
    """What shapes a first task: settings, data, weights, versions, processor and precision."""
    config = {k: v for k, v in found["config"].items() if k not in FREE and k[:4] != "lra_"}
    machine = {k: v for k, v in found["environment"].items() if k != "date"}
    return config | machine | {"tasks": found["tasks"], "weights": found["weights"]}


class Journal:
    """log.jsonl: a line an epoch, a window of the loss, or a consolidation."""

    def __init__(self, folder):
        self.path = Path(folder, "log.jsonl")

    @parallel.first_only
    def write(self, **line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self):
        """All whole lines; a kill may have torn one."""
        found = []
        text = self.path.read_text("utf-8", "replace") if self.path.is_file() else ""
        for line in text.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict) and type(line.get("task")) is int]

    @parallel.first_only
    def forget_after(self, task, epoch):
        """Drop what a resumed run writes again."""
        if self.path.is_file():
            kept = until(self.lines(), task, epoch)
            write(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def seconds(self, task, kind):
        """What the lines of a kind ("raw": epochs; "consolidated") tell of a task."""
        told = [x for x in self.lines() if x["task"] == task and kind in x]
        return sum(x.get("seconds", 0.0) for x in told)


def consolidations(lines):
    """Where a task-free method consolidated, as results.json has it."""
    fired = [x | x["window"] for x in lines if x.get("window", {}).get("fired")]
    return [{name: x[name] for name in ("task", "epoch", "step", "reason")} for x in fired]


def until(lines, task, epoch):
    """Those up to an epoch of a task; what has no epoch comes after all of them."""
    return [x for x in lines if (x["task"], x.get("epoch", math.inf)) <= (task, epoch)]
