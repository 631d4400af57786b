"""A run: its data and model, its folder, its checkpoints, its device."""

import contextlib
import fcntl
import json
import math
import os
import shutil
from pathlib import Path

import peft
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from atlas import parallel
from atlas.audio import build_audio_encoder, fingerprint
from atlas.clips import CSVS, READERS, built_beside
from atlas.config import as_dict, load_config, run_name
from atlas.data import PackedClips, pack
from atlas.errors import AtlasError
from atlas.model import Atlas, base_encoder, build_model
from atlas.prepare.synth import synth_s4
from atlas.prepare.synth_ms3 import synth_ms3

SYNTHETIC = {"s4": synth_s4, "ms3": synth_ms3}


def open_data(config):
    """(PackedClips, SHA-256 of the audio encoder) of a config; makes the synthetic set and the packed cache where they are missing."""
    if config.synth and not Path(config.data_root, CSVS[config.dataset]).is_file():
        print(f"making the synthetic {config.dataset.upper()} in {config.data_root}")
        SYNTHETIC[config.dataset](config.data_root)
    clips = READERS[config.dataset](config.data_root)
    encoder = build_audio_encoder(config.audio, config.audio_weights)
    folder = pack(
        clips,
        config.data_root,
        config.cache_dir,
        config.image_size,
        encoder,
        config.audio,
        config.dataset,
    )
    return PackedClips(folder), fingerprint(encoder)


def open_model(config, cache, tasks=()):
    """(the untrained model of a config, SHA-256 of its frozen visual encoder)."""
    classes = [task.classes for task in tasks] if config.classify else None
    model = build_model(config, cache.context_dim, cache.token_dim, classes)
    return model, frozen_fingerprint(model)


def refuse_other_encoders(run, results, visual_sha, audio_sha):
    """The scores of a run hold for its own frozen encoders only."""
    for name, sha in (("visual", visual_sha), ("audio", audio_sha)):
        if sha != results["weights"][name]["sha256"]:
            raise AtlasError(
                f"the {name} encoder is not the one of the run {run}: its weights differ ({name}_weights in config.yaml, or another torch)"
            )


def frozen_fingerprint(model):
    """The SHA-256 of the visual encoder without LoRA."""
    encoder = base_encoder(model.encoder)
    kept = {
        name.replace(".base_layer", ""): value
        for name, value in encoder.state_dict().items()
        if "lora_" not in name
    }
    holder = torch.nn.Module()
    for i, name in enumerate(sorted(kept)):
        holder.register_buffer(f"{i:05d}", kept[name])
    return fingerprint(holder)


# ---- the folder ------------------------------------------------------------------------------------------------------


def folder_of(config):
    return Path(config.out_dir, run_name(config))


def refuse_used_folder(config):
    """A cheap look before the heavy work: open_run is what decides."""
    folder = folder_of(config)
    if folder.is_dir() and {p.name for p in folder.iterdir()} - {".lock"}:
        raise AtlasError(
            f"the run folder {folder} is not empty and is never overwritten; choose another name=..., go on with --resume, or remove it"
        )


def begun(config):
    """Whether there is a run to resume."""
    return (folder_of(config) / "config.yaml").is_file()


def open_run(config, resume):
    """(folder, lock) of a run; hold on to the lock. New: an empty folder with the resolved config.yaml, and one that holds anything is refused.

    With `resume`, a folder that holds this very run is opened as it is; another config is refused by the keys that differ.
    """
    folder = folder_of(config)
    if parallel.rank():
        return folder, None
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AtlasError(
            f"the run folder {folder} is in use by another process; wait for it, or choose another name=..."
        ) from None
    if {p.name for p in folder.iterdir()} - {".lock"}:
        if not resume:
            refuse_used_folder(config)
        if not (folder / "config.yaml").is_file():
            raise AtlasError(
                f"{folder} is not empty and holds no config.yaml, so it is no run to resume; choose another name=..."
            )
        old, new = as_dict(read_run_config(folder)), as_dict(config)
        differing = [
            f"{key} ({old[key]} there, {new[key]} here)" for key in new if old[key] != new[key]
        ]
        if differing:
            raise AtlasError(
                f"{folder} was made with another config, so it cannot be resumed: {', '.join(differing)}"
            )
    else:
        write_text(folder / "config.yaml", yaml.safe_dump(as_dict(config), sort_keys=False))
    return folder, lock


