"""A run: its data, its folder, its checkpoints and its results file. What train.py writes and eval.py reads."""
import contextlib
import datetime
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path

import peft
import timm
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlas.audio import build_audio_encoder, fingerprint
from atlas.config import as_dict, load_config, run_name
from atlas.data import READERS, PackedClips, built_beside, pack
from atlas.errors import AtlasError
from atlas.metrics import continual_metrics
from atlas.model import base_encoder, build_model
from atlas.synth import synth_s4

TEST_SCORES = ("J", "F", "J_strict", "F_dataset", "J_swap", "mute_area")


def open_data(config):
    """(PackedClips, SHA-256 of the audio encoder) of a config; makes the synthetic set and the packed cache where they are missing."""
    root = Path(config.data_root)
    if config.synth and not (root.is_dir() and any(root.iterdir())):
        print(f"making the synthetic set in {config.data_root}")
        synth_s4(config.data_root)
    clips = READERS[config.dataset](config.data_root)
    encoder = build_audio_encoder(config.audio, config.audio_weights)
    folder = pack(clips, config.data_root, config.cache_dir, config.image_size, encoder, config.audio, config.dataset)
    return PackedClips(folder), fingerprint(encoder)


def open_model(config, cache):
    """(the untrained model of a config, SHA-256 of its frozen visual encoder)."""
    model = build_model(config, cache.context_dim, cache.token_dim)
    return model, frozen_fingerprint(model)


def frozen_fingerprint(model):
    """The SHA-256 of the visual encoder without LoRA."""
    encoder = base_encoder(model.encoder)
    kept = {name.replace(".base_layer", ""): value for name, value in encoder.state_dict().items() if "lora_" not in name}
    holder = torch.nn.Module()
    for i, name in enumerate(sorted(kept)):
        holder.register_buffer(f"{i:05d}", kept[name])
    return fingerprint(holder)


# ---- the folder ------------------------------------------------------------------------------------------------------


def refuse_used_folder(config):
    """A cheap look before the heavy work: open_run is what decides."""
    folder = Path(config.out_dir, run_name(config))
    if folder.is_dir() and {p.name for p in folder.iterdir()} - {".lock"}:
        raise AtlasError(f"the run folder {folder} is not empty and is never overwritten; choose another name=..., go on with --resume, or remove it")


