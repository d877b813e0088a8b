"""What must hold of the log: every line that a worker wrote is served, once and in its place. Pure."""

from collections import defaultdict
from collections.abc import Sequence

from tests.chaos.history import Found, History, Job

Stream = tuple[str, int]  # a job and the attempt that wrote; the campaign's workers have one source each
SOURCE = "driver"


def logs_are_complete(history: History) -> Found:
    """What a worker wrote, the API serves: every line, exactly once, in its order.

    A line may still lie on the disk of a worker that was killed, as long as no other one of its job
    found it dead there. A line that was kept right before a kill may be served without being in the journal.
    """
    sent = {(e.job, attempt) for e in history.effects for attempt in e.dead if e.kind == "recovered"}
    for stream, lines in sorted(written(history).items()):
        job = history.jobs.get(stream[0])
        if job is not None:
            for told in _wrong(job, stream, lines, must_be_served=stream in sent):
                yield job.id, f"attempt {stream[1]} {told}"


def written(history: History) -> dict[Stream, list[str]]:
    """The lines of each attempt, in the order in which its worker wrote them."""
    lines: dict[Stream, list[str]] = defaultdict(list)
    for effect in history.effects:
        if effect.kind == "line":
            lines[effect.job, effect.attempt].append(effect.line)
    return lines


def num_waiting(history: History) -> int:
    """The lines that no worker came to send: their jobs ended with the worker that wrote them."""
    return sum(
        len(set(lines) - set(job.lines.get(stream, ())))
        for job in history.jobs.values()
        for stream, lines in job.waiting.items()
    )


def _wrong(job: Job, stream: Stream, lines: Sequence[str], *, must_be_served: bool) -> list[str]:
    name = f"{stream[1]}/{SOURCE}"
    served, waiting = list(job.lines.get(name, ())), set(job.waiting.get(name, ()))
    missing = [line for line in lines if line not in served]
    if lost := [line for line in missing if line not in waiting]:
        return [f"wrote {len(lost)} lines that are nowhere: {lost[0]!r}"]
    if missing and must_be_served:
        return [f"wrote {len(missing)} lines that a later worker found and did not send: {missing[0]!r}"]
    here = [line for line in lines if line in served]
    if served[: len(here)] != here:
        return [f"wrote {len(here)} lines that are served in another order, or more than once"]
    if len(served) > len(here) + 1:
        return [f"is served with {len(served) - len(here)} lines that nobody wrote: {served[-1]!r}"]
    return []
