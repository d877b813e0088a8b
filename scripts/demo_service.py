"""The embedded service as a child of the demo, which ends it whatever happens."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

STOP_S = 60.0
KILL_S = 10.0
FOREIGN = ("CIM_", "RAY_", "MLFLOW_")  # settings of another service must not reach this one


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running `cim up`."""

    process: subprocess.Popen[str]
    api: str
    mlflow: str
    log: Path


def start(data_dir: Path, *, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    """Run `cim up` on `data_dir`, in a session of its own: Ctrl-C reaches the demo alone."""
    data_dir.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).with_name("cim")), "up", "--port", "0", "--mlflow-port", "0"]
    with _log(data_dir).open("w") as log:
        return subprocess.Popen(
            [*command, "--json", "--data-dir", str(data_dir)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env={name: value for name, value in environ.items() if not name.startswith(FOREIGN)},
        )


@contextmanager
def running(data_dir: Path, *, environ: Mapping[str, str]) -> Iterator[Service]:
    """The service for as long as the block runs; nothing of it is left behind.

    Raises:
        DemoError: It does not start, or does not end as it should.
    """
    with _signals_raise():
        process = start(data_dir, environ=environ)
        try:
            yield _ready(process, data_dir)
        finally:
            with _undisturbed():
                status = stop(process)
        if status != 0:
            raise DemoError(f"the service ended with status {status}; its words are in {_log(data_dir)}")


def stop(process: subprocess.Popen[str]) -> int:
    """SIGTERM, as Ctrl-C of `cim up` does; its exit status. What outlasts a minute is killed."""
    family = _family(process)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=STOP_S)
    left = [member for member in family if _lives(member)]
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left, timeout=KILL_S)
    status = process.wait(timeout=KILL_S)
    if process.stdout is not None:
        process.stdout.close()
    return status or (1 if left else 0)


def _ready(process: subprocess.Popen[str], data_dir: Path) -> Service:
    assert process.stdout is not None
    log = _log(data_dir)
    # The one line that says it is ready, or the end of the stream when it could not start.
    line = process.stdout.readline()
    if not line:
        words = log.read_text(errors="replace").strip()[-2000:]
        raise DemoError(f"the service did not start:\n{words}\nAll of it: {log}")
    where = json.loads(line)
    return Service(process=process, api=where["api"], mlflow=where["mlflow"], log=log)


def _log(data_dir: Path) -> Path:
    return data_dir / "demo-service.log"


def _family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        return [*root.children(recursive=True), root]
    return []


def _lives(member: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    return False


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and a closed terminal interrupt like Ctrl-C, so that the service is ended."""

    def interrupt(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No second Ctrl-C while the service ends: it would leave processes behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
