"""The learning rate as a pure function of the step."""

import math

from cim_core.config import TrainingConfig
from cim_core.durations import Plan


def learning_rate(step: int, training: TrainingConfig, plan: Plan) -> float:
    """The rate of the step that follows `step` completed ones.

    Linear from 0 to the peak over `plan.warmup_steps`, so the first step of a warm-up has rate 0;
    then half a cosine, which reaches `min_learning_rate` at `plan.total_steps` (METHOD.md 7.3).
    """
    peak, low = training.learning_rate, training.min_learning_rate
    if step < plan.warmup_steps:
        return peak * step / plan.warmup_steps
    length = max(1, plan.total_steps - plan.warmup_steps)
    done = min(1.0, (step - plan.warmup_steps) / length)
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * done))
