"""LoRA learned on the first task and held from then on."""

from atlas.lra import Holding, deltas


class FrozenLoRA(Holding):
    """After the first task LoRA's gradients are dropped before the update.

    Fusion and decoder go on learning, and forget. This tells what anchoring LoRA adds over freezing
    it. olora and inflora derive from it: they too end a pair with its task.
    """

    def __init__(self, run):
        super().__init__(run)
        found = deltas(run.model)
        self.names, self.pairs = list(found), list(found.values())

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
        self.armed = True

    def hold(self, pair):
        """Drop the gradients that must not be followed; AdamW leaves such parameters alone."""
        if self.armed:
            pair.A.grad = pair.B.grad = None
