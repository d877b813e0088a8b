"""Addresses of data in a spec: what can be known of them before a worker opens them."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from cim_core.config import DALL_E
from service.contracts.addresses import images_of, models_of, official_files_of
from service.contracts.allowed import Allowed
from service.contracts.parsing import AnySpec
from service.contracts.problems import FieldProblem
from service.jobs import places
from service.jobs.looks import Looks, LookTimeoutError

_SUPPORTED = "give an absolute folder, s3://bucket/prefix/, or .tar shards (one path or a pattern)"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?")
_FORMATS = (".parquet", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".csv", ".json", ".jsonl", ".txt")
_WORDS = {"model.tokenizer.source": ("fake", DALL_E), "encoder": ()}


@dataclass(frozen=True, kw_only=True)
class _Address:
    """One address of a spec, and the rules for what it names."""

    path: str  # of the key, dotted
    uri: str
    form: Callable[[str], str]  # what is wrong with the text
    place: Callable[[str], str]  # what is wrong with what lies there, on this machine


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is wrong with the addresses of a spec, and which ones could not be looked at in time."""

    problems: list[FieldProblem]
    unseen: list[str]


async def judge(
    spec: AnySpec, *, allowed: Allowed, shared_filesystem: bool, looks: Looks, deadline: float
) -> Judged:
    """Judge the addresses of `spec`.

    Args:
        spec: A sound spec.
        allowed: Where addresses may lead.
        shared_filesystem: The workers see the folders of this machine, so they are looked at.
        looks: Where that is done.
        deadline: Of `time.monotonic`; from then on the workers have to see for themselves.
    """
    judged = Judged(problems=[], unseen=[])
    for address in _addresses(spec):
        fault = address.form(address.uri) or _forbidden(address.uri, allowed)
        # What lies outside is not looked at: the answer would tell what is there.
        if not fault and shared_filesystem and address.uri.startswith("/"):
            work = partial(_seen_fault, address, allowed)
            try:
                fault = await looks.look(work, limit_s=deadline - time.monotonic())
            except LookTimeoutError:
                judged.unseen.append(address.path)
        if fault:
            judged.problems.append(FieldProblem(path=address.path, message=fault, value=address.uri))
    return judged


def _seen_fault(address: _Address, allowed: Allowed) -> str:
    if places.leaves(address.uri, allowed):
        return f"leads through a link out of the places that this service allows, got {address.uri!r}"
    return address.place(address.uri)


def _addresses(spec: AnySpec) -> Iterator[_Address]:
    for path, uri in images_of(spec):
        yield _Address(path=path, uri=uri, form=_image_form, place=places.images_fault)
    for path, uri in models_of(spec):
        if not uri.startswith("job:") and uri not in _WORDS[path]:
            form = _tokenizer_form if _WORDS[path] else _encoder_form
            yield _Address(path=path, uri=uri, form=form, place=places.model_fault)
    for path, uri in official_files_of(spec):
        yield _Address(path=path, uri=uri, form=_official_form, place=places.file_fault)


def _forbidden(uri: str, allowed: Allowed) -> str:
    fault = allowed.fault(uri)
    return f"{fault}, got {uri!r}" if fault else ""


def _image_form(uri: str) -> str:
    suffix = next((suffix for suffix in _FORMATS if uri.lower().endswith(suffix)), None)
    if suffix is not None:
        return f"{suffix} is not supported in this version: {_SUPPORTED}; got {uri!r}"
    return _form_fault(uri, supported=_SUPPORTED)


def _tokenizer_form(uri: str) -> str:
    return _form_fault(
        uri, supported=f"give job:NAME, an absolute folder, or s3://bucket/prefix/, or {DALL_E}"
    )


def _encoder_form(uri: str) -> str:
    return _form_fault(uri, supported="give job:NAME, an absolute folder, or s3://bucket/prefix/")


def _official_form(uri: str) -> str:
    """What is wrong with the address of one of OpenAI's files."""
    if uri.startswith(("http://", "https://")):
        return _web_fault(uri)
    supported = "give an absolute path, or an address that begins with https://, http:// or s3://"
    if fault := _form_fault(uri, supported=supported):
        return fault
    key = uri.removeprefix("s3://").partition("/")[2]
    named = not uri.startswith("s3://") or (key and not key.endswith("/"))
    return "" if named else f"must name a file, s3://bucket/key, got {uri!r}"


def _web_fault(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port or an IPv6 address that is none
        sound = False
    if not sound or not uri.isprintable() or " " in uri:
        return f"must be a web address such as https://example.org/encoder.pkl, got {uri!r}"
    return ""


def _form_fault(uri: str, *, supported: str) -> str:
    scheme = _SCHEME.match(uri)
    if scheme is not None and scheme[1] != "s3":
        return f"{scheme[1]}:// is not supported in this version: {supported}; got {uri!r}"
    if scheme is not None and not _BUCKET.fullmatch(uri):
        return f"must look like s3://bucket/prefix/, got {uri!r}"
    if scheme is None and not uri.startswith("/"):
        return f"must be absolute, the service does not know your working folder: {supported}; got {uri!r}"
    return ""
