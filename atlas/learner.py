"""A model and its method on their device, without data; and their checkpoints: LoRA as PEFT alone
opens it on timm's encoder, all else and the method as safetensors."""

import contextlib
import json
import pkgutil
import shutil

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from atlas import parallel
from atlas.audio import fingerprint
from atlas.clips import built_beside, why_unreadable
from atlas.encoders import base_encoder
from atlas.errors import AtlasError
from atlas.methods import METHODS
from atlas.model import build_model


class Learner:
    is_stream = False  # TF-CL: its optimiser goes on from one checkpoint to the next
    updates = None  # updates.Updates while a task is learned
    drifts = ()  # steps at which a stream's segments begin; only lra_trigger=told asks for them

    def __init__(self, config, dims, classes=None):
        """dims: (D_a, D_u) of the audio encoder; classes: each task's, where there is a branch."""
        self.config, self.device = config, pick_device(config)
        self.amp = pick_amp(config, self.device)
        self.model = build_model(config, *dims, classes)
        self.visual_sha = frozen_fingerprint(self.model)
        layout = torch.channels_last if self.device == "cuda" else torch.preserve_format
        self.model.to(self.device, memory_format=layout)
        self.method = pkgutil.resolve_name(METHODS[config.method].where)(self)

    def autocast(self):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.amp)
        return torch.autocast(self.device, dtype, enabled=dtype is not None)

    def groups(self):
        """The trainables that a method may hold, by group. Heads of TIL's tasks are left out."""
        groups = self.model.groups()
        if self.config.protocol != "til":
            return groups
        shared = {n: p for n, p in groups["decoder"].items() if ".heads." not in n}
        return groups | {"decoder": shared, "classifier": {}}

    def memory(self):
        return sum(value.nbytes for value in self.method.state_dict().values())

    @parallel.first_only
    def save(self, folder):
        """Write a checkpoint, where there is none yet; on a stream with the optimiser's state."""
        with built_beside(folder) as build, writing(folder):
            if isinstance(self.model.encoder, peft.PeftModel):
                self.model.encoder.save_pretrained(build)
                (build / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
                widen_adapter(build, self.method.adapters())
            state = self.model.state_dict().items()
            rest = {name: x for name, x in state if not name.startswith("encoder.")}
            for name, tensors in ("model", rest), ("method", self.method.state_dict()):
                whole = {key: x.contiguous() for key, x in tensors.items()}
                save_file(whole, build / f"{name}.safetensors")
            if self.is_stream:
                torch.save(self.updates.state_dict(), build / "updates.pt")

    def load(self, folder, with_method=True):
        """Load a checkpoint of such a model, and its method's state unless told not to."""
        state = read_state(folder / "model.safetensors")
        method = read_state(folder / "method.safetensors")
        while f"decoder.heads.{len(self.model.decoder.heads)}.weight" in state:
            self.model.decoder.add_head()
        if isinstance(self.model.encoder, peft.PeftModel):
            past = len(method.get("A0", ()))  # the rank of what `widen_adapter` put first
            for name, value in read_state(folder / "adapter_model.safetensors").items():
                own = value[:, past:] if "lora_B" in name else value[past:]
                state["encoder." + name.replace(".weight", ".default.weight")] = own
        try:
            found = self.model.load_state_dict(state, strict=False)
            learned = [n for n in found.missing_keys if n[:8] != "encoder." or "lora_" in n]
            wrong = found.unexpected_keys + learned
            if with_method:
                self.method.load_state_dict(method)
        except (RuntimeError, KeyError) as error:  # shapes or names that differ
            wrong = [" ".join(str(error).split())[:200]]
        if wrong:
            raise AtlasError(f"{folder} is of another model than config.yaml says ({wrong[0]})")


def frozen_fingerprint(model):
    """The SHA-256 of the visual encoder without LoRA."""
    holder = torch.nn.Module()
    state = base_encoder(model.encoder).state_dict().items()
    frozen = {name.replace(".base_layer", ""): x for name, x in state if "lora_" not in name}
    for i, name in enumerate(sorted(frozen)):
        holder.register_buffer(f"{i:05d}", frozen[name])
    return fingerprint(holder)


def widen_adapter(folder, past):
    """Put pairs folded into the frozen weights, {layer: (A, B)}, before the adapter's own pair:
    [B_1 B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2. alpha / r stays."""
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    state = load_file(path)
    settings = json.loads(config.read_text(encoding="utf-8"))
    total = rank = settings["r"]
    for name, (A, B) in past.items():
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        state[a] = torch.cat([A.cpu(), state[a]])
        state[b] = torch.cat([B.cpu(), state[b]], 1)
        total = rank + len(A)
    if total > rank:
        save_file(state, path, metadata={"format": "pt"})
        settings |= {"r": total, "lora_alpha": settings["lora_alpha"] * total / rank}
        config.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def read_state(path):
    if path.is_file():
        open(path, "rb").close()  # without the right to read, safetensors says that it is missing
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        how = f"remove {path.parent}, and --resume learns that task again"
        raise AtlasError(f"{path} is damaged ({why_unreadable(path, error)}); {how}") from None


@contextlib.contextmanager
def writing(folder):
    """One line for the errors that torch and safetensors have for a full disk."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        how = "make room there, or allow it, and go on with --resume"
        raise AtlasError(f"cannot write to {folder}: {error}; {how}") from None


def pick_device(config):
    if config.device == "cuda" and not torch.cuda.is_available():
        raise AtlasError("device=cuda, but torch sees no GPU; use device=cpu or device=auto")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def pick_amp(config, device):
    if config.amp != "auto" or device == "cpu":
        return "off" if config.amp == "auto" else config.amp
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def compiled(model):
    """torch.compile of the forward pass, on tensors only: for lists it would compile anew."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise AtlasError("compile=true on a CPU needs g++ or clang++; install it, or compile=false")
    forward = torch.compile(model)
    return lambda batch: forward({n: value for n, value in batch.items() if torch.is_tensor(value)})
