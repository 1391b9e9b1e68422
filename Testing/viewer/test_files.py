"""Files into the page and out of it: dropped, as a DICOM folder, saved as DICOM SEG and as a scene."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SHAPE_KJI, SPACING = (26, 44, 40), (1.4, 1.2, 2.5)
CENTRE = np.array([12.0, -30.0, 55.0])
"""Of the ball in the middle of the series, RAS mm."""
RADIUS = 14.0


@pytest.fixture
def an_oblique_series(write_series: Callable[..., list[Path]], tmp_path: Path) -> list[Path]:
    """A bright ball in the middle of a CT that is turned about two axes; anisotropic."""
    a, b = np.deg2rad((20, -15))
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]) @ turn
    affine = np.eye(4)
    affine[:3, :3] = turn * SPACING
    affine[:3, 3] = CENTRE - affine[:3, :3] @ ((np.array(SHAPE_KJI[::-1]) - 1) / 2)
    kji = np.moveaxis(np.indices(SHAPE_KJI), 0, -1)
    world = kji[..., ::-1] @ affine[:3, :3].T + affine[:3, 3]
    array = np.where(np.linalg.norm(world - CENTRE, axis=-1) < RADIUS, 160, -60)
    array = array + np.random.default_rng(0).integers(-8, 8, SHAPE_KJI)
    return write_series(tmp_path / "series", array.astype(np.int16), affine)


def a_zip(files: list[Path]) -> Path:
    path = files[0].parent.with_name("series.zip")
    with zipfile.ZipFile(path, "w") as packed:
        for file in files:
            packed.write(file, f"series/{file.name}")
    return path


def click_the_middle(tab: Any) -> None:
    box = tab.page.locator(".view-Red").bounding_box()
    tab.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.still()
    assert tab.state("prompt_count") == 1


def drop(tab: Any, paths: list[Path]) -> None:
    """As from the desktop: real files, with the folders that they are in.

    A hand is over the page before it lets go: a page that was not asked yet whether it takes them gets none.
    """
    devtools = tab.page.context.new_cdp_session(tab.page)
    for kind in ("dragEnter", *["dragOver"] * 3, "drop"):
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        devtools.send("Input.dispatchDragEvent", {"type": kind, "x": 700, "y": 300, "data": data})
        tab.page.wait_for_timeout(50)


def test_zip_of_dicom_files_is_opened_as_one_volume(a_tab: Any, an_oblique_series: list[Path]) -> None:
    a_tab.open(a_zip(an_oblique_series))

    a_tab.until(lambda: "Slices" in a_tab.state("volume_name"))
    a_tab.still()
    assert a_tab.page.locator(".message").count() == 0
    assert a_tab.picture("Red").max() > 100


def test_dicom_segmentation_lies_on_its_series_under_its_names(
    a_tab: Any, an_oblique_series: list[Path], tmp_path: Path
) -> None:
    import highdicom
    import pydicom

    a_tab.open(a_zip(an_oblique_series))
    a_tab.until(lambda: "Slices" in a_tab.state("volume_name"))
    click_the_middle(a_tab)
    segment = a_tab.state("segments")[0]["id"]
    a_tab.page.evaluate(f"window.trame.trigger('renameSegment', ['{segment}', 'Liver'])")
    a_tab.until(lambda: a_tab.state("segments")[0]["name"] == "Liver")

    read = highdicom.seg.segread(a_tab.save("seg.dcm", tmp_path))

    slices = [pydicom.dcmread(file) for file in an_oblique_series]
    assert read.StudyInstanceUID == slices[0].StudyInstanceUID
    (described,) = read.SegmentSequence
    assert (described.SegmentLabel, described.segmented_property_type.meaning) == ("Liver", "Liver")
    places = {tuple(one.ImagePositionPatient) for one in slices}
    frames = read.PerFrameFunctionalGroupsSequence
    assert {tuple(one.PlanePositionSequence[0].ImagePositionPatient) for one in frames} <= places
    assert (int(read.Rows), int(read.Columns)) == SHAPE_KJI[1:]
    volume = read.get_volume(segment_numbers=[1], combine_segments=True)
    filled = np.argwhere(np.asarray(volume.array) > 0)
    middle = (filled @ volume.affine[:3, :3].T + volume.affine[:3, 3]).mean(axis=0) * (-1, -1, 1)
    assert np.linalg.norm(middle - CENTRE) < 6
    assert len(filled) == a_tab.voxels("Liver").sum()


def test_dicom_segmentation_is_offered_for_dicom_alone(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)

    a_tab.page.locator(".save-button").click()
    a_tab.page.locator('[data-save="seg.nrrd"]').wait_for()

    assert not a_tab.page.locator('[data-save="seg.dcm"]').is_visible()


def test_dropped_file_is_opened(a_tab: Any, a_phantom: Path, tmp_path: Path) -> None:
    path = tmp_path / "dropped.nii.gz"
    path.write_bytes(a_phantom.read_bytes())

    drop(a_tab, [path])

    a_tab.until(lambda: a_tab.state("volume_name") == "dropped")
    a_tab.still()
    assert a_tab.picture("Red").max() > 100


def test_dropped_folder_is_opened_as_a_series(a_tab: Any, an_oblique_series: list[Path]) -> None:
    drop(a_tab, [an_oblique_series[0].parent])

    a_tab.until(lambda: "Slices" in a_tab.state("volume_name"))
    assert a_tab.state("from_dicom")
    assert a_tab.state("error") == ""


def test_volume_after_an_oblique_one_is_shown_along_its_own_axes(
    a_tab: Any, a_phantom: Path, an_oblique_series: list[Path]
) -> None:
    a_tab.open(a_zip(an_oblique_series))
    a_tab.until(lambda: "Slices" in a_tab.state("volume_name"))

    a_tab.open(a_phantom)
    a_tab.until(lambda: a_tab.state("volume_name") == "ball")
    a_tab.still()

    a_tab.page.locator(".view-Red .remote-controlled-area").focus()
    a_tab.press("ArrowRight")
    r, a, s = a_tab.cursor()
    a_tab.press("Shift+ArrowUp")
    moved = np.subtract(a_tab.cursor(), (r, a, s))
    assert moved[1] > 10
    assert np.allclose(moved[[0, 2]], 0, atol=0.2)


def test_saved_prompts_make_the_same_mask_at_the_command_line(a_tab: Any, a_phantom: Path, tmp_path: Path) -> None:
    import nibabel

    r, a, s = a_tab.BALL
    a_tab.click("Red", a_tab.BALL)
    a_tab.press("n")
    a_tab.click("Red", (r + 0.6 * a_tab.RADIUS, a, s))
    prompts, labels = a_tab.save("json", tmp_path), a_tab.save("nii.gz", tmp_path)

    again = tmp_path / "again.nii.gz"
    command = [sys.executable, "-m", "KA2ERSegment.cli", "segment", str(a_phantom)]
    command += ["--output", str(again), "--prompts", str(prompts), "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True, timeout=a_tab.PATIENCE)

    seen, made = (np.asarray(nibabel.load(path).dataobj) > 0 for path in (labels, again))
    assert seen.any()
    assert 2 * (seen & made).sum() / (seen.sum() + made.sum()) > 0.99


READ_SCENE = """
import json, sys
import numpy as np
import slicer, vtk
from trame_slicer.core import SlicerApp
from vtk.util.numpy_support import vtk_to_numpy

