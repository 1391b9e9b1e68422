"""The whole way with a real engine in a process of its own: click, undo, overlays, cancel, killed, closed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slicer

from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.engine.process import LocalEngine
from KA2ERSegment.geometry import apply_affine
from KA2ERSegment.session import Session
from KA2ERSegment.testing import tiny_bundle
from KA2ERSegment.volume import Volume

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def a_bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "bundle"
    tiny_bundle(folder)
    return folder


@pytest.fixture
def a_local_engine(a_bundle_folder: Path) -> Iterator[LocalEngine]:
    engine = LocalEngine([sys.executable], a_bundle_folder, "cpu")
    yield engine
    engine.stop()


@pytest.fixture
def a_real_logic(a_scene: Any, a_volume_node: Any, a_local_engine: LocalEngine) -> Iterator[Any]:
    from SlicerKA2ERLib.PromptLogic import PromptLogic

    logic = PromptLogic(a_scene.scene, a_scene.applicationLogic)
    logic.connectEngine(lambda: a_local_engine)
    logic.setVolumeNode(a_volume_node)
    yield logic
    logic.close()


def centre(node: Any) -> list[float]:
    bounds = [0.0] * 6
    node.GetRASBounds(bounds)
    return [(bounds[2 * n] + bounds[2 * n + 1]) / 2 for n in range(3)]


def box_at(ras: Any, size: float) -> tuple[Any, Any]:
    return np.subtract(ras, size / 2), [(size, 0, 0), (0, size, 0), (0, 0, size)]


def test_from_click_to_saved_segment(a_real_logic, a_bundle_folder, a_scene, segment_array, value_at, wait):
    logic = a_real_logic
    here = centre(logic.volumeNode)
    logic.warmUp()
    wait(logic, seconds=90)
    assert logic.engineState == "ready"
    assert [row.name for row in logic.experts()] == ["foundation", "tiny_trunk", "tiny_brain"]

    logic.addBox(*box_at(here, 14), True)
    logic.addPoint(here, True)
    wait(logic, seconds=60)
    assert logic.lastError == ""
    two = segment_array(logic)
    assert two[tuple(round(0.5 * (n - 1)) for n in two.shape)]
    assert 0 <= logic.quality <= 1
    assert sum(row.share for row in logic.experts()) == pytest.approx(1, abs=0.02)

    logic.setExpertShown("tiny_trunk", True)
    logic.setDisagreementShown(True)
    logic.suggest()
    wait(logic, seconds=60)
    assert logic.lastError == ""
    volumes = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode", a_scene.scene)
    assert len(volumes) == 3
    there = logic._engine.link.session
    here_too = Session(load_bundle(a_bundle_folder), "cpu")
    here_too.set_volume(Volume(slicer.util.arrayFromVolume(logic.volumeNode), there.ijk_to_ras))
    here_too.give(there.to_json())
    expected = {"Tiny trunk probability": here_too.prediction.experts["tiny_trunk"].probability,
                "Disagreement": here_too.prediction.disagreement}  # fmt: skip
    places = apply_affine(there.ijk_to_ras, np.argwhere(np.ones(two.shape, dtype=bool))[:, ::-1])
    for node in volumes:
        if node is not logic.volumeNode:
            array = slicer.util.arrayFromVolume(node)
            assert 0 <= array.min() <= array.max() <= 1
            shown, said = value_at(node, places), expected[node.GetName()].ravel()
            assert np.isfinite(shown).sum() > 500
            np.testing.assert_allclose(shown[np.isfinite(shown)], said[np.isfinite(shown)], atol=0.004)

    logic.setFinish(2.0, False)
    wait(logic, seconds=60)
    assert logic.lastError == ""
    logic.undo()
    wait(logic, seconds=60)
    assert np.array_equal(segment_array(logic), two)
    logic.undo()
    wait(logic, seconds=60)
    assert [row.kind for row in logic.prompts()] == ["box"]
    logic.redo()
    wait(logic, seconds=60)
    assert np.array_equal(segment_array(logic), two)
    assert len(logic.prompts()) == 2


def test_two_segments_edits_and_moves_agree_with_the_engine(a_real_logic, a_scene, segment_array, wait):
    logic = a_real_logic
    here = centre(logic.volumeNode)
    logic.addBox(*box_at(here, 12), True)
    wait(logic, seconds=90)
    first = logic.selectedSegment
    before = segment_array(logic, first)
    second = logic.nextSegment()
    logic.addBox(*box_at(np.add(here, (5, 3, 0)), 12), True)
    wait(logic, seconds=60)
    assert logic.lastError == ""
    assert np.array_equal(segment_array(logic, first), before)
    assert not (segment_array(logic, first) & segment_array(logic, second)).any()

    array = segment_array(logic, second).astype(np.uint8)
    array[:3] = 1
    slicer.util.updateSegmentBinaryLabelmapFromArray(array, logic.segmentationNode, second, logic.volumeNode)
    logic.addPoint(np.add(here, (6, 3, 0)), True)
    wait(logic, seconds=60)
    node = next(iter(slicer.util.getNodesByClass("vtkMRMLMarkupsFiducialNode", a_scene.scene)))
    node.SetNthControlPointPositionWorld(0, *np.add(here, (6, 5, 0)))
    wait(logic, seconds=60)
    assert logic.lastError == ""

    session = logic._engine.link.session
    for name in (first, second):
        box, mask = session.mask(name)
        whole = np.zeros(before.shape, dtype=bool)
        whole[box.slices] = mask
        assert np.array_equal(segment_array(logic, name), whole)
    assert segment_array(logic, second)[:3].any()


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_killed_engine_is_replaced_and_nothing_is_lost(a_real_logic, a_local_engine, segment_array, wait):
    logic = a_real_logic
    here = centre(logic.volumeNode)
    logic.addBox(*box_at(here, 12), True)
    wait(logic, seconds=90)
    os.kill(a_local_engine._process.pid, signal.SIGKILL)

    logic.addPoint(here, True)
    wait(logic, seconds=90)

    assert logic.lastError == ""
    assert len(logic.prompts()) == 2
    logic.undo()
    logic.undo()
    wait(logic, seconds=60)
    assert segment_array(logic).sum() == 0


def test_refusal_of_the_engine_reaches_the_user_in_its_words(a_real_logic, wait):
    logic = a_real_logic
    here = centre(logic.volumeNode)
    logic.addPoint(here, True)
    wait(logic, seconds=90)
    logic.nextSegment()
    logic.addPoint(here, True)
    wait(logic, seconds=60)

    assert "a voxel can only belong to one object" in logic.lastError
    assert all(repr(row.name) in logic.lastError and row.id not in logic.lastError for row in logic.segments())
    assert logic.prompts() == []
