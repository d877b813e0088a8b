"""Errors on the wire: RFC 9457 problem+json with a stable `code`."""

from typing import Any

from pydantic import Field

from service.contracts.base import Stored


class FieldProblem(Stored):
    """One mistake in a spec."""

    path: str  # dotted, e.g. model.masking.min_ratio
    message: str  # the rule, the value received, and what to do
    value: Any = None


class Problem(Stored):
    """The body of every error answer."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    errors: list[FieldProblem] = Field(default_factory=list)
