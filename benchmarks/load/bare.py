"""The baseline: what FastAPI, SQLAlchemy and PostgreSQL cost alone. One table, one insert, one page."""

import json
import os
import secrets
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

_TABLE = """
CREATE TABLE IF NOT EXISTS things (
    id text PRIMARY KEY, body jsonb, made timestamptz DEFAULT clock_timestamp()
)
"""
_INDEX = "CREATE INDEX IF NOT EXISTS things_made ON things (made)"
_INSERT = "INSERT INTO things (id, body) VALUES (:id, CAST(:body AS jsonb))"
_PAGE = "SELECT id, body, made FROM things ORDER BY made DESC LIMIT 50"


def create_app(database_url: str) -> FastAPI:
    """Put one, list the last fifty."""
    app = FastAPI()
    engine = create_async_engine(database_url, pool_size=10, max_overflow=20)

    @app.on_event("startup")
    async def prepare() -> None:
        async with engine.begin() as connection:
            await connection.execute(text(_TABLE))
            await connection.execute(text(_INDEX))

    @app.post("/things", status_code=201)
    async def put(body: dict[str, Any]) -> dict[str, str]:
        made = secrets.token_hex(8)
        async with engine.begin() as connection:
            await connection.execute(text(_INSERT), {"id": made, "body": json.dumps(body)})
        return {"id": made}

    @app.get("/things")
    async def page() -> list[dict[str, Any]]:
        async with engine.begin() as connection:
            rows = (await connection.execute(text(_PAGE))).mappings()
            return [dict(row) for row in rows]

    return app


if __name__ == "__main__":
    uvicorn.run(create_app(os.environ["DATABASE_URL"]), port=int(os.environ["PORT"]), access_log=False)
