"""Real processes of one line each: no network, and nothing is waited for that does not come."""

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from service.data_folder import DataFolder, FolderTakenError
from service.processes import Child, Record, end

SLEEPER = "import time; time.sleep(600)"
# A child of its own, which goes into another session as Ray's jobs do.
FAMILY = (
    "import subprocess, sys, time; "
    f"p = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], start_new_session={{apart}}); "
    "print(p.pid, flush=True); time.sleep(600)"
)
STUBBORN = (
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
)


def start(tmp_path: Path, code: str, name: str = "one") -> Child:
    command = [sys.executable, "-c", code]
    return Child.start(name, command, env=dict(os.environ), log=tmp_path / f"{name}.log", cwd=tmp_path)


def printed(path: Path) -> str:
    deadline = time.monotonic() + 60
    while not (text := path.read_text()).endswith("\n"):
        assert time.monotonic() < deadline, f"{path} stays empty"
        time.sleep(0.02)
    return text


async def test_end__takes_descendants_of_other_sessions_too(tmp_path: Path) -> None:
    child = start(tmp_path, FAMILY.format(apart=True))
    grandchild = psutil.Process(int(printed(tmp_path / "one.log")))
    await end([child], grace_s=10)
    assert child.process() is None
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


async def test_end__kills_what_does_not_listen_and_counts_it(tmp_path: Path) -> None:
    child = start(tmp_path, STUBBORN)
    printed(tmp_path / "one.log")
    assert await end([child], grace_s=0.2) == 1
    assert child.process() is None


async def test_end__finds_the_orphans_of_a_root_that_died(tmp_path: Path) -> None:
    child = start(tmp_path, FAMILY.format(apart=False))
    grandchild = psutil.Process(int(printed(tmp_path / "one.log")))
    os.kill(child.pid, signal.SIGKILL)
    assert child.process() is None or psutil.Process(child.pid).wait(10) is not None
    assert grandchild.is_running()
    await end([child], grace_s=10)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


async def test_end__never_touches_a_recycled_pid(tmp_path: Path) -> None:
    other = start(tmp_path, SLEEPER)
    mistaken = replace(other, create_time=other.create_time - 5)
    assert mistaken.process() is None
    assert await end([mistaken], grace_s=0.1) == 0
    assert other.process() is not None
    await end([other], grace_s=10)


async def test_record__finds_a_living_child_again_and_forgets_a_dead_one(tmp_path: Path) -> None:
    child, path = start(tmp_path, SLEEPER), tmp_path / "processes.json"
    Record(children=(child,), facts={"port": "8000"}).save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    loaded = Record.load(path)
    assert loaded is not None
    assert loaded.facts == {"port": "8000"}
    assert loaded.child("one") == child
    assert loaded.child("other") is None
    await end([child], grace_s=10)
    assert loaded.child("one") is None


def test_record__missing_is_none_and_a_broken_one_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "processes.json"
    assert Record.load(path) is None
    path.write_text('{"children": 3}')
    with pytest.raises(ValueError, match="remove it once its processes are gone"):
        Record.load(path)


def test_child__bears_no_lock_of_ours(tmp_path: Path) -> None:
    folder = DataFolder(path=tmp_path)
    folder.prepare()
    with folder.locked():
        child = start(tmp_path, SLEEPER)
    try:
        with folder.locked():
            assert child.process() is not None
    finally:
        os.kill(child.pid, signal.SIGKILL)


def test_lock__names_the_process_that_has_it(tmp_path: Path) -> None:
    folder = DataFolder(path=tmp_path)
    folder.prepare()
    with folder.locked(), pytest.raises(FolderTakenError, match=rf"process {os.getpid()}"), folder.locked():
        pass
    with folder.locked():
        pass


def test_secret__stays_the_same_for_this_user_alone(tmp_path: Path) -> None:
    folder = DataFolder(path=tmp_path)
    secret = folder.secret("secret")
    assert len(secret) == 64
    assert folder.secret("secret") == secret
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert DataFolder(path=tmp_path / "..").secret("other") != secret
    (tmp_path.parent / "other").unlink()
