"""results.json, and what derives from its matrices. Needs no torch: `eval.py RUN` answers at once.

A matrix has row 0 for the untrained model, then a row a task; its columns are the tasks. A row that
was not scored is None, and so is what needs it."""

import datetime
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from atlas.config import as_dict
from atlas.errors import AtlasError

# class_accuracy is null without the class branch, and for classes that were not learned yet
TEST_SCORES = ("J", "F", "J_strict", "F_dataset", "J_source", "J_drawn", "J_swap", "mute_area",
    "class_accuracy")  # fmt: skip
METRICS = ("final", "incremental", "learning", "forgetting", "bwt", "fwt", "intransigence")
NEEDED = dict(schema=int, seed=int, method=str, protocol=str, complete=bool, tasks=list)
NEEDED |= dict.fromkeys(("config", "matrix", "val_matrix", "seconds", "environment"), dict)


def new_results(config, tasks, classes=None):
    """Results before the first score. classes: names of those to score singly."""
    told = []
    for task in tasks:
        clips = {"train": len(task.train), "val": len(task.val), "test": len(task.test)}
        told.append({"name": task.name, "classes": list(task.classes), "clips": clips})
    found = {"schema": 1, "complete": False}
    found |= {name: getattr(config, name) for name in ("method", "protocol", "seed")}
    found |= {"config": as_dict(config)} | commit()
    # TF-CL: the optimiser steps at which later segments begin, in the middle of a mixed zone
    batches = [t.begins / config.batch_size for t in tasks[1:] if t.begins is not None]
    drifts = [round(number * config.stream_epochs) for number in batches]
    found |= {"tasks": told, "drifts": drifts, "consolidations": []}
    found |= {"matrix": {name: [] for name in TEST_SCORES}, "val_matrix": {"J": []}}
    found |= {"class_matrix": {"classes": classes, "J": []} if classes else None}
    found |= {"seconds": {"train": [], "consolidate": [], "evaluate": []}}
    return found | dict.fromkeys(("metrics", "method_memory_bytes", "peak_memory_mb"))


def add_scores(results, row):
    """Append a row of metrics.score_tasks, with its "seconds"."""
    for name, rows in results["matrix"].items():  # an older version began with fewer
        rows.append(row and row["test"][name])
    results["val_matrix"]["J"].append(row and row["val"])
    if results.get("class_matrix"):
        results["class_matrix"]["J"].append(row and row["classes"])
    results["seconds"]["evaluate"].append(row["seconds"] if row else 0.0)


def first_rows(results, rows):
    """The first rows of every matrix, with what they took."""
    found = {}
    for name in ("matrix", "val_matrix", "class_matrix"):
        part = results.get(name) or {}
        found[name] = {k: v if k == "classes" else v[:rows] for k, v in part.items()} or None
    spent = results["seconds"].items()
    return found | {"seconds": {k: v[: rows - (k != "evaluate")] for k, v in spent}}


def derived_metrics(results, joint=None):
    """results["metrics"]. joint: what read_joint gives."""
    from atlas.metrics import continual_metrics  # it comes with torch

    matrix, metrics = results["matrix"], {}
    clips = [task["clips"]["test"] for task in results["tasks"]]
    for score in ("J", "F"):
        rows = matrix[score]
        filled = [row or [None] * len(clips) for row in rows]
        found = continual_metrics(filled, joint and joint[score])
        needs = {"final": rows[-1:], "fwt": rows[:-1]}
        for name in METRICS:
            if None in needs.get(name, rows[1:]):
                found[name] = None
        known = [(value * n, n) for value, n in zip(filled[-1], clips) if value is not None]
        total, count = map(sum, zip(*known)) if known else (0, 0)
        metrics[score] = found | {"final_clips": total / count if count else None}
    for name in ("J_source", "J_drawn", "mute_area", "class_accuracy"):
        metrics[name] = mean_known(matrix[name][-1]) if name in matrix else None
    swapped = mean_known(matrix["J_swap"][-1])
    metrics["listening"] = None if swapped is None else metrics["J"]["final"] - swapped
    return metrics


def mean_known(values):
    known = [value for value in values or [] if value is not None]
    return sum(known) / len(known) if known else None


def environment():
    found = {name: metadata.version(name) for name in ("torch", "timm", "peft")}
    found |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    return found | {"python": platform.python_version(), "platform": platform.platform()}


def commit():
    """Null outside a git checkout."""
    command = "git describe --always --abbrev=40 --dirty --exclude=*".split()
    where = {"cwd": Path(__file__).parent, "capture_output": True, "text": True}
    try:
        head, dirty, _ = subprocess.run(command, **where).stdout.strip().partition("-")
    except OSError:  # no git
        head = ""
    return {"commit": head or None, "dirty": bool(dirty) if head else None}


def read_results(folder):
    path = Path(folder, "results.json")
    try:
        return checked(path, json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        said = f"no results.json in {folder}; give the folder of a run, as train.py printed it"
        raise AtlasError(said) from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise damaged(path, error) from None


def read_or_none(folder):
    """The results of a folder; None where there are none, or, with a line, damaged ones."""
    path = folder / "results.json"
    try:
        return read_results(folder) if path.is_file() else None
    except AtlasError as error:
        print(f"{path} is written anew from the checkpoints: {error}", flush=True)
        return None


def checked(path, results):
    """The results that stood in the file `path`, if this version reads them."""
    found = results if isinstance(results, dict) else {}
    if found.get("schema", 1) != 1:
        raise AtlasError(f"{path} has schema {found['schema']}; this version reads schema 1")
    for key, kind in (NEEDED | ({"metrics": dict} if found.get("complete") else {})).items():
        if not isinstance(found.get(key), kind):
            raise damaged(path, f"{key} is missing or of a wrong kind")
    width = len(results["tasks"])
    for row in results["matrix"].get("J", []):
        if row is not None and (not isinstance(row, list) or len(row) != width):
            raise damaged(path, f"a row of J does not fit the {width} tasks")
    return results


def damaged(path, why):
    again = "the command that began the run, with --resume, scores its checkpoints again"
    return AtlasError(f"{path} is damaged ({why}); {again}")


def read_joint(folder, tasks):
    """{score: last row} of a finished joint run over the same tasks; None without a folder."""
    if not folder:
        return None
    joint = read_results(folder)
    if joint["method"] != "joint" or not joint["complete"] or joint["tasks"] != tasks:
        what = f"joint_run={folder} is no finished joint run over the same tasks and clips"
        raise AtlasError(f"{what}; run method=joint with the same data, seed, base and step")
    return {name: rows[-1] for name, rows in joint["matrix"].items()}