application = SlicerApp()
scene = application.scene
assert scene.ReadFromMRB(sys.argv[1], True)
one = lambda kind: [scene.GetNthNodeByClass(n, kind) for n in range(scene.GetNumberOfNodesByClass(kind))]
(volume,) = [node for node in one("vtkMRMLScalarVolumeNode") if not node.IsA("vtkMRMLLabelMapVolumeNode")]
(segmentation,) = one("vtkMRMLSegmentationNode")
matrix = vtk.vtkMatrix4x4()
volume.GetIJKToRASMatrix(matrix)
segments = {}
for n in range(segmentation.GetSegmentation().GetNumberOfSegments()):
    segment = segmentation.GetSegmentation().GetNthSegment(n)
    image, to_world = segment.GetRepresentation("Binary labelmap"), vtk.vtkMatrix4x4()
    image.GetImageToWorldMatrix(to_world)
    low = np.array(image.GetExtent()[::2])
    array = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(image.GetDimensions()[::-1])
    ijk = np.argwhere(array == segment.GetLabelValue())[:, ::-1] + low
    to_world = np.array([[to_world.GetElement(r, c) for c in range(4)] for r in range(4)])
    middle = (ijk @ to_world[:3, :3].T + to_world[:3, 3]).mean(axis=0)
    segments[segment.GetName()] = [len(ijk), middle.tolist(), list(segment.GetColor())]
points = []
for node in one("vtkMRMLMarkupsNode"):
    for n in range(node.GetNumberOfControlPoints()):
        points.append(list(node.GetNthControlPointPositionWorld(n)))
print("READ " + json.dumps({
    "volume": volume.GetName(),
    "size": list(volume.GetImageData().GetDimensions()),
    "affine": [[matrix.GetElement(r, c) for c in range(4)] for r in range(4)],
    "segments": segments,
    "points": points,
}))
"""
"""Reads a scene in a Slicer of its own that knows nothing of us."""


def test_saved_scene_opens_in_slicer_with_volume_segments_and_prompts(
    a_tab: Any, a_phantom: Path, tmp_path: Path
) -> None:
    import nibabel

    r, a, s = a_tab.BALL
    marked = (r, a, a_tab.state("slice_Red"))
    a_tab.click("Red", marked)
    a_tab.press("e")
    a_tab.click("Green", (r + 30, a, s + 20))
    counts = {name: int(a_tab.voxels(name).sum()) for name in ("Segment_1", "Segment_2")}
    path = a_tab.save("mrb", tmp_path)

    command = [sys.executable, "-c", READ_SCENE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=a_tab.PATIENCE, check=False)

    (line,) = [line for line in done.stdout.splitlines() if line.startswith("READ ")] or [done.stderr[-2000:]]
    read = json.loads(line.removeprefix("READ "))
    image = nibabel.load(a_phantom)
    assert (read["volume"], tuple(read["size"])) == ("ball", image.shape)
    assert np.allclose(read["affine"], image.affine, atol=1e-4)
    assert {name: found[0] for name, found in read["segments"].items()} == counts
    assert np.linalg.norm(np.subtract(read["segments"]["Segment_1"][1], a_tab.BALL)) < 6
    colors = {row["name"]: row["color"] for row in a_tab.state("segments")}
    for name, (_, _, color) in read["segments"].items():
        assert "#" + "".join(f"{round(255 * part):02x}" for part in color) == colors[name]
    assert any(np.linalg.norm(np.subtract(point, marked)) < 2 for point in read["points"]), (marked, read["points"])
    assert len(read["points"]) == 2
