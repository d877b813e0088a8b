"""Poison on SQLite; tests/integration/test_postgres.py plants it in PostgreSQL."""

from tests.fakes.poison_contract import PoisonContract


class TestPoison(PoisonContract): ...
