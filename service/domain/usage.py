"""What a job has used up of what its spec allows: failures and time. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Counted over the attempts since the user's last retry; he forgave those before."""

    num_failures: int = 0
    runtime_s: float = 0.0  # from each start to its end, or to now
    runtime_limit_s: float | None = None

    @property
    def over_runtime(self) -> str:
        """The sentence of a job whose time is used up; empty while some is left."""
        if self.runtime_limit_s is None or self.runtime_s < self.runtime_limit_s:
            return ""
        return (
            f"limits.runtime_hours: its {self.runtime_limit_s / 3600:g} h are used up; `cim retry` goes on "
            "from the last checkpoint with as many again"
        )
