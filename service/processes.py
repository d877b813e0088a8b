"""Child processes that outlive a killed parent, are found again, and end completely.

A child is started in a session of its own, so that Ctrl-C in the terminal reaches the service
alone, and is written down as (pid, creation time): a recycled pid is never taken for ours.
"""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

_ASKED_S = 1.5  # for what a root left running
_SAME_START_S = 0.05  # psutil reads the creation time in clock ticks of 10 ms


@dataclass(frozen=True, kw_only=True)
class Child:
    """One process that we started."""

    name: str
    pid: int
    create_time: float  # seconds since the epoch

    @classmethod
    def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        cwd: Path,
        niceness: int = 0,
    ) -> Self:
        """Start `command` in a session of its own; both its outputs are appended to `log`."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                command,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # A child that ended at once is still there to be asked: nobody has waited for it.
        started = psutil.Process(process.pid)
        if niceness:
            started.nice(niceness)
        return cls(name=name, pid=process.pid, create_time=started.create_time())

    def process(self) -> psutil.Process | None:
        """The running process; None when it is gone, a zombie, or its pid belongs to another one."""
        process = self._same()
        return None if process is None or _is_zombie(process) else process

    def orphans(self) -> list[psutil.Process]:
        """What a dead child left running: the other processes of the session that it led.

        The kernel gives the pid to nobody else for as long as a session bears it, so a pid that
        belongs to another process says that none is left.
        """
        if self.process() is not None or (psutil.pid_exists(self.pid) and self._same() is None):
            return []
        return [process for process in psutil.process_iter() if _in_session(process.pid, self.pid)]

    def _same(self) -> psutil.Process | None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.create_time) < _SAME_START_S:
                return process
        return None


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the next start needs to know about this one: the children, and where they listen."""

    children: tuple[Child, ...] = ()
    facts: Mapping[str, str]  # e.g. ports and folders

    def save(self, path: Path) -> None:
        """Replace the file at `path` in one step."""
        content = {"children": [asdict(child) for child in self.children], "facts": dict(self.facts)}
        replace_file(path, json.dumps(content, indent=1))

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """What `save` wrote; None where there is no such file.

        Raises:
            ValueError: the file is not ours or damaged.
        """
        try:
            content = json.loads(path.read_text())
            children = tuple(Child(**child) for child in content["children"])
            return cls(children=children, facts=content["facts"])
        except FileNotFoundError:
            return None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error!r}); remove it once its processes are gone"
            ) from error

    def child(self, name: str) -> Child | None:
        """The child of that name, where it still runs."""
        return next((c for c in self.children if c.name == name and c.process() is not None), None)


async def end(children: Iterable[Child], *, grace_s: float) -> int:
    """End `children` and all their descendants; returns how many had to be killed.

    The whole tree is listed before the first signal, because a process whose parent has died can
    no longer be found through it. The roots have `grace_s` seconds to end their own children in
    order; what they leave is asked, then killed, and so is what was started meanwhile.
    """
    children = list(children)
    roots = [process for child in children if (process := child.process()) is not None]
    orphans = [process for child in children for process in child.orphans()]
    family = _with_descendants([*roots, *orphans])
    _signal(roots, signal.SIGTERM)
    await _wait(roots, grace_s=grace_s)
    left = await _wait(family, grace_s=0.2)
    _signal(left, signal.SIGTERM)
    left = await _wait(left, grace_s=_ASKED_S)
    num_killed = 0
    # A second round finds what was started between the listing and the kill.
    for _ in range(3):
        left = [process for process in _with_descendants(left) if not _is_zombie(process)]
        if not left:
            break
        num_killed += _signal(left, signal.SIGKILL)
        left = await _wait(left, grace_s=2.0)
    return num_killed


def replace_file(path: Path, content: str) -> None:
    """Write `content` to `path` so that a reader sees the old or the new text, readable by us alone."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
    draft.replace(path)


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> int:
    """Send a signal; returns how many processes were there to get it."""
    reached = 0
    for process in processes:
        # psutil compares the creation time first, so a recycled pid is spared.
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            reached += 1
    return reached


def _in_session(pid: int, leader: int) -> bool:
    try:
        return os.getsid(pid) == leader and pid != leader
    except (ProcessLookupError, PermissionError):
        return False


def _with_descendants(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    family: dict[int, psutil.Process] = {}
    for process in processes:
        family[process.pid] = process
        with suppress(psutil.NoSuchProcess):
            family.update({child.pid: child for child in process.children(recursive=True)})
    return list(family.values())


async def _wait(processes: Sequence[psutil.Process], *, grace_s: float) -> list[psutil.Process]:
    """Those of `processes` that still run after `grace_s` seconds at most."""
    deadline = time.monotonic() + grace_s
    while True:
        _, left = await asyncio.to_thread(psutil.wait_procs, processes, timeout=0.1)
        left = [process for process in left if not _is_zombie(process)]
        if not left or time.monotonic() >= deadline:
            return left


def _is_zombie(process: psutil.Process) -> bool:
    # A zombie has ended; whether its parent has noticed is not our business.
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
