"""`make test` counts what its tiers did, and fails when one of them does."""

from pathlib import Path

import pytest

from scripts import run_tests
from scripts.run_tests import Counts, Tier, Verdict

EVERY_ENDING = """
import pytest

def test_good(): pass
def test_good_too(): pass
def test_bad(): assert False
@pytest.mark.skip
def test_left_out(): pass
@pytest.fixture
def broken(): raise OSError
def test_without_its_fixture(broken): pass
"""


def test_run__counts_each_ending(tmp_path: Path) -> None:
    verdict = run(tmp_path, EVERY_ENDING)
    assert not verdict.ok
    assert verdict.word == "FAILED (1)"
    assert verdict.counts == Counts(passed=2, failed=2, skipped=1)


def test_run__an_empty_tier_fails(tmp_path: Path) -> None:
    assert not run(tmp_path, "").ok


def test_run__a_pytest_that_was_cut_short_counts_as_a_failure(tmp_path: Path) -> None:
    verdict = run(tmp_path, "import os\ndef test_end(): os._exit(0)")
    assert verdict.counts == Counts(failed=1)
    assert not verdict.ok


def test_main__last_line_is_the_total(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = [Counts(passed=5, skipped=1), Counts(passed=2, failed=3)]
    endings = [Verdict(tier=str(n), word="", counts=c, ok=not c.failed) for n, c in enumerate(counts)]
    monkeypatch.setattr(run_tests, "TIERS", endings)
    monkeypatch.setattr(run_tests, "run", lambda verdict, _: verdict)
    monkeypatch.setattr(run_tests, "run_gpu", lambda _: Verdict(tier="gpu", word="left out"))
    assert run_tests.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "total: 7 passed, 3 failed, 1 skipped"


def run(folder: Path, text: str) -> Verdict:
    (folder / "test_one.py").write_text(text, encoding="utf-8")
    return run_tests.run(Tier(name="one", folders=(str(folder),), options=("-p", "no:cacheprovider")), [])
