"""A worker without a network: the real protocol, real files in the real store, a sum instead of a training.

`python -m tests.chaos.worker --url URL --attempt JOB_ID/N`, as `python -m workers`. Each commit, refusal and
end is written to its own journal before and after it happens. When its parent, the cluster's head, dies, it
goes on for `CHAOS_ORPHAN_S` seconds and still tries to commit, as Ray's workers do.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import signal
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.client.errors import ApiError, BrokenManifestError, StaleAttempt
from service.client.http import Backoff
from service.client.work import WorkClient
from service.contracts.jobs import FailureKind, FileEntry, MetricPoint, Progress
from service.contracts.tokens import new_token
from service.contracts.work import Assignment, Checkpoint, Failure, Finish, Report
from service.store.base import CorruptObjectError, MissingObjectError, StoreError, StoreFullError
from tests.chaos import curve
from tests.chaos.journal import FOLDER, HEAD_PID, SPOOLS, Journal
from tests.chaos.log_rules import SOURCE
from workers.logs import LogShipper, attach, blotted, detach, send_left_lines
from workers.results import earlier_files, put_json, result_document
from workers.storage import JobStore

log = logging.getLogger("workers.chaos")

STEP_S, ORPHAN_S, START_S = "CHAOS_STEP_S", "CHAOS_ORPHAN_S", "CHAOS_START_S"
PATIENCE_S = 90.0
TIMEOUT_S = 8.0
REPORT_EVERY_S = 0.5
STATE = "state.json"
DONE, INFRASTRUCTURE, STORAGE, USER, STALE, TERMINATED = 0, 11, 12, 10, 14, 143
_REFUSALS = (400, 409, 413, 422)


class JournaledShipper(LogShipper):
    """The real one; what it has kept is journaled after it, in the same order."""

    def __init__(self, store: JobStore, *, journal: Journal, spool: Path, secrets: Sequence[str]) -> None:
        super().__init__(
            store.store,
            store.log_prefix,
            spool=spool,
            attempt=store.attempt,
            source=SOURCE,
            secrets=secrets,
        )
        self._journal, self._blotted = journal, secrets

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        super().emit(record)
        if not self.abandoned:
            self._journal.note("line", line=blotted(self.format(record), self._blotted))


def send_left(spools: Path, store: JobStore, journal: Journal, *, patient: bool = False) -> None:
    """Send the lines of the dead, with the real code; whose they were is journaled once they are sent."""
    found = list(dead(spools))
    if send_left_lines(spools, store.store, store.logs_prefix, patient=patient):
        journal.note("recovered", dead=found)


def dead(spools: Path) -> Iterator[int]:
    """The attempts whose lines wait and whose processes are gone."""
    for folder in sorted({chunk.parent for chunk in spools.glob("*/*.jsonl")}):
        with (folder / f"{SOURCE}.lock").open("a") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield int(folder.name.removeprefix("attempt-"))


@dataclass(kw_only=True)
class Training:
    """One attempt from its assignment to its last step."""

    service: WorkClient
    assignment: Assignment
    store: JobStore
    journal: Journal
    step_s: float
    state: int = 0
    step: int = 0
    points: list[MetricPoint] = field(default_factory=list)  # not yet delivered
    fresh: list[FileEntry] = field(default_factory=list)  # not yet announced
    made: list[FileEntry] = field(default_factory=list)
    reported_at: float = 0.0
    stop_asked: bool = False
    planned: bool = False  # the service knows how long the training is

    @property
    def training(self) -> dict[str, Any]:
        """The spec's section."""
        section: dict[str, Any] = self.assignment.spec["training"]
        return section

    @property
    def total_steps(self) -> int:
        """As the spec says."""
        return int(self.training["steps"])

    def run(self) -> None:
        """Train to the end, or to a checkpoint where the service wants an end.

        Raises `StaleAttempt`, `StoreError`, `ApiError`.
        """
        self._resume()
        self.journal.note("training", step=self.step)
        log.info("training from step %d to %d", self.step, self.total_steps)
        self._flush()
        every, sample = (self.training[f"{what}_every"]["steps"] for what in ("checkpoint", "sample"))
        while self.step < self.total_steps and not self.stop_asked:
            self._advance()
            if self.step % sample == 0:
                self._announce(self.store.put_bytes(f"samples/step-{self.step}.png", png(self.step)))
            if time.monotonic() - self.reported_at > REPORT_EVERY_S:
                self._report(patience_s=0)
            if self.step % every == 0 or self.step == self.total_steps or self.stop_asked:
                self._checkpoint()

    def _advance(self) -> None:
        time.sleep(self.step_s)
        self.step += 1
        self.state = curve.advance(self.state, self.step)
        value = curve.loss(self.state, self.step)
        self.points.append(MetricPoint(step=self.step, key=curve.LOSS, value=value))
        log.info("step %d of attempt %d", self.step, self.assignment.attempt)

    def _checkpoint(self) -> None:
        """All points first, then files, manifest, commit: the order of the real ones."""
        self._flush()
        prefix = f"attempts/{self.assignment.attempt}/checkpoints/step-{self.step}"
        document = json.dumps({"step": self.step, "state": self.state}).encode()
        weights = hashlib.sha256(str(self.state).encode()).digest() * 200
        files = [
            self.store.put_bytes(f"{prefix}/{STATE}", document),
            self.store.put_bytes(f"{prefix}/weights.bin", weights),
        ]
        manifest = json.dumps({"step": self.step, "files": [entry.model_dump() for entry in files]})
        files.append(self.store.put_bytes(f"{prefix}/manifest.json", manifest.encode()))
        checkpoint = Checkpoint(step=self.step, prefix=prefix, files=files)
        told = lambda: self.service.commit_checkpoint(checkpoint, patience_s=PATIENCE_S)  # noqa: E731
        self._commit("checkpoint", told)

    def conclude(self) -> list[FileEntry]:
        """The result's files, `result.json` last."""
        weights = hashlib.sha256(str(self.state).encode()).digest() * 500
        files = [*self.made, self.store.put_bytes("encoder/model.safetensors", weights)]
        files += earlier_files(self.store, "samples", files)
        document = result_document(self.assignment, step=self.step, metrics=self.metrics, files=files)
        files.append(put_json(self.store, "result.json", document))
        self._flush()
        return files

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each curve."""
        return {curve.LOSS: curve.loss(self.state, self.step)} if self.step else {}

    def finish(self, finish: Finish) -> None:
        """Say how it ended."""
        told = lambda: self.service.finish(finish, patience_s=PATIENCE_S)  # noqa: E731
        files = [entry.path for entry in finish.files]
        self._commit("finish", told, outcome=finish.outcome, files=files)

    def _resume(self) -> None:
        self.state = curve.begin(self.training["seed"])
        checkpoint = self.assignment.checkpoint
        if checkpoint is None:
            return
        with tempfile.TemporaryDirectory(prefix="cim-chaos-") as folder:
            for entry in checkpoint.files:
                self.store.get_file(entry.path, Path(folder) / entry.path)
                found = (Path(folder) / entry.path).read_bytes()
                if hashlib.sha256(found).hexdigest() != entry.sha256:
                    raise CorruptObjectError(f"{entry.path} differs from its manifest")
            document = json.loads((Path(folder) / checkpoint.prefix / STATE).read_text())
        self.step, self.state = document["step"], document["state"]

    def _announce(self, entry: FileEntry) -> None:
        self.fresh.append(entry)
        self.made.append(entry)

    def _flush(self) -> None:
        self._report(patience_s=PATIENCE_S)
        while self.points or self.fresh:
            self._report(patience_s=PATIENCE_S)

    def _report(self, *, patience_s: float) -> None:
        points, files = self.points[:1000], list(self.fresh)
        progress = Progress(step=self.step, total_steps=self.total_steps, message="training")
        plan: dict[str, Any] | None = None if self.planned else {"total_steps": self.total_steps}
        report = Report(progress=progress, metrics=points, files=files, plan=plan)
        self.reported_at = time.monotonic()
        try:
            reply = self.service.report(report, patience_s=patience_s)
        except StaleAttempt:
            raise
        except ApiError as error:
            if patience_s or error.status in _REFUSALS:
                raise
            return
        steps = [point.step for point in points]
        self.journal.note("reported", sent=self.reported_at, steps=steps, step=self.step)
        del self.points[: len(points)]
        del self.fresh[: len(files)]
        self.planned = True
        self.stop_asked = self.stop_asked or reply.directive == "stop"

    def _commit(self, what: str, call: Callable[[], None], **facts: Any) -> None:
        sent = time.monotonic()
        self.journal.note(f"{what}-sent", step=self.step, **facts)
        call()
        self.journal.note(f"{what}-taken", sent=sent, step=self.step, **facts)


def attempt(service: WorkClient, journal: Journal, assignment: Assignment, *, token: str) -> int:
    """Do it all; the exit status."""
    store = JobStore.of(assignment)
    spools = Path(os.environ[FOLDER]) / SPOOLS / assignment.job_id
    spool = spools / f"attempt-{assignment.attempt}"
    send_left(spools, store, journal)
    shipper = JournaledShipper(store, journal=journal, spool=spool, secrets=[token])
    training = Training(
        service=service,
        assignment=assignment,
        store=store,
        journal=journal,
        step_s=float(os.environ.get(STEP_S, "0.1")),
    )
    attach(shipper)
    shipper.start()
    finish = None
    try:
        finish = ending(training)
    except StaleAttempt:
        shipper.abandon()
        raise
    finally:
        detach(shipper)
        if not shipper.abandoned:
            send_left(spools, store, journal, patient=finish is not None and finish.outcome == "succeeded")
    finish = told(training, finish)
    return DONE if finish.failure is None else _EXIT[finish.failure.kind]


_EXIT = {FailureKind.USER: USER, FailureKind.STORAGE: STORAGE, FailureKind.INFRASTRUCTURE: INFRASTRUCTURE}


def told(training: Training, finish: Finish) -> Finish:
    """Say how it ended, and return that: a success whose files the service does not find is none."""
    try:
        training.finish(finish)
    except BrokenManifestError as error:
        finish = failed(training, FailureKind.STORAGE, f"the object store failed: {error}")
        training.finish(finish)
    return finish


def ending(training: Training) -> Finish:
    """How the attempt ends. Raises `StaleAttempt`."""
    try:
        training.run()
        if training.step < training.total_steps:
            return Finish(outcome="stopped", step=training.step, total_steps=training.total_steps)
        files = training.conclude()
    except StoreFullError as error:
        return failed(training, FailureKind.USER, f"no space is left for the artifacts: {error}")
    except (StoreError, MissingObjectError, CorruptObjectError, BrokenManifestError) as error:
        return failed(training, FailureKind.STORAGE, f"the object store failed: {error}")
    log.info("succeeded at step %d", training.step)
    return Finish(
        outcome="succeeded",
        step=training.step,
        total_steps=training.total_steps,
        metrics=training.metrics,
        files=files,
    )


def failed(training: Training, kind: FailureKind, message: str) -> Finish:
    """An end that the service may follow with another attempt."""
    log.error("the attempt failed: %s", message)
    return Finish(outcome="failed", step=training.step, failure=Failure(kind=kind, message=message[:4000]))


def png(shade: int) -> bytes:
    """One grey pixel, which is what a viewer needs to open a picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes([0, shade % 256]))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def mind_the_head(journal: Journal, *, after_s: float) -> None:
    """Die `after_s` seconds after the head, without a word to anyone but the journal."""
    head = int(os.environ[HEAD_PID])  # which may be dead before this process can ask for its parent

    def watch() -> None:
        while os.getppid() == head:
            time.sleep(0.2)
        journal.note("orphaned")
        time.sleep(after_s)
        journal.note("ended", status=-1)
        os._exit(1)

    threading.Thread(target=watch, name="mind-the-head", daemon=True).start()


