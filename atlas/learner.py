"""A model and its method on their device, without data; and their checkpoints.

A checkpoint is a folder task_NN/. It holds LoRA in PEFT's own format, for the encoder as timm
makes it (so `PeftModel.from_pretrained` opens it), fusion and decoder in model.safetensors, and
the method's buffers in method.safetensors.
"""

import importlib
import json
import shutil
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from atlas import parallel
from atlas.audio import fingerprint
from atlas.clips import built_beside
from atlas.encoders import base_encoder
from atlas.errors import AtlasError
from atlas.methods import METHODS
from atlas.model import build_model


class Learner:
    """config, device, amp, model, method. A checkpoint is loaded into it."""

    def __init__(self, config, dims, classes=None):
        """dims: (D_a, D_u) of the audio encoder; classes: each task's, where there is a branch."""
        self.config = config
        self.device = pick_device(config)
        self.amp = pick_amp(config, self.device)
        self.model = build_model(config, *dims, classes)
        self.visual_sha = frozen_fingerprint(self.model)
        on_gpu = self.device == "cuda"
        layout = torch.channels_last if on_gpu else torch.preserve_format
        self.model.to(self.device, memory_format=layout)
        self.method = build_method(self)

    def autocast(self):
        """The context of the run's precision; it does nothing where amp is off."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.amp)
        return torch.autocast(self.device, dtype, enabled=dtype is not None)

    def groups(self):
        """The trainables that a method may hold, by group. Heads of TIL's tasks are left out."""
        groups = self.model.groups()
        if self.config.protocol == "til":
            decoder = groups["decoder"].items()
            own = {name: p for name, p in decoder if not name.startswith("decoder.heads.")}
            groups |= {"decoder": own, "classifier": {}}
        return groups

    @property
    def has_lora(self):
        return isinstance(self.model.encoder, peft.PeftModel)

    def memory(self):
        """The method's memory: the bytes of its state."""
        state = self.method.state_dict().values()
        return sum(value.numel() * value.element_size() for value in state)

    @parallel.first_only
    def save(self, folder, extra=None):
        """Write a checkpoint, beside its place first. A folder that is there is never replaced.

        extra: {file name: what torch.save writes into it}.
        """
        with built_beside(folder) as build, writing(folder):
            if self.has_lora:
                self.model.encoder.save_pretrained(build)
                (build / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
                widen_adapter(build, self.method.adapters())
            state = self.model.state_dict().items()
            rest = {name: x.contiguous() for name, x in state if not name.startswith("encoder.")}
            save_file(rest, build / "model.safetensors")
            state = self.method.state_dict().items()
            save_file({name: x.contiguous() for name, x in state}, build / "method.safetensors")
            for name, content in (extra or {}).items():
                torch.save(content, build / name)

    def load(self, folder, with_method=True):
        """Load a checkpoint that fits this model, and its method's state unless told not to."""
        folder = Path(folder)
        if not (folder / "model.safetensors").is_file():
            raise AtlasError(damaged(folder / "model.safetensors", "it is missing"))
        try:
            wrong = self.load_model(folder)
            if with_method:
                self.method.load_state_dict(read_state(folder / "method.safetensors"))
        except (RuntimeError, KeyError) as error:  # shapes or names that differ
            wrong = [" ".join(str(error).split())[:200]]
        if wrong:
            raise AtlasError(f"{folder} is of another model than config.yaml says ({wrong[0]})")

    def load_model(self, folder):
        """Load what `save` wrote of the model; returns the names that do not fit."""
        wrong = []
        if self.has_lora:
            rank = self.model.encoder.peft_config["default"].r
            found = peft.set_peft_model_state_dict(self.model.encoder, own_adapter(folder, rank))
            wrong += found.unexpected_keys
            wrong += [name for name in found.missing_keys if "lora_" in name]
        rest = read_state(folder / "model.safetensors")
        while f"decoder.heads.{len(self.model.decoder.heads)}.weight" in rest:
            self.model.decoder.add_head()
        found = self.model.load_state_dict(rest, strict=False)
        missing = [name for name in found.missing_keys if not name.startswith("encoder.")]
        return [*wrong, *found.unexpected_keys, *missing]


def build_method(learner):
    """The method of a learner's config, from the table METHODS."""
    module, _, name = METHODS[learner.config.method].where.partition(":")
    return getattr(importlib.import_module(module), name)(learner)


def frozen_fingerprint(model):
    """The SHA-256 of the visual encoder without LoRA."""
    holder = torch.nn.Module()
    kept = {}
    for name, value in base_encoder(model.encoder).state_dict().items():
        if "lora_" not in name:
            kept[name.replace(".base_layer", "")] = value
    for i, name in enumerate(sorted(kept)):
        holder.register_buffer(f"{i:05d}", kept[name])
    return fingerprint(holder)


# ---- the adapter's file ------------------------------------------------------------------------


def widen_adapter(folder, past):
    """Put pairs folded into the frozen weights, {layer: (A, B)}, before the adapter's own pair.

    The adapter then stands for all that was learned, on timm's weights:
    [B_1 B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2. alpha grows with r, so that alpha / r stays.
    """
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    rank = settings["r"]
    total = rank
    for name, (A, B) in past.items():
        key = f"{name}.lora_A.weight"
        state[key] = torch.cat([A.cpu(), state[key]])
        key = f"{name}.lora_B.weight"
        state[key] = torch.cat([B.cpu(), state[key]], 1).contiguous()
        total = rank + len(A)
    if total == rank:
        return
    save_file(state, path, metadata={"format": "pt"})
    settings |= {"r": total, "lora_alpha": settings["lora_alpha"] * total / rank}
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def own_adapter(folder, rank):
    """The adapter's own pair, of `rank`: what `widen_adapter` put before it is the method's."""
    state = read_state(folder / "adapter_model.safetensors")
    read_state(folder / "method.safetensors")  # says where it is torn
    with safe_open(folder / "method.safetensors", "pt") as file:
        past = file.get_slice("A0").get_shape()[0] if "A0" in file.keys() else 0
    own = {}
    for name, value in state.items():
        dim = 1 if "lora_B" in name else 0
        widened = value.shape[dim] == past + rank
        own[name] = value.narrow(dim, past, rank) if widened else value
    return own


def read_state(path):
    """The tensors of a checkpoint's safetensors file."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise AtlasError(damaged(path, "it is missing")) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise AtlasError(damaged(path, error)) from None


def damaged(path, reason):
    folder = Path(path).parent
    return f"{path} is damaged ({reason}); remove {folder}, and --resume learns that task again"


class writing:
    """torch and safetensors have errors of their own for a full disk: one line for all of them."""

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            how = "make room there and go on with --resume"
            raise AtlasError(f"cannot write to {self.folder}: {error}; {how}") from None


# ---- the machine -------------------------------------------------------------------------------


def pick_device(config):
    """ "cuda" or "cpu"."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise AtlasError("device=cuda, but torch sees no GPU; use device=cpu or device=auto")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def pick_amp(config, device):
    """bf16, fp16 or off. auto: off on the CPU, bf16 on a GPU that has it, else fp16."""
    if config.amp != "auto":
        return config.amp
    if device == "cpu":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def compiled(model):
    """torch.compile of the model's forward pass.

    It gets the tensors of a batch only: what is a list would be compiled anew for each.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise AtlasError("compile=true on a CPU needs g++ or clang++; install it, or compile=false")
    forward = torch.compile(model)

    def call(batch):
        return forward({name: value for name, value in batch.items() if torch.is_tensor(value)})

    return call
