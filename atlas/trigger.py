"""Task-free: where does a method consolidate, if nobody tells it where a task ends?

A trigger sees the task loss of every step and nothing else. `watch(loss)` answers None within a
window, and at a window's end a report {"step", "mean", "std", "fired", "reason"}.
"""

import math
import statistics


def trigger_of(config):
    """The trigger of a config; None where task boundaries are told."""
    if config.lra_trigger == "plateau":
        return Plateau(config.lra_window, config.lra_peak)
    return None


class Plateau:
    """Fires where a plateau of the task loss has ended, by thresholds that scale with the losses.

    Losses are taken in windows of `length` steps, with mean m and standard deviation s. `level` is
    the lowest mean of the last `memory` windows, `noise` the running mean of s. The loss has left
    its plateau, so that the data have likely drifted, when

        m > level + peak * noise

    and the windows are then counted anew from this one.
    """

    memory = 3

    def __init__(self, length, peak):
        self.length = length
        self.peak = peak
        self.step = 0
        self.noise = math.nan
        self.means = []
        self.losses = []

    def state(self):
        """All that must survive a resume, as a list of floats."""
        return [self.step, self.noise, len(self.means), *self.means, *self.losses]

    def restore(self, state):
        """Go on from a `state`."""
        self.step, self.noise, count = int(state[0]), state[1], int(state[2])
        self.means = list(state[3 : 3 + count])
        self.losses = list(state[3 + count :])

    def watch(self, loss):
        """Take note of one step's loss; the report at the end of a window, else None."""
        self.step += 1
        self.losses.append(loss)
        if len(self.losses) < self.length:
            return None
        mean = statistics.fmean(self.losses)
        std = statistics.stdev(self.losses)
        self.losses = []
        fired = False
        reason = ""
        if self.means:
            level = min(self.means)
            fired = mean > level + self.peak * self.noise
            sign = ">" if fired else "<="
            reason = f"{mean:.3f} {sign} {level:.3f} + {self.peak:g} x {self.noise:.3f}"
        self.means = [mean] if fired else [*self.means, mean][-self.memory :]
        self.noise = std if math.isnan(self.noise) else (self.noise + std) / 2
        return {"step": self.step, "mean": mean, "std": std, "fired": fired, "reason": reason}
