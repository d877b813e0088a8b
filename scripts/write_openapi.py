"""Writes tests/golden/openapi.json from the code.

Usage: python -m scripts.write_openapi
"""

import json
from pathlib import Path

from pydantic import SecretStr

from service.api.app import create_app
from service.db.engine import create_engine, create_sessions
from service.settings import Settings
from service.store.directory import DirectoryStore

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "openapi.json"


def main() -> None:
    """Compose the API on services that are never called."""
    settings = Settings(
        database_url="sqlite+aiosqlite://",
        store_url="/nowhere",
        ray_url="http://ray.invalid",
        public_url="http://api.invalid",
        secret=SecretStr("x" * 32),
    )
    sessions = create_sessions(create_engine(settings.database_url))
    app = create_app(settings, sessions, DirectoryStore(Path(settings.store_url)))
    GOLDEN.write_text(json.dumps(app.openapi(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
