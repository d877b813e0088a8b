"""The Python client against a scripted service."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from service.client import ApiError, Client, UnreachableError
from service.client.downloads import Downloader
from service.client.errors import CorruptDownloadError, RefusedError
from service.client.http import Transport
from service.client.sse import Message, messages
from service.contracts.estimates import Estimate
from service.contracts.jobs import (
    EventView,
    FileEntry,
    JobPage,
    JobState,
    JobView,
    LogLine,
    MetricPoint,
    Validation,
)
from service.contracts.problems import FieldProblem
from service.contracts.recipes import known_recipes
from service.jobs.estimate import REQUEST_LIMIT_S
from tests.fakes.costs import COST
from tests.fakes.scripted import CREATED, JOB_ID, Clock, Server, job, ok, problem

DATA = b"some weights"
ENTRY = FileEntry(path="encoder/model.bin", size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def clock() -> Clock:
    return Clock()


def client_of(
    server: Callable[[httpx.Request], httpx.Response], clock: Clock, *, refused_is_final: bool = False
) -> Client:
    return Client(
        "http://service:1",
        backoff=clock.backoff(),
        refused_is_final=refused_is_final,
        transport=httpx.MockTransport(server),
    )


@pytest.mark.parametrize("url", ["", "service:8000", "ftp://service", "http://", "http://a:port"])
def test_address__that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="address"):
        Client(url)


def test_submit__one_spec_or_several_make_one_request(clock: Clock) -> None:
    server = Server(ok([job()]))
    client = client_of(server, clock)
    assert client.submit({"kind": "pretrain"}) == [job()]
    client.submit([{"name": "a"}, {"name": "b"}], idempotency_key="mine")
    assert [json.loads(r.content) for r in server.requests] == [
        [{"kind": "pretrain"}],
        [{"name": "a"}, {"name": "b"}],
    ]
    assert server.requests[1].headers["idempotency-key"] == "mine"


def test_submit__a_repetition_bears_the_same_key_and_another_call_another(clock: Clock) -> None:
    server = Server(httpx.ReadTimeout("lost answer"), ok([job()]))
    client = client_of(server, clock)
    client.submit({})
    client.submit({})
    first, repeated, other = (request.headers["idempotency-key"] for request in server.requests)
    assert first == repeated != other
    assert len(first) >= 16


def test_errors__name_every_mistake(clock: Clock) -> None:
    errors = [
        FieldProblem(path="training.epochs", message="must be above 0"),
        FieldProblem(path="x", message="no"),
    ]
    with pytest.raises(ApiError) as raised:
        client_of(Server(problem(422, "invalid_spec", errors=errors)), clock).submit({})
    assert str(raised.value) == "training.epochs: must be above 0\nx: no"
    assert raised.value.problem.errors == errors
    assert (raised.value.status, raised.value.code) == (422, "invalid_spec")


def test_errors__another_programs_page_is_shown(clock: Clock) -> None:
    with pytest.raises(ApiError, match="<h1>Not here</h1>") as raised:
        client_of(Server(httpx.Response(404, text="<h1>Not here</h1>")), clock).job("x")
    assert raised.value.code == "http_404"


def test_refused__says_how_to_start_the_service(clock: Clock) -> None:
    server = Server(httpx.ConnectError("Connection refused"))
    with pytest.raises(RefusedError, match="cim up"):
        client_of(server, clock, refused_is_final=True).job("x")
    assert len(server.requests) == 1
    with pytest.raises(RefusedError):
        client_of(server, clock).job("x")
    assert clock.now > 5  # by default it waits a while for the service to come up


def test_jobs__pages_are_fetched_as_they_are_reached(clock: Clock) -> None:
    pages = [
        JobPage(jobs=[job(name="a"), job(name="b")], next_cursor="c/1"),
        JobPage(jobs=[job(name="c")]),
    ]
    server = Server(*(ok(page) for page in pages))
    found = client_of(server, clock).jobs(state="running", label=None, page_size=2)
    assert next(found).name == "a"
    assert len(server.requests) == 1
    assert [view.name for view in found] == ["b", "c"]
    assert server.calls == [
        "GET /v1/jobs?state=running&limit=2",
        "GET /v1/jobs?state=running&limit=2&cursor=c%2F1",
    ]


def test_calls__address_the_job_as_given(clock: Clock) -> None:
    server = Server(ok(job()))
    client = client_of(server, clock)
    client.job("a/b?")
    client.cancel("street")
    client.update("street", priority=7, labels={"team": "x"})
    assert server.calls == ["GET /v1/jobs/a%2Fb%3F", "POST /v1/jobs/street/cancel", "PATCH /v1/jobs/street"]
    assert json.loads(server.requests[2].content) == {"priority": 7, "labels": {"team": "x"}}


def test_validate__gives_the_resolved_specs(clock: Clock) -> None:
    estimate = Estimate(name="x", workers=1, cpus=1, gpus=0, steps=3, cost=COST)
    answer = Validation(resolved=[{"kind": "x"}], estimate=[estimate], warnings=["w"])
    server = Server(ok(answer))
    assert client_of(server, clock).validate({"kind": "x"}) == answer
    assert server.requests[0].extensions["timeout"]["read"] > REQUEST_LIMIT_S


def test_recipes__listed_or_one(clock: Clock) -> None:
    recipe = known_recipes()["tokenizer-64"]
    server = Server(ok([recipe]), ok(recipe))
    client = client_of(server, clock)
    assert [one.name for one in client.recipes()] == ["tokenizer-64"]
    assert client.recipe("a/b") == recipe
    assert server.calls == ["GET /v1/recipes", "GET /v1/recipes/a%2Fb"]


def test_metrics__a_full_answer_is_followed_by_the_rest(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.client.client.MOST_POINTS", 3)
    points = [MetricPoint(step=step, key=key, value=step) for step in (1, 2, 3) for key in ("a", "b")]

    def serve(request: httpx.Request) -> httpx.Response:
        after = int(request.url.params.get("after_step", -1))
        return ok([point for point in points if point.step > after][:3])

    assert client_of(serve, clock).metrics("x") == points


def test_wait__looks_until_the_job_is_final_through_an_outage(clock: Clock) -> None:
    refused = httpx.ConnectError("no")
    server = Server(ok(job()), ok(job(step=1)), refused, refused, ok(job(JobState.FAILED, step=2)))
    seen: list[JobView] = []
    client = client_of(server, clock)
    assert client.wait("street", on_progress=seen.append, poll_s=1, sleep=clock.sleep).state == "failed"
    assert [view.progress.step for view in seen] == [1, 2]
    assert server.calls[1:] == [f"GET /v1/jobs/{JOB_ID}"] * 4


# Streams


def event(number: int) -> EventView:
    return EventView(id=number, at=CREATED, actor="user", message=f"event {number}")


def stream(*parts: str, broken: bool = False) -> httpx.Response:
    def content() -> Iterator[bytes]:
        yield from (part.encode() for part in parts)
        if broken:
            raise httpx.ReadError("cut")

    return httpx.Response(200, content=content())


def sent(item: EventView | LogLine, *, mark: str | None = None) -> str:
    return (f"id: {mark}\n" if mark else "") + f"data: {item.model_dump_json()}\n\n"


END = "event: end\ndata: {}\n\n"


def test_follow__ends_with_the_end_event(clock: Clock) -> None:
    server = Server(stream(": ping\n\n", sent(event(1), mark="1"), sent(event(2), mark="2"), END))
    assert list(client_of(server, clock).events("x", follow=True)) == [event(1), event(2)]
    assert server.calls == ["GET /v1/jobs/x/events?follow=true"]


def test_follow__goes_on_where_it_broke(clock: Clock) -> None:
    server = Server(
        stream(sent(event(1), mark="1"), broken=True),
        httpx.ConnectError("the service restarts"),
        stream(sent(event(2), mark="2")),  # closed without an end
        stream(END),
    )
    assert list(client_of(server, clock).events("x", follow=True)) == [event(1), event(2)]
    assert [request.headers.get("last-event-id") for request in server.requests] == [None, "1", "1", "2"]


def test_follow__what_a_new_connection_repeats_is_not_told_twice(clock: Clock) -> None:
    lines = [LogLine(at=CREATED, attempt=1, source="rank-0", level="info", message=m) for m in "abbcd"]
    a, b1, b2, c, d = lines
    server = Server(
        stream(sent(a, mark="m1"), sent(b1), broken=True),
        stream(broken=True),
        stream(sent(b1), sent(b2), sent(c, mark="m2"), broken=True),
        stream(sent(d, mark="m3"), END),
    )
    assert list(client_of(server, clock).logs("x", follow=True)) == lines
    assert [request.headers.get("last-event-id") for request in server.requests] == [None, "m1", "m1", "m2"]


def test_follow__a_service_that_never_answered_is_told_at_once(clock: Clock) -> None:
    server = Server(httpx.ConnectError("no"))
    with pytest.raises(UnreachableError):
        list(client_of(server, clock).logs("x", follow=True))
    assert len(server.requests) == 1


def test_follow__gives_up_after_five_minutes_and_on_a_refusal(clock: Clock) -> None:
    with pytest.raises(UnreachableError):
        list(client_of(Server(stream(), httpx.ConnectError("no")), clock).events("x", follow=True))
    assert 300 < clock.now < 302
    with pytest.raises(ApiError, match="gone"):
        list(
            client_of(Server(stream(), problem(404, "not_found", detail="gone")), clock).events(
                "x", follow=True
            )
        )


def test_sse__fields_as_the_standard_says() -> None:
    lines = [
        "data:a",
        "data: b",
        "data",
        "",
        ": comment",
        "event: e",
        "data:x",
        "id:7",
        "",
        "retry: 3",
        "",
        "data: cut",
    ]
    assert list(messages(lines, last_id="6")) == [Message("message", "a\nb\n", "6"), Message("e", "x", "7")]


# Downloads


def files_server(files: dict[str, bytes], *, manifest: list[FileEntry] | None = None) -> Server:
    """Serves `files`; its manifest is theirs unless another is given."""
    entries = manifest or [
        FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        for path, data in files.items()
    ]

    class Files(Server):
        def __call__(self, request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            path = request.url.path.removeprefix("/v1/jobs/x/artifacts").removeprefix("/")
            return ok(entries) if not path else httpx.Response(200, content=files[path])

    return Files(httpx.Response(500))


def test_download__a_folder_with_progress(clock: Clock, tmp_path: Path) -> None:
    files = {"encoder/a b#.json": b"{}", "encoder/sub/w": b"w" * 5, "encoder2/x": b"x", "result.json": b"r"}
    seen: list[tuple[int, int]] = []
    paths = client_of(files_server(files), clock).download(
        "x", "encoder/", tmp_path, on_progress=lambda done, total: seen.append((done, total))
    )
    assert paths == [tmp_path / "encoder/a b#.json", tmp_path / "encoder/sub/w"]
    assert {
        str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    } == {
        "encoder/a b#.json": b"{}",
        "encoder/sub/w": b"w" * 5,
    }
    assert seen[0] == (0, 7)
    assert seen[-1] == (7, 7)
    assert seen == sorted(seen)


def test_download__everything(clock: Clock, tmp_path: Path) -> None:
    client_of(files_server({"a": b"1", "b/c": b"2"}), clock).download("x", "", tmp_path)
    assert (tmp_path / "b/c").read_bytes() == b"2"


def test_download__what_is_there_already_is_kept_and_what_differs_replaced(
    clock: Clock, tmp_path: Path
) -> None:
    server = files_server({"same": b"1", "other": b"2"})
    (tmp_path / "same").write_bytes(b"1")
    (tmp_path / "other").write_bytes(b"x")
    client_of(server, clock).download("x", "", tmp_path)
    assert (tmp_path / "other").read_bytes() == b"2"
    assert server.calls == ["GET /v1/jobs/x/artifacts", "GET /v1/jobs/x/artifacts/other"]


def test_download__damage_is_found_and_the_old_file_stays(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/model.bin").write_bytes(b"old")
    server = files_server({"encoder/model.bin": DATA[::-1]}, manifest=[ENTRY])
    with pytest.raises(CorruptDownloadError, match=r"encoder/model\.bin"):
        client_of(server, clock).download("x", "encoder", tmp_path)
    assert (tmp_path / "encoder/model.bin").read_bytes() == b"old"
    assert [path.name for path in (tmp_path / "encoder").iterdir()] == ["model.bin"]


def test_download__no_path_of_the_service_leads_outside(clock: Clock, tmp_path: Path) -> None:
    downloader = Downloader(Transport("http://127.0.0.1:1"), patience_s=0, on_progress=None)
    for path in ("../evil", "/etc/evil", "a/../../evil"):
        evil = FileEntry.model_construct(path=path, size=len(DATA), sha256=ENTRY.sha256)
        with pytest.raises(ApiError, match="must be a plain relative path"):
            client_of(files_server({path: DATA}, manifest=[evil]), clock).download("x", "", tmp_path / "in")
        with pytest.raises(CorruptDownloadError, match="outside"):
            downloader.fetch([evil], tmp_path / "in", address="/x")
    assert not (tmp_path / "evil").exists()


def test_download__an_unknown_path_lists_what_there_is(clock: Clock, tmp_path: Path) -> None:
    server = files_server({"encoder/a": b"", "result.json": b""})
    with pytest.raises(ApiError, match=r"no artifact 'encode'; it has: encoder, result\.json") as raised:
        client_of(server, clock).download("x", "encode", tmp_path)
    assert raised.value.status == 404


def test_download__a_broken_connection_is_tried_again(clock: Clock, tmp_path: Path) -> None:
    broken = stream(DATA[:4].decode(), broken=True)
    server = Server(
        ok([ENTRY]), broken, stream(DATA[:2].decode(), broken=True), httpx.Response(200, content=DATA)
    )
    client_of(server, clock).download("x", "encoder", tmp_path)
    assert (tmp_path / "encoder/model.bin").read_bytes() == DATA
    assert clock.pauses == [0.5]


def test_download__the_service_itself_serves_when_the_object_store_is_out_of_reach(
    clock: Clock, tmp_path: Path
) -> None:
    def serve(request: httpx.Request) -> httpx.Response:
        if request.url.host == "store":
            raise httpx.ConnectError("no route")
        if request.url.path.endswith("/artifacts"):
            return ok([ENTRY])
        if request.url.params.get("redirect") == "false":
            return httpx.Response(200, content=DATA)
        return httpx.Response(307, headers={"location": "http://store/signed"})

    client_of(serve, clock).download("x", "encoder", tmp_path)
    assert (tmp_path / "encoder/model.bin").read_bytes() == DATA
    assert client_of(serve, clock).read("x", "encoder/model.bin") == DATA
