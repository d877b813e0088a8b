"""The commands, each against a scripted service: what is sent, printed and returned."""

import hashlib
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.contracts.estimates import Estimate
from service.contracts.jobs import EventView, FileEntry, JobPage, JobState, LogLine, MetricPoint, Validation
from service.contracts.problems import FieldProblem
from service.contracts.recipes import RecipeSummary, known_recipes
from tests.fakes.scripted import CREATED, JOB_ID, Server, job, ok, problem
from tests.unit.service.conftest import Run

URL = "http://service:1"
SPEC = "kind: tokenizer\nname: street\ndata: {uri: photos}\ntraining: {epochs: 3}\n"


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No service is known but the one that a test names."""
    monkeypatch.chdir(tmp_path)
    for name in ("CIM_URL", "CIM_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


def spec_file(tmp_path: Path) -> str:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return str(path)


def at(*arguments: str) -> tuple[str, ...]:
    return (*arguments, "--url", URL)


# Finding the service


def test_address__option_then_variable_then_folder(run: Run, addresses: list[str], tmp_path: Path) -> None:
    for folder, port in ((".cim", 1), ("other", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "service.json").write_text(json.dumps({"api": f"http://127.0.0.1:{port}"}))
    server = Server(ok(job()))
    run(server, "show", "x")
    run(server, "show", "x", "--data-dir", "other")
    runner = CliRunner(env={"CIM_DATA_DIR": "other"})
    assert runner.invoke(app, ["show", "x"]).exit_code == 0
    assert runner.invoke(app, ["show", "x"], env={"CIM_URL": "http://variable:1"}).exit_code == 0
    run(server, "show", "x", "--url", "http://option:1", "--data-dir", "other")
    assert addresses == [
        "http://127.0.0.1:1",
        "http://127.0.0.1:2",
        "http://127.0.0.1:2",
        "http://variable:1",
        "http://option:1",
    ]


@pytest.mark.parametrize(
    ("content", "lesson"),
    [
        (None, "start one with `cim up`"),
        ("{", "does not tell"),
        ("[]", "does not tell"),
        ("{}", "does not tell"),
    ],
)
def test_address__that_is_unknown_is_wrong_usage(
    run: Run, tmp_path: Path, content: str | None, lesson: str
) -> None:
    if content is not None:
        (tmp_path / ".cim").mkdir()
        (tmp_path / ".cim" / "service.json").write_text(content)
    result = run(None, "ls")
    assert result.exit_code == 2
    assert lesson in result.stderr
    assert "service.json" in result.stderr
    assert result.stdout == ""


def test_address__that_is_no_url_is_wrong_usage(run: Run) -> None:
    result = run(None, "ls", "--url", "service:8000")
    assert result.exit_code == 2
    assert "service:8000" in result.stderr


def test_errors__a_service_that_is_away(run: Run) -> None:
    server = Server(httpx.ConnectError("Connection refused"))
    result = run(server, *at("ls"))
    assert result.exit_code == 1
    assert "cim up" in result.stderr
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "exit_code"), [(404, 1), (409, 1), (422, 2), (400, 2)])
def test_errors__become_lines_and_a_status(run: Run, status: int, exit_code: int) -> None:
    errors = (
        [FieldProblem(path="training.epochs", message="must be above 0, got [0]")] if status == 422 else []
    )
    result = run(Server(problem(status, "code", detail="the [detail]", errors=errors)), *at("show", "x"))
    assert result.exit_code == exit_code
    assert result.stderr == ("training.epochs: must be above 0, got [0]\n" if errors else "the [detail]\n")
    assert result.stdout == ""


# submit and validate


def test_submit__sends_the_specs_and_prints_the_jobs(run: Run, tmp_path: Path) -> None:
    server = Server(ok([job(JobState.QUEUED)]))
    result = run(
        server, *at("submit", spec_file(tmp_path), "--set", "training.epochs=1", "--set", "street:priority=9")
    )
    assert result.exit_code == 0
    assert result.stdout == f"{JOB_ID}  street  queued\n"
    assert server.calls == ["POST /v1/jobs"]
    assert json.loads(server.requests[0].content) == [
        {
            "kind": "tokenizer",
            "name": "street",
            "data": {"uri": str(tmp_path / "photos")},
            "training": {"epochs": 1},
            "priority": 9,
        }
    ]


@pytest.mark.parametrize("command", ["submit", "validate"])
def test_submit__mistakes_bear_the_name_of_their_spec(run: Run, command: str) -> None:
    errors = [
        FieldProblem(path="[1].training.epochs", message="must be above 0"),
        FieldProblem(path="[7].x", message="see [1]. too"),
    ]
    server = Server(problem(422, "invalid_spec", errors=errors))
    result = run(server, *at(command, "-"), stdin="name: a\n---\nname: b\n")
    assert result.exit_code == 2
    assert result.stderr == "b: training.epochs: must be above 0\n[7].x: see [1]. too\n"


def test_submit__from_standard_input_as_json(run: Run) -> None:
    result = run(Server(ok([job()])), *at("submit", "-", "--json"), stdin="name: x")
    assert json.loads(result.stdout) == [job().model_dump(mode="json")]


def test_submit__a_bad_file_is_not_sent(run: Run) -> None:
    server = Server(ok([]))
    result = run(server, *at("submit", "none.yaml"))
    assert (result.exit_code, server.requests) == (2, [])
    assert "none.yaml" in result.stderr


@pytest.mark.parametrize(
    ("state", "exit_code"), [(JobState.SUCCEEDED, 0), (JobState.FAILED, 1), (JobState.CANCELLED, 1)]
)
def test_submit_watch__ends_with_the_jobs_status(
    run: Run, tmp_path: Path, state: JobState, exit_code: int
) -> None:
    last = job(state, step=100, reason="the reason " * 20)
    server = Server(ok([job(JobState.QUEUED)]), ok(job(step=1)), ok(last))
    result = run(server, *at("submit", spec_file(tmp_path), "--watch", "--json"))
    assert result.exit_code == exit_code
    assert json.loads(result.stdout) == [last.model_dump(mode="json")]
    assert "running" in result.stderr
    assert ("street failed: " + "the reason " * 20 in result.stderr) == (state == JobState.FAILED)


@pytest.mark.parametrize("command", ["watch", "logs"])
def test_interrupt__leaves_the_job_alone_and_says_so(run: Run, command: str) -> None:
    result = run(Server(KeyboardInterrupt()), *at(command, "street"))
    assert result.exit_code == 130
    assert "cim watch street" in result.stderr
    assert "goes on" in result.stderr


def test_validate__prints_yaml_with_the_estimate(run: Run, tmp_path: Path) -> None:
    known = Estimate(name="a", workers=2, cpus=4, gpus=0, steps=1000, images=20_000)
    unknown = Estimate(name="b", workers=1, cpus=1, gpus=0)
    answer = Validation(
        resolved=[{"name": "a", "n": 1}, {"name": "b"}], estimate=[known, unknown], warnings=["no images"]
    )
    server = Server(ok(answer))
    result = run(server, *at("validate", spec_file(tmp_path)))
    assert result.exit_code == 0
    assert result.stdout == (
        "name: a\nn: 1\n# estimate\n#   resources: workers 2, CPUs 4, GPUs 0\n"
        "#   length: 1,000 steps, 20,000 images\n"
        "---\nname: b\n# estimate\n#   resources: workers 1, CPUs 1, GPUs 0\n"
    )
    assert result.stderr == "warning: no images\n"
    assert server.calls == ["POST /v1/jobs/validate"]
    result = run(server, *at("validate", spec_file(tmp_path), "--json"))
    assert Validation.model_validate_json(result.stdout) == answer


def test_recipes__list_one_or_json(run: Run) -> None:
    recipes = list(known_recipes().values())
    summaries = [RecipeSummary.model_validate(recipe.model_dump()) for recipe in recipes]
    server = Server(ok(summaries))
    lines = run(server, *at("recipes")).stdout
    assert all(recipe.name in lines for recipe in recipes)
    assert json.loads(run(server, *at("recipes", "--json")).stdout) == [one.model_dump() for one in summaries]
    server = Server(ok(recipes[0]))
    assert run(server, *at("recipes", recipes[0].name)).stdout == recipes[0].text
    shown = json.loads(run(server, *at("recipes", recipes[0].name, "--json")).stdout)
    assert shown == recipes[0].model_dump()
    assert server.calls == [f"GET /v1/recipes/{recipes[0].name}"] * 2


# Looking


def test_ls__filters_and_stops_at_the_limit(run: Run) -> None:
    page = JobPage(jobs=[job(name=f"job{i}") for i in range(3)], next_cursor="more")
    server = Server(ok(page))
    result = run(
        server,
        *at("ls", "--state", "running", "--kind", "pretrain", "--label", "a=b", "--limit", "3", "--json"),
    )
    assert [view["name"] for view in json.loads(result.stdout)] == ["job0", "job1", "job2"]
    assert server.calls == ["GET /v1/jobs?state=running&kind=pretrain&label=a%3Db&limit=3"]
    assert "job2" in run(server, *at("ls", "--limit", "3")).stdout


def test_show__panel_or_json(run: Run) -> None:
    view = job(mlflow_url="http://127.0.0.1:5000/#/x")
    assert "http://127.0.0.1:5000/#/x" in run(Server(ok(view)), *at("show", "street")).stdout
    assert json.loads(run(Server(ok(view)), *at("show", "street", "--json")).stdout) == view.model_dump(
        mode="json"
    )


def test_watch__several_jobs(run: Run) -> None:
    server = Server(*(ok(job(JobState.SUCCEEDED, id=letter * 16, name=letter)) for letter in "ab"))
    result = run(server, *at("watch", "a", "b"))
    assert result.exit_code == 0
    assert result.stdout == ""
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["a", "b"]


def test_events_and_logs__text_or_json_lines(run: Run) -> None:
    event = EventView(id=1, at=CREATED, actor="user", message="submitted [x]")
    line = LogLine(at=CREATED, attempt=1, source="rank-0", level="info", message="Ü" * 300)
    for command, item in (("events", event), ("logs", line)):
        server = Server(ok([item, item]))
        text = run(server, *at(command, "street")).stdout.splitlines()
        assert len(text) == 2
        assert text[0].endswith(item.message)
        lines = run(server, *at(command, "street", "--json")).stdout.splitlines()
        assert [json.loads(one) for one in lines] == [item.model_dump(mode="json")] * 2
        stream = httpx.Response(200, text=f"data: {item.model_dump_json()}\n\nevent: end\ndata: {{}}\n\n")
        assert run(Server(stream), *at(command, "street", "-f")).stdout == text[0] + "\n"


def test_metrics__table_curve_or_points(run: Run) -> None:
    points = [MetricPoint(step=step, key="loss", value=4 - step) for step in range(3)]
    server = Server(ok(points))
    assert "loss" in run(server, *at("metrics", "street")).stdout
    with_values = run(server, *at("metrics", "street", "--key", "loss")).stdout
    assert [line.split() for line in with_values.splitlines()[-3:]] == [["0", "4"], ["1", "3"], ["2", "2"]]
    assert server.calls == ["GET /v1/jobs/street/metrics", "GET /v1/jobs/street/metrics?key=loss"]
    found = json.loads(run(server, *at("metrics", "street", "--json")).stdout)
    assert found[0] == {"step": 0, "key": "loss", "value": 4.0}


def test_cancel__says_what_is_wanted(run: Run) -> None:
    server = Server(ok(job(JobState.STOPPING, desired="cancel")))
    assert run(server, *at("cancel", "street")).stdout == f"{JOB_ID}  street  stopping, cancel wanted\n"
    assert json.loads(run(server, *at("cancel", "street", "--json")).stdout)["desired"] == "cancel"
    assert server.calls == ["POST /v1/jobs/street/cancel"] * 2


# Files

FILES = {
    "encoder/config.json": b"{}",
    "result.json": b"r",
    "logs/a.jsonl": b"l",
    "attempts/1/checkpoints/x": b"c",
}


class Files(Server):
    """A job with files."""

    def __init__(self) -> None:
        super().__init__(httpx.Response(500))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        path = request.url.path
        if path == "/v1/jobs/street":
            return ok(job(JobState.SUCCEEDED))
        name = path.removeprefix(f"/v1/jobs/{JOB_ID}/artifacts").removeprefix("/v1/jobs/street/artifacts")
        if name:
            return httpx.Response(200, content=FILES[name[1:]])
        return ok(
            [
                FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
                for path, data in FILES.items()
            ]
        )


def test_artifacts__table_or_json(run: Run) -> None:
    assert "encoder/config.json" in run(Files(), *at("artifacts", "street")).stdout
    found = json.loads(run(Files(), *at("artifacts", "street", "--json")).stdout)
    assert {entry["path"] for entry in found} == set(FILES)


def test_download__the_results_into_a_folder_of_the_jobs_name(run: Run, tmp_path: Path) -> None:
    result = run(Files(), *at("download", "street"))
    assert result.stdout == "street/encoder/config.json\nstreet/result.json\n"
    found = [path for path in (tmp_path / "street").rglob("*") if path.is_file()]
    assert {str(path.relative_to(tmp_path / "street")) for path in found} == {
        "encoder/config.json",
        "result.json",
    }


def test_download__what_is_asked_for_where_it_is_wanted(run: Run, tmp_path: Path) -> None:
    result = run(Files(), *at("download", "street", "attempts/1", "--to", "there", "--json"))
    assert json.loads(result.stdout) == ["there/attempts/1/checkpoints/x"]
    assert (tmp_path / "there/attempts/1/checkpoints/x").read_bytes() == b"c"
    result = run(Files(), *at("download", "street", "none"))
    assert result.exit_code == 1
    assert "it has: attempts, encoder, logs, result.json" in result.stderr


# up and start-up


def test_up__hands_its_options_to_the_service(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _program, command: started.append(command))
    run(None, "up")
    run(None, "up", "--port", "0", "--mlflow-port", "7", "--data-dir", "d", "--json", "--other", "x")
    service = [sys.executable, "-m", "service", "up", "--data-dir"]
    assert started == [
        [*service, ".cim"],
        [*service, "d", "--port", "0", "--mlflow-port", "7", "--json", "--other", "x"],
    ]


def test_up__needs_the_whole_installation(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    result = run(None, "up")
    assert result.exit_code == 2
    assert "cim-service[all]" in result.stderr


@pytest.mark.parametrize("arguments", [["submit"], ["nonsense"], ["ls", "--limit", "0"], ["show"]])
def test_usage__mistakes_end_with_2(run: Run, arguments: list[str]) -> None:
    assert run(None, *arguments).exit_code == 2


def test_import__is_light() -> None:
    code = "import sys, service.cli.main; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "ray", "mlflow", "boto3", "fastapi", "sqlalchemy", "httpx", "pydantic", "service.store"}
    assert not heavy & set(done.stdout.split())


def test_version__is_that_of_the_distribution(run: Run) -> None:
    result = run(None, "--version")
    assert (result.exit_code, result.stdout) == (0, f"cim-service {version('cim-service')}\n")
