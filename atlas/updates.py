"""From a loss to an update: AdamW, its schedule, loss scaling and the sum over processes."""

import math

import torch

from atlas import parallel
from atlas.config import rate_of


class Updates:
    """The optimiser and schedule of one task (fresh each time), or of a whole stream."""

    def __init__(self, run, t, steps):
        """steps: of the whole schedule, of which `done` are taken."""
        config = self.config = run.config
        self.steps, self.done = steps, 0
        self.peak = config.lr_first if t == 1 or run.is_stream else rate_of(config)
        self.parameters = [p for p in run.model.parameters() if p.requires_grad]
        decay = {"weight_decay": config.weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters, self.peak, fused=True, **decay)
        scaled = run.amp == "fp16" and run.device == "cuda"
        self.scaler = torch.amp.GradScaler(run.device, enabled=scaled)

    def backward(self, loss, share):
        """Leave the whole batch's gradients. loss: of this process's part, of weight `share`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(share * loss).backward()
        parallel.sum_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)

    def step(self):
        """Clip the gradients, and update the parameters."""
        self.optimizer.param_groups[0]["lr"] = self.rate
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1

    @property
    def rate(self):
        constant = self.config.protocol == "tfcl"  # of `joint` too
        return self.peak * schedule(self.done, self.steps, self.config.warmup, constant)

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


def schedule(step, steps, warmup, constant=False):
    """The rate in peaks: it rises over `warmup` of the steps; then half a cosine, or constant."""
    warm = warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return 1.0 if constant else cosine
