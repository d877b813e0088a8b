"""Writes the drawn part of docs/lifecycle.md from the table of moves.

Usage: python -m scripts.draw_lifecycle
"""

from pathlib import Path

from service.contracts.jobs import FINAL
from service.domain.lifecycle import HOLDS_WORKERS, MOVES

PAGE = Path(__file__).parent.parent / "docs" / "lifecycle.md"
BEGIN, END = "<!-- drawn from service/domain/lifecycle.py -->", "<!-- end of the drawn part -->"


def drawing() -> str:
    """The diagram and the table, between their marks."""
    lines = [BEGIN, "", "```mermaid", "stateDiagram-v2", "    [*] --> queued"]
    lines += [f"    {src} --> {dst}" for src, moves in MOVES.items() for dst in sorted(moves)]
    lines += [f"    {state} --> [*]" for state in MOVES if state in FINAL]
    lines += ["```", "", "| state | holds workers | may become |", "|---|---|---|"]
    for state, moves in MOVES.items():
        holds = "yes" if state in HOLDS_WORKERS else "no"
        lines.append(f"| `{state}` | {holds} | {', '.join(sorted(moves)) or 'nothing, it is final'} |")
    return "\n".join([*lines, "", END])


def redrawn(page: str) -> str:
    """The page with its drawn part as it should be."""
    head, _, rest = page.partition(BEGIN)
    return head + drawing() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
