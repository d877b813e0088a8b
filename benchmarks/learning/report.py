"""The table and the picture of what the runs have found."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from benchmarks.learning.chart import line_chart

Record = Mapping[str, Any]

# What a record says of the call that made it: runs that differ in one of these are no seeds of each other.
SETTING = (
    "label",
    "changes",
    "size",
    "training",
    "seconds",
    "tokenizer",
    "images",
    "labelled",
    "finetuning",
    "device",
    "clock",
    "model",  # a digest; records made before there was one have none
)

# Header, key of a record, factor, digits. What a row has no number for stays empty.
Column = tuple[str, str, int, int]
COLUMNS: tuple[Column, ...] = (
    ("steps", "steps", 1, 0),
    ("images", "images_seen", 1, 0),
    ("seconds", "train_seconds", 1, 0),
    ("k-NN", "knn", 100, 1),
    ("linear", "linear", 100, 1),
    ("k-NN, own pooling", "own_knn", 100, 1),
    ("linear, own pooling", "own_linear", 100, 1),
    ("k-NN, BN of real images", "bn_knn", 100, 1),
    ("linear, BN of real images", "bn_linear", 100, 1),
    ("fine-tuned", "finetune", 100, 1),
    ("feature std", "diag_feature_std", 1, 2),
    ("RankMe", "diag_rankme", 1, 1),
)
MORE_PROBES = re.compile(r"(decoded|stage\d+)_(knn|linear)")  # keys that --more-probes adds


def row_name(record: Record) -> str:
    """Method and label of a run: what it is averaged under."""
    return f"{record['method']} {record['label']}".strip()


def grouped(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The seeds of each row, in order of first appearance.

    Runs of one name whose settings differ are no seeds of each other: their names get what differs.
    """
    settings: dict[str, list[Mapping[str, Any]]] = {}
    records = list(records)
    for record in records:
        settings.setdefault(row_name(record), []).append(_setting(record))
    rows: dict[str, list[Record]] = {}
    for record in records:
        others = settings[row_name(record)]
        differs = [
            f", {key} {value}"
            for key, value in _setting(record).items()
            if any(other.get(key) != value for other in others)
        ]
        rows.setdefault(row_name(record) + "".join(differs), []).append(record)
    return rows


def _setting(record: Record) -> dict[str, Any]:
    """What the seeds of a row have in common; the parts of the training by themselves."""
    given = {name: record[name] for name in SETTING if name in record}
    training: dict[str, Any] = given.pop("training", {})
    return given | training


def table(records: Iterable[Record]) -> str:
    """Markdown: a row for each method, means over its seeds and, from two seeds on, their deviation."""
    return _markdown(grouped(records), COLUMNS)


def more_table(records: Iterable[Record]) -> str:
    """The same of what --more-probes adds, of the records that have it; empty where none does."""
    having = {
        name: more
        for name, row in grouped(records).items()
        if (more := [record for record in row if any(map(MORE_PROBES.fullmatch, record))])
    }
    keys = sorted({key for row in having.values() for r in row for key in r if MORE_PROBES.fullmatch(key)})
    columns = [(key.replace("_", ", ").replace("knn", "k-NN"), key, 100, 1) for key in keys]
    return _markdown(having, columns) if having else ""


def _markdown(rows: Mapping[str, Sequence[Record]], columns: Sequence[Column]) -> str:
    """What no record has gets no column."""
    shown = [
        column for column in columns if any(column[1] in record for row in rows.values() for record in row)
    ]
    lines = ["| method | seeds | " + " | ".join(header for header, *_ in shown) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(shown))
    for name, row in rows.items():
        cells = [
            cell([r[key] * factor for r in row if key in r], digits=digits)
            for _, key, factor, digits in shown
        ]
        lines.append(f"| {name} | {len(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: Sequence[float], *, digits: int) -> str:
    """Mean ± deviation between seeds (n - 1)."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def mean_curve(records: Sequence[Record]) -> list[tuple[float, float]]:
    """(seconds, k-NN in per cent) of each look, averaged over the seeds that have as many looks."""
    return [
        (statistics.fmean(p["seconds"] for p in points), 100 * statistics.fmean(p["knn"] for p in points))
        for points in zip(*_longest_curves(records), strict=True)
    ]


def _longest_curves(records: Sequence[Record]) -> list[list[dict[str, float]]]:
    curves = [record["curve"] for record in records if record.get("curve")]
    longest = max((len(curve) for curve in curves), default=0)
    return [curve for curve in curves if len(curve) == longest]


def curve_name(name: str, records: Sequence[Record]) -> str:
    """In the legend: of how many seeds the curve is, where it is not of all."""
    used = len(_longest_curves(records))
    return name if used == len(records) else f"{name} ({used} of {len(records)} seeds)"


def picture(records: Iterable[Record]) -> Image.Image:
    """The learning curves of all rows that have one."""
    lines = {curve_name(name, row): mean_curve(row) for name, row in grouped(records).items()}
    return line_chart(
        {name: line for name, line in lines.items() if line},
        title="k-NN accuracy of frozen features, mean over seeds",
        x_label="seconds of training",
        y_label="%",
    )
