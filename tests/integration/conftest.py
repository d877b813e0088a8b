"""Servers that the whole integration tier shares. Each is a real process, started when first asked for."""

import itertools
from collections.abc import Iterator

import psycopg
import pytest

from tests.integration import servers
from tests.integration.servers import RayCluster

_numbers = itertools.count()


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A Ray head with two CPUs."""
    with servers.ray_head(tmp_path_factory.mktemp("ray")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server."""
    with servers.mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An S3 server."""
    with servers.s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server; its address names the database `postgres`."""
    with servers.postgres_server(tmp_path_factory.mktemp("pg")) as uri:
        yield uri


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """The address of an empty database of its own, for SQLAlchemy."""
    name = f"empty_{next(_numbers)}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    address = postgres_server.replace("/postgres?", f"/{name}?", 1)
    return address.replace("postgresql://", "postgresql+psycopg://", 1)
