"""Elastic weight consolidation (EWC), online."""

from atlas.config import strength_of
from atlas.lra import Anchor


class EWC(Anchor):
    """(strength / 2) sum_i F_i (theta_i - anchor_i)^2 over every trainable parameter.

    F <- F + (1/n) sum_x (d l(x) / d theta_i)^2,  anchor <- theta.

    F is the empirical Fisher information, not normalised: l is the task loss of one of n clips.
    Sources: Kirkpatrick et al. 2017 (arXiv 1612.00796); one anchor and a sum of F: Schwarz et al.
    2018 (arXiv 1805.06370) with gamma = 1.
    """

    def __init__(self, run):
        super().__init__(run, run.groups(), strength_of(run.config))
