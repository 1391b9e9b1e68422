"""The command that makes the table of `docs/results.md`, with a tiny bundle."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.testing import tiny_bundle

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "ablation_table.py"


@pytest.fixture(scope="module")
def script() -> Any:
    import sys

    spec = importlib.util.spec_from_file_location("ablation_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation_table"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def a_data_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "permissive"
    folder.mkdir(parents=True)
    labels = np.zeros((14, 18, 22), dtype=np.uint8)
    labels[3:10, 4:14, 5:17] = 1
    image = labels * 150 + np.random.default_rng(0).normal(0, 9, labels.shape)
    affine = np.diag([1.0, 1.2, 2.5, 1.0])
    nibabel.Nifti1Image(image.T.astype(np.int16), affine).to_filename(folder / "img.nii.gz")
    nibabel.Nifti1Image(labels.T, affine).to_filename(folder / "lbl.nii.gz")
    (folder / "names.json").write_text('{"1": "block"}')
    head = "id,split,has_image,images,label,labels_json,source_repo,subject"
    (folder / "manifest.csv").write_text(f"{head}\na,val,yes,img.nii.gz,lbl.nii.gz,names.json,group/a,a\n")
    return tmp_path / "data"


def test_rows_are_named_bundles_with_systems_off(script: Any) -> None:
    row = script.Row.parse("no gate=some/folder:gate,voting")
    assert (row.name, row.bundle, row.off) == ("no gate", Path("some/folder"), ("gate", "voting"))
    assert script.Row.parse("all=some/folder").off == ()
    assert script.Row.parse("growcut").bundle is None
    for wrong in ("some/folder", "all=some/folder:everything", "=folder"):
        with pytest.raises(argparse.ArgumentTypeError, match="name=bundle"):
            script.Row.parse(wrong)


def test_tables_and_pictures_of_two_rows_and_nothing_is_run_twice(
    script: Any, a_data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    bundle = tiny_bundle(tmp_path / "tiny")
    words = [f"foundation={bundle.folder}:experts", f"all={bundle.folder}", "--modes", "clicks"]
    words += ["--data", str(a_data_folder), "--output", str(tmp_path / "out"), "--device", "cpu"]
    script.main(words)
    found = json.loads((tmp_path / "out" / "clicks.json").read_text())
    assert [row["name"] for row in found["rows"]] == ["foundation", "all"]
    assert found["rows"][0]["method"].endswith(" without experts")
    assert found["rows"][1]["about"]["parameters"] > 1000
    assert "| all |" in (tmp_path / "out" / "clicks.md").read_text()
    assert (tmp_path / "out" / "clicks.png").stat().st_size > 1000
    capsys.readouterr()
    script.main(words)
    assert capsys.readouterr().out.count("done before") == 2
    with pytest.raises(KA2ERError, match="got other values of max_objects_per_item"):
        script.main([*words, "--max-objects-per-item", "2"])
    tiny_bundle(
        tmp_path / "tiny", seed=1
    )  # another bundle in the same place: its results must not pass for the old ones
    with pytest.raises(KA2ERError, match="got other values of method"):
        script.main(words)


def test_times_of_rows_are_measured_in_turn_and_nothing_is_evaluated(script: Any, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny").folder
    script.main([f"all={bundle}", f"bare={bundle}:experts", "--times", "1", "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "times.json").read_text())["rows"]
    assert list(found) == ["all", "bare"]
    assert all(row["seconds_per_patch"] > 0 and row["seconds_per_click"] > 0 for row in found.values())
    assert (tmp_path / "out" / "times.md").read_text().count("\n") == 4
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"times.json", "times.md"}
