"""What submitting and listing must do on every database."""

import asyncio
import base64
import json
from datetime import timedelta

import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from service.contracts.jobs import JobState
from tests.fakes.world import World


class SubmitContract:
    async def test_submit__one_spec_gives_one_job_with_every_default(self, world: World) -> None:
        answer = await world.client.post("/v1/jobs", json=world.tokenizer(labels={"team": "vision"}))
        job = answer.json()
        assert answer.status_code == 201
        assert (job["state"], job["desired"], job["labels"]) == ("queued", "run", {"team": "vision"})
        assert job["spec"] == world.tokenizer(labels={"team": "vision"})
        assert job["resolved"]["training"]["checkpoint_every"] == {"epochs": 1.0}
        events = (await world.client.get(f"/v1/jobs/{job['id']}/events")).json()
        assert [(event["src"], event["dst"], event["actor"]) for event in events] == [
            (None, "queued", "user")
        ]

    async def test_submit__a_list_is_linked_by_name(self, world: World) -> None:
        older = (await world.submit(world.tokenizer()))[0]
        tok, enc, ev = await world.submit(world.tokenizer(), world.pretrain(), world.evaluate())
        assert enc["resolved"]["model"]["tokenizer"]["source"] == f"job:{tok['id']}" != f"job:{older['id']}"
        assert enc["spec"]["model"]["tokenizer"]["source"] == "job:tok"
        assert ev["resolved"]["encoder"] == f"job:{enc['id']}"
        assert (await world.row(enc["id"])).inputs_wait == [tok["id"]]
        assert (await world.row(tok["id"])).inputs_wait == []

    async def test_submit__a_name_means_the_latest_job(self, world: World) -> None:
        await world.submit(world.tokenizer())
        latest = (await world.submit(world.tokenizer()))[0]
        enc = (await world.submit(world.pretrain()))[0]
        assert enc["resolved"]["model"]["tokenizer"]["source"] == f"job:{latest['id']}"

    async def test_submit__a_job_may_have_the_name_of_the_one_it_waits_for(self, world: World) -> None:
        tok = (await world.submit(world.tokenizer("street")))[0]
        enc = (await world.submit(world.pretrain("street", source="job:street")))[0]
        assert (await world.row(enc["id"])).inputs_wait == [tok["id"]]

    async def test_submit__all_or_none(self, world: World) -> None:
        await world.refused(world.tokenizer(), world.pretrain(source="job:nobody"))
        assert (await world.client.get("/v1/jobs")).json()["jobs"] == []

    async def test_submit__reference_to_an_unknown_job(self, world: World) -> None:
        (message,) = (await world.refused(world.pretrain(source="job:nobody"))).values()
        assert "nobody" in message
        problems = await world.refused(world.tokenizer(), world.pretrain(source="job:nobody"))
        assert set(problems) == {"[1].model.tokenizer.source"}

    async def test_submit__reference_to_another_kind(self, world: World) -> None:
        await world.submit(world.tokenizer())
        problems = await world.refused(world.evaluate(encoder="job:tok"))
        assert "kind pretrain" in problems["encoder"]
        assert "is of kind tokenizer" in problems["encoder"]
        inside = await world.refused(world.tokenizer("a"), world.evaluate(encoder="job:a"))
        assert "is of kind tokenizer" in inside["[1].encoder"]

    @pytest.mark.parametrize(
        ("state", "word"), [(JobState.FAILED, "failed"), (JobState.CANCELLED, "cancelled")]
    )
    async def test_submit__reference_to_a_job_that_ended_badly(
        self, world: World, state: JobState, word: str
    ) -> None:
        tok = (await world.submit(world.tokenizer()))[0]
        await world.put(tok["id"], state, reason="no images there")
        problems = await world.refused(world.pretrain())
        assert word in problems["model.tokenizer.source"]
        assert "no images there" in problems["model.tokenizer.source"]

    async def test_submit__equal_names_in_one_request_are_refused(self, world: World) -> None:
        problems = await world.refused(world.tokenizer(), world.tokenizer())
        assert "differ" in problems["[1].name"]

    async def test_key__same_specs_give_the_same_jobs(self, world: World) -> None:
        specs, headers = [world.tokenizer(), world.pretrain()], {"Idempotency-Key": "k"}
        first = await world.client.post("/v1/jobs", json=specs, headers=headers)
        (world.images / "one.png").unlink()  # what was accepted once is not judged again
        again = await world.client.post("/v1/jobs", json=specs, headers=headers)
        assert (first.status_code, again.status_code) == (201, 200)
        assert [job["id"] for job in again.json()] == [job["id"] for job in first.json()]
        assert len((await world.client.get("/v1/jobs")).json()["jobs"]) == 2

    async def test_key__other_specs_are_refused(self, world: World) -> None:
        headers = {"Idempotency-Key": "k"}
        await world.client.post("/v1/jobs", json=world.tokenizer(), headers=headers)
        answer = await world.client.post("/v1/jobs", json=world.tokenizer("other"), headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_key_reused")
        assert len((await world.client.get("/v1/jobs")).json()["jobs"]) == 1

    async def test_key__a_refused_submit_leaves_the_key_free(self, world: World) -> None:
        headers = {"Idempotency-Key": "k"}
        bad = await world.client.post("/v1/jobs", json=world.pretrain(), headers=headers)
        good = await world.client.post("/v1/jobs", json=world.tokenizer(), headers=headers)
        assert (bad.status_code, good.status_code) == (422, 201)

    async def test_key__submits_at_once_make_one_job(self, world: World) -> None:
        headers = {"Idempotency-Key": "k"}
        posts = (world.client.post("/v1/jobs", json=world.tokenizer(), headers=headers) for _ in range(8))
        answers = await asyncio.gather(*posts)
        assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert len((await world.client.get("/v1/jobs")).json()["jobs"]) == 1

    async def test_commit__a_failing_one_is_not_answered_with_201(self, world: World) -> None:
        event.listen(Session, "before_commit", _fail)
        try:
            answer = await world.client.post("/v1/jobs", json=world.tokenizer())
        finally:
            event.remove(Session, "before_commit", _fail)
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
        assert "disk" not in answer.text
        assert (await world.client.get("/v1/jobs")).json()["jobs"] == []


def _fail(_: object) -> None:
    raise RuntimeError("the disk is full")


def cursor(moment: str, job_id: str) -> str:
    """As a page gives it."""
    return base64.urlsafe_b64encode(json.dumps([moment, job_id]).encode()).decode()


class ListContract:
    async def test_list__pages_are_complete_while_jobs_come_in(self, world: World) -> None:
        made = [job["id"] for job in await world.submit(*(world.tokenizer(f"t{n}") for n in range(7)))]
        seen: list[str] = []
        cursor = None
        while True:
            query = {"limit": "3", **({"cursor": cursor} if cursor else {})}
            page = (await world.client.get("/v1/jobs", params=query)).json()
            seen += [job["id"] for job in page["jobs"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
            await world.submit(world.tokenizer("late"))
        assert seen == made[::-1]

    async def test_list__jobs_of_one_moment_are_not_lost_between_pages(self, world: World) -> None:
        for n in range(4):
            world.clock.now -= timedelta(milliseconds=1)
            await world.submit(world.tokenizer(f"t{n}"))
        first = (await world.client.get("/v1/jobs?limit=2")).json()
        rest = (await world.client.get("/v1/jobs", params={"cursor": first["next_cursor"]})).json()
        names = [job["name"] for job in first["jobs"] + rest["jobs"]]
        assert sorted(names) == ["t0", "t1", "t2", "t3"]

    @pytest.mark.parametrize(
        ("query", "names"),
        [
            ("state=cancelled", ["b"]),
            ("state=queued&state=cancelled", ["c", "b", "a"]),
            ("kind=pretrain", ["c"]),
            ("name=a", ["a"]),
            ("label=team=vision", ["a"]),
            ("label=team=vision&label=site=x.y", ["a"]),
            ("label=team=other", []),
            ("label=team=vision&label=site=other", []),
            ("label=team=%22vision%22", []),
            ("q=C", ["c"]),
            ("q=%25", []),
        ],
    )
    async def test_list__filters(self, world: World, query: str, names: list[str]) -> None:
        labels = {"team": "vision", "site": "x.y"}
        await world.submit(world.tokenizer("a", labels=labels))
        await world.submit(world.tokenizer("b", labels={"team": "vision2"}))
        await world.submit(world.pretrain("c", source="fake"))
        await world.client.post("/v1/jobs/b/cancel")
        # Ids are random hex digits, in which a letter may occur.
        page = (await world.client.get(f"/v1/jobs?{query}")).json()
        found = [job["name"] for job in page["jobs"] if not (query == "q=C" and job["name"] != "c")]
        assert found == names

    @pytest.mark.parametrize(
        ("query", "path"),
        [
            ({"label": 'a"b=c'}, "label"),
            ({"label": "=c"}, "label"),
            ({"label": "a"}, "label"),
            ({"label": "$[0]=c"}, "label"),
            ({"cursor": cursor("0001-01-01T00:00:00+14:00", "a")}, "cursor"),
            ({"cursor": cursor("9999-12-31T23:59:59-14:00", "a")}, "cursor"),
            ({"cursor": cursor("2026-01-01T00:00:00", "a")}, "cursor"),
            ({"cursor": cursor("2026-01-01T00:00:00+00:00", "\x00")}, "cursor"),
            ({"cursor": cursor("2026-01-01T00:00:00+00:00", "\ud800")}, "cursor"),
            ({"cursor": "W1tbW1tbW1tbW1tbW1tb"}, "cursor"),
        ],
    )
    async def test_list__what_no_database_can_look_for_is_refused(
        self, world: World, query: dict[str, str], path: str
    ) -> None:
        await world.submit(world.tokenizer("a", labels={"a": "c"}))
        answer = await world.client.get("/v1/jobs", params=query)
        assert answer.status_code == 422, answer.text
        assert [error["path"] for error in answer.json()["errors"]] == [path]

    async def test_list__part_of_a_name_is_found_as_python_finds_it(self, world: World) -> None:
        names = ["zzy-y_z", "Z-z.Z", "y", "VIT_small-3", "vit", "v.tsmall"]
        await world.submit(*(world.tokenizer(name) for name in names))
        # Letters that occur in no id.
        for part in (
            "z",
            "Z-Z",
            "%",
            "_",
            "t_s",
            "small-",
            "vit",
            "VIT",
            "-3x",
            "zzy-y_zz",
            "\\",
            "zyx",
            "y",
        ):
            page = (await world.client.get("/v1/jobs", params={"q": part})).json()
            found = {job["name"] for job in page["jobs"]}
            assert found == {name for name in names if part.lower() in name.lower()}, part

    async def test_list__part_of_an_id_is_found(self, world: World) -> None:
        (job, _) = await world.submit(world.tokenizer("z"), world.tokenizer("y"))
        page = (await world.client.get("/v1/jobs", params={"q": job["id"][3:12].upper()})).json()
        assert [shown["id"] for shown in page["jobs"]] == [job["id"]]

    async def test_show__by_id_name_and_unique_prefix(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        for ref in (job["id"], job["id"][:9], "tok"):
            assert (await world.show(ref))["id"] == job["id"]

    async def test_show__an_ambiguous_prefix_names_the_jobs(self, world: World) -> None:
        jobs = await world.submit(*(world.tokenizer(f"t{n}") for n in range(17)))
        letters = [job["id"][0] for job in jobs]
        twice = next(letter for letter in letters if letters.count(letter) > 1)
        answer = await world.client.get(f"/v1/jobs/{twice}")
        assert (answer.status_code, answer.json()["code"]) == (409, "ambiguous")

    async def test_change__writes_columns_and_an_event_but_not_the_spec(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        wanted = {"name": "new", "priority": 90, "labels": {"a": "b"}}
        answer = await world.client.patch("/v1/jobs/tok", json=wanted)
        assert answer.status_code == 200
        shown = await world.show(job["id"])
        assert {key: shown[key] for key in wanted} == wanted
        assert shown["spec"]["name"] == "tok"
        events = (await world.client.get(f"/v1/jobs/{job['id']}/events")).json()
        assert "priority: 50 -> 90" in events[-1]["message"]

    async def test_change__what_is_not_known_is_refused(self, world: World) -> None:
        await world.submit(world.tokenizer())
        unknown = [{"state": "succeeded"}, {"priority": 101}, {"priority": False}, {"labels": {"a": "b\x00"}}]
        for wanted in unknown:
            answer = await world.client.patch("/v1/jobs/tok", json=wanted)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), wanted
