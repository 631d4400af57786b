"""What a run tells while it learns: log.jsonl, the terminal's line an epoch, the progress bar."""

import contextlib
import json
import math
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from atlas import parallel
from atlas.folder import write
from atlas.model import weighted


class Journal:
    """log.jsonl: a line an epoch, a window of the loss, or a consolidation."""

    def __init__(self, folder):
        self.path = Path(folder, "log.jsonl")

    @parallel.first_only
    def write(self, **line):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self):
        """All whole lines; a kill may have torn one."""
        found = []
        content = self.path.read_bytes() if self.path.is_file() else b""
        for text in content.decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                found.append(json.loads(text))
        return [line for line in found if isinstance(line, dict) and type(line.get("task")) is int]

    @parallel.first_only
    def forget_after(self, task, epoch):
        """Drop what a resumed run writes again."""
        if self.path.is_file():
            kept = until(self.lines(), task, epoch)
            write(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def consolidations(self):
        """Where a task-free method consolidated, as results.json has it."""
        lines = [line for line in self.lines() if "window" in line]
        return [consolidation(**line) for line in lines if line["window"]["fired"]]

    def seconds(self, task, kind):
        """What the lines of a kind ("raw": epochs; "consolidated") tell of a task."""
        lines = self.lines()
        return sum(x.get("seconds", 0.0) for x in lines if x["task"] == task and kind in x)


def consolidation(task, epoch, window):
    return {"task": task, "epoch": epoch, "step": window["step"], "reason": window["reason"]}


def until(lines, task, epoch):
    """Those up to an epoch of a task; what has no epoch comes after all of them."""
    return [x for x in lines if (x["task"], x.get("epoch", math.inf)) <= (task, epoch)]


class Epoch:
    """An epoch of a task, or a chunk of a stream, around its learning steps. At its end its mean
    losses go to log.jsonl and to the terminal, and the run is saved."""

    def __init__(self, run, plan, number):
        self.run, self.plan, self.number = run, plan, number
        self.title = f"{plan.task_word} {plan.t}, {plan.word} {number}/{len(plan.epochs)}"
        self.totals, self.clips = Counter(), 0

    def __enter__(self):
        self.start = time.time()
        steps = self.plan.steps_of(self.number)
        self.bar = tqdm(None, self.title, steps, False, unit="step", disable=parallel.quiet())
        return self

    def add(self, losses, batch):
        clips = len(batch["whole"])
        self.clips += clips
        for name, value in losses.items():
            self.totals[name] += value * clips
        self.bar.update()
        self.bar.set_postfix(loss=f"{losses['task']:.3f}", refresh=False)

    def __exit__(self, kind, error, trace):
        self.bar.close()
        if kind:
            return
        run, seconds = self.run, time.time() - self.start
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
