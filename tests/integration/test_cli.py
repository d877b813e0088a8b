"""The command line against the real API on a real port; the test plays dispatcher and worker."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli.main import app
from service.client.work import WorkClient
from service.contracts.jobs import JobState, LogLine, MetricPoint, Progress
from service.contracts.work import Finish, Report
from tests.fakes.served import served
from tests.fakes.world import World, token_of

SPECS = """
kind: tokenizer
name: tokens
data: {uri: images}
training: {steps: 10, batch_size: 4, learning_rate: 1e-3}
---
kind: pretrain
name: street
data: {uri: ./images}
model:
  tokenizer: {source: job:tokens}
  enhancer: {name: vit_tiny_patch16_224}
  objective: {name: respix}
training: {epochs: 2, batch_size: 4}
"""


@dataclass
class Terminal:
    """`cim` in a folder, and the service that it speaks to."""

    world: World
    url: str
    folder: Path

    async def run(self, *arguments: str, exit_code: int = 0) -> Result:
        """Run `cim ARGUMENTS` while the service goes on."""
        env = {"CIM_URL": self.url, "COLUMNS": "200"}
        result = await asyncio.to_thread(
            CliRunner().invoke, app, list(arguments), env=env, catch_exceptions=False
        )
        assert result.exit_code == exit_code, result.output
        return result

    async def process(self, *arguments: str) -> str:
        """Standard output of a real process; unlike `run` it may go on beside another one."""
        command = [sys.executable, "-c", "from service.cli.main import main; main()", *arguments]
        program = await asyncio.create_subprocess_exec(
            *command, "--url", self.url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        stdout, stderr = await program.communicate()
        assert program.returncode == 0, stderr
        return stdout.decode()

    async def json(self, *arguments: str) -> Any:
        """Its JSON."""
        return json.loads((await self.run(*arguments, "--json")).stdout)

    def worker(self, job_id: str, attempt: int) -> WorkClient:
        """What a worker of the attempt would use."""
        return WorkClient(self.url, job_id, attempt, token_of(job_id, attempt))

    async def succeed(self, job_id: str, *paths: str) -> None:
        """Run the job to its end, with these files and its result."""
        attempt = await self.world.launch(job_id)
        files = [self.world.file(job_id, path, data=path.encode()) for path in (*paths, "result.json")]
        with self.worker(job_id, attempt) as worker:
            points = [MetricPoint(step=step, key="loss", value=1 / step) for step in range(1, 11)]
            progress = Progress(step=10, total_steps=10, images_per_s=50)
            report = Report(progress=progress, metrics=points, plan={"total_steps": 10})
            reply = await asyncio.to_thread(worker.report, report)
            assert reply.directive == "continue"
            finish = Finish.model_validate(
                {"outcome": "succeeded", "step": 10, "total_steps": 10, "files": files}
            )
            await asyncio.to_thread(worker.finish, finish)


@pytest.fixture
async def terminal(world: World, tmp_path: Path) -> AsyncIterator[Terminal]:
    async with served(world.app) as url:
        (tmp_path / "specs.yaml").write_text(SPECS)
        yield Terminal(world, url, tmp_path)


@pytest.fixture
def specs(tmp_path: Path) -> str:
    return str(tmp_path / "specs.yaml")


async def test_submit__the_whole_file_in_one_request(terminal: Terminal, specs: str) -> None:
    tokens, street = await terminal.json(
        "submit", specs, "--set", "labels.team=vision", "--set", "street:priority=90"
    )
    assert [job["name"] for job in await terminal.json("ls")] == ["street", "tokens"]
    assert tokens["spec"]["data"]["uri"] == str(terminal.world.images)
    assert tokens["resolved"]["training"]["learning_rate"] == 0.001
    assert (tokens["priority"], street["priority"]) == (50, 90)
    assert street["labels"] == tokens["labels"] == {"team": "vision"}
    assert street["resolved"]["model"]["tokenizer"]["source"] == f"job:{tokens['id']}"

    assert [job["name"] for job in await terminal.json("ls", "--kind", "tokenizer")] == ["tokens"]
    assert await terminal.json("ls", "--label", "team=sound") == []
    assert len(await terminal.json("ls", "--limit", "1")) == 1
    for ref in (street["id"], street["id"][:10], "street"):
        assert (await terminal.json("show", ref))["id"] == street["id"]
    assert "queued" in (await terminal.run("show", "street")).stdout


async def test_submit__a_refused_file_queues_nothing(terminal: Terminal, specs: str) -> None:
    mistakes = ("--set", "training.batchsize=3", "--set", "street:model.masking.min_ratio=1.4")
    result = await terminal.run("submit", specs, *mistakes, exit_code=2)
    lines = result.stderr.splitlines()
    assert any("training.batchsize: " in line and "batch_size" in line for line in lines)
    assert any("model.masking.min_ratio: " in line and "1.4" in line for line in lines)
    assert await terminal.json("ls") == []
    assert (await terminal.run("validate", specs, *mistakes, exit_code=2)).stderr == result.stderr
    assert "nobody" in (await terminal.run("show", "nobody", exit_code=1)).stderr


async def test_validate__gives_the_resolved_specs(terminal: Terminal, specs: str) -> None:
    found = await terminal.json("validate", specs)
    assert [spec["name"] for spec in found["resolved"]] == ["tokens", "street"]
    assert "# estimate" in (await terminal.run("validate", specs)).stdout
    assert await terminal.json("ls") == []


async def test_watch__until_the_worker_is_done(terminal: Terminal, specs: str) -> None:
    (job, _) = await terminal.json("submit", specs)
    commands = (("watch", "tokens", "--json"), ("events", "-f", "tokens", "--json"), ("logs", "-f", "tokens"))
    running = [asyncio.create_task(terminal.process(*command)) for command in commands]
    line = LogLine(at=job["created_at"], attempt=1, source="rank-0", level="info", message="hello [world]")
    key = f"jobs/{job['id']}/logs/attempt-1/rank-0-000000.jsonl"
    terminal.world.store.put_bytes(key, f"{line.model_dump_json()}\n".encode())
    await asyncio.sleep(0.5)  # what was there before is shown as well as what comes
    await terminal.succeed(job["id"])

    watched, events, logs = await asyncio.gather(*running)
    (seen,) = json.loads(watched)
    assert (seen["state"], seen["progress"]["step"]) == ("succeeded", 10)
    moves = [json.loads(text)["dst"] for text in events.splitlines()]
    assert [move for move in moves if move] == ["queued", "launching", "running", "succeeded"]
    assert logs.endswith("1/rank-0 info: hello [world]\n")
    assert (await terminal.run("logs", "tokens")).stdout == logs
    assert (await terminal.run("events", "tokens", "--json")).stdout == events


async def test_metrics_and_files__come_back_as_the_worker_gave_them(terminal: Terminal, specs: str) -> None:
    (job, _) = await terminal.json("submit", specs)
    await terminal.succeed(job["id"], "encoder/config.json", "encoder/a b#%.bin")
    assert await terminal.json("metrics", "tokens", "--key", "loss") == [
        {"step": step, "key": "loss", "value": 1 / step} for step in range(1, 11)
    ]
    assert "loss" in (await terminal.run("metrics", "tokens")).stdout
    found = await terminal.json("artifacts", "tokens")
    assert [entry["path"] for entry in found] == ["encoder/a b#%.bin", "encoder/config.json", "result.json"]

    there = terminal.folder / "there"
    fetched = await terminal.json("download", "tokens", "encoder", "--to", str(there))
    assert fetched == [str(there / "encoder/a b#%.bin"), str(there / "encoder/config.json")]
    assert (there / "encoder/a b#%.bin").read_bytes() == b"encoder/a b#%.bin"
    await terminal.run("download", "tokens", "--to", str(there))
    assert (there / "result.json").read_bytes() == b"result.json"


async def test_cancel__ends_a_waiting_job_and_its_watch(terminal: Terminal, specs: str) -> None:
    await terminal.run("submit", specs)
    assert "cancelled" in (await terminal.run("cancel", "street")).stdout
    assert (await terminal.json("cancel", "street"))["state"] == JobState.CANCELLED
    assert "cancelled" in (await terminal.run("watch", "street", exit_code=1)).stderr
