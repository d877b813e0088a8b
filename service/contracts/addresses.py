"""The addresses in a spec, and secrets in its texts.

A spec is kept, shown, logged and copied to MLflow, and so are a job's name and labels. So no address in
them may hold a password, a key or a signature: workers have credentials of their own.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any
from urllib.parse import unquote

from service.contracts.problems import FieldProblem
from service.contracts.spec_keys import Part, dotted
from service.contracts.specs import EvaluateSpec, PretrainSpec, TokenizerSpec

AnySpec = TokenizerSpec | PretrainSpec | EvaluateSpec

# Looked for in any text, so bounded: time grows with the length alone.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}:/")
_MOST_ADDRESSES = 32  # of one text; in a longer list the last ones are not judged
_AWS_KEY = re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])")
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


def secrets_in(tree: Mapping[str, Any]) -> Iterator[FieldProblem]:
    """A lesson for each text or key in `tree` that holds a secret; the secret is not repeated.

    Addresses and AWS's access keys are seen; nobody can tell a plain password from any other word.
    """
    for path, text in _texts(tree):
        if fault := _secret_fault(text):
            yield FieldProblem(path=path, message=fault)


def _texts(tree: object) -> Iterator[tuple[str, str]]:
    """Dotted path and content of every text, names of keys included."""
    todo: list[tuple[tuple[Part, ...], object]] = [((), tree)]
    while todo:
        parts, value = todo.pop()
        if isinstance(value, str):
            yield dotted(parts), value
        elif isinstance(value, Mapping):
            yield from ((dotted((*parts, key)), key) for key in value)
            todo += [((*parts, key), inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            todo += [((*parts, number), inner) for number, inner in enumerate(value)]


def redacted(text: str) -> str:
    """`text` without AWS's access keys, and its addresses without passwords and query values.

    Time grows with its length.
    """
    keyless = _AWS_KEY.sub("***", text)
    return _WORD.sub(lambda word: _SHOWN_VALUE.sub(r"\1***", _without_owner(word[0])), keyless)


def without_secrets(problem: FieldProblem) -> FieldProblem:
    """`problem` as it may go into an answer and into a log: whatever is wrong may stand in a secret."""
    cleaned = {
        "path": redacted(problem.path),  # a label's name may be anything
        "message": redacted(problem.message),
        "value": _redacted_deep(problem.value),
    }
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
        return {_redacted_deep(key): _redacted_deep(item) for key, item in value.items()}
    return value


def _secret_fault(text: str) -> str:
    address = f", got {redacted(text)!r}" if _SCHEME.match(text) else ""
    # Decoded as often as it takes: %2540 is an @ for whoever decodes twice.
    for _ in range(3):
        if _AWS_KEY.search(text):
            return (
                "must not hold an AWS access key: specs are kept, shown and logged. Leave it out; workers "
                "find credentials in their own environment (AWS_ACCESS_KEY_ID, ...)"
            )
        starts = [found.start() for found in islice(_SCHEME.finditer(text), _MOST_ADDRESSES)]
        if any(_OWNER.match(text, start) for start in starts):
            return (
                "must not hold a user name, key or password: specs are kept, shown and logged. Leave it out; "
                f"workers find credentials in their own environment (AWS_ACCESS_KEY_ID, ...){address}"
            )
        names = [name.lower() for name in _PARAMETER.findall(text, starts[0])] if starts else []
        if secret := next((name for name in names if _SECRET_NAME.search(name)), None):
            return (
                f"must not hold a secret, as {secret}= is: specs are kept, shown and logged. Copy the "
                f"file to a folder or bucket that the workers can read, and give that address{address}"
            )
        text = unquote(text)
    return ""
