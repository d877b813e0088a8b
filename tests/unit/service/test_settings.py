import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from service.settings import Settings, from_environment

EXAMPLE = Path(__file__).parents[3] / ".env.example"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CIM_{name.upper()}", raising=False)


def test_example__lists_exactly_the_known_settings() -> None:
    names = re.findall(r"^(CIM_\w+)=", EXAMPLE.read_text(), flags=re.MULTILINE)
    assert sorted(names) == sorted(f"CIM_{name.upper()}" for name in Settings.model_fields)


def test_example__every_value_is_accepted_but_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in re.findall(r"^(CIM_\w+)=(.*)$", EXAMPLE.read_text(), flags=re.MULTILINE):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        from_environment()
    assert [error["loc"] for error in caught.value.errors()] == [("secret",)]
    monkeypatch.setenv("CIM_SECRET", "x" * 32)
    defaults = {n: f.default for n, f in Settings.model_fields.items() if n.endswith("_s")}
    settings = from_environment()
    assert {name: getattr(settings, name) for name in defaults} == defaults


def test_settings__secrets_never_show_and_loopback_is_the_default() -> None:
    settings = Settings(
        database_url="sqlite+aiosqlite:///x",
        store_url="/x",
        ray_url="http://r",
        public_url="http://a",
        secret=SecretStr("s3cret" * 6),
        ray_token=SecretStr("t0ken"),
    )
    assert "s3cret" not in repr(settings)
    assert "t0ken" not in repr(settings)
    assert settings.host == "127.0.0.1"
