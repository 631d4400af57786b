"""Replay of stored clips. It is NOT exemplar-free: a reference row only."""

from collections import Counter

import torch

from atlas import parallel
from atlas.config import strength_of
from atlas.errors import AtlasError
from atlas.lra import Method
from atlas.model import clip_losses, weighted

OF_A_CLASS = 4  # clips kept of each class
OF_A_STREAM = 64  # clips kept of a stream, where no class is told
KEPT = {"frames": torch.uint8, "masks": torch.bool, "second": torch.long, "head": torch.long}
KEPT |= {"context": torch.float32, "tokens": torch.float32}


class Replay(Method):
    """strength * the mask loss of stored clips, as many as the batch has, drawn at random.

    Of a clip the first annotated frame is stored, with the features of its sound: at a task's end
    OF_A_CLASS clips of each class; on a stream OF_A_STREAM clips, a uniform sample of all that
    passed (reservoir sampling: Vitter 1985). In TIL the clips of a draw are of one task, whose head
    is asked. Source: experience replay (Chaudhry et al. 2019, arXiv 1902.10486).
    """

    def __init__(self, run):
        super().__init__(run)
        if parallel.processes() > 1:
            raise AtlasError("method=replay stores what one process sees; run one process")
        self.strength = strength_of(run.config)
        self.unit = self.strength or 1.0
        self.on_stream = run.config.protocol == "tfcl"
        for name, dtype in KEPT.items():
            self.register_buffer(name, torch.zeros(0, dtype=dtype, device=run.device))
        self.register_buffer("passed", torch.zeros((), dtype=torch.long, device=run.device))

    def end_task(self, clips):
        counts = Counter()
        for batch in clips:
            for i, category in enumerate(batch["category"]):
                counts[category] += 1
                if counts[category] <= OF_A_CLASS and self.strength:
                    self.store(batch, i, len(self.head))
        return {"kept": len(self.head)}

    def store(self, batch, i, place):
        first = int((batch["clip"] == i).nonzero()[0])
        values = {name: batch[name][first] for name in ("frames", "masks", "second")}
        values |= {name: batch[name][i] for name in ("context", "tokens")}
        values["head"] = torch.tensor(self.run.model.decoder.active, device=self.head.device)
        for name, value in values.items():
            kept = getattr(self, name).view(-1, *value.shape)
            setattr(self, name, torch.cat([kept[:place], value[None], kept[place + 1 :]]))

    def penalty(self, batch, outputs):
        loss = super().penalty(batch, outputs)
        if len(self.head) and self.strength:
            loss = self.strength * self.loss_of(self.drawn(len(batch["context"])))
        if self.on_stream and self.strength:
            self.sample(batch)
        return loss

    def drawn(self, count):
        """The numbers of `count` stored clips; in TIL all of the task of one of them."""
        known = torch.arange(len(self.head), device=self.head.device)
        if self.run.config.protocol == "til":
            known = (self.head == self.head[torch.randint(len(known), (1,))]).nonzero()[:, 0]
        return known[torch.randint(len(known), (count,)).to(known.device)]

    def loss_of(self, chosen):
        batch = {name: getattr(self, name)[chosen] for name in KEPT}
        batch["clip"] = torch.arange(len(chosen), device=chosen.device)
        decoder = self.run.model.decoder
        active = decoder.active
        if self.run.config.protocol == "til":
            decoder.use_head(int(batch["head"][0]))
        with self.run.autocast():
            outputs = self.run.model(batch)
        decoder.use_head(active)
        terms = clip_losses({"masks": outputs["masks"]}, batch)
        return sum(weighted(terms, self.run.config).values()).mean()

    def sample(self, batch):
        for i in range(len(batch["context"])):
            self.passed += 1
            place = len(self.head)
            if place == OF_A_STREAM:
                place = int(torch.randint(int(self.passed), (1,)))
            if place < OF_A_STREAM:
                self.store(batch, i, place)
