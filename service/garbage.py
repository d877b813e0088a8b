"""`python -m service garbage`: what may go is printed, or goes."""

import json
from collections.abc import AsyncIterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from sqlalchemy.exc import SQLAlchemyError

from service.data_folder import DataFolder
from service.db.engine import Sessions, create_engine, create_sessions, only_reads
from service.db.failures import is_outage
from service.errors import ServiceError
from service.jobs import garbage
from service.jobs.garbage import Pass, Removed
from service.jobs.readiness import readiness
from service.settings import Storage
from service.store.base import ObjectStore, StoreError
from service.store.open import open_store


class GarbageError(Exception):
    """It cannot be done, or not to the end; the message says why."""


def storage_of(folder: DataFolder) -> Storage:
    """Where the embedded service of this folder keeps rows and objects.

    Raises GarbageError where there is none.
    """
    if not folder.database.is_file():
        told = f"no service has run on {folder.path}: there is no {folder.database.name}"
        raise GarbageError(f"{told}; name the folder of one with --data-dir")
    return Storage(
        database_url=folder.database_url, store_url=str(folder.objects), s3_endpoint_url=None, s3_region=None
    )


async def collect(storage: Storage, *, deletes: bool, as_json: bool) -> None:
    """Print what may go; with `deletes` it is gone by then.

    Raises GarbageError where database or object store fail, and at the end where a job could not be looked
    through; what was printed until then is true.
    """
    now = datetime.now(UTC)
    look = Pass(now=now, before=now - timedelta(seconds=storage.garbage_after_s), deletes=deletes)
    store = open_store(storage.store_url, endpoint_url=storage.s3_endpoint_url, region=storage.s3_region)
    engine = create_engine(storage.database_url)
    everything: list[Removed] = []
    broken: dict[str, Exception] = {}  # by job
    try:
        async for removed in _look(create_sessions(engine), store, look, broken=broken):
            everything.append(removed)
            if not as_json:
                _say(f"{removed.place}: {garbage.removed_text(removed)}")
    except (ServiceError, SQLAlchemyError) as error:
        raise GarbageError(str(error)) from error
    finally:
        await engine.dispose()
    _say(_document(everything, look) if as_json else _summary(everything, look))
    if broken:
        told = "; ".join(f"{job_id}: {type(error).__name__}: {error}" for job_id, error in broken.items())
        raise GarbageError(f"{len(broken)} jobs could not be looked through: {told}")


async def _look(
    sessions: Sessions, store: ObjectStore, look: Pass, *, broken: dict[str, Exception]
) -> AsyncIterator[Removed]:
    async with sessions.begin() as session:
        await only_reads(session)
        await readiness(session, dispatches=False)
    async for job_id in garbage.jobs(sessions):
        try:
            removed = await garbage.sweep_job(sessions, store, job_id, look=look)
        except StoreError:
            raise
        except Exception as error:
            if is_outage(error):
                raise
            broken[job_id] = error
        else:
            if removed:
                yield removed
    if removed := await garbage.sweep_shared(store, look=look):
        yield removed


def _document(everything: list[Removed], look: Pass) -> str:
    return json.dumps({"deleted": look.deletes, "garbage": [asdict(removed) for removed in everything]})


def _summary(everything: list[Removed], look: Pass) -> str:
    if not everything:
        return "nothing to remove"
    size = f"{sum(removed.size_bytes for removed in everything) / 1e6:.1f} MB in all"
    return f"removed: {size}" if look.deletes else f"would be removed: {size}; --delete does it"


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201
