"""The training that the campaign's workers play: a sum whose every step needs the one before.

A run that was cut and resumed from the wrong place, or from a damaged state, has another curve from there on.
"""

_MODULUS = 2**61 - 1
LOSS = "loss"


def begin(seed: int) -> int:
    """The state before the first step."""
    return (seed * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) % _MODULUS


def advance(state: int, step: int) -> int:
    """The state after `step`, counted from 1."""
    return (state * 48_271 + step * 2_654_435_761 + 12_345) % _MODULUS


def loss(state: int, step: int) -> float:
    """What a plot shows: it falls, and its last digits tell the state."""
    return 5.0 * 0.97**step + (state % 10**9) / 10**10


def uncut(seed: int, total_steps: int) -> dict[int, float]:
    """The curve of a run that nothing disturbed."""
    state, points = begin(seed), {}
    for step in range(1, total_steps + 1):
        state = advance(state, step)
        points[step] = loss(state, step)
    return points
