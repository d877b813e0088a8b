"""The supervisor of embedded mode, without real children."""

import asyncio
import logging
import os
from pathlib import Path

import pytest

from service import embedded
from service.data_folder import DataFolder
from service.embedded import UpOptions, _Embedded
from service.processes import Child

GONE = Child(name="Ray", pid=2**22 + 1, create_time=0.0)  # Linux gives no pid beyond 2**22


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataFolder:
    monkeypatch.setattr(embedded, "_RESTART_PAUSE_S", 0.01)
    monkeypatch.setattr(embedded, "_short_temp_dir", lambda: tmp_path / "short")
    made = DataFolder.at(tmp_path / "data")
    made.prepare()
    return made


async def test_watch__tries_again_where_a_start_fails(
    folder: DataFolder, caplog: pytest.LogCaptureFixture
) -> None:
    """The machine may be out of memory or processes at the very moment."""
    stop = asyncio.Event()
    options = UpOptions(data_dir=folder.path, port=0, mlflow_port=0)
    service = _Embedded(options, folder, environ={}, stop=stop)
    starts = iter((OSError("Resource temporarily unavailable"), OSError("again"), GONE))

    def start() -> Child:
        outcome = next(starts)
        if isinstance(outcome, OSError):
            raise outcome
        stop.set()
        return outcome

    service._children, service._starts = {"Ray": GONE}, {"Ray": start}
    caplog.set_level(logging.ERROR)
    async with asyncio.timeout(20):
        await service._watch()
    await service.end()
    assert next(starts, None) is None
    assert caplog.text.count("Ray has ended; starting it again") == 3
    assert "Resource temporarily unavailable" in caplog.text


async def test_last_lines__of_a_flood_are_short(folder: DataFolder) -> None:
    with folder.log("ray").open("wb") as file:
        file.truncate(2**26)  # sparse, one line of zeros
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe end\n")
    options = UpOptions(data_dir=folder.path, port=0, mlflow_port=0)
    service = _Embedded(options, folder, environ={}, stop=asyncio.Event())
    told = service._last_lines("Ray")
    await service.end()
    assert told.endswith("\n  the end")
    assert len(told) < 10_000
