"""What every wire model shares: strict when a user writes, lenient when we read back."""

from pydantic import BaseModel, ConfigDict


class Contract(BaseModel):
    """A frozen wire model that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Stored(BaseModel):
    """A frozen model read from a peer or a row: keys that a newer version added are dropped."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)
