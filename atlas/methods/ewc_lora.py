"""EWC on LoRA's update B A instead of its factors."""

from atlas.config import strength_of
from atlas.lra import Anchor, deltas


class EWCLoRA(Anchor):
    """EWC (atlas/methods/ewc.py) with theta = (alpha / r) B A of every adapted layer.

    Only LoRA is held, as published, so fusion and decoder forget. The authors begin a new pair for
    each task. Here one pair goes on, and B A - (B A)* is held.
    Source: EWC-LoRA (arXiv 2602.17559).
    """

    def __init__(self, run):
        super().__init__(run, {"lora": deltas(run.model)}, strength_of(run.config))
