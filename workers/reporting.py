"""Progress and metrics on their way to the service, from a thread of their own.

Training never waits for the service: points queue up here, and a service that is away for a
while gets them when it is back. The answer to a report carries what the worker must do.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from service.client.errors import ApiError, StaleAttempt
from service.contracts.jobs import FileEntry, MetricPoint, Progress
from service.contracts.printable import printable
from service.contracts.work import Report, ReportReply
from workers.failures import AttemptStaleError, ServiceAwayError

log = logging.getLogger(__name__)

MAX_POINTS = 100_000  # waiting for the service; older ones are given up first
POINTS_A_REPORT = FILES_A_REPORT = 1_000
MAX_PAUSE_S = 30.0
CONFLICT = "conflict"  # the service's code for a row that moved; it says that repeating is safe


class Reports(Protocol):
    """The part of the service that a reporter talks to."""

    def report(self, report: Report, *, patience_s: float) -> ReportReply:
        """Deliver one report, trying for `patience_s`; raises `ApiError` or its `StaleAttempt`."""
        ...


@dataclass(frozen=True)
class Mark:
    """How far the queues had come at a moment."""

    points: int  # queued since the start
    files: int
    plan: dict[str, Any] | None  # not delivered yet


class Reporter:
    """Collects what is new and posts it every `every_s` seconds.

    `give_up_after_s` without an answer ends the attempt: by then the service has started a new
    one, or nobody would take the result anyway. Each report says how long ago the training last
    showed a sign of life: a job that hangs must not look alive to the service.
    """

    def __init__(
        self,
        service: Reports,
        *,
        every_s: float = 1.0,
        give_up_after_s: float = 900.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service, self._every_s = service, every_s
        self._give_up_after_s, self._clock = give_up_after_s, clock
        self._lock, self._posting = threading.Lock(), threading.Lock()
        self._progress = Progress()
        self._points: deque[MetricPoint] = deque()
        self._files: list[FileEntry] = []
        self._num_points, self._num_files = 0, 0  # queued since the start
        self._plan: dict[str, Any] | None = None
        self._muted: set[str] = set()  # metrics whose non-finite values were mentioned
        self._failures, self._last_answer, self._last_life = 0, clock(), clock()
        self._stop, self._stale, self._ending = threading.Event(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin posting in the background."""
        self._last_answer = self._clock()
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def progress(self, progress: Progress) -> None:
        """Replace what is known of the progress."""
        with self._lock:
            self._progress, self._last_life = progress, self._clock()

    def say(self, message: str) -> None:
        """Keep the progress and change its message."""
        with self._lock:
            self._progress = self._progress.model_copy(update={"message": printable(message)})
            self._last_life = self._clock()

    def alive(self) -> None:
        """A sign of life from the thread that trains."""
        self._last_life = self._clock()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Queue one point for each finite value; a value that JSON cannot carry goes to the log."""
        for key, value in values.items():
            if math.isfinite(value):
                self._add(MetricPoint(step=step, key=key, value=value))
            elif key not in self._muted:
                self._muted.add(key)
                log.warning("%s is %s at step %d; such values are not recorded", key, value, step)

    def file(self, entry: FileEntry) -> None:
        """Announce a finished artifact."""
        with self._lock:
            self._files.append(entry)
            self._num_files += 1

    def plan(self, plan: dict[str, Any]) -> None:
        """Announce the durations in steps."""
        with self._lock:
            self._plan = plan

    @property
    def idle_s(self) -> float:
        """Seconds since the training last showed itself."""
        return max(0.0, self._clock() - self._last_life)

    @property
    def step(self) -> int:
        """The step of the latest progress."""
        return self._progress.step

    @property
    def stop_requested(self) -> bool:
        """Whether the service asked for a checkpoint and an end."""
        return self._stop.is_set()

    def check(self) -> None:
        """Raise when this attempt must not go on.

        Raises:
            AttemptStaleError: a newer attempt owns the job, or the job is final.
            ServiceAwayError: the service has not answered for `give_up_after_s`.
        """
        if self._stale.is_set():
            raise AttemptStaleError("a newer attempt owns this job")
        silent_s = self._clock() - self._last_answer
        if self._failures and silent_s > self._give_up_after_s:
            raise ServiceAwayError(f"the service has not answered for {silent_s:.0f} s")

    def post(self) -> bool:
        """Send one report now; False when the service is away, and what was sent is kept.

        Raises:
            AttemptStaleError: a newer attempt owns the job.
        """
        with self._posting:
            with self._lock:
                points = [self._points[i] for i in range(min(POINTS_A_REPORT, len(self._points)))]
                files, plan = self._files[:FILES_A_REPORT], self._plan
                report = Report(
                    progress=self._progress, metrics=points, files=files, plan=plan, idle_s=self.idle_s
                )
            try:
                self._note_answer(self._service.report(report, patience_s=0))
            except StaleAttempt as error:
                self._stale.set()
                raise AttemptStaleError(str(error)) from error
            except ApiError as error:
                self._note_failure(error)
                if not _is_refusal(error):
                    return False
            with self._lock:
                self._forget(points, files, plan)
            return True

    def mark(self) -> Mark:
        """What was queued so far, for `flush`."""
        with self._lock:
            return Mark(self._num_points, self._num_files, self._plan)

    def flush(self, *, timeout_s: float = 60.0, until: Mark | None = None) -> bool:
        """Post until nothing waits that was queued before `until` (now); False when the service stayed away.

        What is queued later is not waited for: a training that goes on always has something.

        Raises:
            AttemptStaleError: a newer attempt owns the job.
        """
        until = until or self.mark()
        deadline = self._clock() + timeout_s
        while True:
            delivered = self.post()
            if delivered and self._has_passed(until):
                return True
            if self._clock() >= deadline:
                return False
            if not delivered:
                time.sleep(min(1.0, self._every_s))

    def close(self, *, wait_s: float = 2.0) -> None:
        """End the background thread. A post under way is given `wait_s` and may otherwise still arrive."""
        self._ending.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=wait_s)

    def _run(self) -> None:
        while not self._ending.wait(self._pause_s()):
            try:
                self.post()
            except AttemptStaleError:
                return
            except Exception:
                # A reporter that dies unseen would leave the job without a stop signal.
                log.exception("posting a report failed")
                self._failures += 1

    def _pause_s(self) -> float:
        if not self._failures:
            return 0.0 if len(self._points) > POINTS_A_REPORT else self._every_s
        return float(min(MAX_PAUSE_S, self._every_s * 2 ** min(self._failures, 10)))

    def _add(self, point: MetricPoint) -> None:
        with self._lock:
            if len(self._points) >= MAX_POINTS:
                self._points.popleft()
            self._points.append(point)
            self._num_points += 1

    @property
    def waiting(self) -> bool:
        """Whether something has not been delivered."""
        with self._lock:
            return bool(self._points or self._files or self._plan)

    def _has_passed(self, mark: Mark) -> bool:
        # The queues are in order and are given up from their front.
        with self._lock:
            points, files = self._num_points - len(self._points), self._num_files - len(self._files)
            has_plan = mark.plan is None or self._plan is not mark.plan
            return points >= mark.points and files >= mark.files and has_plan

    def _note_failure(self, error: ApiError) -> None:
        self._failures += 1
        if self._failures == 1:
            log.warning("the service does not answer, reports wait: %s", error)

    def _note_answer(self, reply: ReportReply) -> None:
        if self._failures:
            log.warning("the service answers again after %d failed reports", self._failures)
        self._failures, self._last_answer = 0, self._clock()
        if reply.directive == "stop":
            self._stop.set()

    def _forget(self, points: list[MetricPoint], files: list[FileEntry], plan: dict[str, Any] | None) -> None:
        # The queue may have dropped old points meanwhile, so compare instead of counting.
        for point in points:
            if self._points and self._points[0] is point:
                self._points.popleft()
        del self._files[: len(files)]
        if self._plan is plan:
            self._plan = None


def _is_refusal(error: ApiError) -> bool:
    """Whether the service will never take this report: sending it again would block all others."""
    return error.status in (400, 409, 413, 422) and error.code != CONFLICT


def insistently(action: Callable[[], None], *, tries: int = 10, pause_s: float = 0.5) -> None:
    """Do `action`, again when the service says that something else changed the job meanwhile."""
    for left in reversed(range(tries)):
        try:
            action()
        except ApiError as error:
            if error.code != CONFLICT or not left:
                raise
            time.sleep(pause_s)
        else:
            return
