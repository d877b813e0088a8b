"""The function that Ray Train calls on every rank.

A kind's module is loaded on the ranks of that kind alone: the driver pickles this function by
reference, and would otherwise spend seconds on timm, as would the ranks of a tokenizer job.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import ray.train

from workers.attempt import Outcome, Work
from workers.cache import discard
from workers.rank import Rank, rank_of

# Kind of a job: module and function that do it.
JOBS: Mapping[str, tuple[str, str]] = {
    "tokenizer": ("workers.tokenizer_job", "run_tokenizer"),
    "pretrain": ("workers.pretrain_job", "run_pretrain"),
    "evaluate": ("workers.evaluate_job", "run_evaluate"),
}


def train_loop(config: dict[str, Any]) -> Outcome:
    """Do this rank's part of `config["work"]`; Ray hands rank 0's outcome to the driver.

    Raises:
        AttemptFailedError, AttemptStaleError: see `rank_of`.
    """
    work: Work = config["work"]
    with rank_of(work) as rank:
        outcome = job_of(work.attempt.spec.kind)(rank)
        # The other ranks of this node have read their last image: the last step was taken together.
        if not outcome.stopped and ray.train.get_context().get_local_rank() == 0:
            discard(work.attempt.cache)
        return outcome


def job_of(kind: str) -> Callable[[Rank], Outcome]:
    """What does a job of this kind."""
    module, name = JOBS[kind]
    function: Callable[[Rank], Outcome] = getattr(import_module(module), name)
    return function
