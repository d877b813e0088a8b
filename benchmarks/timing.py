"""Times of several things, taken in turns, so that a busy moment of the machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def high(self) -> float:
        """The slowest round."""
        return max(self.seconds)

    def as_json(self) -> dict[str, object]:
        """Median, extremes and every round, seconds."""
        return {
            "median_s": self.median,
            "low_s": self.low,
            "high_s": self.high,
            "rounds_s": list(self.seconds),
        }


def in_turns(parts: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int) -> dict[str, Times]:
    """Time every part once a round; the first `warmup` rounds do not count."""
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(warmup + rounds):
        for name, part in parts.items():
            started = time.perf_counter()
            part()
            if number >= warmup:
                taken[name].append(time.perf_counter() - started)
    return {name: Times(seconds=tuple(seconds)) for name, seconds in taken.items()}


def median_ratio(times: Times, baseline: Times) -> float:
    """The median over the rounds of a round's ratio: both of its numbers saw the same machine."""
    pairs = zip(times.seconds, baseline.seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def total(parts: list[Times]) -> Times:
    """The sum of some parts, round by round."""
    return Times(seconds=tuple(sum(values) for values in zip(*(p.seconds for p in parts), strict=True)))
