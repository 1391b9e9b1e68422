"""`ka2ersegment serve`, and `segment --engine` with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from KA2ERSegment.cli import app
from KA2ERSegment.engine.client import EngineClient
from KA2ERSegment.engine.wire import EngineError
from KA2ERSegment.image_files import read_image
from KA2ERSegment.volume import Volume


@pytest.fixture(scope="module")
def a_served(a_bundle: Path) -> Iterator[dict[str, Any]]:
    """What the program says about itself when it is ready."""
    command = [sys.executable, "-m", "KA2ERSegment.cli", "serve", "--port", "0", "--bundle", str(a_bundle)]
    with subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, encoding="utf-8") as process:
        yield json.loads(process.stdout.readline())
        process.terminate()


@pytest.fixture
def an_image(tmp_path: Path, an_oblique_volume: Volume) -> Path:
    path = tmp_path / "image.nii"
    nibabel.save(nibabel.Nifti1Image(an_oblique_volume.array_kji.T, an_oblique_volume.ijk_to_ras), path)
    return path


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, ["segment", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_engine_started_by_hand_makes_a_key_and_says_it_once(a_served: dict[str, Any]) -> None:
    assert len(a_served["api_key"]) >= 32
    assert EngineClient(a_served["url"], a_served["api_key"]).info()["protocol"] == 2
    with pytest.raises(EngineError, match="key"):
        EngineClient(a_served["url"]).info()


@pytest.mark.parametrize("file", ["mask.nii.gz", "mask.seg.nrrd"])
def test_engine_gives_the_files_that_this_machine_gives(
    a_served: dict[str, Any], a_bundle: Path, an_image: Path, tmp_path: Path, file: str
) -> None:
    prompts = ["--box", "6,7,3,19,18,10", "--point", "12,12,6", "--negative-point", "27,3,12"]
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    local = run(
        an_image, "-o", here / file, *prompts, "--bundle", a_bundle, "--device", "cpu", "--confidence", here / "maps"
    )
    engine = ["--engine", a_served["url"], "--api-key", a_served["api_key"]]

    remote = run(an_image, "-o", there / file, *prompts, *engine, "--confidence", there / "maps")

    assert remote["objects"] == local["objects"]
    assert remote["objects"]["object"]["voxels"] > 0
    assert remote["quality"] == local["quality"]
    assert remote["expert_weights"] == pytest.approx(local["expert_weights"], abs=1e-3)
    assert (there / file).read_bytes() == (here / file).read_bytes() or file.endswith("nrrd")
    maps = sorted(path.name for path in (here / "maps").iterdir())
    assert sorted(path.name for path in (there / "maps").iterdir()) == maps
    assert len(maps) >= 6
    for name in maps:
        np.testing.assert_allclose(
            read_image(there / "maps" / name)[0], read_image(here / "maps" / name)[0], atol=0.003
        )


def test_saved_prompts_are_replayed_by_an_engine(
    a_served: dict[str, Any], a_bundle: Path, an_image: Path, tmp_path: Path
) -> None:
    from KA2ERSegment.bundle import load_bundle
    from KA2ERSegment.prompts import PointPrompt
    from KA2ERSegment.session import Session

    session = Session(load_bundle(a_bundle), "cpu")
    session.set_volume(Volume.read(an_image))
    for n, name in enumerate(("liver", "spleen")):
        session.select(name)
        session.add(PointPrompt.from_ijk((12 + 6 * n, 12, 6), session.volume))
    session.save(tmp_path / "prompts.json")
    labels, names = session.label_map()

    done = run(
        an_image,
        "-o",
        tmp_path / "mask.nii.gz",
        "--prompts",
        tmp_path / "prompts.json",
        "--engine",
        a_served["url"],
        "--api-key",
        a_served["api_key"],
    )

    assert {name: entry["voxels"] for name, entry in done["objects"].items()} == {
        name: int((labels == value).sum()) for value, name in enumerate(names, 1)
    }


def test_segmenting_with_an_engine_loads_no_torch(a_served: dict[str, Any], an_image: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from KA2ERSegment.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    arguments = ["segment", an_image, "-o", tmp_path / "mask.nii.gz", "--point", "12,12,6", "--engine", a_served["url"]]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), "--api-key", a_served["api_key"]],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "voxels" in done.stdout


def test_engine_that_is_not_there_is_one_line(an_image: Path, tmp_path: Path) -> None:
    arguments = [an_image, "-o", tmp_path / "mask.nii.gz", "--point", "12,12,6", "--engine", "http://127.0.0.1:1"]
    done = CliRunner().invoke(app, ["segment", *map(str, arguments)])

    assert done.exit_code == 1
    assert "does not answer" in done.output


def test_engine_and_bundle_exclude_each_other(an_image: Path, tmp_path: Path) -> None:
    arguments = [an_image, "-o", tmp_path / "mask.nii.gz", "--point", "12,12,6", "--engine", "http://127.0.0.1:1"]
    done = CliRunner().invoke(app, ["segment", *map(str, arguments), "--bundle", str(tmp_path)])

    assert done.exit_code == 2
    assert "its own bundle" in done.output


def test_host_that_others_reach_needs_a_key() -> None:
    done = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0"])

    assert done.exit_code == 1
    assert "must have a key" in done.output
