"""The function that Ray Train calls on every rank."""

from collections.abc import Callable, Mapping
from typing import Any

from workers.attempt import Outcome, Work
from workers.evaluate_job import run_evaluate
from workers.pretrain_job import run_pretrain
from workers.rank import Rank, rank_of
from workers.tokenizer_job import run_tokenizer

JOBS: Mapping[str, Callable[[Rank], Outcome]] = {
    "tokenizer": run_tokenizer,
    "pretrain": run_pretrain,
    "evaluate": run_evaluate,
}


def train_loop(config: dict[str, Any]) -> Outcome:
    """Do this rank's part of `config["work"]`; Ray hands rank 0's outcome to the driver.

    Raises:
        AttemptFailedError, AttemptStaleError: see `rank_of`.
    """
    work: Work = config["work"]
    with rank_of(work) as rank:
        return JOBS[work.attempt.spec.kind](rank)
