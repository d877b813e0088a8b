"""Which storage a spec may name: prefixes that whoever runs the service has listed.

Prefixes are compared part by part, so that /data does not open /database, nor s3://photos
s3://photos-of-others. What is compared is text; whoever sees the files also follows their links.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

DALL_E_FILES = "https://cdn.openai.com/dall-e"  # where OpenAI publishes its tokenizer
EVERYTHING = "/,s3://,https://,http://"
_SUPPORTED = (
    "an absolute folder, s3://BUCKET/PREFIX, https://HOST/PREFIX, or `/`, `s3://`, `https://` for all"
)
_WEB_PORTS = {"http": 80, "https": 443}
_GROUP = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"\d+\.\.\d+")
_MOST_SHOWN = 5

Parts = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Prefixes of addresses, as `prefixes_in` has checked them."""

    prefixes: tuple[str, ...]

    @property
    def folders(self) -> tuple[str, ...]:
        """Those that are folders of a machine."""
        return tuple(prefix for prefix in self.prefixes if prefix.startswith("/"))

    @property
    def anywhere_local(self) -> bool:
        """Whether every path of a machine is allowed."""
        return "/" in self.folders

    def fault(self, address: str) -> str:
        """Why an address must not be used, as the end of a sentence; empty where it may be."""
        if address.startswith("/") and self.anywhere_local:
            return ""
        if _climbs(address):
            return "must not hold the part '..' or '.', not even encoded or in braces: write the address out"
        parts = _parts(address)
        if any(parts[: len(allowed)] == allowed for allowed in map(_parts, self.prefixes)):
            return ""
        shown = ", ".join(self.prefixes[:_MOST_SHOWN]) + (", ..." if len(self.prefixes) > _MOST_SHOWN else "")
        return (
            f"must lie below one of the places that this service allows ({shown}); whoever runs it adds "
            "others in CIM_ALLOWED_STORAGE"
        )


def prefixes_in(text: str) -> tuple[str, ...]:
    """The prefixes of a comma-separated list.

    Raises:
        ValueError: one is none, or could be left again.
    """
    prefixes = tuple(prefix.strip() for prefix in text.split(",") if prefix.strip())
    for prefix in prefixes:
        scheme, found, _ = prefix.partition("://")
        known = prefix.startswith("/") or (found and scheme in ("s3", *_WEB_PORTS))
        if not known or _climbs(prefix) or set(prefix) & set("*?{") or (found and "@" in prefix):
            raise ValueError(f"must be a comma-separated list, each entry {_SUPPORTED}; got {prefix!r}")
    return prefixes


def allowed_by(prefixes: Iterable[str], *, store_url: str) -> Allowed:
    """What the operator has listed, the service's own store, and OpenAI's tokenizer."""
    return Allowed(prefixes=(*prefixes, store_url, f"{DALL_E_FILES}/"))


def _parts(address: str) -> Parts:
    """Scheme, host or bucket, then the parts of the path."""
    scheme, found, rest = address.partition("://")
    if not found or address.startswith("/"):
        return ("/", *_path_parts(address))
    scheme = scheme.lower()
    if scheme in _WEB_PORTS:
        return (scheme, *_host(address, scheme), *_path_parts(urlsplit(address).path))
    return (scheme, *_path_parts(rest))


def _host(address: str, scheme: str) -> Parts:
    parts = urlsplit(address)
    return (f"{parts.hostname}:{parts.port or _WEB_PORTS[scheme]}",) if parts.hostname else ()


def _path_parts(path: str) -> Parts:
    return tuple(part for part in path.split("/") if part not in ("", "."))


def _climbs(address: str) -> bool:
    """Whether some reading of the address could leave the folder that it seems to lie in."""
    scheme, found, _ = address.partition("://")
    if found and scheme.lower() in _WEB_PORTS:
        return _climbs_on_the_web(address)
    dots = {"..", "."} if found else {".."}  # a folder's own '.' leads nowhere
    return bool(dots & set(address.split("/"))) or (not found and _climbs_in_braces(address))


def _climbs_on_the_web(address: str) -> bool:
    # Servers decode, some of them twice, and some take a backslash for a slash.
    for _ in range(4):
        path = address.partition("?")[0]
        if "\\" in path or "#" in path or {"..", "."} & set(path.split("/")):
            return True
        address = unquote(address)
    return False


def _climbs_in_braces(address: str) -> bool:
    """Whether a choice in braces could become, or become part of, a part made of dots alone."""
    groups = [found for found in _GROUP.findall(address) if not _NUMBERS.fullmatch(found)]
    nested = bool(set(_GROUP.sub("", address)) & set("{}"))
    return nested or any("/" in c or not c.strip(".") for group in groups for c in group.split(","))


ANYWHERE = Allowed(prefixes=prefixes_in(EVERYTHING))
