"""What a worker prints is on Ray's pages for everybody."""

import logging
import signal

import pytest

import workers.__main__ as entry
from workers.failures import ExitCode
from workers.settings import WorkerSettings


def test_main__prints_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    settings: list[WorkerSettings] = []

    def run(given: WorkerSettings) -> ExitCode:
        settings.append(given)
        try:
            raise RuntimeError(f"{given.token} is not {given.code}, says s3://k:hidden@bucket/")
        except RuntimeError:
            logging.getLogger("library").exception("failed with %s and aws-secret-aws-secret", given.code)
        return ExitCode.DONE

    monkeypatch.setattr(entry, "run", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setenv("CIM_CLAIM_CODE", "the-claim-code")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret-aws-secret")
    assert entry.main(["--url", "http://service", "--attempt", "ab12/1"]) == 0
    printed = capsys.readouterr().err
    assert "RuntimeError: *** is not ***, says s3://***@bucket/" in printed
    for secret in (settings[0].token, "the-claim-code", "aws-secret-aws-secret", "hidden"):
        assert secret not in printed


def test_main__without_a_code_ends_as_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CIM_CLAIM_CODE", raising=False)
    with pytest.raises(SystemExit) as left:
        entry.main(["--url", "http://service", "--attempt", "ab12/1"])
    assert left.value.code == ExitCode.USAGE
    assert "CIM_CLAIM_CODE" in capsys.readouterr().err
