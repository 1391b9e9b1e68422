"""Comparing results: paired differences, intervals that cover, and refusals of what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner

from KA2ERSegment import comparison
from KA2ERSegment.cli import app
from KA2ERSegment.comparison import (
    OVERALL,
    SAME,
    Row,
    check_comparable,
    compare,
    differences,
    markdown,
    read_row,
    write_comparison,
)
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.evaluation import Evaluation, ObjectResult

SETTINGS = {"split": "val", "with_box": True, "max_objects_per_item": 2, "min_voxels": 20, "manifests": ["abc"]}


def a_result(item: str, auc: float, source: str = "s", label: int = 1, subject: str = "", **more: Any) -> ObjectResult:
    numbers = dict.fromkeys((f.name for f in fields(ObjectResult)), 0.5)
    words = {"item": item, "source": source, "label": label, "name": "x", "voxels": 100, "subject": subject}
    return ObjectResult(**{**numbers, **words, "dsc_auc": auc, **more})  # type: ignore[arg-type]


def a_row(name: str, results: list[ObjectResult], **settings: Any) -> Row:
    return Row(name, {**SETTINGS, "method": name, **settings}, {"parameters": 5e6}, tuple(results))


def shifted(results: list[ObjectResult], shifts: np.ndarray) -> list[ObjectResult]:
    return [replace(r, dsc_auc=r.dsc_auc + float(d)) for r, d in zip(results, shifts, strict=True)]


def test_objects_of_an_item_share_its_weight_and_sources_count_the_same() -> None:
    before = [a_result("a", 1, label=n) for n in range(3)] + [a_result("b", 1)] + [a_result("c", 2, source="t")]
    found = differences(a_row("x", before), a_row("y", shifted(before, np.array([0.3, 0.3, 0.6, 0.8, 1.0]))), "dsc_auc")
    assert found["s"].mean == pytest.approx((0.4 + 0.8) / 2)
    assert found[OVERALL].mean == pytest.approx((0.6 + 1.0) / 2)
    means = [a_row("", list(r)).sources[OVERALL]["dsc_auc"] for r in (before, shifted(before, np.arange(5)))]
    assert differences(a_row("x", before), a_row("y", shifted(before, np.arange(5))), "dsc_auc")[OVERALL].mean == (
        pytest.approx(means[1] - means[0])  # type: ignore[operator]
    )


def test_an_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Subjects differ by 0.2, two items each that go together: an interval over items would cover too seldom."""
    monkeypatch.setattr(comparison, "DRAWS", 400)
    rng = np.random.default_rng(0)
    before = [a_result(f"{n}{moment}", 1.0, subject=f"p{n}") for n in range(25) for moment in "ab"]
    covered, widths = 0, []
    for trial in range(200):
        effects = np.repeat(0.1 + rng.normal(0, 0.2, 25), 2)
        found = differences(a_row("x", before), a_row("y", shifted(before, effects)), "dsc_auc", seed=trial)["s"]
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.1 <= found.high
        widths.append(found.high - found.low)
    assert 0.88 <= covered / 200 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.2 / 5, rel=0.1)


def test_the_interval_is_that_of_scipys_bootstrap_over_subjects() -> None:
    before = [a_result(f"i{n}", 1.0) for n in range(12)]
    effects = np.random.default_rng(1).gamma(2, 0.1, 12)
    found = differences(a_row("x", before), a_row("y", shifted(before, effects)), "dsc_auc")["s"]
    theirs = stats.bootstrap((effects,), np.mean, method="percentile", n_resamples=4000, random_state=2)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)
    assert found.clear


def test_sources_that_disagree_widen_the_interval_over_sources() -> None:
    before = [a_result(f"{s}{n}", 1.0, source=s) for s in "abcdef" for n in range(6)]
    noise = np.random.default_rng(3).normal(0, 0.01, 36)
    same = differences(a_row("x", before), a_row("y", shifted(before, 0.2 + noise)), "dsc_auc")[OVERALL]
    apart = np.repeat([0.6, -0.2, 0.5, -0.1, 0.4, 0.0], 6) + noise
    mixed = differences(a_row("x", before), a_row("y", shifted(before, apart)), "dsc_auc")[OVERALL]
    assert same.mean == pytest.approx(mixed.mean, abs=0.01)
    assert same.clear
    assert not mixed.clear


