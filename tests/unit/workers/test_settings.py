import pytest

from workers.settings import UsageError, WorkerSettings

TOKEN = {"CIM_ATTEMPT_TOKEN": "a-secret"}


def test_read__job_and_attempt_come_from_one_argument() -> None:
    settings = WorkerSettings.read("http://service", "ab12/3", {**TOKEN, "RAY_ADDRESS": "10.0.0.1:6379"})
    assert (settings.job_id, settings.attempt, settings.ray_address) == ("ab12", 3, "10.0.0.1:6379")


@pytest.mark.parametrize("attempt", ["ab12", "ab12/", "/1", "ab12/0", "ab12/one", "ab12/1/2"])
def test_read__anything_but_id_and_number_is_refused(attempt: str) -> None:
    with pytest.raises(UsageError, match="JOB_ID/N"):
        WorkerSettings.read("http://service", attempt, TOKEN)


def test_read__a_missing_token_is_named() -> None:
    with pytest.raises(UsageError, match="CIM_ATTEMPT_TOKEN"):
        WorkerSettings.read("http://service", "ab12/1", {})


def test_repr__hides_the_token() -> None:
    assert "a-secret" not in repr(WorkerSettings.read("http://service", "ab12/1", TOKEN))
