"""How an attempt may end, and what its job becomes, on every database."""

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from service.contracts.jobs import JobState
from service.domain.names import job_prefix
from tests.fakes.work_contract import PLAN, checkpoint, running, success
from tests.fakes.world import World

SPOILS = ("missing", "shorter", "other bytes", "no such checksum")


def spoilt(world: World, job_id: str, path: str, spoil: str) -> dict[str, Any]:
    """The line of a manifest that the store does not bear out."""
    entry = world.file(job_id, path, b"as it was written")
    key = f"{job_prefix(job_id)}/{path}"
    match spoil:
        case "missing":
            world.store.delete([key])
        case "shorter":
            world.store.put_bytes(key, b"as it was")
        case "other bytes":
            world.store.put_bytes(key, b"as it was wRitten")
        case _:
            entry["sha256"] = "0" * 64
    return entry


class FinishContract:
    async def test_finish__a_success_names_its_files(self, world: World) -> None:
        job_id = await running(world)
        told = success(world, job_id, world.file(job_id, "encoder/x", b"abc"), metrics={"psnr": 20.5})
        for _ in range(2):
            assert (await world.tell(job_id, 1, "finish", told)).status_code == 200
        job = await world.show(job_id)
        assert (job["state"], job["progress"]["step"]) == ("succeeded", 10)
        assert job["result"] == {"step": 10, "metrics": {"psnr": 20.5}, "num_files": 2, "size_bytes": 5}
        assert job["metrics"]["psnr"] == 20.5
        assert (job["attempts"][0]["outcome"], job["reason"]) == ("succeeded", "succeeded at step 10")
        assert (await world.client.get(f"/v1/jobs/{job_id}/artifacts")).json() == told["files"]

    async def test_finish__a_success_may_come_with_a_warning(self, world: World) -> None:
        job_id = await running(world)
        told = success(world, job_id, warnings=["the codebook has collapsed"])
        assert (await world.tell(job_id, 1, "finish", told)).status_code == 200
        job = await world.show(job_id)
        assert job["state"] == "succeeded"
        assert job["reason"] == "succeeded at step 10; warning: the codebook has collapsed"
        assert job["result"]["warnings"] == ["the codebook has collapsed"]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"step": 9}, "step 9 of 10"),
            ({"step": 9, "total_steps": 9}, "10"),
            ({"step": 11, "total_steps": 11}, "10"),
            ({"total_steps": None}, "step 10 of None"),
            ({"files": []}, "result.json"),
        ],
        ids=["one step short", "short of the plan", "beyond the plan", "no total", "no file"],
    )
    async def test_finish__a_success_without_its_steps_or_its_result_is_none(
        self, world: World, changes: dict[str, Any], words: str
    ) -> None:
        job_id = await running(world)
        answer = await world.tell(job_id, 1, "finish", success(world, job_id, **changes))
        assert (answer.status_code, answer.json()["code"]) == (409, "broken_manifest")
        assert words in answer.json()["detail"]
        assert (await world.show(job_id))["state"] == "running"
        assert (await world.tell(job_id, 1, "finish", success(world, job_id))).status_code == 200

    @pytest.mark.parametrize("spoil", SPOILS)
    async def test_finish__a_success_whose_file_is_not_what_it_says_is_none(
        self, world: World, spoil: str
    ) -> None:
        job_id = await running(world)
        entry = spoilt(world, job_id, "encoder/model.safetensors", spoil)
        answer = await world.tell(job_id, 1, "finish", success(world, job_id, entry))
        assert (answer.status_code, answer.json()["code"]) == (409, "broken_manifest")
        assert "encoder/model.safetensors" in answer.json()["detail"]
        assert (await world.show(job_id))["state"] == "running"

    async def test_finish__a_training_whose_plan_nobody_told_has_not_succeeded(self, world: World) -> None:
        job_id = str((await world.submit(world.tokenizer()))[0]["id"])
        await world.launch(job_id)
        told = success(world, job_id)
        assert (await world.tell(job_id, 1, "finish", told)).json()["code"] == "broken_manifest"
        await world.report(job_id, 1, plan=PLAN)
        assert (await world.tell(job_id, 1, "finish", told)).status_code == 200

    async def test_finish__an_evaluation_has_steps_and_no_plan(self, world: World) -> None:
        job_id = str((await world.submit(world.evaluate(encoder="s3://photos/encoder")))[0]["id"])
        await world.launch(job_id)
        answer = await world.tell(job_id, 1, "finish", success(world, job_id, step=2, total_steps=2))
        assert answer.status_code == 200
        assert (await world.show(job_id))["state"] == "succeeded"

    async def test_finish__another_end_keeps_the_files_that_are_what_they_say(self, world: World) -> None:
        job_id = await running(world)
        good = world.file(job_id, "samples/step-1.png")
        bad = [spoilt(world, job_id, f"samples/{spoil}.png", spoil) for spoil in SPOILS]
        told = {"outcome": "failed", "step": 4, "files": [good, *bad]}
        assert (await world.tell(job_id, 1, "finish", told)).status_code == 200
        assert (await world.client.get(f"/v1/jobs/{job_id}/artifacts")).json() == [good]

    @pytest.mark.parametrize("what", ["finish", "checkpoints"])
    async def test_reading_the_files__keeps_nobody_waiting(
        self, world: World, what: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = await running(world)
        saved = checkpoint(world, job_id, attempt=1, step=5)
        told = saved if what == "checkpoints" else success(world, job_id)
        read, begun, may_go_on = world.store.read, threading.Event(), threading.Event()

        def slowly(key: str) -> Iterator[bytes]:
            begun.set()
            assert may_go_on.wait(30)
            return read(key)

        monkeypatch.setattr(world.store, "read", slowly)
        telling = asyncio.create_task(world.tell(job_id, 1, what, told))
        assert await asyncio.to_thread(begun.wait, 30)
        assert (await world.report(job_id, 1, step=6)).status_code == 200
        may_go_on.set()
        assert (await telling).status_code == 200

    async def test_finish__a_file_that_goes_while_it_is_read_is_missing(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = await running(world)
        told, read = success(world, job_id), world.store.read

        def too_late(key: str) -> Iterator[bytes]:
            world.store.delete([key])
            return read(key)

        monkeypatch.setattr(world.store, "read", too_late)
        answer = await world.tell(job_id, 1, "finish", told)
        assert (answer.status_code, answer.json()["code"]) == (409, "broken_manifest")

    @pytest.mark.parametrize("spoil", SPOILS)
    async def test_checkpoint__of_a_file_that_is_not_what_it_says_is_not_committed(
        self, world: World, spoil: str
    ) -> None:
        job_id = await running(world)
        told = checkpoint(world, job_id, attempt=1, step=5)
        path = told["files"][0]["path"]
        told["files"][0] = spoilt(world, job_id, path, spoil)
        answer = await world.tell(job_id, 1, "checkpoints", told)
        assert (answer.status_code, answer.json()["code"]) == (409, "broken_manifest")
        assert path in answer.json()["detail"]
        assert (await world.ask(job_id, 1)).json()["checkpoint"] is None

    async def test_checkpoint__a_repetition_is_not_read_again(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job_id = await running(world)
        told = checkpoint(world, job_id, attempt=1, step=5)
        assert (await world.tell(job_id, 1, "checkpoints", told)).status_code == 200
        monkeypatch.setattr(world.store, "read", None)
        assert (await world.tell(job_id, 1, "checkpoints", told)).status_code == 200

    async def test_finish__the_users_fault_is_final_at_once(self, world: World) -> None:
        job_id = await running(world)
        failure = {"kind": "user", "message": "lower training.batch_size to 3"}
        await world.tell(job_id, 1, "finish", {"outcome": "failed", "step": 0, "failure": failure})
        job = await world.show(job_id)
        assert (job["state"], job["failure_kind"], job["reason"]) == ("failed", "user", failure["message"])

    async def test_finish__another_fault_is_tried_again_until_the_attempts_are_used_up(
        self, world: World
    ) -> None:
        job = (await world.submit(world.tokenizer(retries={"max_attempts": 2})))[0]
        failure = {"kind": "storage", "message": "no answer"}
        told = {"outcome": "failed", "step": 4, "failure": failure}
        await world.launch(job["id"])
        assert (await world.tell(job["id"], 1, "finish", told)).status_code == 200
        row = await world.row(job["id"])
        assert row.state is JobState.RETRYING
        assert row.not_before is not None
        # 5 s is the first pause of the settings, a quarter more or less; the clock ticks at each look.
        assert timedelta(seconds=3.7) < row.not_before - world.clock.now < timedelta(seconds=6.3)
        await world.launch(job["id"])
        assert (await world.row(job["id"])).not_before is None
        await world.tell(job["id"], 2, "finish", told)
        shown = await world.show(job["id"])
        assert (shown["state"], shown["failure_kind"]) == ("failed", "storage")
        assert [attempt["message"] for attempt in shown["attempts"]] == ["no answer"] * 2

    @pytest.mark.parametrize(
        ("desired", "state"), [("cancel", "cancelled"), ("pause", "paused"), ("run", "retrying")]
    )
    async def test_finish__what_a_stop_means_is_what_the_user_wants(
        self, world: World, desired: str, state: str
    ) -> None:
        job_id = await running(world)
        if desired != "run":
            await world.put(job_id, JobState.STOPPING, desired=desired)
        answer = await world.tell(job_id, 1, "finish", {"outcome": "stopped", "step": 6, "total_steps": 10})
        assert answer.status_code == 200
        assert (await world.show(job_id))["state"] == state

    async def test_finish__a_success_counts_although_the_stop_was_asked_for(self, world: World) -> None:
        job_id = await running(world)
        await world.client.post("/v1/jobs/tok/cancel")
        await world.tell(job_id, 1, "finish", success(world, job_id))
        assert (await world.show(job_id))["state"] == "succeeded"

    async def test_finish__a_failure_while_being_cancelled_is_a_cancel(self, world: World) -> None:
        job_id = await running(world)
        await world.client.post("/v1/jobs/tok/cancel")
        failure = {"kind": "infrastructure", "message": "a rank died"}
        await world.tell(job_id, 1, "finish", {"outcome": "failed", "step": 3, "failure": failure})
        job = await world.show(job_id)
        assert (job["state"], job["attempts"][0]["outcome"]) == ("cancelled", "failed")

    async def test_race__finish_and_cancel_agree_on_one_end(self, world: World) -> None:
        for turn in range(10):
            job_id = await running(world, name=f"t{turn}")
            finished, cancelled = await asyncio.gather(
                world.tell(job_id, 1, "finish", success(world, job_id)),
                world.client.post(f"/v1/jobs/{job_id}/cancel"),
            )
            assert (finished.status_code, cancelled.status_code) == (200, 202)
            assert (await world.show(job_id))["state"] == "succeeded"
            events = (await world.client.get(f"/v1/jobs/{job_id}/events")).json()
            assert [event["dst"] for event in events].count("succeeded") == 1
