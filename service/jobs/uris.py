"""Addresses of data in a spec: what can be known of them before a worker opens them."""

import os
import re
from collections.abc import Iterator
from glob import has_magic, iglob
from pathlib import Path
from urllib.parse import urlsplit

from cim_core.config import DALL_E
from cim_core.data.sources import expand_braces
from service.contracts.parsing import AnySpec
from service.contracts.problems import FieldProblem
from service.contracts.specs import EvaluateSpec, PretrainSpec, TokenizerSpec

_SUPPORTED = "give an absolute folder, s3://bucket/prefix/, or .tar shards (one path or a pattern)"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BUCKET = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?")
_FORMATS = (".parquet", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".csv", ".json", ".jsonl", ".txt")
_NUMBERS = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
_MOST_SHARDS = 100_000
_MODEL_FILES = ("config.json", "model.safetensors")


def problems(spec: AnySpec, *, shared_filesystem: bool) -> Iterator[FieldProblem]:
    """What is wrong with the addresses of `spec`. Looks at local folders, so it may block.

    Args:
        spec: A sound spec.
        shared_filesystem: The workers see the folders of this machine.
    """
    for path, uri in _images(spec):
        if fault := _image_fault(uri, look=shared_filesystem):
            yield FieldProblem(path=path, message=fault, value=uri)
    for path, uri in _models(spec):
        if fault := _model_fault(uri, path=path, look=shared_filesystem):
            yield FieldProblem(path=path, message=fault, value=uri)
    for path, uri in _official_files(spec):
        if fault := _official_fault(uri, look=shared_filesystem):
            yield FieldProblem(path=path, message=fault, value=uri)


def _images(spec: AnySpec) -> Iterator[tuple[str, str]]:
    if isinstance(spec, TokenizerSpec | PretrainSpec):
        yield "data.uri", spec.data.uri
    if isinstance(spec, EvaluateSpec):
        yield from (("data.train", spec.data.train), ("data.val", spec.data.val))
    if isinstance(spec, PretrainSpec) and spec.probe is not None:
        yield from (("probe.train", spec.probe.train), ("probe.val", spec.probe.val))


def _models(spec: AnySpec) -> Iterator[tuple[str, str]]:
    if isinstance(spec, PretrainSpec):
        yield "model.tokenizer.source", spec.model.tokenizer.source
    if isinstance(spec, EvaluateSpec):
        yield "encoder", spec.encoder


def _official_files(spec: AnySpec) -> Iterator[tuple[str, str]]:
    if isinstance(spec, PretrainSpec):
        given = spec.model.tokenizer
        files = (("encoder", given.encoder), ("decoder", given.decoder))
        yield from ((f"model.tokenizer.{name}", uri) for name, uri in files if uri is not None)


def _image_fault(uri: str, *, look: bool) -> str:
    suffix = next((suffix for suffix in _FORMATS if uri.lower().endswith(suffix)), None)
    if suffix is not None:
        return f"{suffix} is not supported in this version: {_SUPPORTED}; got {uri!r}"
    if fault := _form_fault(uri, supported=_SUPPORTED):
        return fault
    return _folder_fault(uri) if look and uri.startswith("/") else ""


def _model_fault(uri: str, *, path: str, look: bool) -> str:
    is_tokenizer = path == "model.tokenizer.source"
    if uri.startswith("job:") or (uri in ("fake", DALL_E) and is_tokenizer):
        return ""
    supported = "give job:NAME, an absolute folder, or s3://bucket/prefix/"
    supported += f", or {DALL_E}" if is_tokenizer else ""
    if fault := _form_fault(uri, supported=supported):
        return fault
    missing = [name for name in _MODEL_FILES if not Path(uri, name).is_file()]
    if look and uri.startswith("/") and missing:
        return f"must be a folder with {' and '.join(_MODEL_FILES)}; {uri} lacks {' and '.join(missing)}"
    return ""


def _official_fault(uri: str, *, look: bool) -> str:
    """What is wrong with the address of one of OpenAI's files."""
    if uri.startswith(("http://", "https://")):
        return _web_fault(uri)
    supported = "give an absolute path, or an address that begins with https://, http:// or s3://"
    if fault := _form_fault(uri, supported=supported):
        return fault
    if uri.startswith("s3://"):
        key = uri.removeprefix("s3://").partition("/")[2]
        return "" if key and not key.endswith("/") else f"must name a file, s3://bucket/key, got {uri!r}"
    return f"there is no file {uri} on the machine of the service" if look and not os.path.isfile(uri) else ""


def _web_fault(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port or an IPv6 address that is none
        sound = False
    if not sound or not uri.isprintable() or " " in uri:
        return f"must be a web address such as https://example.org/encoder.pkl, got {uri!r}"
    if "@" in parts.netloc:
        return "must not hold a user name or password: specs are kept, shown and logged"
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


def _folder_fault(uri: str) -> str:
    try:
        if os.path.isdir(uri):
            return "" if _holds_a_file(uri) else f"the folder {uri} holds no files; put images into it"
        if os.path.isfile(uri):
            return "" if uri.endswith(".tar") else f"must be a folder or a .tar, got the file {uri}"
        if any(int(last) - int(first) > _MOST_SHARDS for first, last in _NUMBERS.findall(uri)):
            return f"a pattern may stand for at most {_MOST_SHARDS} shards, got {uri}"
        shards = [shard for pattern in expand_braces(uri) for shard in _shards(pattern)]
    except OSError as error:
        return f"{uri} cannot be read: {error.strerror}"
    if shards:
        return ""
    rule = "no file fits the pattern" if has_magic(uri) or "{" in uri else "there is no folder or file"
    return f"{rule} {uri} on the machine of the service"


def _shards(pattern: str) -> Iterator[str]:
    found = next(iglob(pattern, recursive=True), None) if has_magic(pattern) else pattern
    if found is not None and os.path.isfile(found):
        yield found


def _holds_a_file(folder: str) -> bool:
    """Whether a file lies at any depth; ends at the first one."""

    def refuse(error: OSError) -> None:
        raise error

    return any(not name.startswith(".") for _, _, names in os.walk(folder, onerror=refuse) for name in names)
