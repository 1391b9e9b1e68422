"""The kit for a lent machine: what its script finds out, what comes back, and what the next call goes on from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PYTHON = """#!/bin/sh
# In Python's place: what it is asked is done, but training only leaves what training leaves.
case "$*" in
  "-m KA2ERSegment.training"*)
    echo "$*" > called
    [ -e runs/gpu/amalgamation/last.ckpt ] && cp runs/gpu/amalgamation/last.ckpt begun-from
    mkdir -p runs/gpu/amalgamation runs/gpu/bundle-unfinished
    head -c 17000000 /dev/zero > runs/gpu/amalgamation/last.ckpt
    echo '{}' > runs/gpu/bundle-unfinished/checksums.json
    echo '[]' > runs/gpu/log.json
    ;;
  "-c import KA2ERSegment.training.__main__") ;;
  *) exec PYTHON "$@" ;;
esac
"""


@pytest.fixture
def a_checkout(tmp_path: Path) -> Path:
    """What travels, small: the script, its list, a cache, and a Python that does not train."""
    folder = tmp_path / "checkout"
    (folder / "Testing" / "gpu").mkdir(parents=True)
    for name in ("train", "wheels.txt"):
        shutil.copy(ROOT / "Testing" / "gpu" / name, folder / "Testing" / "gpu")
    (folder / "cache" / "thin").mkdir(parents=True)
    (folder / "cache" / "thin" / "one.npz").touch()
    python = folder / "python"
    python.write_text(PYTHON.replace("PYTHON", sys.executable))
    python.chmod(0o755)
    return folder


def train(folder: Path, *options: str, python: str = "") -> subprocess.CompletedProcess[str]:
    command = ["bash", "Testing/gpu/train", "--results", "results", "--minutes", "5", *options]
    environment = os.environ | {"PYTHON": python or str(folder / "python")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


STAGE = ("--", "--config", "gpu.json", "--stage", "amalgamation")


def test_results_come_back_in_files_that_may_travel(a_checkout: Path) -> None:
    done = train(a_checkout, *STAGE)

    assert done.returncode == 0, done.stderr
    sizes = {path.name: path.stat().st_size for path in (a_checkout / "results").iterdir()}
    assert sizes.keys() == {"bundle-unfinished.tar.000", "log.json", "resume.000", "resume.001"}
    assert max(sizes.values()) <= 16 * 2**20
    called = (a_checkout / "called").read_text().split()
    assert called[2:6] == ["--config", "gpu.json", "--stage", "amalgamation"]
    assert {"--resume", "--compact"} <= set(called)
    assert 4 < float(called[called.index("--stop-after") + 1]) <= 5, "what has passed is taken off"


def test_the_next_machine_goes_on_from_the_parts(a_checkout: Path) -> None:
    train(a_checkout, *STAGE)
    shutil.rmtree(a_checkout / "runs")
    (a_checkout / ".resume").mkdir()
    for path in (a_checkout / "results").glob("resume.*"):
        shutil.move(path, a_checkout / ".resume")

    done = train(a_checkout, *STAGE)

    assert "going on from .resume" in done.stdout
    assert (a_checkout / "begun-from").stat().st_size == 17_000_000


def test_a_machine_that_cannot_train_is_told_why(a_checkout: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # no site-packages
    bare.chmod(0o755)

    for options, python, words in (
        (STAGE, str(bare), "torch and numpy must be there"),
        (STAGE, "no-such-python", "no no-such-python here"),
        (("--", "--config", "gpu.json"), "", "name one stage"),
        (("--colour", "red"), "", "unknown option --colour"),
    ):
        done = train(a_checkout, *options, python=python)
        assert done.returncode in (2, 3)
        assert words in done.stderr
    (a_checkout / "cache" / "thin" / "one.npz").unlink()
    assert "cache/thin is empty" in train(a_checkout, *STAGE).stderr
    assert not (a_checkout / "called").exists()


def test_a_wheel_that_was_not_carried_is_named(a_checkout: Path) -> None:
    with (a_checkout / "Testing" / "gpu" / "wheels.txt").open("a") as lines:
        lines.write("no-such-package-here\n")
    (a_checkout / ".whl").mkdir()

    done = train(a_checkout, *STAGE)

    assert done.returncode == 3
    assert "not in .whl: one of no-such-package-here" in done.stderr


def test_the_list_has_what_training_declares() -> None:
    """A new requirement of the library or of training must be thought about here too."""
    names = {line for line in (ROOT / "Testing/gpu/wheels.txt").read_text().split("\n") if line and line[0] != "#"}
    lines = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0].split("\n")
    declared = {line.strip(' ",').split(">")[0] for line in lines if line.strip().startswith('"')}

    not_for_training = {"blosc2", "nibabel", "numpy", "SimpleITK", "slicerio", "starlette", "torch", "uvicorn"}
    assert {name.split('"')[0] for name in declared} - not_for_training <= names
