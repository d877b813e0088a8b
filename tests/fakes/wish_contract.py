"""What cancel, pause, resume and retry must do on every database."""

from typing import Any

import pytest

from service.contracts.jobs import JobState
from tests.fakes.world import Document, World


async def asked(world: World, verb: str, *, status: int = 202) -> Document:
    """The answer to a verb."""
    answer = await world.client.post(f"/v1/jobs/tok/{verb}")
    assert answer.status_code == status, answer.text
    told: Document = answer.json()
    return told


async def running(world: World, **changes: Any) -> str:
    """A job whose first attempt has reported; its id."""
    job = (await world.submit(world.tokenizer(**changes)))[0]
    await world.launch(job["id"])
    await world.report(job["id"], 1)
    return str(job["id"])


class WishContract:
    async def test_cancel__a_waiting_job_at_once(self, world: World) -> None:
        await world.submit(world.tokenizer())
        answer = await world.client.post("/v1/jobs/tok/cancel")
        assert answer.status_code == 202
        job = answer.json()
        assert (job["state"], job["desired"]) == ("cancelled", "cancel")
        assert job["finished_at"] is not None

    async def test_cancel__a_running_job_is_asked_to_stop(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        await world.launch(job["id"])
        await world.report(job["id"], 1)
        answer = await world.client.post("/v1/jobs/tok/cancel")
        assert (answer.status_code, answer.json()["state"]) == (202, "stopping")
        assert (await world.report(job["id"], 1)).json() == {"directive": "stop"}

    async def test_cancel__a_retrying_job_at_once(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        await world.launch(job["id"])
        await world.put(job["id"], JobState.RETRYING)
        assert (await world.client.post("/v1/jobs/tok/cancel")).json()["state"] == "cancelled"

    async def test_cancel__a_stop_for_a_pause_becomes_one_for_good(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        await world.launch(job["id"])
        await world.put(job["id"], JobState.STOPPING, desired="pause")
        answer = (await world.client.post("/v1/jobs/tok/cancel")).json()
        assert (answer["state"], answer["desired"]) == ("stopping", "cancel")

    @pytest.mark.parametrize("turns", [2, 3])
    async def test_cancel__repeating_changes_nothing(self, world: World, turns: int) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        answers = [await world.client.post("/v1/jobs/tok/cancel") for _ in range(turns)]
        assert {answer.status_code for answer in answers} == {202}
        assert (await world.row(job["id"])).version == 1

    async def test_cancel__a_final_job_stays_what_it_is(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        await world.put(job["id"], JobState.FAILED)
        answer = await world.client.post("/v1/jobs/tok/cancel")
        assert (answer.status_code, answer.json()["state"], answer.json()["desired"]) == (
            202,
            "failed",
            "run",
        )

    async def test_pause__a_waiting_job_at_once_and_resume_queues_it(self, world: World) -> None:
        await world.submit(world.tokenizer())
        for _ in range(2):
            paused = await asked(world, "pause")
            assert (paused["state"], paused["desired"]) == ("paused", "pause")
        for _ in range(2):
            queued = await asked(world, "resume")
            assert (queued["state"], queued["desired"]) == ("queued", "run")

    async def test_pause__a_running_job_stops_and_resume_goes_on_from_there(self, world: World) -> None:
        job_id = await running(world)
        assert (await asked(world, "pause"))["state"] == "stopping"
        assert (await world.report(job_id, 1)).json() == {"directive": "stop"}
        await world.finish(job_id, 1, outcome="stopped", step=5)
        assert (await world.show(job_id))["reason"] == "paused by the user at step 5"
        assert (await asked(world, "resume"))["state"] == "queued"
        assert await world.launch(job_id) == 2
        assert (await world.report(job_id, 2)).json() == {"directive": "continue"}

    async def test_resume__while_it_still_stops_goes_on_after_the_stop(self, world: World) -> None:
        job_id = await running(world)
        await asked(world, "pause")
        told = await asked(world, "resume")
        assert (told["state"], told["desired"]) == ("stopping", "run")
        assert (await world.report(job_id, 1)).json() == {"directive": "stop"}
        await world.finish(job_id, 1, outcome="stopped", step=5)
        assert (await world.show(job_id))["state"] == "paused"

    async def test_resume__before_a_stop_that_fails_counts_the_failure(self, world: World) -> None:
        job_id = await running(world, retries={"max_attempts": 2})
        await asked(world, "pause")
        await asked(world, "resume")
        failure = {"kind": "storage", "message": "the store is away"}
        await world.finish(job_id, 1, outcome="failed", step=5, failure=failure)
        job = await world.show(job_id)
        assert (job["state"], job["desired"], job["attempts"][0]["outcome"]) == ("paused", "run", "failed")
        assert job["reason"] == "paused after: the store is away"

    async def test_wishes__of_one_moment_do_not_overwrite_each_other(self, world: World) -> None:
        """Each is guarded by the version, so the later one has to look again."""
        job_id = await running(world)
        await asked(world, "pause")
        for number, verb in enumerate(("resume", "pause", "cancel"), start=1):
            before = (await world.row(job_id)).version
            await asked(world, verb)
            assert (await world.row(job_id)).version == before + 1, number

    async def test_pauses__use_up_no_attempt(self, world: World) -> None:
        job_id = await running(world, retries={"max_attempts": 1})
        for number in (1, 2):
            await asked(world, "pause")
            await world.finish(job_id, number, outcome="stopped", step=number)
            await asked(world, "resume")
            await world.launch(job_id)
            await world.report(job_id, number + 1)
        job = await world.show(job_id)
        assert [attempt["outcome"] for attempt in job["attempts"]] == ["stopped", "stopped", None]
        await world.finish(job_id, 3, outcome="stopped", step=3)  # nobody here asked: preempted
        job = await world.show(job_id)
        assert (job["state"], job["failure_kind"]) == ("failed", "preempted")
        assert job["reason"].startswith("attempt 3 failed (preempted), failure 1 of 1, no attempt is left")

    @pytest.mark.parametrize("state", [JobState.FAILED, JobState.CANCELLED])
    async def test_retry__queues_what_did_not_succeed_with_all_attempts_anew(
        self, world: World, state: JobState
    ) -> None:
        job_id = await running(world, retries={"max_attempts": 1})
        await world.put(job_id, JobState.STOPPING)
        await world.put(job_id, state, mlflow_run_id="run", mlflow_closed=True)
        for _ in range(2):
            job = await asked(world, "retry")
            assert (job["state"], job["desired"], job["finished_at"]) == ("queued", "run", None)
        row = await world.row(job_id)
        assert (row.forgiven_attempts, row.mlflow_closed, row.mlflow_run_id) == (1, False, None)
        await world.launch(job_id)
        failure = {"kind": "infrastructure", "message": "lost"}
        await world.finish(job_id, 2, outcome="failed", step=2, failure=failure)
        assert "failure 1 of 1" in (await world.show(job_id))["reason"]

    async def test_retry__the_next_attempt_of_a_retrying_job_need_not_wait(self, world: World) -> None:
        job_id = await running(world)
        failure = {"kind": "infrastructure", "message": "lost"}
        await world.finish(job_id, 1, outcome="failed", step=2, failure=failure)
        assert (await world.row(job_id)).not_before is not None
        for _ in range(2):
            assert (await asked(world, "retry"))["state"] == "retrying"
        assert (await world.row(job_id)).not_before is None
        events = (await world.client.get(f"/v1/jobs/{job_id}/events")).json()
        assert [e["message"] for e in events].count("the user wants the next attempt now") == 1

    @pytest.mark.parametrize(
        ("verb", "state", "advice"),
        [
            ("pause", JobState.FAILED, "nothing is left to pause"),
            ("resume", JobState.CANCELLED, "retry"),
            ("resume", JobState.SUCCEEDED, "nothing waits for a resume"),
            ("retry", JobState.SUCCEEDED, "submit the spec again"),
            ("retry", JobState.STOPPING, "resume"),
        ],
    )
    async def test_verb__that_makes_no_sense_says_which_does(
        self, world: World, verb: str, state: JobState, advice: str
    ) -> None:
        job_id = await running(world)
        if state is JobState.CANCELLED:
            await world.put(job_id, JobState.STOPPING)
        await world.put(job_id, state)
        problem = await asked(world, verb, status=409)
        assert problem["code"] == "illegal_move"
        assert advice in problem["detail"]
        assert (await world.row(job_id)).state is state

    async def test_runtime_limit__fails_what_was_stopped_for_it_and_retry_allows_as_much_again(
        self, world: World
    ) -> None:
        job_id = await running(world, limits={"runtime_hours": 1e-7})
        await world.put(job_id, JobState.STOPPING)  # as the dispatcher does
        assert (await world.report(job_id, 1)).json() == {"directive": "stop"}
        await world.finish(job_id, 1, outcome="stopped", step=5)
        job = await world.show(job_id)
        assert (job["state"], job["failure_kind"]) == ("failed", "user")
        assert "limits.runtime_hours" in job["reason"]
        assert (await asked(world, "retry"))["state"] == "queued"
