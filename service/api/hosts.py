"""Only who means this service is answered.

A page of any site can make a browser ask 127.0.0.1: under another name that leads here (DNS rebinding),
or straight, with a request that needs no permission. The name in `Host`, and the site in `Origin`, tell.
"""

import re
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import problem_of, problem_response
from service.domain.loopback import NAMES

_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@?#\s]+))(?::\d{0,5})?")
_MISDIRECTED, _FORBIDDEN = 421, 403


class Hosts:
    """An ASGI middleware. `public_url` is the address under which a proxy may pass requests on."""

    def __init__(self, app: ASGIApp, *, public_url: str) -> None:
        self._app = app
        self._names = {*NAMES, (urlsplit(public_url).hostname or "").lower()} - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 421 or 403."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or _name_in(hosts[0]) not in self._names:
            problem = problem_of(_MISDIRECTED, detail=self._told(f"the Host header names {_shown(hosts)}"))
        elif strangers := [o for o in _values(scope, b"origin") if _name_of(o) not in self._names]:
            problem = problem_of(_FORBIDDEN, detail=self._told(f"a page of {_shown(strangers)} asks"))
        else:
            await self._app(scope, receive, send)
            return
        await problem_response(problem)(scope, receive, send)

    def _told(self, fault: str) -> str:
        names = ", ".join(sorted(self._names))
        return (
            f"{fault}, and this service answers only to {names}: use one of them, or let CIM_PUBLIC_URL name "
            "the proxy in front of it"
        )


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _name_in(host: str) -> str:
    """The name in a Host header, without its port."""
    found = _HOST.fullmatch(host.lower())
    return (found[1] or found[2]) if found else ""


def _name_of(address: str) -> str:
    try:
        return (urlsplit(address).hostname or "").lower()
    except ValueError:  # no address at all
        return ""


def _shown(names: list[str]) -> str:
    return (", ".join(names) or "nothing")[:200]
