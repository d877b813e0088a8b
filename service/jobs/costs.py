"""What a training takes, asked of a child process: the service itself never loads torch."""

import asyncio
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import IO, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from service.contracts.estimates import Cost, Question

COMMAND = (sys.executable, "-m", "workers.estimate")
_NEEDS = ("torch", "timm", "workers")
_CHILD_LIMIT_S = 300.0  # ten seconds on an idle machine
_MOST_KEPT = 256  # answers, of about a kilobyte
_MOST_WAITING = 100  # questions; a request holds as many specs
_LONGEST_ANSWER = 2**16  # bytes
_MOST_TOLD = 300  # characters of a child's last words


class NoCostError(Exception):
    """There is no answer; the message says why."""


class Costs(Protocol):
    """Answers questions about costs."""

    async def cost(self, question: Question, *, limit_s: float) -> Cost:
        """The answer. Raises NoCostError, at the latest after `limit_s` seconds."""


class ChildCosts:
    """Starts a process for each question that is new, one at a time, and keeps the answers.

    Whoever asks may stop waiting: the process goes on, so that asking again later finds the answer.
    """

    def __init__(
        self,
        command: Sequence[str] = COMMAND,
        *,
        needs: Sequence[str] = _NEEDS,
        child_limit_s: float = _CHILD_LIMIT_S,
    ) -> None:
        """`needs` are the packages without which `command` is not tried; a child has `child_limit_s`."""
        self._command = tuple(command)
        self._missing = [name for name in needs if find_spec(name) is None]
        self._child_limit_s = child_limit_s
        self._asked: OrderedDict[str, asyncio.Task[Cost | str]] = OrderedDict()
        self._turn = asyncio.Lock()

    async def cost(self, question: Question, *, limit_s: float) -> Cost:
        """The answer. Raises NoCostError, at the latest after `limit_s` seconds."""
        if self._missing:
            raise NoCostError(
                f"counting them needs the workers' packages, and {', '.join(self._missing)} is not "
                "installed where the service runs"
            )
        task = self._task(question.model_dump_json())
        done, _ = await asyncio.wait([task], timeout=limit_s)
        if not done:
            raise NoCostError(f"counting them takes longer than {limit_s:.0f} s; it goes on, ask again")
        found = task.result()
        if isinstance(found, str):
            raise NoCostError(found)
        return found

    def _task(self, key: str) -> asyncio.Task[Cost | str]:
        """That of an equal question, unless it failed by chance; else a new one."""
        task = self._asked.get(key)
        if task is not None and not (task.done() and _failed(task)):
            return task
        self._asked = OrderedDict((k, t) for k, t in self._asked.items() if not (t.done() and _failed(t)))
        if sum(not t.done() for t in self._asked.values()) >= _MOST_WAITING:
            raise NoCostError(f"{_MOST_WAITING} other networks are being counted; ask again later")
        while len(self._asked) >= _MOST_KEPT:
            self._asked.popitem(last=False)
        self._asked[key] = asyncio.create_task(self._count(key))
        return self._asked[key]

    async def _count(self, question: str) -> Cost | str:
        """The child's answer, or the reason that it gave."""
        async with self._turn:
            try:
                async with asyncio.timeout(self._child_limit_s):
                    return await self._ask(question)
            except TimeoutError:
                raise NoCostError(f"counting them took longer than {self._child_limit_s:.0f} s") from None

    async def _ask(self, question: str) -> Cost | str:
        """Start a child, which does not outlive this call, and read what it says."""
        with tempfile.TemporaryFile() as said:
            child = _start(self._command, said)
            try:
                answer, status = await asyncio.to_thread(_exchange, child, question.encode())
            finally:
                child.kill()
                child.wait()
            if status != 0:
                raise NoCostError(f"counting them ended with status {status}: {_last_words(said)}")
        return _read(answer)


def _failed(task: asyncio.Task[Cost | str]) -> bool:
    return task.cancelled() or task.exception() is not None


def _start(command: Sequence[str], said: IO[bytes]) -> subprocess.Popen[bytes]:
    """A child that is asked and answers by pipes.

    Not asyncio's own, which waits for ever where a task is cancelled while its child starts.
    """
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)


def _exchange(child: subprocess.Popen[bytes], question: bytes) -> tuple[bytes, int]:
    """What the child answers, and the status that it ends with; blocks until it ends or is killed."""
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError), child.stdin as asked:  # its status tells why it ended
        asked.write(question)
    with child.stdout as answered:
        answer = answered.read(_LONGEST_ANSWER + 1)
    if len(answer) > _LONGEST_ANSWER:
        raise NoCostError(f"counting them gave more than {_LONGEST_ANSWER} bytes")
    return answer, child.wait()


class _Answer(BaseModel):
    """What the child prints: a cost, or why the networks cannot be built."""

    model_config = ConfigDict(extra="allow")
    problem: str | None = None


def _read(answer: bytes) -> Cost | str:
    try:
        problem = _Answer.model_validate_json(answer).problem
        return problem if problem is not None else Cost.model_validate_json(answer)
    except ValidationError as error:
        raise NoCostError(f"counting them gave no answer: {answer[:_MOST_TOLD]!r}") from error


def _last_words(said: IO[bytes]) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    return lines[-1][:_MOST_TOLD] if lines else "it said nothing"
