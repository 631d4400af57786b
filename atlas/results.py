"""results.json: what a run writes at the end of every task, what derives from its matrices, and its table."""

import datetime
import json
import platform
import subprocess
from pathlib import Path

import peft
import timm
import torch

from atlas import parallel
from atlas.config import SAME_FIRST, Config, as_dict
from atlas.errors import AtlasError
from atlas.metrics import continual_metrics

TEST_SCORES = (
    "J",
    "F",
    "J_strict",
    "F_dataset",
    "J_swap",
    "mute_area",
    "class_accuracy",
)  # the last: null without the branch and for classes not seen yet


def new_results(config, tasks, classes, parameters, sha256, device, amp):
    """results.json before the first score. Matrices: row 0 = untrained, then one row a stage learned; columns = tasks, or `classes` (None: the data have none).

    `sha256`: of the frozen encoders.
    """
    source = lambda weights: "random" if weights is False else str(weights)
    weights = {
        "visual": {"source": source(config.visual_weights), "sha256": sha256["visual"]},
        "audio": {
            "source": "none needed" if config.audio == "logmel" else source(config.audio_weights),
            "sha256": sha256["audio"],
        },
    }
    return {
        "schema": 1,
        "complete": False,
        "method": config.method,
        "protocol": config.protocol,
        "seed": config.seed,
        "config": as_dict(config),
        **commit(),
        "environment": environment(device, amp),
        "weights": weights,
        "tasks": [
            {
                "name": t.name,
                "classes": list(t.classes),
                "clips": {s: len(getattr(t, s)) for s in ("train", "val", "test")},
            }
            for t in tasks
        ],
        "sensitivity": None
        if config.method not in ("lra", "lra_plus", "ewc", "mas", "ewc_lora")
        else "batch"
        if config.lra_trigger == "plateau"
        else "clip",
        "drifts": drifts(tasks, config),
        "consolidations": [],
        "matrix": {name: [] for name in TEST_SCORES},
        "val_matrix": {"J": []},
        "class_matrix": classes and {"classes": classes, "J": []},
        "metrics": None,
        "parameters": parameters,
        "seconds": {"train": [], "consolidate": [], "evaluate": []},
        "peak_memory_mb": None,
    }


def drifts(tasks, config):
    """TF-CL: the optimiser steps at which the segments after the first truly begin (the middle of the zone where neighbours mix). Empty for other protocols."""
    return [
        round(task.begins / config.batch_size * config.stream_epochs)
        for task in tasks[1:]
        if task.begins is not None
    ]


def read_joint(folder, tasks):
    """The last row of every matrix of a finished joint run over the very same tasks, for intransigence; None without a folder."""
    if not folder:
        return None
    joint = read_results(folder)
    if joint["method"] != "joint" or not joint["complete"] or joint["tasks"] != tasks:
        raise AtlasError(
            f"joint_run={folder} is no finished joint run over the same tasks and clips; run method=joint with the same data, seed, base and step"
        )
    return {name: rows[-1] for name, rows in joint["matrix"].items()}


def read_first_task(config, results):
    """The results of the run `first_task`, whose first task stands for this run's own; None without one. All that shapes a first task must be as in `config`.

    `results`: this run's. What a method does after its first task may differ, and TIL and CIL begin alike where no classes compete.
    """
    if not config.first_task:
        return None
    first, own = read_results(config.first_task), as_dict(config)
    defaults = as_dict(Config())
    free = {key for key in own if key.startswith("lra_")} | {
        "name",
        "out_dir",
        "cache_dir",
        "device",
        "workers",
        "watch",
        "joint_run",
        "first_task",
        "method",
        "strength",
        "epochs",
        "lr",
        "lr_rest",
    }
    free |= (
        {"protocol"}
        if {config.protocol, first["protocol"]} <= {"til", "cil"} and not config.classify
        else set()
    )
    differing = [
        key for key in own if key not in free and own[key] != (defaults | first["config"])[key]
    ]
    if (
        first["method"] not in SAME_FIRST
        or (defaults | first["config"])["lra_trigger"] == "plateau"
    ):
        differing.append(f"method={first['method']}, which begins in a way of its own")
    differing += [f"the {name}" for name in ("tasks", "weights") if first[name] != results[name]]
    differing += [
        f"{name} ({first['environment'][name]} there)"
        for name in ("device", "amp")
        if first["environment"][name] != results["environment"][name]
    ]
    differing += (
        []
        if bool(first.get("class_matrix")) == bool(results["class_matrix"])
        else ["its results are of an older version"]
    )
    if (
        differing
        or len(first["matrix"]["J"]) < 2
        or not Path(config.first_task, "task_01", "model.safetensors").is_file()
    ):
        raise AtlasError(
            f"first_task={config.first_task} cannot stand for the first task of this run: {', '.join(differing) or 'it has no checkpoint or no scores yet'}; learn it anew with first_task=null"
        )
    return first


def add_scores(results, test, val, classes, seconds):
    """Append a row to every matrix: {score: [one a task]}, J of the tasks on validation clips, J of each class on test clips (None: the data have none), and what they took."""
    for name, row in test.items():
        results["matrix"][name].append(row)
    results["val_matrix"]["J"].append(val)
    if results.get("class_matrix"):  # a run begun by an older version has no such matrix
        results["class_matrix"]["J"].append(classes)
    results["seconds"]["evaluate"].append(seconds)


