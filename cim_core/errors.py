"""The errors of the core. Each docstring says when its error happens; standard library only."""

# How torch begins to say that a batch norm sees one value a channel, of which there is no deviation.
ONE_VALUE = "Expected more than 1 value per channel when training"


class ConfigError(ValueError):
    """A configuration breaks its own rules; `problems` holds (field, lesson) for each one."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{field}: {lesson}" for field, lesson in problems))
        self.problems = problems


class DataError(ValueError):
    """The user's images cannot be used: none found, none decodes, fewer than one batch."""


class ModelError(ValueError):
    """The named network cannot serve here; the message says why and what would."""


class NonFiniteError(ArithmeticError):
    """A loss or gradient is not finite, told to every rank before weights move; or a tensor to be saved."""


class CheckpointMismatchError(ValueError):
    """A checkpoint does not belong to this configuration, or lacks one of its tensors."""
