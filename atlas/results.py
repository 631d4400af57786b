"""results.json: what a run writes after every task, what derives from its matrices, and its table.

Nothing here needs torch, so `eval.py RUN` answers at once. A matrix has row 0 for the untrained
model and then a row for each task learned; its columns are the tasks. A row that was not scored is
None, and so is every metric that needs it.
"""

import datetime
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from atlas.config import as_dict
from atlas.errors import AtlasError

# class_accuracy is null without the class branch, and for classes that were not learned yet
TEST_SCORES = ("J", "F", "J_strict", "F_dataset", "J_swap", "mute_area", "class_accuracy")
METRICS = ("final", "incremental", "learning", "forgetting", "bwt", "fwt", "intransigence")
NEEDED = {"complete": bool, "config": dict, "tasks": list, "matrix": dict, "seconds": dict}


# ---- writing a run's results ---------------------------------------------------------------------


def new_results(run):
    """The results of a run (runs.Run) before its first score."""
    config = run.config
    tasks = []
    for task in run.tasks:
        clips = {split: len(getattr(task, split)) for split in ("train", "val", "test")}
        tasks.append({"name": task.name, "classes": list(task.classes), "clips": clips})
    return {
        "schema": 1,
        "complete": False,
        "method": config.method,
        "protocol": config.protocol,
        "seed": config.seed,
        "config": as_dict(config),
        **commit(),
        "environment": environment() | run.environment,
        "weights": run.weights,
        "tasks": tasks,
        "drifts": drifts(run.tasks, config),
        "consolidations": [],
        "matrix": {name: [] for name in TEST_SCORES},
        "val_matrix": {"J": []},
        "class_matrix": {"classes": run.class_names, "J": []} if run.class_names else None,
        "metrics": None,
        "parameters": run.parameters,
        "method_memory_bytes": None,
        "seconds": {"train": [], "consolidate": [], "evaluate": []},
        "peak_memory_mb": None,
    }


def add_scores(results, row):
    """Append a row to every matrix, or null where `row` is None.

    row: {"test": {score: [one a task]}, "val": [J a task], "classes": [J a class] or None,
    "seconds": of the evaluation}.
    """
    for name in TEST_SCORES:
        results["matrix"][name].append(row and row["test"][name])
    results["val_matrix"]["J"].append(row and row["val"])
    if results.get("class_matrix"):  # a run that an older version began has none
        results["class_matrix"]["J"].append(row and row["classes"])
    results["seconds"]["evaluate"].append(row["seconds"] if row else 0.0)


def derived_metrics(results, joint=None):
    """results["metrics"], from the matrices. `joint`: what read_joint gives."""
    from atlas.metrics import continual_metrics  # it comes with torch

    matrix = results["matrix"]
    tasks = results["tasks"]
    metrics = {}
    for score in ("J", "F"):
        rows = matrix[score]
        filled = [row or [None] * len(tasks) for row in rows]
        metrics[score] = continual_metrics(filled, joint and joint[score])
        needs = {"final": rows[-1:], "fwt": rows[:-1]}
        for name in METRICS:
            if None in needs.get(name, rows[1:]):
                metrics[score][name] = None
        total, clips = 0.0, 0
        for value, task in zip(filled[-1], tasks):
            if value is not None:
                total += value * task["clips"]["test"]
                clips += task["clips"]["test"]
        metrics[score]["final_clips"] = total / clips if clips else None
    metrics["mute_area"] = mean_known(matrix["mute_area"][-1])
    metrics["class_accuracy"] = mean_known(matrix["class_accuracy"][-1])
    swapped = mean_known(matrix["J_swap"][-1])
    metrics["listening"] = None if swapped is None else metrics["J"]["final"] - swapped
    return metrics


def mean_known(values):
    """The mean without the None among them; None where nothing is left, or the row is None."""
    known = [value for value in values or [] if value is not None]
    return sum(known) / len(known) if known else None


def drifts(tasks, config):
    """TF-CL: the optimiser steps at which the segments after the first begin. Else an empty list.

    Neighbouring segments mix in a zone; a segment begins in the middle of it.
    """
    clips = [task.begins for task in tasks[1:] if task.begins is not None]
    return [round(begins / config.batch_size * config.stream_epochs) for begins in clips]


def environment():
    """The versions and the platform. What only torch knows, the run adds."""
    versions = {name: metadata.version(name) for name in ("torch", "timm", "peft")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
    }


