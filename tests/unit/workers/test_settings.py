import pytest

from workers.settings import UsageError, WorkerSettings

CODE = {"CIM_CLAIM_CODE": "a-secret"}


def test_read__job_and_attempt_come_from_one_argument() -> None:
    settings = WorkerSettings.read("http://service", "ab12/3", {**CODE, "RAY_ADDRESS": "10.0.0.1:6379"})
    assert (settings.job_id, settings.attempt, settings.ray_address) == ("ab12", 3, "10.0.0.1:6379")


@pytest.mark.parametrize("attempt", ["ab12", "ab12/", "/1", "ab12/0", "ab12/one", "ab12/1/2"])
def test_read__anything_but_id_and_number_is_refused(attempt: str) -> None:
    with pytest.raises(UsageError, match="JOB_ID/N"):
        WorkerSettings.read("http://service", attempt, CODE)


def test_read__a_missing_code_is_named() -> None:
    with pytest.raises(UsageError, match="CIM_CLAIM_CODE"):
        WorkerSettings.read("http://service", "ab12/1", {})


def test_read__every_process_makes_a_token_of_its_own() -> None:
    tokens = {WorkerSettings.read("http://service", "ab12/1", CODE).token for _ in range(3)}
    assert [len(token) for token in tokens] == [64] * 3


def test_repr__hides_code_and_token() -> None:
    settings = WorkerSettings.read("http://service", "ab12/1", CODE)
    assert "a-secret" not in repr(settings)
    assert settings.token not in repr(settings)
