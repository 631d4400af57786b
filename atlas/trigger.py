"""Task-free: when does a method consolidate, if nobody calls `end_task`?"""

import math
import statistics


def trigger_of(run):
    """The trigger of a run; None where task boundaries are told."""
    config = run.config
    kind, _, number = config.lra_trigger.partition(":")
    if kind == "every":
        return Clock(config.lra_window, range(int(number), 10**9, int(number)))
    if kind == "told":
        return Clock(config.lra_window, run.drifts)
    return Plateau(config.lra_window, config.lra_peak) if kind == "plateau" else None


class Plateau:
    """Fires where the loss has risen above its plateau, so that the data have likely changed.

    With m the mean of a window of `length` steps, M that of the up to `memory` windows before it
    and s the standard deviation within windows, it fires if

        m > M + peak * s * sqrt(1 / length + 1 / (length * windows before))

    so `peak` is in standard errors of m - M. The windows are then counted anew from this one.
    """

    memory = 4

    def __init__(self, length, peak):
        self.length = length
        self.peak = peak
        self.step = 0
        self.losses = []  # of the steps of this window
        self.windows = []  # (mean, variance) of those before

    def state(self):
        """All that must survive a resume, as a list of floats."""
        before = [value for window in self.windows for value in window]
        return [self.step, len(self.windows), *before, *self.losses]

    def restore(self, state):
        self.step, count = int(state[0]), 2 * int(state[1])
        values = list(state[2:])
        self.windows = list(zip(values[:count:2], values[1:count:2]))
        self.losses = values[count:]

    def watch(self, loss):
        """Take note of a step's loss. At a window's end this gives a report, else None."""
        self.step += 1
        self.losses.append(loss)
        if len(self.losses) < self.length:
            return None
        mean, variance = statistics.fmean(self.losses), statistics.variance(self.losses)
        fired, reason = self.decide(mean, variance)
        before = [] if fired else self.windows
        self.windows = [*before, (mean, variance)][-self.memory :]
        self.losses = []
        std = math.sqrt(variance)
        return {"step": self.step, "mean": mean, "std": std, "fired": fired, "reason": reason}

    def decide(self, mean, variance):
        """(Does this window fire?, why)."""
        if not self.windows:
            return False, ""
        means, variances = zip(*self.windows)
        M, s2 = statistics.fmean(means), statistics.fmean([*variances, variance])
        error = math.sqrt(s2 * (1 + 1 / len(means)) / self.length)
        fired = mean > M + self.peak * error
        return fired, f"{mean:.3f} {'>' if fired else '<='} {M:.3f} + {self.peak:g} x {error:.3f}"


class Clock(Plateau):
    """Fires at the end of the first window at or after each of `steps`: `every:N` is a baseline;
    `told`, which knows where segments begin, an upper bound."""

    def __init__(self, length, steps):
        super().__init__(length, 0.0)
        self.steps = steps

    def decide(self, mean, variance):
        window = range(self.step - self.length + 1, self.step + 1)
        due = [step for step in window if step in self.steps]
        return bool(due), f"step {due[0]} is due" if due else ""