def commit():
    """{"commit", "dirty"} of the code; both are null outside a git checkout."""
    try:
        head = git("rev-parse", "HEAD")
        return {"commit": head, "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def git(*words):
    command = ["git", "-C", Path(__file__).parent, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# ---- reading -------------------------------------------------------------------------------------


def read_results(folder):
    """The results.json of a run's folder."""
    path = Path(folder, "results.json")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise AtlasError(
            f"no results.json in {folder}; give the folder of a run, as train.py printed it"
        ) from None
    except ValueError as error:  # no JSON, or no UTF-8
        raise damaged(path, error) from None
    return checked(path, results)


def checked(path, results):
    """The results that stood in the file `path`, if they are what this version reads."""
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema not in (None, 1):
        raise AtlasError(f"{path} has schema {schema}; this version reads schema 1")
    if schema is None:
        raise damaged(path, "it has no schema")
    for key, kind in NEEDED.items():
        if not isinstance(results.get(key), kind):
            raise damaged(path, f"{key} is missing or of a wrong kind")
    width = len(results["tasks"])
    for row in results["matrix"].get("J", [[]]):
        if row is not None and (not isinstance(row, list) or len(row) != width):
            raise damaged(path, f"a row of J does not fit the {width} tasks")
    if results["complete"] and not isinstance(results.get("metrics"), dict):
        raise damaged(path, "it has no metrics")
    return results


def damaged(path, why):
    return AtlasError(
        f"{path} is damaged ({why}); the command that began the run, with --resume, scores its "
        "checkpoints again"
    )


def read_joint(folder, tasks):
    """{score: last row} of a finished joint run over the very same tasks; None without a folder."""
    if not folder:
        return None
    joint = read_results(folder)
    if joint["method"] != "joint" or not joint["complete"] or joint["tasks"] != tasks:
        raise AtlasError(
            f"joint_run={folder} is no finished joint run over the same tasks and clips; "
            "run method=joint with the same data, seed, base and step"
        )
    return {name: rows[-1] for name, rows in joint["matrix"].items()}


# ---- as text -------------------------------------------------------------------------------------


def row_text(results, k):
    """Row k of J, a number a task. A learned task is followed by its change against its best past
    score; a task that is not learned yet stands in brackets."""
    matrix = results["matrix"]["J"]
    if matrix[k] is None:
        return "not scored"
    learned = len(results["tasks"]) if results["method"] == "joint" and k else k
    words = []
    for j, value in enumerate(matrix[k]):
        past = [row[j] for row in matrix[j + 1 : k] if row]
        change = f" {value - max(past):+.2f}" if past else ""
        words.append(f"{value:.3f}{change}" if j < learned else f"({value:.3f})")
    return " | ".join(words)


def summary(results):
    """The matrix of J and the table of one run, as text."""
    tasks, matrix = results["tasks"], results["matrix"]["J"]
    joint, stream = results["method"] == "joint", results["protocol"] == "tfcl"
    column, stage = ("segment", "checkpoint") if stream else ("task", "task")
    stages = [
        "untrained",
        *(["joint"] if joint else [f"{stage} {k + 1}" for k in range(len(tasks))]),
    ]
    width = len(column) + 3
    heads = [f"{column} {j + 1}" for j in range(len(tasks))]
    lines = [
        f"{results['method']} · {results['protocol'].upper()} · seed {results['seed']}",
        "",
        f"R, J on test clips: a row after each {stage}, a column for each {column}",
        " " * 13 + "".join(f"{head:>{width}}" for head in heads),
    ]
    for name, row in zip(stages, matrix):
        cells = [f"{shown(value):>{width}}" for value in row or [None] * len(tasks)]
        lines.append(f"{name:<13}" + "".join(cells))
    lines.append("")
    if not results["complete"]:
        lines.append(f"not finished: {len(matrix)} of {len(stages)} rows. The command that began")
        return "\n".join([*lines, "this run goes on with --resume."])
    lines += [*scores_text(results["metrics"]), ""]
    if stream and not joint:
        steps = [str(found["step"]) for found in results["consolidations"]]
        lines.append(f"consolidated after steps {', '.join(steps) or 'none'}")
        lines += [f"the data drift at steps   {', '.join(map(str, results['drifts']))}", ""]
    return "\n".join(lines + costs_text(results))


def scores_text(metrics):
    """The lines of the metrics, for J and for F."""
    J, F = metrics["J"], metrics["F"]
    lines = [f"{'':<14}{'J':>6}  {'F':>6}"]
    for name in METRICS:
        if J[name] is not None:
            lines.append(f"{name:<14}{shown(J[name]):>6}  {shown(F[name]):>6}")
    for name, said in (
        ("listening", "   J minus J with another clip's sound"),
        ("mute_area", "   area masked when it hears nothing"),
        ("class_accuracy", ""),
    ):
        if metrics[name] is not None:
            lines.append(f"{name.replace('_', ' '):<14}{shown(metrics[name]):>6}{said}")
    if disjoint := metrics.get("source_disjoint"):
        said = f"the {disjoint['clips']} test clips whose source video has no train clip"
        lines.append(
            f"{'disjoint':<14}{shown(disjoint['J']):>6}  {shown(disjoint['F']):>6}   {said}"
        )
    return lines


def costs_text(results):
    """The lines of parameters, memory and seconds, and a warning of random weights."""
    p = results["parameters"]
    lines = [
        f"parameters: {p['total']:,} without the audio encoder, {p['trainable']:,} trainable, "
        f"{p['lora']:,} of them LoRA"
    ]
    if (kept := results.get("method_memory_bytes")) is not None:
        lines.append(f"memory: the method keeps {kept / 1e6:.1f} MB beside the model")
    train, consolidate, evaluate = (
        sum(results["seconds"][part]) for part in ("train", "consolidate", "evaluate")
    )
    lines.append(
        f"seconds: {train:.0f} training, {consolidate:.0f} consolidating, {evaluate:.0f} evaluating"
    )
    random = [name for name, w in results["weights"].items() if w["source"] == "random"]
    if random:
        lines.append(f"note: the {' and '.join(random)} encoder has random weights, not pretrained")
    return lines


def shown(value):
    return "–" if value is None else f"{value:.3f}"
