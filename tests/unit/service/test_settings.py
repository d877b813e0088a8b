import re
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.settings import Settings, SettingsError, check_environment, from_environment

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
    with pytest.raises(SettingsError) as caught:
        from_environment()
    assert re.findall(r"^(\w+):", str(caught.value), flags=re.MULTILINE) == ["CIM_SECRET"]
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


NEEDED = {
    "CIM_DATABASE_URL": "postgresql+psycopg://cim:h1dden@postgres/cim",
    "CIM_STORE_URL": "/x",
    "CIM_RAY_URL": "http://r",
    "CIM_PUBLIC_URL": "http://a",
    "CIM_SECRET": "s" * 32,
}
OUTSIDE = ["0.0.0.0", "::", "", "192.168.1.7", "example.org", "127.0.0.1.evil.net", "127.0.0.2", "LOCALHOST."]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_host__loopback_is_taken(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    for name, value in {**NEEDED, "CIM_HOST": host}.items():
        monkeypatch.setenv(name, value)
    assert from_environment().host == host


@pytest.mark.parametrize("host", OUTSIDE)
def test_host__any_other_is_refused_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setenv("CIM_HOST", host)
    for read in (check_environment, from_environment):
        for name, value in NEEDED.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SettingsError) as caught:
            read()
        assert f"CIM_HOST: must be 127.0.0.1, ::1 or localhost, got {host!r}" in str(caught.value)
        assert "proxy" in str(caught.value)
        assert "ssh -L" in str(caught.value)


def test_errors__each_setting_on_a_line_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**NEEDED, "CIM_SECRET": "h1dden", "CIM_PORT": "h1dden"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CIM_RAY_URL")
    with pytest.raises(SettingsError) as caught:
        from_environment()
    lines = dict(line.split(": ", 1) for line in str(caught.value).splitlines())
    assert set(lines) == {"CIM_SECRET", "CIM_PORT", "CIM_RAY_URL"}
    assert lines["CIM_RAY_URL"] == "is required"
    assert "h1dden" not in str(caught.value)
