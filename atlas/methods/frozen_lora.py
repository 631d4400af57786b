"""LoRA learned on the first task and held from then on."""

import torch

from atlas.lra import Method, deltas
from atlas.trigger import trigger_of


class FrozenLoRA(Method):
    """After the first task LoRA's gradients are dropped before the update.

    Fusion and decoder go on learning, and forget. This baseline tells what anchoring LoRA adds
    over freezing it. olora and inflora derive from it: they too end a pair with its task.
    """

    def __init__(self, run):
        super().__init__(run)
        self.trigger = trigger_of(run.config)
        self.pairs = list(deltas(run.model).values())
        self.names = list(deltas(run.model))
        self.armed = False  # no task is over yet

    def get_extra_state(self):
        state = [self.armed, *(self.trigger.state() if self.trigger else ())]
        return torch.tensor(state, dtype=torch.float64)

    def set_extra_state(self, state):
        self.armed = bool(state[0])
        if self.trigger:
            self.trigger.restore(state[1:].tolist())

    def observe(self, step):
        report = self.trigger.watch(step.loss) if self.trigger else None
        if report and report["fired"]:
            self.end_pair()
        for pair in self.pairs:
            self.hold(pair)
        return report

    def end_task(self, clips):
        self.end_pair()

    def end_pair(self):
        """A task is over."""
        self.armed = True

    def hold(self, pair):
        """Drop the gradients that must not be followed; AdamW leaves such parameters alone."""
        if self.armed:
            pair.A.grad = None
            pair.B.grad = None
