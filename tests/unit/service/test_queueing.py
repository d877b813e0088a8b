from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from service.domain.queueing import BEHIND, Candidate, Load, Needs, admit

START = datetime(2026, 1, 1, tzinfo=UTC)


def waits(job_id: str, *, age_s: int = 0, priority: int = 50, cpus: float = 1, gpus: float = 0) -> Candidate:
    created = START - timedelta(seconds=age_s)
    return Candidate(job_id=job_id, priority=priority, created_at=created, needs=Needs(cpus=cpus, gpus=gpus))


def load(*, cpus: float = 4, gpus: float = 0, used: float = 0, active: int = 0, most: int = 100) -> Load:
    in_use = Needs(cpus=used)
    return Load(capacity=Needs(cpus=cpus, gpus=gpus), in_use=in_use, num_active=active, max_active=most)


def admitted(verdicts: dict[str, str | None]) -> set[str]:
    return {job for job, reason in verdicts.items() if reason is None}


def test_admit__priority_before_age() -> None:
    jobs = [waits("old", age_s=9), waits("older", age_s=99), waits("urgent", priority=60)]
    assert admitted(admit(jobs, load(cpus=1))) == {"urgent"}
    assert admitted(admit(jobs, load(cpus=2))) == {"urgent", "older"}


def test_admit__says_how_much_is_missing() -> None:
    verdicts = admit([waits("a", cpus=3)], load(cpus=4, used=2))
    assert verdicts == {"a": "waiting for resources: it needs 3 CPUs and 2 of 4 are free"}


def test_admit__a_job_that_waits_for_room_holds_back_smaller_ones_behind_it() -> None:
    verdicts = admit([waits("large", age_s=9, cpus=4), waits("small", cpus=1)], load(cpus=4, used=1))
    assert admitted(verdicts) == set()
    assert verdicts["small"] == BEHIND


def test_admit__a_job_that_can_never_fit_holds_back_nobody() -> None:
    verdicts = admit([waits("huge", age_s=9, cpus=2, gpus=8), waits("small")], load(cpus=4))
    assert verdicts == {
        "huge": "waiting: the cluster is too small, it needs 8 GPUs and there are 0",
        "small": None,
    }


def test_admit__the_number_of_active_jobs_is_limited() -> None:
    verdicts = admit([waits("a", age_s=2), waits("b", age_s=1)], load(active=4, most=5))
    assert admitted(verdicts) == {"a"}
    assert "CIM_MAX_ACTIVE_JOBS" in (verdicts["b"] or "")


@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3), st.integers(0, 100)), max_size=12),
    used=st.integers(0, 5),
    most=st.integers(1, 6),
)
def test_admit__never_hands_out_more_than_there_is(
    sizes: list[tuple[int, int, int]], used: int, most: int
) -> None:
    jobs = [waits(f"{n}", priority=p, cpus=c, gpus=g) for n, (c, g, p) in enumerate(sizes)]
    verdicts = admit(jobs, load(cpus=8, gpus=2, used=used, most=most))
    chosen = [job.needs for job in jobs if verdicts[job.job_id] is None]
    assert set(verdicts) == {job.job_id for job in jobs}
    assert used + sum(n.cpus for n in chosen) <= 8
    assert sum(n.gpus for n in chosen) <= 2
    assert len(chosen) <= most
