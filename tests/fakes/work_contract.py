"""What workers, and those who watch them, must get from the API on every database."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from service.contracts.jobs import JobState, LogLine
from service.db import queries
from service.domain.names import log_prefix
from tests.fakes.world import World, token_of

PLAN = {"total_steps": 10}


async def running(world: World, *, name: str = "tok") -> str:
    """The id of a job whose first attempt has reported once."""
    job = (await world.submit(world.tokenizer(name)))[0]
    job_id = str(job["id"])
    await world.launch(job_id)
    assert (await world.report(job_id, 1, plan=PLAN)).status_code == 200
    return job_id


def success(world: World, job_id: str, *files: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The last word of a worker that has done it all; its result is stored."""
    told = {"outcome": "succeeded", "step": 10, "total_steps": 10}
    return {**told, "files": [*files, world.file(job_id, "result.json", b"{}")], **changes}


def checkpoint(world: World, job_id: str, *, attempt: int, step: int) -> dict[str, Any]:
    """A checkpoint of two stored files."""
    prefix = f"attempts/{attempt}/checkpoints/step-{step}"
    files = [world.file(job_id, f"{prefix}/{name}") for name in ("state.safetensors", "manifest.json")]
    return {"step": step, "prefix": prefix, "files": files}


class WorkContract:
    async def test_token__only_that_of_the_attempt_opens(self, world: World) -> None:
        job_id = await running(world)
        body = {"progress": {"step": 1}}
        for token in ("x", "f" * 64, "\xe9", token_of(job_id, 2)):
            answer = await world.tell(job_id, 1, "report", body, token=token)
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorised")
        assert (await world.client.get(f"/v1/attempts/{job_id}/1")).status_code == 401

    async def test_assignment__inputs_are_prefixes_of_the_store(self, world: World) -> None:
        tok, enc, ev = await world.submit(world.tokenizer(), world.pretrain(), world.evaluate())
        expected = [
            {},
            {"tokenizer": f"jobs/{tok['id']}/tokenizer"},
            {"encoder": f"jobs/{enc['id']}/encoder"},
        ]
        for job, inputs in zip((tok, enc, ev), expected, strict=True):
            await world.launch(job["id"])
            assignment = (await world.ask(job["id"], 1)).json()
            assert assignment["inputs"] == inputs
            assert assignment["spec"] == job["resolved"]
            assert assignment["submitted"] == job["spec"]
            assert assignment["checkpoint"] is None
            assert assignment["store"]["url"].endswith("/store")

    async def test_assignment__a_method_without_tokenizer_has_no_inputs(self, world: World) -> None:
        model = {"method": "mae", "enhancer": {"name": "vit_tiny_patch16_224"}}
        (enc,) = await world.submit(world.pretrain(model=model))
        await world.launch(enc["id"])
        assert (await world.ask(enc["id"], 1)).json()["inputs"] == {}

    async def test_assignment__an_address_is_passed_on(self, world: World) -> None:
        enc = (await world.submit(world.pretrain(source="s3://bucket/tok/")))[0]
        await world.launch(enc["id"])
        assert (await world.ask(enc["id"], 1)).json()["inputs"] == {"tokenizer": "s3://bucket/tok/"}

    async def test_report__the_first_one_sets_the_job_running(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        await world.launch(job["id"])
        plan = {"total_steps": 10}
        answer = await world.report(job["id"], 1, step=3, plan=plan)
        assert answer.json() == {"directive": "continue"}
        shown = await world.show(job["id"])
        assert (shown["state"], shown["progress"]["step"]) == ("running", 3)
        assert shown["resolved"]["plan"] == plan
        assert (await world.row(job["id"])).version == 2
        await world.report(job["id"], 1, step=4)
        assert (await world.row(job["id"])).version == 2

    async def test_report__a_repeated_point_keeps_its_moment(self, world: World) -> None:
        job_id = await running(world)
        moments = []
        for value in (1.0, 1.0, 2.0):
            await world.report(job_id, 1, metrics=[{"step": 10, "key": "loss", "value": value}])
            async with world.sessions.begin() as session:
                (row,) = await queries.metrics(session, job_id, limit=10)
            moments.append(row.at)
            assert row.value == value
        assert moments == moments[:1] * 3

    async def test_report__a_repeated_point_takes_the_place_of_the_old_one(self, world: World) -> None:
        job_id = await running(world)
        points = [{"step": step, "key": "loss", "value": 1.0 / step} for step in (10, 20)]
        await world.report(job_id, 1, metrics=[*points, points[0]])
        await world.report(job_id, 1, metrics=[{**points[1], "value": 7.0}, {**points[0], "key": "acc"}])
        found = (await world.client.get(f"/v1/jobs/{job_id}/metrics")).json()
        told = [(point["step"], point["key"], point["value"]) for point in found]
        assert told == [(10, "acc", 0.1), (10, "loss", 0.1), (20, "loss", 7.0)]
        latest = (await world.client.get(f"/v1/jobs/{job_id}/metrics?latest=true")).json()
        assert {(point["key"], point["value"]) for point in latest} == {("acc", 0.1), ("loss", 7.0)}
        only = (await world.client.get(f"/v1/jobs/{job_id}/metrics?key=loss&after_step=10")).json()
        assert [point["step"] for point in only] == [20]
        assert (await world.show(job_id))["metrics"] == {"acc": 0.1, "loss": 7.0}

    async def test_report__many_points_in_one_request(self, world: World) -> None:
        job_id = await running(world)
        points = [{"step": n, "key": f"k{n % 7}", "value": n / 2} for n in range(2500)]
        assert (await world.report(job_id, 1, metrics=points)).status_code == 200
        assert len((await world.client.get(f"/v1/jobs/{job_id}/metrics")).json()) == 2500

    @pytest.mark.parametrize(
        ("what", "body", "path"),
        [
            ("report", '{"progress": {"step": 2, "eta_s": Infinity}}', "progress.eta_s"),
            ("report", '{"progress": {"step": 2, "epoch": 1e308}}', "progress.epoch"),
            ("report", '{"progress": {"step": 1180591620717411303424}}', "progress.step"),
            (
                "report",
                '{"progress": {}, "metrics": [{"step": 2, "key": "a", "value": NaN}]}',
                "metrics.0.value",
            ),
            (
                "report",
                '{"progress": {}, "metrics": [{"step": 2, "key": "a", "value": 1e308}]}',
                "metrics.0.value",
            ),
            (
                "report",
                '{"progress": {}, "metrics": [{"step": 2, "key": "\\u0000", "value": 1}]}',
                "metrics.0.key",
            ),
            ("report", '{"progress": {}, "plan": {"total_steps": Infinity}}', "plan"),
            ("report", '{"progress": {}, "plan": {"a": 1180591620717411303424}}', "plan"),
            ("finish", '{"outcome": "succeeded", "step": 1, "metrics": {"a": -1e999}}', "metrics.a"),
            ("checkpoints", '{"step": 9223372036854775808, "prefix": "a", "files": []}', "step"),
        ],
    )
    async def test_worker__numbers_that_no_database_stores_are_refused(
        self, world: World, what: str, body: str, path: str
    ) -> None:
        job_id = await running(world)
        before = await world.show(job_id)
        headers = {"Authorization": f"Bearer {token_of(job_id, 1)}", "Content-Type": "application/json"}
        answer = await world.client.post(f"/v1/attempts/{job_id}/1/{what}", content=body, headers=headers)
        assert answer.status_code == 422, answer.text
        assert answer.json()["errors"][0]["path"].startswith(path)
        assert await world.show(job_id) == before

    @pytest.mark.parametrize("idle_s", ["-1", "1.1e9", "2.4e307", "1e999", "Infinity", "NaN"])
    async def test_report__silence_that_has_no_date_is_refused(self, world: World, idle_s: str) -> None:
        job_id = await running(world)
        headers = {"Authorization": f"Bearer {token_of(job_id, 1)}", "Content-Type": "application/json"}
        body = f'{{"progress": {{"step": 1}}, "idle_s": {idle_s}}}'
        answer = await world.client.post(f"/v1/attempts/{job_id}/1/report", content=body, headers=headers)
        assert answer.status_code == 422
        (error,) = answer.json()["errors"]
        assert error["path"] == "idle_s"

    async def test_report__the_longest_silence_has_a_date(self, world: World) -> None:
        job_id = await running(world)
        answer = await world.tell(job_id, 1, "report", {"progress": {"step": 1}, "idle_s": 1e9})
        assert answer.status_code == 200

    async def test_fence__an_earlier_attempt_may_write_nothing(self, world: World) -> None:
        job_id = await running(world)
        saved = checkpoint(world, job_id, attempt=1, step=5)
        await world.put(job_id, JobState.RETRYING)
        assert await world.launch(job_id) == 2
        for what, body in (
            ("report", {"progress": {}}),
            ("checkpoints", saved),
            ("finish", success(world, job_id)),
        ):
            answer = await world.tell(job_id, 1, what, body)
            assert (answer.status_code, answer.json()["code"]) == (409, "stale_attempt"), what
        assert (await world.ask(job_id, 1)).status_code == 409
        assert (await world.ask(job_id, 2)).json()["checkpoint"] is None
        assert (await world.show(job_id))["state"] == "launching"

    async def test_fence__a_final_job_takes_nothing_more(self, world: World) -> None:
        job_id = await running(world)
        assert (await world.tell(job_id, 1, "finish", success(world, job_id))).status_code == 200
        answer = await world.report(job_id, 1)
        assert (answer.status_code, answer.json()["code"]) == (409, "stale_attempt")

    async def test_checkpoint__the_next_attempt_resumes_from_the_last_one(self, world: World) -> None:
        job_id = await running(world)
        for step in (5, 9, 5):
            answer = await world.tell(
                job_id, 1, "checkpoints", checkpoint(world, job_id, attempt=1, step=step)
            )
            assert answer.status_code == 200
        await world.put(job_id, JobState.RETRYING)
        await world.launch(job_id)
        assignment = (await world.ask(job_id, 2)).json()
        assert assignment["checkpoint"] == checkpoint(world, job_id, attempt=1, step=9)
        assert (await world.show(job_id))["attempts"][1]["resumed_from_step"] == 9
        events = (await world.client.get(f"/v1/jobs/{job_id}/events")).json()
        assert sum("checkpoint at step 5" in event["message"] for event in events) == 1

    async def test_checkpoint__a_file_that_is_not_there_is_refused(self, world: World) -> None:
        job_id = await running(world)
        for spoil in ({"size": 1}, {"path": "attempts/1/checkpoints/step-5/none"}):
            told = checkpoint(world, job_id, attempt=1, step=5)
            told["files"][0] |= spoil
            answer = await world.tell(job_id, 1, "checkpoints", told)
            assert (answer.status_code, answer.json()["code"]) == (409, "broken_manifest")

    @pytest.mark.parametrize(
        "prefix",
        [
            "attempts/1/checkpoints/step-4",
            "attempts/2/checkpoints/step-5",
            "attempts/1/../../other",
            "encoder",
        ],
    )
    async def test_checkpoint__lies_where_its_attempt_and_step_say(self, world: World, prefix: str) -> None:
        job_id = await running(world)
        told = {**checkpoint(world, job_id, attempt=1, step=5), "prefix": prefix}
        if ".." in prefix:
            told["files"] = [{**entry, "path": f"{prefix}/x"} for entry in told["files"]]
        else:  # the place is all that is wrong
            told["files"] = [world.file(job_id, f"{prefix}/x")]
        assert (await world.tell(job_id, 1, "checkpoints", told)).status_code in (409, 422)


class DetailContract:
    async def test_events__a_stream_ends_when_the_job_does(self, world: World) -> None:
        job_id = await running(world)

        async def end() -> None:
            await asyncio.sleep(0.05)
            await world.tell(job_id, 1, "finish", success(world, job_id))

        answer, _ = await asyncio.gather(world.client.get(f"/v1/jobs/{job_id}/events?follow=true"), end())
        told = [json.loads(data) for data in _fields(answer.text, "data")]
        assert [event.get("dst") for event in told] == ["queued", "launching", "running", "succeeded", None]
        assert _fields(answer.text, "event") == ["end"]
        rest = await world.client.get(
            f"/v1/jobs/{job_id}/events?follow=true", headers={"Last-Event-ID": str(told[2]["id"])}
        )
        assert [json.loads(data).get("dst") for data in _fields(rest.text, "data")] == ["succeeded", None]

    async def test_logs__lines_of_all_sources_by_time(self, world: World) -> None:
        job_id = await running(world)
        self.write(world, job_id, "attempt-1/driver-000000", [1, 4])
        self.write(world, job_id, "attempt-1/rank-0-000000", [2, 3])
        self.write(world, job_id, "attempt-2/rank-0-000000", [9])
        self.write(world, job_id, "attempt-1/driver-000001", [5])
        lines = (await world.client.get(f"/v1/jobs/{job_id}/logs")).json()
        assert [line["message"] for line in lines] == ["1", "2", "3", "4", "5", "9"]

    async def test_logs__a_stream_tells_all_and_goes_on_where_it_broke(self, world: World) -> None:
        job_id = await running(world)
        self.write(world, job_id, "attempt-1/driver-000000", [1, 2])

        async def end() -> None:
            await asyncio.sleep(0.05)
            self.write(world, job_id, "attempt-1/driver-000001", [4])
            self.write(world, job_id, "attempt-1/rank-0-000000", [3])
            await world.tell(job_id, 1, "finish", success(world, job_id))

        answer, _ = await asyncio.gather(world.client.get(f"/v1/jobs/{job_id}/logs?follow=true"), end())
        messages = [json.loads(data).get("message") for data in _fields(answer.text, "data")]
        assert messages[:2] == ["1", "2"]
        assert sorted(messages[2:4]) == ["3", "4"]
        assert messages[4:] == [None]
        first = _fields(answer.text, "id")[0]
        rest = await world.client.get(f"/v1/jobs/{job_id}/logs?follow=true", headers={"Last-Event-ID": first})
        again = [json.loads(data).get("message") for data in _fields(rest.text, "data")]
        assert again == ["3", "4", None]

    async def test_logs__broken_lines_are_left_out(self, world: World) -> None:
        job_id = await running(world)
        self.write(world, job_id, "attempt-1/driver-000000", [1])
        world.store.put_bytes(f"{log_prefix(job_id)}attempt-1/driver-000001.jsonl", b'{"at": "2026-')
        lines = (await world.client.get(f"/v1/jobs/{job_id}/logs")).json()
        assert [line["message"] for line in lines] == ["1"]

    async def test_artifacts__bytes_type_and_parts(self, world: World) -> None:
        job_id = await running(world)
        files = [world.file(job_id, "samples/step-10.png", b"0123456789")]
        await world.report(job_id, 1, files=files)
        address = f"/v1/jobs/{job_id}/artifacts/samples/step-10.png"
        whole = await world.client.get(address)
        assert (whole.status_code, whole.content) == (200, b"0123456789")
        assert whole.headers["content-type"] == "image/png"
        for wanted, part in (
            ("bytes=2-4", b"234"),
            ("bytes=7-", b"789"),
            ("bytes=-2", b"89"),
            ("bytes=8-99", b"89"),
        ):
            answer = await world.client.get(address, headers={"Range": wanted})
            assert (answer.status_code, answer.content) == (206, part), wanted
        outside = await world.client.get(address, headers={"Range": "bytes=10-"})
        assert outside.status_code == 416

    async def test_artifacts__what_no_manifest_names_does_not_exist(self, world: World) -> None:
        job_id = await running(world)
        world.file(job_id, "secret.txt")
        for path in ("secret.txt", "..%2F..%2Fcim.db", "%2Fetc%2Fpasswd", "samples/../secret.txt"):
            answer = await world.client.get(f"/v1/jobs/{job_id}/artifacts/{path}")
            assert answer.status_code == 404, path
            assert answer.json()["code"] == "not_found"

    async def test_artifacts__a_lost_object_is_a_problem_not_half_an_answer(self, world: World) -> None:
        job_id = await running(world)
        await world.report(job_id, 1, files=[world.file(job_id, "a.bin")])
        world.store.delete_prefix(f"jobs/{job_id}")
        answer = await world.client.get(f"/v1/jobs/{job_id}/artifacts/a.bin")
        assert (answer.status_code, answer.json()["code"]) == (404, "missing_object")

    async def test_artifacts__the_last_checkpoint_is_among_them(self, world: World) -> None:
        job_id = await running(world)
        told = checkpoint(world, job_id, attempt=1, step=5)
        await world.tell(job_id, 1, "checkpoints", told)
        found = (await world.client.get(f"/v1/jobs/{job_id}/artifacts")).json()
        assert found == sorted(told["files"], key=lambda entry: str(entry["path"]))

    @staticmethod
    def write(world: World, job_id: str, name: str, seconds: list[int]) -> None:
        """A log object with a line for each second, which is also its message."""
        start = datetime(2026, 1, 1, tzinfo=UTC)
        lines = [
            LogLine(at=start + timedelta(seconds=s), attempt=1, source="x", level="info", message=str(s))
            for s in seconds
        ]
        data = "".join(line.model_dump_json() + "\n" for line in lines)
        world.store.put_bytes(f"{log_prefix(job_id)}{name}.jsonl", data.encode())


def _fields(text: str, name: str) -> list[str]:
    lines = (line.partition(": ") for line in text.splitlines())
    return [value for field, _, value in lines if field == name]
