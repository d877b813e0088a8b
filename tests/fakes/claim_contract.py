"""How a worker gets hold of its attempt, on every database."""

import asyncio
import hashlib

from service.contracts.jobs import JobState
from service.contracts.tokens import claim_code
from service.db import queries
from tests.fakes.work_contract import running
from tests.fakes.world import SECRET, World, token_of


class ClaimContract:
    async def test_claim__the_code_alone_opens_nothing_else(self, world: World) -> None:
        job_id = (await world.submit(world.tokenizer()))[0]["id"]
        await world.launch(job_id, claimed=False)
        code = claim_code(SECRET, job_id, 1)
        body = {"progress": {"step": 1}}
        for _ in ("before the claim", "after it"):
            assert (await world.tell(job_id, 1, "report", body, token=code)).status_code == 401
            assert (await world.claim(job_id, 1)).status_code == 200
        assert (await world.ask(job_id, 1)).status_code == 200
        assert (await world.report(job_id, 1)).status_code == 200

    async def test_claim__needs_the_code_of_this_attempt(self, world: World) -> None:
        job_id = (await world.submit(world.tokenizer()))[0]["id"]
        await world.launch(job_id, claimed=False)
        for code in ("x", claim_code(SECRET, job_id, 2), claim_code("another" * 5, job_id, 1), "\xe9"):
            answer = await world.claim(job_id, 1, code=code)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorised")
        assert (await world.ask(job_id, 1)).status_code == 401

    async def test_claim__a_second_worker_is_refused_and_told_of(self, world: World) -> None:
        job_id = (await world.submit(world.tokenizer()))[0]["id"]
        await world.launch(job_id)
        for _ in range(2):
            assert (await world.claim(job_id, 1)).status_code == 200, "a repetition, its reply was lost"
            answer = await world.claim(job_id, 1, token="an intruder's")
            assert (answer.status_code, answer.json()["code"]) == (409, "attempt_claimed")
        body = {"progress": {"step": 1}}
        assert (await world.tell(job_id, 1, "report", body, token="an intruder's")).status_code == 401
        assert (await world.report(job_id, 1)).status_code == 200
        events = (await world.client.get(f"/v1/jobs/{job_id}/events")).json()
        told = [event["message"] for event in events]
        assert told.count("a second worker tried to claim attempt 1") == 1

    async def test_claim__two_at_once_one_wins(self, world: World) -> None:
        for turn in range(10):
            job_id = (await world.submit(world.tokenizer(f"t{turn}")))[0]["id"]
            await world.launch(job_id, claimed=False)
            answers = await asyncio.gather(*(world.claim(job_id, 1, token=f"token {n}") for n in range(4)))
            assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
            winner = [answer.status_code for answer in answers].index(200)
            body = {"progress": {"step": 1}}
            opened = [
                (await world.tell(job_id, 1, "report", body, token=f"token {n}")).status_code
                for n in range(4)
            ]
            assert opened == [200 if n == winner else 401 for n in range(4)]

    async def test_claim__an_attempt_that_is_over_is_not_for_taking(self, world: World) -> None:
        job_id = (await world.submit(world.tokenizer()))[0]["id"]
        await world.launch(job_id, claimed=False)
        await world.put(job_id, JobState.RETRYING)
        await world.launch(job_id)
        answer = await world.claim(job_id, 1)
        assert (answer.status_code, answer.json()["code"]) == (409, "stale_attempt")
        assert (await world.claim(job_id, 7)).status_code == 404

    async def test_claim__only_the_digest_is_stored(self, world: World) -> None:
        job_id = await running(world)
        async with world.sessions.begin() as session:
            attempt = await queries.attempt(session, job_id, 1)
        assert attempt is not None
        assert attempt.token_hash == hashlib.sha256(token_of(job_id, 1).encode()).hexdigest()
