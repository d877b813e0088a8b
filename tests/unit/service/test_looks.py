"""A folder that does not answer, or holds millions of names, holds up no request and nobody else's."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.jobs import estimate, places, submit
from service.jobs.looks import Looks, LookTimeoutError
from tests.fakes.world import World

PATIENCE_S = 60.0


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """Set it, and what hangs goes on; it is set at the end of each test."""
    event = threading.Event()
    yield event
    event.set()


async def test_look__gives_what_was_seen_or_raised() -> None:
    looks = Looks()
    assert await looks.look(lambda: 7, limit_s=PATIENCE_S) == 7

    def fail() -> int:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        await looks.look(fail, limit_s=PATIENCE_S)


async def test_look__that_hangs_is_given_up_and_takes_a_place_until_it_ends(hanging: threading.Event) -> None:
    looks = Looks(most_at_once=2)
    for _ in range(2):
        with pytest.raises(LookTimeoutError):
            await looks.look(hanging.wait, limit_s=0.05)
    with pytest.raises(LookTimeoutError):
        await looks.look(lambda: 7, limit_s=0.05)
    hanging.set()
    assert await looks.look(lambda: 7, limit_s=PATIENCE_S) == 7


async def test_look__no_time_left_begins_none() -> None:
    seen: list[int] = []
    with pytest.raises(LookTimeoutError):
        await Looks().look(lambda: seen.append(1), limit_s=-1.0)
    assert seen == []


async def test_look__whose_asker_is_gone_frees_its_place(hanging: threading.Event) -> None:
    looks = Looks(most_at_once=1)
    asking = asyncio.create_task(looks.look(hanging.wait, limit_s=PATIENCE_S))
    await asyncio.sleep(0.05)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    hanging.set()
    assert await looks.look(lambda: 7, limit_s=PATIENCE_S) == 7


async def test_requests__about_folders_that_hang_are_answered_and_so_is_everybody_else(
    world: World, monkeypatch: pytest.MonkeyPatch, hanging: threading.Event
) -> None:
    def hang(_: object) -> str:
        hanging.wait()
        return ""

    monkeypatch.setattr(places, "images_fault", hang)
    monkeypatch.setattr(estimate, "_num_files", hang)
    monkeypatch.setattr(submit, "_LOOK_LIMIT_S", 0.1)
    monkeypatch.setattr(estimate, "_COUNT_LIMIT_S", 0.1)
    async with asyncio.timeout(PATIENCE_S):
        many = [world.client.post("/v1/jobs", json=world.tokenizer(f"t{n}")) for n in range(8)]
        others = [world.client.get("/v1/jobs") for _ in range(8)]
        answers = await asyncio.gather(*many, *others)
        asked = await world.client.post("/v1/jobs/validate", json=world.tokenizer())
    assert [answer.status_code for answer in answers] == [201] * 8 + [200] * 8
    assert asked.json()["estimate"][0]["files"] is None
    assert "data.uri could not be looked at in time: the workers will have to" in asked.json()["warnings"]


async def test_requests__that_cannot_look_still_judge_what_is_written(
    world: World, monkeypatch: pytest.MonkeyPatch, hanging: threading.Event
) -> None:
    monkeypatch.setattr(places, "images_fault", lambda _: str(hanging.wait()))
    monkeypatch.setattr(submit, "_LOOK_LIMIT_S", 0.1)
    specs = [world.tokenizer("a"), world.tokenizer("b", data={"uri": "relative"})]
    assert list(await world.refused(*specs)) == ["[1].data.uri"]


def test_places__a_folder_of_many_names_is_not_listed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(300):
        (tmp_path / f".{number}").mkdir()
    monkeypatch.setattr(places, "_MOST_LOOKS", 100)
    listed = 0
    inner = os.scandir

    @contextmanager
    def counting(folder: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        def entries() -> Iterator[os.DirEntry[str]]:
            nonlocal listed
            for entry in found:
                listed += 1
                yield entry

        with inner(folder) as found:
            yield entries()

    monkeypatch.setattr(os, "scandir", counting)
    for uri in (str(tmp_path), f"{tmp_path}/*.tar"):
        listed = 0
        assert places.images_fault(uri) == ""  # too much to see: the workers will have to
        assert 100 <= listed <= 101