def main() -> int:
    """Run one attempt; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.worker")
    parser.add_argument("--url", required=True)
    parser.add_argument("--attempt", required=True)
    given = parser.parse_args()
    job_id, _, number = given.attempt.partition("/")
    journal = Journal(Path(os.environ[FOLDER]), "worker", job=job_id, attempt=int(number))
    journal.note("begun")
    mind_the_head(journal, after_s=float(os.environ.get(ORPHAN_S, "12")))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    # Ray and torch take their time; a third of the workers here does so too.
    if os.getpid() % 3 == 0:
        time.sleep(float(os.environ.get(START_S, "0")))
    status = INFRASTRUCTURE
    token = new_token()
    backoff = Backoff(first_s=0.2, longest_s=2.0)
    try:
        with WorkClient(
            given.url, job_id, int(number), token, timeout_s=TIMEOUT_S, backoff=backoff
        ) as service:
            service.claim(os.environ["CIM_CLAIM_CODE"], patience_s=PATIENCE_S)
            assignment = service.assignment(patience_s=PATIENCE_S)
            status = attempt(service, journal, assignment, token=token)
    except StaleAttempt as error:
        journal.note("refused", told=str(error))
        status = STALE
    except ApiError as error:
        journal.note("gave-up", told=str(error))
    except SystemExit:
        status = TERMINATED
        raise
    finally:
        journal.note("ended", status=status)
    return status


if __name__ == "__main__":
    sys.exit(main())
