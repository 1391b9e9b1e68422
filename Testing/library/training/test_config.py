"""Configs: what one does not say, the one that it extends says; all that are shipped can be read and built."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from KA2ERSegment.build import build_model
from KA2ERSegment.encoders.foundation import Foundation
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import FoundationPlans, Plans
from KA2ERSegment.training.config import read_config

CONFIGS = Path(str(files("KA2ERSegment.training").joinpath("configs")))


def write(path: Path, settings: Any) -> Path:
    path.write_text(json.dumps(settings))
    return path


def test_objects_are_merged_and_the_rest_replaced(tmp_path: Path) -> None:
    write(tmp_path / "base.json", {"a": {"x": 1, "y": [1, 2], "z": 3}, "b": 1, "c": {"k": 1}})
    write(tmp_path / "middle.json", {"extends": "base.json", "a": {"y": [3]}, "d": 4})
    path = write(tmp_path / "top.json", {"extends": "middle.json", "a": {"z": None}, "b": 2, "c": 5})

    assert read_config(path) == {"a": {"x": 1, "y": [3]}, "b": 2, "c": 5, "d": 4}


def test_a_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "one.json", {"extends": "two.json"})
    path = write(tmp_path / "two.json", {"extends": "one.json"})

    with pytest.raises(BundleError, match="must not extend itself"):
        read_config(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be JSON"),
        ("[1]", "must be a JSON object, got list"),
        ('{"gate": {"batch": 2}, "gate": {"cases": 9}}', "'gate' is there twice"),
    ],
)
def test_what_is_no_config_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)

    with pytest.raises(BundleError, match=words):
        read_config(path)


def test_training_on_a_gpu_holds_subjects_out() -> None:
    """Shares, gates, votes and temperatures are then chosen on subjects that no stage learns from."""
    assert read_config(CONFIGS / "gpu.json")["held_out"] == read_config(CONFIGS / "ssl48.json")["held_out"] == 8


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_config_says_all_that_training_needs(path: Path) -> None:
    settings = read_config(path)
    plans = Plans.from_json(settings["plans"])

    assert {"manifests", "share_alike", "tasks", "expert", "foundation", "amalgamation", "sampling"} <= settings.keys()
    assert [expert.name for expert in plans.experts] == list(settings["tasks"])
    if path.name != "ssl48.json":  # 20 MB: the next test builds its foundation
        assert sum(value.numel() for value in build_model(plans).parameters()) * 2 < 16e6, "larger than may be shipped"


def test_the_gpu_has_larger_batches_and_the_bundles_of_the_cpu() -> None:
    cpu, gpu = read_config(CONFIGS / "cpu.json"), read_config(CONFIGS / "gpu.json")

    assert gpu["plans"] == cpu["plans"], "else --start could not begin from the shipped bundle"
    for stage in ("foundation", "amalgamation", "specialists", "gate", "voting"):
        assert gpu[stage]["batch"] >= 16
        assert gpu[stage]["clicks"] == 4
        assert gpu[stage].get("accumulate", 1) == 1
    for stage in ("expert", "foundation", "amalgamation", "specialists"):
        assert gpu[stage]["average"] == 0.999


def test_ssl48_is_of_the_size_of_the_public_weights() -> None:
    settings = read_config(CONFIGS / "ssl48.json")
    plans = Plans.from_json(settings["plans"]).foundation

    assert plans == FoundationPlans(feature_size=48, window=7)
    with torch.no_grad():
        features = Foundation(plans)(torch.zeros(1, 1, 64, 64, 64))
    assert {stride: feature.shape[1] for stride, feature in features.items()} == {2: 48, 4: 96, 8: 192, 16: 384}
    assert settings["foundation_weights"].keys() == {"file", "sha256"}
