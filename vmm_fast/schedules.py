"""Schedules of the learning rate over training.

    constant    1
    cosine      t / 0.04                                         for t < 0.04
                0.02 + 0.98 (1 + cos(pi (t - 0.04) / 0.96)) / 2  else

times the learning rate, with t = (step + 1/2) / steps the share of the training that has passed: a
warm-up, then the cosine of Loshchilov & Hutter (2017), arXiv 1608.03983, without restarts. It
depends on nothing but t, so that a resumed training goes on exactly.
"""

from __future__ import annotations

import math

from vmm_fast._checks import check_choice

__all__ = ["SCHEDULES", "learning_rate_share"]

SCHEDULES = ("constant", "cosine")
WARM_UP, LEAST = 0.04, 0.02


def learning_rate_share(schedule: str, step: int, steps: int) -> float:
    """Return the factor that multiplies the learning rate in a step.

    Parameters
    ----------
    schedule : {"constant", "cosine"}
    step : int
        Number of the step, from 0.
    steps : int
        Number of steps of the whole training.

    Raises
    ------
    ValueError
        For an unknown schedule.

    Examples
    --------
    >>> [round(learning_rate_share("cosine", step, steps=100), 3) for step in (0, 4, 52, 99)]
    [0.125, 1.0, 0.502, 0.02]
    """
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return 1.0
    passed = (step + 0.5) / max(steps, 1)
    if passed < WARM_UP:
        return passed / WARM_UP
    falling = min(1.0, (passed - WARM_UP) / (1 - WARM_UP))
    return LEAST + (1 - LEAST) * (1 + math.cos(math.pi * falling)) / 2