def add_scores_of(results, first, k):
    """Append row k of another run's."""
    test = {name: rows[k] for name, rows in first["matrix"].items()}
    add_scores(
        results,
        test,
        first["val_matrix"]["J"][k],
        (first.get("class_matrix") or {"J": {k: None}})["J"][k],
        first["seconds"]["evaluate"][k],
    )


def derived_metrics(results, joint=None):
    """results["metrics"]: what derives from the matrices. `joint`: of read_joint."""
    matrix = results["matrix"]
    clips = [t["clips"]["test"] for t in results["tasks"]]
    metrics = {}
    for name in ("J", "F"):
        last = matrix[name][-1]
        metrics[name] = continual_metrics(matrix[name], joint and joint[name])
        known = [(value, n) for value, n in zip(last, clips) if value is not None]
        metrics[name]["final_clips"] = (
            sum(value * n for value, n in known) / sum(n for _, n in known) if known else None
        )
    metrics["mute_area"] = sum(matrix["mute_area"][-1]) / len(clips)
    known = [accuracy for accuracy in matrix["class_accuracy"][-1] if accuracy is not None]
    metrics["class_accuracy"] = sum(known) / len(known) if known else None
    metrics["listening"] = metrics["J"]["final"] - sum(matrix["J_swap"][-1]) / len(clips)
    return metrics


def read_results(folder):
    try:
        results = json.loads(Path(folder, "results.json").read_text())
    except FileNotFoundError:
        raise AtlasError(
            f"no results.json in {folder}; give the folder of a run, as train.py printed it"
        ) from None
    except json.JSONDecodeError as error:
        raise AtlasError(f"{folder}/results.json is damaged ({error})") from None
    if results.get("schema") != 1:
        raise AtlasError(
            f"{folder}/results.json has schema {results.get('schema')}, this version reads 1"
        )
    return results


def commit():
    """{"commit", "dirty"} of the code, both null outside a git checkout."""
    here = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(
            ["git", "-C", here, *words], capture_output=True, text=True, check=True
        ).stdout.strip()
        return {
            "commit": run("rev-parse", "HEAD"),
            "dirty": bool(run("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def environment(device, amp):
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "peft": peft.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "amp": amp,
        "channels_last": device == "cuda",
        "processes": parallel.processes(),
    }


def row_text(results, k):
    """Row k of R for J, in words: one number a task, with its change against the best past score where it was learned before; tasks not learned yet in brackets."""
    matrix = results["matrix"]["J"]
    learned = len(results["tasks"]) if results["method"] == "joint" and k else k
    words = []
    for j, v in enumerate(matrix[k]):
        past = [row[j] for row in matrix[j + 1 : k]]
        words.append(
            f"({v:.3f})"
            if j >= learned
            else f"{v:.3f}" + (f" {v - max(past):+.2f}" if past else "")
        )
    return " | ".join(words)


def summary(results):
    """The matrix R of J and the summary table of one run, as text, from results.json alone."""
    tasks, matrix = results["tasks"], results["matrix"]["J"]
    stages = ["untrained"] + (
        ["joint"] if results["method"] == "joint" else [f"task {k + 1}" for k in range(len(tasks))]
    )
    lines = [
        f"{results['method']} · {results['protocol'].upper()} · seed {results['seed']}",
        "",
        "R, J on test clips: rows after learning, columns tasks",
    ]
    lines += [" " * 12 + " ".join(f"{f'task {j + 1}':>7}" for j in range(len(tasks)))]
    lines += [
        f"{stages[k]:<12}" + " ".join(f"{v:7.3f}" for v in row) for k, row in enumerate(matrix)
    ]
    if not results["complete"]:
        return "\n".join(lines + ["", f"not finished: {len(matrix)} of {len(stages)} rows"])
    show = lambda v: "   –  " if v is None else f"{v:6.3f}"
    J, F = results["metrics"]["J"], results["metrics"]["F"]
    names = ("final", "incremental", "learning", "forgetting", "bwt", "fwt", "intransigence")
    lines += ["", f"{'':<14}{'J':>6}  {'F':>6}"] + [
        f"{name:<14}{show(J[name])}  {show(F[name])}" for name in names if J[name] is not None
    ]
    lines += [
        f"{'listening':<14}{show(results['metrics']['listening'])}   J minus J with another clip's sound"
    ]
    lines += [
        f"{'mute area':<14}{show(results['metrics']['mute_area'])}   area masked when it hears nothing"
    ]
    if results["config"]["classify"]:
        lines += [f"{'class accuracy':<14}{show(results['metrics']['class_accuracy'])}"]
    if disjoint := results["metrics"]["source_disjoint"]:
        lines += [
            f"{'disjoint':<14}{show(disjoint['J'])}  {show(disjoint['F'])}   the {disjoint['clips']} test clips whose source video has no train clip"
        ]
    if results["sensitivity"] == "batch":
        lines += [
            "",
            f"consolidated after steps {', '.join(str(c['step']) for c in results['consolidations']) or 'none'}",
        ]
        lines += [f"the data drift at steps   {', '.join(map(str, results['drifts']))}"]
    p, s = results["parameters"], results["seconds"]
    lines += [
        "",
        f"parameters: {p['total']:,} without the audio encoder, {p['trainable']:,} trainable, {p['lora']:,} of them LoRA",
    ]
    lines += [
        f"seconds: {sum(s['train']):.0f} training, {sum(s['consolidate']):.0f} consolidating, {sum(s['evaluate']):.0f} evaluating"
    ]
    random = [name for name, w in results["weights"].items() if w["source"] == "random"]
    if random:
        lines += [
            f"note: the {' and '.join(random)} encoder has random weights, not pretrained ones"
        ]
    return "\n".join(lines)
