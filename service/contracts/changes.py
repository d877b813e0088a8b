"""What a user may change of a job that exists."""

from typing import Annotated

from pydantic import Field

from service.contracts.base import Contract
from service.contracts.specs import MOST_LABELS, Name

# PostgreSQL stores no NUL.
Label = Annotated[str, Field(max_length=256, pattern=r"^[^\x00]*$")]


class JobChange(Contract):
    """Only what is given changes."""

    name: Name | None = None
    priority: int | None = Field(default=None, strict=True, ge=0, le=100)
    labels: dict[Name, Label] | None = Field(
        default=None, max_length=MOST_LABELS, description="takes the place of all labels"
    )
