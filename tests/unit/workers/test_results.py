from pathlib import Path

import pytest
from pydantic_core import from_json

from service.contracts.jobs import FileEntry
from service.contracts.work import Assignment, StoreAddress
from workers.results import LIBRARIES, earlier_files, put_json, result_document, spec_document
from workers.storage import JobStore

SPEC = {"kind": "pretrain", "name": "p", "training": {"steps": 3}}


@pytest.fixture
def assignment(tmp_path: Path) -> Assignment:
    return Assignment(
        job_id="ab",
        attempt=2,
        spec=SPEC,
        submitted={"kind": "pretrain"},
        inputs={},
        store=StoreAddress(url=str(tmp_path)),
    )


def test_spec_document__says_what_was_asked_and_what_ran_it(assignment: Assignment) -> None:
    document = spec_document(assignment)
    assert (document["submitted"], document["resolved"]) == ({"kind": "pretrain"}, SPEC)
    assert set(document["libraries"]) == {"python", *LIBRARIES}
    assert len(document["code"]["source_sha256"]) == 64


def test_result_document__files_in_order_and_no_table_where_there_is_none(assignment: Assignment) -> None:
    files = [FileEntry(path=path, size=1, sha256="0" * 64) for path in ("b", "a")]
    document = result_document(assignment, step=3, metrics={"loss": 1.0}, files=files)
    assert [line["path"] for line in document["files"]] == ["a", "b"]
    assert "table" not in document


def test_result_document__warnings_where_there_are_any(assignment: Assignment) -> None:
    document = result_document(assignment, step=3, metrics={}, files=[], warnings=["collapsed"])
    assert document["warnings"] == ["collapsed"]
    assert "warnings" not in result_document(assignment, step=3, metrics={}, files=[])


def test_put_json__names_that_are_no_unicode_are_escaped_for_strict_readers(assignment: Assignment) -> None:
    store = JobStore.of(assignment)
    put_json(store, "data/report.json", {"bad-\udcff": [{"path": "bad-\udcff.png", "size": 3}]})
    read = from_json(store.store.get_bytes("jobs/ab/data/report.json"))
    assert read == {r"bad-\udcff": [{"path": r"bad-\udcff.png", "size": 3}]}


def test_earlier_files__finds_what_another_attempt_left(assignment: Assignment) -> None:
    store = JobStore.of(assignment)
    old, new = (store.put_bytes(f"samples/step-{step}.png", b"x" * step) for step in (1, 2))
    assert earlier_files(store, "samples", [new]) == [old]
