"""What a run tells while it learns: log.jsonl, the terminal's line an epoch, the progress bar."""

import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from atlas import parallel
from atlas.folder import write_text
from atlas.model import weighted


class Journal:
    """log.jsonl of a run's folder: a line an epoch, a window of the loss, or a consolidation."""

    def __init__(self, folder):
        self.path = Path(folder, "log.jsonl")

    @parallel.first_only
    def write(self, **line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self):
        """All whole lines; a kill may have torn one."""
        found = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    found.append(json.loads(text))
                except (ValueError, RecursionError):
                    continue
        return [line for line in found if isinstance(line, dict) and type(line.get("task")) is int]

    @parallel.first_only
    def forget_after(self, task, epoch):
        """Drop what a resumed run writes again: all after this epoch of this task."""
        kept = []
        for line in self.lines():
            if (line["task"], line.get("epoch", math.inf)) <= (task, epoch):
                kept.append(json.dumps(line) + "\n")
        if self.path.is_file():
            write_text(self.path, "".join(kept))

    def consolidations(self):
        """The consolidations of a task-free run: [{"step", "reason"}]."""
        windows = [line["window"] for line in self.lines() if "window" in line]
        return [{"step": w["step"], "reason": w["reason"]} for w in windows if w["fired"]]

    def seconds(self, task, kind):
        """The seconds that the lines of a kind ("raw": epochs; "consolidated") tell of a task."""
        lines = [line for line in self.lines() if line["task"] == task and kind in line]
        return sum(line.get("seconds", 0.0) for line in lines)


class Epoch:
    """An epoch of a task, or a chunk of a stream, around the learning steps: what it tells.

    On leaving it, its mean losses go to log.jsonl and to the terminal, and its end is saved.
    """

    def __init__(self, run, plan, number):
        self.run, self.plan, self.number = run, plan, number
        self.title = f"{plan.task_word} {plan.t}, {plan.word} {number}/{len(plan.epochs)}"
        self.totals = {}
        self.clips = 0

    def __enter__(self):
        self.start = time.time()
        bar = {"unit": "step", "leave": False, "dynamic_ncols": True, "disable": parallel.quiet()}
        self.bar = tqdm(desc=self.title, total=self.plan.steps_of(self.number), **bar)
        return self

    def add(self, losses, batch):
        """Note the losses {name: float} of a step on a batch."""
        clips = len(batch["whole"])
        self.clips += clips
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0.0) + value * clips
        self.bar.update()
        self.bar.set_postfix(loss=f"{losses['task']:.3f}", refresh=False)

    def __exit__(self, kind, error, trace):
        self.bar.close()
        if kind:
            return
        run = self.run
        seconds = time.time() - self.start
        mean = {name: total / self.clips for name, total in self.totals.items()}
        terms = {name: mean[name] for name in mean if name not in ("task", "penalty", "loss")}
        run.journal.write(
            task=self.plan.t,
            epoch=self.number,
            raw=terms | {"penalty": mean["penalty"] / run.method.unit},
            weighted=weighted(terms, run.config) | {"penalty": mean["penalty"]},
            lr=run.updates.optimizer.param_groups[0]["lr"],
            seconds=seconds,
        )
        share = mean["penalty"] / (mean["loss"] or 1)
        told = f"loss {mean['task']:.3f}, penalty {share:.1%} of it, {seconds:.1f} s"
        print(f"{self.title}: {told}", flush=True)
        run.save_progress(self.plan, self.number)
