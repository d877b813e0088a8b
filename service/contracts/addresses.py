"""The addresses in a spec, and secrets in them.

A spec is kept, shown, logged and copied to MLflow. So no address may hold a password, a key or a
signature: workers have credentials of their own.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from service.contracts.problems import FieldProblem
from service.contracts.specs import EvaluateSpec, PretrainSpec, TokenizerSpec

AnySpec = TokenizerSpec | PretrainSpec | EvaluateSpec

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_AT = "(?:@|%(?:25)*40)"
# AWS's secret keys hold slashes, so the end of one may look like a path: what cannot be a port is one.
_USER_AND_MORE = rf"[^\s/?#'\"@:]*:(?!\d{{1,5}}(?:[/?#]|$))[^\s'\"]*{_AT}"
_OWNER = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*:/+(?:[^/?#]*{_AT}|{_USER_AND_MORE})")
_PARAMETER = re.compile(r"[?&;#]([^=&;#?]{1,100})=")
_TELLING = (
    "accesskey|accesskeyid|apikey|auth|authorization|code|cookie|credential|credentials|jwt|key|passphrase|"
    "passwd|password|pwd|sas|secret|session|sig|signature|token"
)
_SECRET_NAME = re.compile(rf"(^|[^a-z0-9])({_TELLING})$|(key|secret|token|password|signature)(id)?$")
_WORD = re.compile(r"""[^\s'"]+""")
_SCHEME_END = re.compile(r":/+")
_HOST = re.compile(r"[^/?#]*")
_LAST_AT = re.compile(rf".*{_AT}", re.DOTALL)
_SHOWN_VALUE = re.compile(r"""([?&;#][^=&;#?\s'"]{1,100}=)[^&;#\s'"]+""")


def images_of(spec: AnySpec) -> Iterator[tuple[str, str]]:
    """Dotted path and address of each set of images."""
    if isinstance(spec, TokenizerSpec | PretrainSpec):
        yield "data.uri", spec.data.uri
    if isinstance(spec, EvaluateSpec):
        yield from (("data.train", spec.data.train), ("data.val", spec.data.val))
    if isinstance(spec, PretrainSpec) and spec.probe is not None:
        yield from (("probe.train", spec.probe.train), ("probe.val", spec.probe.val))


def models_of(spec: AnySpec) -> Iterator[tuple[str, str]]:
    """Dotted path and address, or other source, of each trained network that the job starts from."""
    if isinstance(spec, PretrainSpec) and spec.model.tokenizer is not None:
        yield "model.tokenizer.source", spec.model.tokenizer.source
    if isinstance(spec, EvaluateSpec):
        yield "encoder", spec.encoder


def official_files_of(spec: AnySpec) -> Iterator[tuple[str, str]]:
    """Dotted path and address of OpenAI's files, where the spec names its own copies."""
    if isinstance(spec, PretrainSpec) and spec.model.tokenizer is not None:
        given = spec.model.tokenizer
        files = (("encoder", given.encoder), ("decoder", given.decoder))
        yield from ((f"model.tokenizer.{name}", uri) for name, uri in files if uri is not None)


def addresses_of(spec: AnySpec) -> Iterator[tuple[str, str]]:
    """Dotted path and value of every key that may hold an address."""
    yield from images_of(spec)
    yield from models_of(spec)
    yield from official_files_of(spec)


def secrets_in(spec: AnySpec) -> Iterator[FieldProblem]:
    """A lesson for each address that holds a secret; the secret is not repeated."""
    for path, address in addresses_of(spec):
        if fault := _secret_fault(address):
            yield FieldProblem(path=path, message=f"{fault}, got {redacted(address)!r}")


def redacted(text: str) -> str:
    """`text` without passwords and query values of the addresses in it; time grows with its length."""
    return _WORD.sub(lambda word: _SHOWN_VALUE.sub(r"\1***", _without_owner(word[0])), text)


def without_secrets(problem: FieldProblem) -> FieldProblem:
    """`problem` as it may go into an answer and into a log: whatever is wrong may stand in a secret."""
    cleaned = {"message": redacted(problem.message), "value": _redacted_deep(problem.value)}
    return problem.model_copy(update=cleaned)


def _without_owner(word: str) -> str:
    """`word` without user name and password of an address in it."""
    scheme = _SCHEME_END.search(word)
    start = scheme.end() if scheme else 0
    owner = _LAST_AT.match(word, start)
    host = _HOST.match(word, start)
    assert host is not None, "it fits the empty text"
    _, colon, port = host[0].partition(":")
    named = bool(scheme) and _LAST_AT.match(host[0]) is not None
    if owner is None or not (named or (colon and not port.isdigit())):
        return word
    return f"{word[:start]}***@{word[owner.end() :]}"


def _redacted_deep(value: Any) -> Any:
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, list):
        return [_redacted_deep(item) for item in value]
    if isinstance(value, dict):
        return {key: _redacted_deep(item) for key, item in value.items()}
    return value


def _secret_fault(address: str) -> str:
    if not _SCHEME.match(address):
        return ""
    # Decoded as often as it takes: %2540 is an @ for whoever decodes twice.
    for _ in range(3):
        if _OWNER.match(address):
            return (
                "must not hold a user name, key or password: specs are kept, shown and logged. Leave it out; "
                "workers find credentials in their own environment (AWS_ACCESS_KEY_ID, ...)"
            )
        names = [name.lower() for name in _PARAMETER.findall(address)]
        if secret := next((name for name in names if _SECRET_NAME.search(name)), None):
            return (
                f"must not hold a secret, as {secret}= is: specs are kept, shown and logged. Copy the "
                "file to a folder or bucket that the workers can read, and give that address"
            )
        address = unquote(address)
    return ""
