"""What is reported of the comparison: means and spreads over the seeds of a row, and curves."""

from typing import Any

import numpy as np
import pytest

from benchmarks.learning import chart, report


def record(method: str, seed: int, **values: Any) -> dict[str, Any]:
    return {"method": method, "label": "", "seed": seed, **values}


def test_table__mean_and_deviation_over_seeds() -> None:
    values = [0.30, 0.34, 0.41]
    made = [record("mae", seed, knn=value, steps=1234) for seed, value in enumerate(values)]
    lines = report.table([*made, record("pixels", 0, knn=0.2)]).splitlines()
    assert lines[0] == "| method | seeds | steps | k-NN |"
    mean, deviation = 100 * np.mean(values), 100 * np.std(values, ddof=1)
    assert lines[2] == f"| mae | 3 | 1234 ± 0 | {mean:.1f} ± {deviation:.1f} |"
    assert lines[3] == "| pixels | 1 |  | 20.0 |"


def test_table__other_settings_are_no_seeds_of_a_row() -> None:
    """One mean over two learning rates would say nothing of either."""
    rates = [(0, 1e-3, 0.1), (0, 3e-4, 0.2), (1, 3e-4, 0.4)]
    made = [
        record("mae", seed, knn=knn, training={"learning_rate": rate, "beta1": 0.9})
        for seed, rate, knn in rates
    ]
    assert report.table(made).splitlines()[2:] == [
        "| mae, learning_rate 0.001 | 1 | 10.0 |",
        "| mae, learning_rate 0.0003 | 2 | 30.0 ± 14.1 |",
    ]


@pytest.mark.parametrize("name", report.SETTING[1:])
def test_table__each_part_of_a_setting_tells_rows_apart(name: str) -> None:
    values: list[Any] = [{"learning_rate": 1}, {"learning_rate": 2}] if name == "training" else [[1], [2]]
    made = [record("mae", seed, knn=0.1, **{name: value}) for seed, value in enumerate(values)]
    assert len(report.grouped(made)) == 2


def test_table__labels_make_rows_of_their_own() -> None:
    made = [record("mae", 0, knn=0.1), {**record("mae", 0, knn=0.3), "label": "rate 3e-3"}]
    assert [line.split("|")[1].strip() for line in report.table(made).splitlines()[2:]] == [
        "mae",
        "mae rate 3e-3",
    ]


def test_more_table__is_of_the_records_that_have_more_probes() -> None:
    made = [record("mae", 0, knn=0.1), record("mae", 1, knn=0.2, decoded_knn=0.3), record("beit", 0, knn=0.4)]
    cnn = record("cnn", 0, decoded_knn=0.25, stage2_linear=0.5, bn_knn=0.1)
    assert report.more_table([*made, cnn]).splitlines() == [
        "| method | seeds | decoded, k-NN | stage2, linear |",
        "| --- | ---: | ---: | ---: |",
        "| mae | 1 | 30.0 |  |",
        "| cnn | 1 | 25.0 | 50.0 |",
    ]
    assert report.more_table(made[::2]) == ""


def test_mean_curve__is_over_seeds_with_as_many_looks() -> None:
    def curve(*values: float) -> list[dict[str, float]]:
        return [{"step": n, "seconds": 10 * n, "knn": value} for n, value in enumerate(values)]

    made = [record("mae", 0, curve=curve(0.1, 0.3)), record("mae", 1, curve=curve(0.3, 0.5))]
    for found in (report.mean_curve(made), report.mean_curve([*made, record("mae", 2, curve=curve(0.9))])):
        np.testing.assert_allclose(found, [(0, 20), (10, 40)])
    assert report.mean_curve([record("random", 0, knn=0.3)]) == []
    assert report.curve_name("mae", made) == "mae"
    assert report.curve_name("mae", [*made, record("mae", 2, curve=curve(0.9))]) == "mae (2 of 3 seeds)"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 200, [0, 50, 100, 150, 200]), (31.2, 47.3, [30, 35, 40, 45, 50]), (3, 3, [2, 3, 4])],
)
def test_ticks__are_round_and_cover_all(low: float, high: float, expected: list[float]) -> None:
    assert chart.ticks(low, high) == expected


def test_chart__draws_each_line_where_its_points_are() -> None:
    lines = {"a": [(0.0, 0.0), (100.0, 100.0)], "b": [(0.0, 100.0), (100.0, 100.0)]}
    picture = np.asarray(chart.line_chart(lines, title="t", x_label="x", y_label="y"))
    middle = ((chart.LEFT + chart.RIGHT) // 2, (chart.TOP + chart.HEIGHT - chart.BOTTOM) // 2)
    near = picture[middle[1] - 3 : middle[1] + 4, middle[0] - 3 : middle[0] + 4].reshape(-1, 3)
    assert (near == chart.COLOURS[0]).all(axis=1).any()
    assert not (near == chart.COLOURS[1]).all(axis=1).any()
    top = picture[chart.TOP - 2 : chart.TOP + 3, middle[0]]
    assert (top == chart.COLOURS[1]).all(axis=1).any()


@pytest.mark.parametrize("letters", [1, 80])
def test_chart__long_names_are_not_cut(letters: int) -> None:
    lines = {"m" * letters: [(0.0, 0.0), (1.0, 1.0)]}
    picture = np.asarray(chart.line_chart(lines, title="", x_label="", y_label=""))
    name = (picture[: chart.TOP + 20, chart.RIGHT + chart.LEGEND :] != 255).any(axis=(0, 2)).nonzero()[0]
    assert letters * 8 < name[-1] - name[0] < letters * 16
    assert (picture[:, -20:] == 255).all()
