"""Logs as JSON lines, shipped to the object store in numbered chunks.

Ray keeps logs on the node that made them and loses them with it. So each process writes its lines to a
spool on disk and sends them from there; a store that is away costs lines at worst, never a training step.
Whatever was sent in many small pieces is sent once more in one: see `workers.joins`.
"""

import atexit
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from service.contracts.addresses import redacted
from service.contracts.jobs import LogLine
from service.contracts.printable import printable
from service.store.base import StoreError
from workers.joins import Joins, PutBytes
from workers.spool import Spool, recover, send
from workers.storage import patiently

log = logging.getLogger(__name__)

OUR_LOGGERS = ("workers", "cim_core", "service")
MAX_LINE_CHARS = 16_000
MAX_WAITING_LINES = 20_000


class LogShipper(logging.Handler):
    """A logging handler whose lines end up under `prefix` as `{source}-{seq:06d}.jsonl`.

    Until then they are in `spool`, a folder of this node: see `workers.spool`. Beyond `lines_per_minute`
    lines are dropped and counted; so are lines that the store does not take in time. Every text in
    `secrets` is blotted out.
    """

    def __init__(
        self,
        store: PutBytes,
        prefix: str,
        *,
        spool: Path,
        attempt: int,
        source: str,
        secrets: Iterable[str] = (),
        lines_per_minute: int = 5_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._store, self._prefix = store, prefix
        self._attempt, self._source = attempt, source
        self._secrets = tuple(secret for secret in secrets if secret)
        self._limit, self._clock = lines_per_minute, clock
        self._spool = Spool(spool, source)
        self._joins = Joins(store, prefix)
        self._waiting = 0  # lines in the spool
        self._dropped = 0
        self._window = (clock(), 0)  # start of the running minute, lines in it
        self._shipping = threading.Lock()
        self._ending = threading.Event()
        self._abandoned = False
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line, or count it as dropped. Called with the handler's lock held."""
        if self._abandoned:
            return
        if not self._admit():
            self._dropped += 1
            return
        try:
            self._append(self._line(record.levelname, self.format(record), at=record.created))
        except Exception:
            # A line that cannot be made, because its arguments do not fit it, must not end the training.
            self.handleError(record)

    def start(self, *, every_s: float = 2.0) -> None:
        """Ship what has gathered every `every_s` seconds, from a thread of its own."""
        self._thread = threading.Thread(target=self._run, args=(every_s,), name="log-shipper", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def ship(self) -> bool:
        """Send what has gathered; False when the store refused and the lines wait."""
        with self._shipping:
            with self._handler_lock():
                self._note_dropped()
                self._spool.roll()
                chunks = self._spool.chunks()  # with the lock held: a chunk that is begun later stays
            for chunk in chunks:
                try:
                    sent = send(chunk, self._store, self._prefix)
                except Exception as error:
                    # Logging it would feed this very handler.
                    sys.stderr.write(f"log lines wait, the object store refused: {error}\n")
                    return False
                with self._handler_lock():
                    self._waiting = max(0, self._waiting - sent.count(b"\n"))
                self._joins.add(chunk.name, sent)
            return True

    def close(self, *, tries: int = 3, pause_s: float = 1.0) -> None:
        """Ship the rest and end. Repeating it is harmless."""
        if self._ending.is_set():
            return
        self._ending.set()
        atexit.unregister(self.close)
        for turn in range(0 if self._abandoned else tries):
            if self.ship():
                with self._shipping:
                    self._joins.store_rest()
                break
            if turn + 1 < tries:
                time.sleep(pause_s)
        self._spool.close()
        super().close()

    def abandon(self) -> None:
        """Send nothing more: a newer attempt owns the job, and sends what waits here."""
        self._abandoned = True

    @property
    def abandoned(self) -> bool:
        """Whether a newer attempt owns the job."""
        return self._abandoned

    def _run(self, every_s: float) -> None:
        while not self._ending.wait(every_s):
            self.ship()

    def _handler_lock(self) -> threading.RLock:
        assert self.lock is not None, "a logging.Handler makes its lock in __init__"
        return self.lock

    def _admit(self) -> bool:
        start, lines = self._window
        if self._clock() - start >= 60:
            start, lines = self._clock(), 0
        self._window = (start, lines + 1)
        return lines < self._limit and self._waiting < MAX_WAITING_LINES

    def _append(self, line: str) -> None:
        try:
            self._spool.append(line)
        except OSError:  # the disk is full
            self._dropped += 1
        else:
            self._waiting += 1

    def _note_dropped(self) -> None:
        if self._dropped:
            text = f"{self._dropped} log lines were dropped: more than {self._limit} a minute, or store away"
            self._dropped = 0
            self._append(self._line("WARNING", text, at=time.time()))

    def _line(self, level: str, message: str, *, at: float) -> str:
        message = printable(blotted(message, self._secrets))
        if len(message) > MAX_LINE_CHARS:
            message = f"{message[:MAX_LINE_CHARS]} ... ({len(message)} characters)"
        line = LogLine(
            at=datetime.fromtimestamp(at, UTC),
            attempt=self._attempt,
            source=self._source,
            level=level.lower(),
            message=message,
        )
        return line.model_dump_json() + "\n"


def send_left_lines(spools: Path, store: PutBytes, prefix: str, *, patient: bool = False) -> bool:
    """Send what dead processes of a job left below `spools` (see `recover`); False where it has to wait.

    `patient` is for the last one who may do it: it waits for a store that is away as for any other file.
    """
    send_all = partial(recover, spools, store, prefix)
    try:
        num_sent = patiently(send_all, what="sending log lines") if patient else send_all()
    except StoreError as error:
        log.warning("log lines of killed processes wait on this node: %s", error)
        return False
    if num_sent:
        log.info("sent %d pieces of log that killed processes of this job had left here", num_sent)
    return True


def blotted(text: str, secrets: Iterable[str]) -> str:
    """`text` without these secrets, and without any in the addresses that it names."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return redacted(text)


class BlottingFormatter(logging.Formatter):
    """For what a process prints: Ray shows it to everybody."""

    def __init__(self, text: str, *, secrets: Iterable[str]) -> None:
        super().__init__(text)
        self._secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        """The line, tracebacks included, without secrets and in UTF-8."""
        return printable(blotted(super().format(record), self._secrets))


def attach(shipper: LogShipper) -> None:
    """Send our own lines from INFO on, everyone else's from WARNING on, to `shipper`."""
    shipper.addFilter(_ours_or_grave)
    root = logging.getLogger()
    root.addHandler(shipper)
    for name in OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(capture=True)


def detach(shipper: LogShipper) -> None:
    """Undo `attach` and ship the rest."""
    logging.getLogger().removeHandler(shipper)
    shipper.close()


def _ours_or_grave(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.split(".")[0] in OUR_LOGGERS
