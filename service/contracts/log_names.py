"""Names of log objects below `logs/attempt-N/`: workers give them, the service reads and removes by them."""

import re
from dataclasses import dataclass
from typing import Self

_NAME = re.compile(r"(?P<source>[^/]+)-(?P<first>[0-9]+)(?:_(?P<last>[0-9]+))?\.jsonl")


@dataclass(frozen=True, kw_only=True)
class LogName:
    """`rank-0-000007.jsonl`, a piece, or `rank-0-000000_000063.jsonl`, a join: the lines of those 64."""

    source: str  # the process
    first: int  # pieces of a source are numbered from 0
    last: int

    @property
    def joins(self) -> bool:
        """Whether it stands for several pieces."""
        return self.last > self.first

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The parts of a name without its folder; None for any that is not written in just this way."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        first, last = int(match["first"]), int(match["last"] or match["first"])
        made = cls(source=match["source"], first=first, last=last)
        return made if str(made) == name else None

    def __str__(self) -> str:
        numbers = f"{self.first:06d}_{self.last:06d}" if self.joins else f"{self.first:06d}"
        return f"{self.source}-{numbers}.jsonl"