def test_few_subjects_are_marked_and_of_few_objects_there_is_no_interval() -> None:
    before = [a_result("a", 1, label=n) for n in range(8)] + [a_result(f"b{n}", 1, source="t") for n in range(4)]
    found = differences(a_row("x", before), a_row("y", shifted(before, np.full(12, 0.3))), "dsc_auc")
    assert found["s"].few
    assert found["s"].low == pytest.approx(0.3)
    assert found["t"].few
    assert found["t"].low is None
    assert not found["t"].clear
    assert found[OVERALL].low is None  # two sources


def test_what_cannot_be_compared_is_refused() -> None:
    results = [a_result(f"i{n}", 1.0) for n in range(3)]
    first = a_row("all", results)
    with pytest.raises(KA2ERError, match="a name of its own"):
        check_comparable([first, first])
    with pytest.raises(KA2ERError, match="same objects; 'less' and 'all' differ in \\['i2 label 1'\\]"):
        compare([first, a_row("less", results[:2])])
    with pytest.raises(KA2ERError, match="'clicks' differs from 'all' in with_box"):
        compare([first, a_row("clicks", results, with_box=False)])
    for key in SAME:
        with pytest.raises(KA2ERError, match=key):
            check_comparable([first, a_row("other", results, **{key: "else"})])


def saved(folder: Path, results: list[ObjectResult], complete: bool = True) -> Path:
    Evaluation({**SETTINGS, "method": folder.name}, tuple(results), (), complete, {"parameters": 5658409}).save(folder)
    return folder


def test_folders_of_evaluate_become_tables(tmp_path: Path) -> None:
    before = [a_result(f"{s}{n}", 1.0, source=s, subject=f"{s}{n}") for s in "abcdef" for n in range(6)]
    worse = shifted(before, np.full(36, -0.25))
    rows = [read_row(str(saved(tmp_path / "full", before))), read_row(f"no gate={saved(tmp_path / 'x', worse)}")]
    assert [row.name for row in rows] == ["full", "no gate"]
    assert rows[1].results == tuple(worse)
    found = compare(rows)
    text = markdown(found)
    assert "| no gate | 0.750 (**-0.250, -0.250 to -0.250**) | 0.500 (+0.000, +0.000 to +0.000) |" in text
    assert "| 5.66 M |  | 0.50 |" in text
    assert "| c | 1.000 | 0.750 (**-0.250, -0.250 to -0.250**) |" in text
    write_comparison(found, tmp_path / "out" / "table.md")
    assert (tmp_path / "out" / "table.md").read_text() == text
    assert json.loads((tmp_path / "out" / "table.json").read_text()) == found

    words = ["compare", str(tmp_path / "full"), f"no gate={tmp_path / 'x'}", "--output"]
    result = CliRunner().invoke(app, [*words, str(tmp_path / "again.md")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.md").read_text() == text
    assert CliRunner().invoke(app, [*words, str(tmp_path / "again.txt")]).exit_code == 2
    assert CliRunner().invoke(app, ["compare", *[str(tmp_path / "full")] * 2]).exit_code == 1


def test_without_a_box_there_is_no_column_for_it() -> None:
    before = [a_result(f"i{n}", 1.0, box_dice=None) for n in range(5)]
    rows = [a_row(name, before, with_box=False) for name in "xy"]
    assert "Dice, box" not in markdown(compare(rows))


def test_folders_without_whole_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KA2ERError, match="ka2ersegment evaluate"):
        read_row(str(tmp_path / "none"))
    with pytest.raises(KA2ERError, match="interrupted run"):
        read_row(str(saved(tmp_path / "part", [a_result("a", 1.0)], complete=False)))