def open_run(config, resume):
    """(folder, lock) of a run; hold on to the lock. New: an empty folder with the resolved config.yaml, and one that holds anything is refused.

    With `resume`, a folder that holds this very run is opened as it is; another config is refused by the keys that differ.
    """
    folder = Path(config.out_dir, run_name(config))
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AtlasError(f"the run folder {folder} is in use by another process; wait for it, or choose another name=...") from None
    if {p.name for p in folder.iterdir()} - {".lock"}:
        if not resume:
            refuse_used_folder(config)
        if not (folder / "config.yaml").is_file():
            raise AtlasError(f"{folder} is not empty and holds no config.yaml, so it is no run to resume; choose another name=...")
        old, new = as_dict(read_run_config(folder)), as_dict(config)
        differing = [f"{key} ({old[key]} there, {new[key]} here)" for key in new if old[key] != new[key]]
        if differing:
            raise AtlasError(f"{folder} was made with another config, so it cannot be resumed: {', '.join(differing)}")
    else:
        write_text(folder / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
    return folder, lock


def log(folder, **line):
    """Append one line to log.jsonl."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def forget_log_after(folder, task, epoch):
    """Drop the lines of log.jsonl that a resumed run writes again: all after this epoch of this task."""
    path = folder / "log.jsonl"
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if (line["task"], line.get("epoch", math.inf)) <= (task, epoch)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def write_text(path, text):
    """Write beside and rename: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_results(folder):
    try:
        results = json.loads(Path(folder, "results.json").read_text())
    except FileNotFoundError:
        raise AtlasError(f"no results.json in {folder}; give the folder of a run, as train.py printed it") from None
    except json.JSONDecodeError as error:
        raise AtlasError(f"{folder}/results.json is damaged ({error})") from None
    if results.get("schema") != 1:
        raise AtlasError(f"{folder}/results.json has schema {results.get('schema')}, this version reads 1")
    return results


def read_run_config(folder):
    return load_config([Path(folder, "config.yaml")])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder):
    """torch and safetensors have errors of their own for a full disk: one line for all of them."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise AtlasError(f"cannot write to {folder}: {error}; make room there and go on with --resume") from None


def save_checkpoint(folder, model, method):
    """`folder` (task_NN/): LoRA in PEFT's own format, fusion and decoder in model.safetensors, the method's state in method.safetensors."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed between this and its scores
    with built_beside(folder) as build, writing(folder):
        if isinstance(model.encoder, peft.PeftModel):
            model.encoder.save_pretrained(build)
            (build / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        rest = {name: value.contiguous() for name, value in model.state_dict().items() if not name.startswith("encoder.")}
        save_file(rest, build / "model.safetensors")
        save_file({name: value.contiguous() for name, value in method.state_dict().items()}, build / "method.safetensors")


def load_checkpoint(folder, model, method=None):
    """Load a checkpoint into the model (and the method) that were built from the run's config."""
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise AtlasError(f"no checkpoint in {folder}; the run stopped before it was written, or the folder was moved")
    if isinstance(model.encoder, peft.PeftModel):
        found = peft.set_peft_model_state_dict(model.encoder, load_file(folder / "adapter_model.safetensors"))
        wrong = [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]
    else:
        wrong = []
    rest = load_file(folder / "model.safetensors")
    while f"decoder.heads.{len(model.decoder.heads)}.weight" in rest:
        model.decoder.add_head()
    found = model.load_state_dict(rest, strict=False)
    wrong += [*found.unexpected_keys, *(name for name in found.missing_keys if not name.startswith("encoder."))]
    if wrong:
        raise AtlasError(f"the checkpoint {folder} is of another model than the run's config.yaml describes (`{wrong[0]}`, for one)")
    if method is not None:
        method.load_state_dict(load_file(folder / "method.safetensors"))


def save_progress(folder, model, optimizer, task, epoch, seconds):
    """progress.pt: the trainables and the optimiser after `epoch` of `task`; one file, replaced as a whole."""
    trainables = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    beside = folder / ".progress.tmp"
    with writing(folder):
        torch.save({"model": trainables, "optimizer": optimizer.state_dict(), "task": task, "epoch": epoch, "seconds": seconds}, beside)
    os.replace(beside, folder / "progress.pt")


def load_progress(folder, task):
    """What save_progress wrote for this very task, or None."""
    path = folder / "progress.pt"
    state = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
    return state if state and state["task"] == task else None


# ---- results.json ----------------------------------------------------------------------------------------------------


def new_results(config, tasks, parameters, sha256):
    """results.json before the first score. Matrices: row 0 = untrained, then one row a stage learned; columns = tasks. `sha256`: of the frozen encoders."""
    source = lambda weights: "random" if weights is False else str(weights)
    weights = {
        "visual": {"source": source(config.visual_weights), "sha256": sha256["visual"]},
        "audio": {"source": "none needed" if config.audio == "logmel" else source(config.audio_weights), "sha256": sha256["audio"]},
    }
    return {
        "schema": 1,
        "complete": False,
        "method": config.method,
        "protocol": config.protocol,
        "seed": config.seed,
        "config": as_dict(config),
        **commit(),
        "environment": environment(config),
        "weights": weights,
        "tasks": [
            {"name": t.name, "classes": list(t.classes), "clips": {s: len(getattr(t, s)) for s in ("train", "val", "test")}} for t in tasks
        ],
        "matrix": {name: [] for name in TEST_SCORES},
        "val_matrix": {"J": []},
        "metrics": None,
        "parameters": parameters,
        "seconds": {"train": [], "consolidate": [], "evaluate": []},
        "peak_memory_mb": None,
    }


def read_joint(folder, tasks):
    """The last row of every matrix of a finished joint run over the very same tasks, for intransigence; None without a folder."""
    if not folder:
        return None
    joint = read_results(folder)
    if joint["method"] != "joint" or not joint["complete"] or joint["tasks"] != tasks:
        raise AtlasError(f"joint_run={folder} is no finished joint run over the same tasks and clips; run method=joint with the same data, seed, base and step")
    return {name: rows[-1] for name, rows in joint["matrix"].items()}


def derived_metrics(results, joint=None):
    """results["metrics"]: what derives from the matrices. `joint`: of read_joint."""
    matrix = results["matrix"]
    clips = [t["clips"]["test"] for t in results["tasks"]]
    metrics = {}
    for name in ("J", "F"):
        last = matrix[name][-1]
        metrics[name] = continual_metrics(matrix[name], joint and joint[name])
        known = [(value, n) for value, n in zip(last, clips) if value is not None]
        metrics[name]["final_clips"] = sum(value * n for value, n in known) / sum(n for _, n in known) if known else None
    metrics["mute_area"] = sum(matrix["mute_area"][-1]) / len(clips)
    metrics["listening"] = metrics["J"]["final"] - sum(matrix["J_swap"][-1]) / len(clips)
    return metrics


def commit():
    """{"commit", "dirty"} of the code, both null outside a git checkout."""
    here = Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=True).stdout.strip()
        return {"commit": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def environment(config):
    device = torch.device(pick_device(config))
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "peft": peft.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "amp": pick_amp(config),
    }


