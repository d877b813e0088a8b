"""Everything that goes wrong on purpose. A fault is injected, lasts a while, and is healed."""

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

import psutil
import psycopg

from tests.chaos.poisoning import PoisonRows
from tests.chaos.proxy import Answer, Delay, Freeze, LoseReplies, Mode, Pass, Refuse, Trip
from tests.chaos.stack import APIS, DISPATCHERS, HEAD, Stack

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
_NO_ROOM = b"<Error><Code>XMinioStorageFull</Code><Message>No room is left.</Message></Error>"
_WRITES = (b"PUT", b"POST")


class Fault(Protocol):
    """One thing that goes wrong."""

    @property
    def hold_s(self) -> float:
        """How long it lasts at most."""
        ...

    def inject(self, stack: Stack, random: Random) -> None:
        """Let it go wrong."""
        ...

    def over(self, stack: Stack) -> bool:
        """Whether it has done its work before its time."""
        ...

    def heal(self, stack: Stack) -> None:
        """Make it good again. Whatever was killed is started, as a supervisor would."""
        ...


class Lasting:
    """A fault that needs all its time."""

    def over(self, stack: Stack) -> bool:
        """Never early."""
        return False


@dataclass(kw_only=True)
class Kill(Lasting):
    """SIGKILL of services: one of them, or all."""

    names: Sequence[str]
    every: bool = False
    hold_s: float = 2.0

    def inject(self, stack: Stack, random: Random) -> None:
        """At once, without a word."""
        for name in self.names if self.every else [random.choice(self.names)]:
            stack.services[name].signal(signal.SIGKILL)

    def heal(self, stack: Stack) -> None:
        """Start what is gone."""
        for name in self.names:
            stack.services[name].start()


@dataclass(kw_only=True)
class Stop(Lasting):
    """SIGSTOP of one service, for longer than anyone waits for it, then SIGCONT."""

    names: Sequence[str]
    hold_s: float = 12.0

    def inject(self, stack: Stack, random: Random) -> None:
        """It keeps its connections and does nothing."""
        stack.services[random.choice(self.names)].signal(signal.SIGSTOP)

    def heal(self, stack: Stack) -> None:
        """It goes on as if no time had passed."""
        for name in self.names:
            stack.services[name].signal(signal.SIGCONT)


@dataclass(kw_only=True)
class KillWorkers(Lasting):
    """SIGKILL of one worker, or of all."""

    every: bool = False
    hold_s: float = 2.0

    def inject(self, stack: Stack, random: Random) -> None:
        """In the middle of whatever they do."""
        workers = stack.workers()
        for process in workers if self.every else random.sample(workers, min(1, len(workers))):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def heal(self, stack: Stack) -> None:
        """The service has to see to that."""