@parallel.first_only
def log(folder, **line):
    """Append one line to log.jsonl."""
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


@parallel.first_only
def forget_log_after(folder, task, epoch):
    """Drop the lines of log.jsonl that a resumed run writes again: all after this epoch of this task."""
    path = folder / "log.jsonl"
    if path.is_file():
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [
            line for line in lines if (line["task"], line.get("epoch", math.inf)) <= (task, epoch)
        ]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def consolidations(folder):
    """The consolidations of a task-free run, from its log: [{"step", "reason"}]."""
    if parallel.rank():  # the first one's log
        return []
    windows = [
        line["window"]
        for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        if "window" in line
    ]
    return [
        {"step": window["step"], "reason": window["reason"]}
        for window in windows
        if window["fired"]
    ]


@parallel.first_only
def write_text(path, text):
    """Write beside and rename: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text)
    os.replace(beside, path)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_run_config(folder):
    return load_config([Path(folder, "config.yaml")])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder):
    """torch and safetensors have errors of their own for a full disk: one line for all of them."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise AtlasError(
            f"cannot write to {folder}: {error}; make room there and go on with --resume"
        ) from None


@parallel.first_only
def save_checkpoint(folder, model, method):
    """`folder` (task_NN/): LoRA in PEFT's own format, for the encoder as timm makes it; fusion and decoder in model.safetensors, the method's state in method.safetensors."""
    shutil.rmtree(
        folder, ignore_errors=True
    )  # of a run that was killed between this and its scores
    with built_beside(folder) as build, writing(folder):
        if isinstance(model.encoder, peft.PeftModel):
            model.encoder.save_pretrained(build)
            (build / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
            _widen_adapter(build, method.folded())
        rest = {
            name: value.contiguous()
            for name, value in model.state_dict().items()
            if not name.startswith("encoder.")
        }
        save_file(rest, build / "model.safetensors")
        save_file(
            {name: value.contiguous() for name, value in method.state_dict().items()},
            build / "method.safetensors",
        )


def _widen_adapter(folder, past):
    """Put the pairs that a method folded into the frozen weights ({layer: (A, B)}) before the adapter's own, so that it stands for all that was learned, on timm's weights.

    [B_1 B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2; alpha grows with r, so that alpha / r stays.
    """
    own = json.loads((folder / "adapter_config.json").read_text())
    state, total = load_file(folder / "adapter_model.safetensors"), own["r"]
    for name, (A, B) in past.items():
        state[f"{name}.lora_A.weight"] = torch.cat([A.cpu(), state[f"{name}.lora_A.weight"]])
        state[f"{name}.lora_B.weight"] = torch.cat(
            [B.cpu(), state[f"{name}.lora_B.weight"]], 1
        ).contiguous()
        total = own["r"] + len(A)
    if total > own["r"]:
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_text(
            folder / "adapter_config.json",
            json.dumps(
                own | {"r": total, "lora_alpha": own["lora_alpha"] * total / own["r"]},
                indent=2,
                sort_keys=True,
            ),
        )


def _own_adapter(folder, rank):
    """The adapter's own pair, of `rank`: what _widen_adapter put before it is the method's, by method.safetensors."""
    state = load_file(folder / "adapter_model.safetensors")
    with safe_open(folder / "method.safetensors", "pt") as file:
        past = file.get_slice("A0").get_shape()[0] if "A0" in file.keys() else 0
    dim = lambda name: 1 if "lora_B" in name else 0
    return {
        name: value.narrow(dim(name), past, rank)
        if value.shape[dim(name)] == past + rank
        else value
        for name, value in state.items()
    }


def load_checkpoint(folder, model, method=None):
    """Load a checkpoint into the model (and the method) that were built from the run's config."""
    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise AtlasError(
            f"no checkpoint in {folder}; the run stopped before it was written, or the folder was moved"
        )
    try:
        wrong = _load_parts(folder, model)
    except RuntimeError as error:  # shapes that differ
        wrong = [str(error).splitlines()[1].strip()]
    if wrong:
        raise AtlasError(
            f"the checkpoint {folder} is of another model than the run's config.yaml describes ({wrong[0]}, for one)"
        )
    if method is not None:
        method.load_state_dict(load_file(folder / "method.safetensors"))


def _load_parts(folder, model):
    """Load what save_checkpoint wrote of the model; the names that do not fit."""
    if isinstance(model.encoder, peft.PeftModel):
        found = peft.set_peft_model_state_dict(
            model.encoder, _own_adapter(folder, model.encoder.peft_config["default"].r)
        )
        wrong = [*found.unexpected_keys, *(name for name in found.missing_keys if "lora_" in name)]
    else:
        wrong = []
    rest = load_file(folder / "model.safetensors")
    while f"decoder.heads.{len(model.decoder.heads)}.weight" in rest:
        model.decoder.add_head()
    found = model.load_state_dict(rest, strict=False)
    return [
        *wrong,
        *found.unexpected_keys,
        *(name for name in found.missing_keys if not name.startswith("encoder.")),
    ]


@parallel.first_only
def forget_progress(folder):
    """The run is finished."""
    (folder / "progress.pt").unlink(missing_ok=True)


@parallel.first_only
def save_progress(folder, task, epoch, seconds, *parts):
    """progress.pt: where a run is, and the state of `parts` (model, optimiser, ...) there; one file, replaced as a whole."""
    beside = folder / ".progress.tmp"
    with writing(folder):
        torch.save(
            {
                "task": task,
                "epoch": epoch,
                "seconds": seconds,
                "parts": [trainable_state(part) for part in parts],
            },
            beside,
        )
    os.replace(beside, folder / "progress.pt")


def load_progress(folder, task, stream, model, optimizer, scaler, method):
    """(rounds done, seconds spent) of this very task, its state loaded into the four; or (0, 0). On a stream the optimiser also comes from the share before."""
    path = folder / "progress.pt"
    state = (
        torch.load(path, map_location="cpu", weights_only=True)
        if path.is_file()
        else {"task": None}
    )
    here = state["task"] == task
    if here or (stream and state["task"] == task - 1):
        weights, *others = state["parts"]
        for part, values in zip((optimizer, scaler), others):
            part.load_state_dict(values)
        if here:
            model.load_state_dict(weights, strict=False)
            method.load_state_dict(others[2])
    return (state["epoch"], state["seconds"]) if here else (0, 0.0)


def trainable_state(part):
    """The state of a part of a run; of a model, the trainables only."""
    if isinstance(part, Atlas):
        return {name: p.detach() for name, p in part.named_parameters() if p.requires_grad}
    return part.state_dict()


# ---- the machine -----------------------------------------------------------------------------------------------------


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


def compiled(model):
    """torch.compile of the model's forward pass. It gets the tensors of a batch only: what is a list would be compiled anew for each."""
    if next(model.parameters()).device.type == "cpu" and not any(
        map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "c++")))
    ):
        raise AtlasError(
            "compile=true on the CPU needs a C++ compiler (g++ or clang++), and none is installed; install one, or set compile=false"
        )
    forward = torch.compile(model)
    return lambda batch: forward(
        {name: value for name, value in batch.items() if torch.is_tensor(value)}
    )
