"""The compositions: api alone, dispatcher alone, or both in one process, until told to stop."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from service.api.app import create_app
from service.db.engine import Sessions, create_engine, create_sessions, only_reads
from service.db.leases import start_anew
from service.db.upgrade import check_schema, upgrade
from service.dispatch.leadership import pause
from service.dispatch.loop import OpenTracker, dispatch
from service.jobs.readiness import standstill
from service.settings import Settings
from service.store.base import ObjectStore
from service.store.open import open_store

logger = logging.getLogger(__name__)

_DRAIN_S = 2  # for requests under way, among them streams that would never end
_END_S = 3.0
_DATABASE_PAUSE_S = 2.0
_LOOK_EVERY_S = 5.0


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it: there is more to stop than a server."""

    def __init__(self, config: uvicorn.Config, *, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture nothing."""
        yield


async def serve_both(
    settings: Settings,
    bound: socket.socket,
    stop: asyncio.Event,
    *,
    open_tracker: OpenTracker,
    on_ready: Callable[[], None],
    tell: Callable[[str], object] = logger.warning,
) -> None:
    """Migrate, then run api and dispatcher.

    `on_ready` is called once requests are answered, `tell` with a line for whoever started this: nothing
    is dispatched any more, and why, or it goes on.
    """
    await asyncio.to_thread(upgrade, settings.database_url)
    engine = create_engine(settings.database_url)
    sessions, store = create_sessions(engine), open_settings_store(settings)
    # The data directory is ours alone, so a lease that is left is that of a killed run.
    async with sessions.begin() as session:
        await start_anew(session)
    server = _server(create_app(settings, sessions, store, dispatches=True), on_ready=on_ready)
    dispatching = dispatch(settings, sessions, store, open_tracker=open_tracker, stop=stop)
    try:
        works = [_serve(server, bound, stop), dispatching, _tell_standstills(sessions, stop, tell=tell)]
        await _until_stopped(works, stop)
    finally:
        await engine.dispose()


async def _tell_standstills(
    sessions: Sessions, stop: asyncio.Event, *, tell: Callable[[str], object]
) -> None:
    told = False
    while not stop.is_set():
        await pause(stop, timeout_s=_LOOK_EVERY_S)
        try:
            async with sessions.begin() as session:
                await only_reads(session)
                standing = await standstill(session)
        except SQLAlchemyError as error:
            logger.warning("whether jobs are dispatched cannot be told: %s", error)
        else:
            if standing is not None and not told:
                tell(str(standing))
            if standing is None and told:
                tell("dispatching goes on")
            told = standing is not None


async def serve_api(settings: Settings) -> None:
    """The api on its host and port, until SIGINT or SIGTERM; `SchemaError` ends it."""
    engine = create_engine(settings.database_url)
    sessions = create_sessions(engine)
    app = create_app(settings, sessions, open_settings_store(settings))
    server = _server(app, on_ready=lambda: logger.info("listening on %s:%d", settings.host, settings.port))
    stop = stop_on_signals()
    bound = listen(settings.host, settings.port)
    try:
        await _until_stopped([_serve(server, bound, stop), _require_schema(sessions, stop)], stop)
    finally:
        bound.close()
        await engine.dispose()


async def serve_dispatcher(settings: Settings, *, open_tracker: OpenTracker) -> None:
    """The dispatcher, until SIGINT or SIGTERM; `SchemaError` ends it before it does anything."""
    # Frozen in the middle of a guarded write, it shall not hold a take-over up for much longer.
    engine = create_engine(settings.database_url, idle_limit_s=settings.lease_s)
    sessions, store, stop = create_sessions(engine), open_settings_store(settings), stop_on_signals()

    async def work() -> None:
        await _require_schema(sessions, stop)
        await dispatch(settings, sessions, store, open_tracker=open_tracker, stop=stop)

    try:
        await _until_stopped([work()], stop)
    finally:
        await engine.dispose()


async def _require_schema(sessions: Sessions, stop: asyncio.Event) -> None:
    """Wait for the database to answer, then for nothing more if its schema is ours."""
    while not stop.is_set():
        try:
            async with sessions.begin() as session:
                await check_schema(session)
        except SQLAlchemyError as error:
            logger.warning("the database does not answer yet: %s", error)
            await pause(stop, timeout_s=_DATABASE_PAUSE_S)
        else:
            return


def listen(host: str, port: int) -> socket.socket:
    """A socket on that port of loopback.

    Raises:
        OSError: the port is taken, or the name leads to another address than loopback.
    """
    bound = socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
    )
    address = bound.getsockname()[0]
    if not ip_address(address).is_loopback:
        bound.close()
        raise OSError(f"{host} leads to {address} on this machine, which is not loopback; use 127.0.0.1")
    # Connections inherit it. asyncio sets it only where a socket names its protocol, and this one does not;
    # a short answer then waits 40 ms for the client's acknowledgement of its head.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound


def open_settings_store(settings: Settings) -> ObjectStore:
    """The object store of these settings."""
    return open_store(settings.store_url, endpoint_url=settings.s3_endpoint_url, region=settings.s3_region)


def stop_on_signals() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _server(app: FastAPI, *, on_ready: Callable[[], None]) -> _Server:
    # Logging is the entry point's affair, and stdout belongs to its one line of JSON.
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_DRAIN_S)
    return _Server(config, on_ready=on_ready)


async def _serve(server: _Server, bound: socket.socket, stop: asyncio.Event) -> None:
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.should_exit = True
    await serving
    if not stop.is_set():
        raise RuntimeError("the api ended by itself; its log says why")


async def _until_stopped(works: list[Coroutine[Any, Any, None]], stop: asyncio.Event) -> None:
    """Run everything until `stop` is set or something fails; what does not end soon is cut off."""
    tasks = [asyncio.create_task(work) for work in works]
    stopping = asyncio.create_task(stop.wait())
    failed = asyncio.ensure_future(_first_failure(tasks))
    await asyncio.wait({stopping, failed}, return_when=asyncio.FIRST_COMPLETED)
    stop.set()
    _, late = await asyncio.wait(tasks, timeout=_END_S)
    for task in late:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    stopping.cancel()
    failed.cancel()
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _first_failure(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