@dataclass(kw_only=True)
class StopWorkers(Lasting):
    """SIGSTOP of some workers until they count as stalled, then SIGCONT: others have their jobs by then."""

    hold_s: float = 28.0
    stopped: list[psutil.Process] = field(default_factory=list)

    def inject(self, stack: Stack, random: Random) -> None:
        """Half of them."""
        workers = stack.workers()
        self.stopped = random.sample(workers, (len(workers) + 1) // 2)
        self._signal(signal.SIGSTOP)

    def heal(self, stack: Stack) -> None:
        """Those that were not ended meanwhile go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@dataclass(kw_only=True)
class Line(Lasting):
    """A proxy misbehaves."""

    proxies: Sequence[str]
    mode: Mode
    hold_s: float = 5.0

    def inject(self, stack: Stack, random: Random) -> None:
        """All lines at once."""
        for name in self.proxies:
            stack.network.apply(stack.proxies[name], self.mode)

    def heal(self, stack: Stack) -> None:
        """As before."""
        for name in self.proxies:
            stack.network.apply(stack.proxies[name], Pass())


@dataclass(kw_only=True)
class RestartDatabase(Lasting):
    """The server ends as in a power cut and recovers."""

    hold_s: float = 2.0

    def inject(self, stack: Stack, random: Random) -> None:
        """Every transaction under way is gone."""
        stack.postgres.signal(signal.SIGQUIT)

    def heal(self, stack: Stack) -> None:
        """Start and recover."""
        stack.postgres.start()


@dataclass(kw_only=True)
class ExhaustDatabase(Lasting):
    """Others hold every connection that the server gives."""

    hold_s: float = 6.0
    held: list["psycopg.Connection[tuple[object, ...]]"] = field(default_factory=list)

    def inject(self, stack: Stack, random: Random) -> None:
        """Ours are ended first, so that they have to be opened again in vain."""
        with psycopg.connect(stack.postgres.uri, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        for _ in range(500):
            try:
                self.held.append(psycopg.connect(stack.postgres.uri))
            except psycopg.OperationalError:
                return
        raise AssertionError("the server gives more than 500 connections")

    def heal(self, stack: Stack) -> None:
        """Give them back."""
        while self.held:
            self.held.pop().close()


@dataclass(kw_only=True)
class CutStep:
    """All dispatchers, or apis, are killed when one of them sends something: a step cut in two.

    `pattern` is part of a request on the line; with `after` it was carried out, and nobody heard of it.
    """

    line: str
    pattern: bytes
    after: bool
    victims: Sequence[str] = DISPATCHERS
    too: Sequence[str] = ()  # what else dies at that moment
    hold_s: float = 40.0

    def inject(self, stack: Stack, random: Random) -> None:
        """Lay the trap. Statements have their text in a request only while a connection is young.

        A worker dies too, so that there will be an attempt to start.
        """
        Kill(names=self.victims, every=True).inject(stack, random)
        KillWorkers().inject(stack, random)
        trip = Trip(pattern=self.pattern, after=self.after, action=lambda: self._kill(stack))
        stack.network.apply(stack.proxies[self.line], trip)
        for name in self.victims:
            stack.services[name].start()

    def over(self, stack: Stack) -> bool:
        """As soon as it has sprung."""
        return stack.proxies[self.line].tripped.is_set()

    def heal(self, stack: Stack) -> None:
        """Take the trap away and start what died."""
        stack.network.apply(stack.proxies[self.line], Pass())
        for name in (*self.victims, *self.too):
            stack.services[name].start()

    def _kill(self, stack: Stack) -> None:
        for name in (*self.victims, *self.too):
            stack.services[name].signal(signal.SIGKILL)


_DATABASE = ("database-api", "database-dispatcher")
_APIS = ("api-clients", "api-workers")


def _step(line: str, pattern: bytes, *, after: bool) -> Callable[[], Fault]:
    return lambda: CutStep(line=line, pattern=pattern, after=after)


def _request(pattern: bytes, *, after: bool) -> Callable[[], Fault]:
    return lambda: CutStep(line="database-api", pattern=pattern, after=after, victims=APIS)


def _line(*proxies: str, mode: Mode, hold_s: float = 5.0) -> Callable[[], Fault]:
    return lambda: Line(proxies=proxies, mode=mode, hold_s=hold_s)


CATALOGUE: Mapping[str, Callable[[], Fault]] = {
    "api-kill": lambda: Kill(names=APIS),
    "api-kill-all": lambda: Kill(names=APIS, every=True),
    "api-stop": lambda: Stop(names=APIS),
    "dispatcher-kill": lambda: Kill(names=DISPATCHERS),
    "dispatcher-kill-all": lambda: Kill(names=DISPATCHERS, every=True),
    "dispatcher-stop": lambda: Stop(names=DISPATCHERS),
    "worker-kill": KillWorkers,
    "worker-kill-all": lambda: KillWorkers(every=True),
    "worker-stop": StopWorkers,
    "head-kill": lambda: Kill(names=(HEAD,), hold_s=3.0),
    "head-kill-and-dispatchers": lambda: Kill(names=(HEAD, *DISPATCHERS), every=True),
    "step-before-fence": _step("database-dispatcher", b"INSERT INTO attempts", after=False),
    "step-after-fence": _step("database-dispatcher", b"INSERT INTO attempts", after=True),
    "step-before-submit": _step("cluster", b"POST /api/jobs/ ", after=False),
    "step-after-submit": _step("cluster", b"POST /api/jobs/ ", after=True),
    # Nobody is left who knows of the process that was started: neither we nor the cluster.
    "step-after-submit-and-head-kill": lambda: CutStep(
        line="cluster", pattern=b"POST /api/jobs/ ", after=True, too=(HEAD,)
    ),
    "step-before-noting-submit": _step("database-dispatcher", b"SET launched_at", after=False),
    "step-after-noting-submit": _step("database-dispatcher", b"SET launched_at", after=True),
    "step-after-commit": _step("database-dispatcher", b"COMMIT", after=True),
    "step-before-accepting": _request(b"INSERT INTO submissions", after=False),
    "step-after-accepting": _request(b"INSERT INTO submissions", after=True),
    "step-before-checkpoint": _request(b"INSERT INTO checkpoints", after=False),
    "step-after-request": _request(b"COMMIT", after=True),
    "database-refused": _line(*_DATABASE, mode=Refuse()),
    "database-frozen": _line(*_DATABASE, mode=Freeze()),
    "database-slow": _line(*_DATABASE, mode=Delay(seconds=0.05)),
    "database-lost-replies": _line(*_DATABASE, mode=LoseReplies(share=0.05)),
    "database-restart": RestartDatabase,
    "database-exhausted": ExhaustDatabase,
    "poisonous-rows": PoisonRows,
    "store-refused": _line("store", mode=Refuse()),
    "store-frozen": _line("store", mode=Freeze()),
    "store-slow": _line("store", mode=Delay(seconds=0.2)),
    "store-503": _line("store", mode=Answer(status="503 Slow Down", body=_SLOW_DOWN)),
    "store-full": _line(
        "store", mode=Answer(status="507 Insufficient Storage", body=_NO_ROOM, methods=_WRITES), hold_s=1.0
    ),
    "store-lost-replies": _line("store", mode=LoseReplies(share=0.2)),
    "mlflow-refused": _line("mlflow", mode=Refuse(), hold_s=10.0),
    "mlflow-slow": _line("mlflow", mode=Delay(seconds=1.0), hold_s=10.0),
    "mlflow-403": _line("mlflow", mode=Answer(status="403 Forbidden", body=b"Invalid Host header")),
    "mlflow-lost-replies": _line("mlflow", mode=LoseReplies(share=0.3)),
    "cluster-refused": _line("cluster", mode=Refuse()),
    "cluster-frozen": _line("cluster", mode=Freeze()),
    "cluster-lost-replies": _line("cluster", mode=LoseReplies(share=0.3)),
    "api-lost-replies": _line(*_APIS, mode=LoseReplies(share=0.3)),
    "api-slow": _line(*_APIS, mode=Delay(seconds=0.3)),
    "api-partition": _line("api-workers", mode=Refuse()),
}