def pick_device(config):
    if config.device == "cuda" and not torch.cuda.is_available():
        raise AtlasError("device=cuda, but torch sees no GPU; use device=cpu or device=auto")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def pick_amp(config):
    """bf16, fp16 or off; `auto` is off on the CPU, bf16 on a GPU that has it, else fp16."""
    if config.amp != "auto":
        return config.amp
    if pick_device(config) == "cpu":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast_of(config):
    """A function that makes the autocast context of a config; one that does nothing where amp is off."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(pick_amp(config))
    return lambda: torch.autocast(pick_device(config), dtype, enabled=dtype is not None)


# ---- the table -------------------------------------------------------------------------------------------------------


def row_text(results, k):
    """Row k of R for J, in words: one number a task, the tasks not learned yet in brackets."""
    learned = len(results["tasks"]) if results["method"] == "joint" and k else k
    row = results["matrix"]["J"][k]
    return " ".join(f" {v:5.3f} " if j < learned else f"({v:5.3f})" for j, v in enumerate(row))


def summary(results):
    """The matrix R of J and the summary table of one run, as text, from results.json alone."""
    tasks, matrix = results["tasks"], results["matrix"]["J"]
    stages = ["untrained"] + (["joint"] if results["method"] == "joint" else [f"task {k + 1}" for k in range(len(tasks))])
    lines = [f"{results['method']} · {results['protocol'].upper()} · seed {results['seed']}", "", "R, J on test clips: rows after learning, columns tasks"]
    lines += [" " * 12 + " ".join(f"{f'task {j + 1}':>7}" for j in range(len(tasks)))]
    lines += [f"{stages[k]:<12}" + " ".join(f"{v:7.3f}" for v in row) for k, row in enumerate(matrix)]
    if not results["complete"]:
        return "\n".join(lines + ["", f"not finished: {len(matrix)} of {len(stages)} rows"])
    show = lambda v: "   –  " if v is None else f"{v:6.3f}"
    J, F = results["metrics"]["J"], results["metrics"]["F"]
    names = ("final", "incremental", "learning", "forgetting", "bwt", "fwt", "intransigence")
    lines += ["", f"{'':<14}{'J':>6}  {'F':>6}"] + [f"{name:<14}{show(J[name])}  {show(F[name])}" for name in names if J[name] is not None]
    lines += [f"{'listening':<14}{show(results['metrics']['listening'])}   J minus J with another clip's sound"]
    lines += [f"{'mute area':<14}{show(results['metrics']['mute_area'])}   area masked when it hears nothing"]
    p, s = results["parameters"], results["seconds"]
    lines += ["", f"parameters: {p['total']:,} without the audio encoder, {p['trainable']:,} trainable, {p['lora']:,} of them LoRA"]
    lines += [f"seconds: {sum(s['train']):.0f} training, {sum(s['consolidate']):.0f} consolidating, {sum(s['evaluate']):.0f} evaluating"]
    random = [name for name, w in results["weights"].items() if w["source"] == "random"]
    if random:
        lines += [f"note: the {' and '.join(random)} encoder has random weights, not pretrained ones"]
    return "\n".join(lines)
