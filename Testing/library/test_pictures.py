"""Pictures: they are written, show every slice where it is, and need no display."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from KA2ERSegment import pictures
from KA2ERSegment.geometry import BoolArray
from KA2ERSegment.pictures import Opinions, picture_of_opinions, picture_of_prediction
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity, Prompt, ScribblePrompt
from KA2ERSegment.volume import Volume

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install ka2ersegment[pictures]")

# I runs to P, J to the left in 3 mm steps, K to the feet: nothing is where it would be without the affine.
AFFINE = np.array([[0, -3.0, 0, 40], [-1.0, 0, 0, 30], [0, 0, -1.5, 50], [0, 0, 0, 1]])
SHAPE = (30, 20, 50)


@pytest.fixture
def a_mask() -> BoolArray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[10:20, 6:14, 12:36] = True
    return mask


@pytest.fixture
def a_picture_volume(a_mask: BoolArray) -> Volume:
    return Volume(a_mask * 80.0 + np.random.default_rng(0).normal(0, 5, SHAPE), AFFINE)


def experts_of(mask: BoolArray, count: int) -> dict[str, Any]:
    probability = mask * 0.8
    return {f"expert{n}": SimpleNamespace(probability=probability, mean_weight=1 / count) for n in range(count)}


def saved_figure(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that the functions make, to look into them."""
    figures: list[Any] = []
    make = pictures._figure

    def keep(*words: Any) -> Any:
        figures.append(make(*words))
        return figures[-1]

    monkeypatch.setattr(pictures, "_figure", keep)
    return figures


@pytest.mark.parametrize("count", [0, 2, 4])
def test_picture_has_three_slices_and_one_map_per_expert(
    count: int, a_picture_volume: Volume, a_mask: BoolArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = saved_figure(monkeypatch)
    picture_of_prediction(tmp_path / "p.png", a_picture_volume, a_mask, [], experts_of(a_mask, count), reference=a_mask)
    titles = [axes.get_title() for axes in figures[0].axes if axes.get_title()]
    maps = [f"expert expert{n}, weight {100 / count:.0f} %" for n in range(count)]
    assert titles == ["axial", "coronal", "sagittal", *maps]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_slices_have_the_size_and_place_of_the_patient(
    a_picture_volume: Volume, a_mask: BoolArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = saved_figure(monkeypatch)
    picture_of_prediction(tmp_path / "p.png", a_picture_volume, a_mask, [], {})
    axial, coronal, sagittal = figures[0].axes[:3]
    for axes in (axial, coronal, sagittal):
        assert axes.get_aspect() == 1.0  # mm on both axes
        assert axes.get_xlim()[0] > axes.get_xlim()[1]  # mirrored: R, or A, on the left
        assert axes.get_ylim()[0] < axes.get_ylim()[1]
    assert [text.get_text() for text in axial.texts] == ["R", "L", "A", "P"]
    assert [text.get_text() for text in coronal.texts] == ["R", "L", "S", "I"]
    assert [text.get_text() for text in sagittal.texts] == ["A", "P", "S", "I"]
    # The block is 8 voxels of 3 mm from right to left, 24 of 1 mm front to back, 10 of 1.5 mm head to feet.
    for axes, size in ((axial, (24, 24)), (coronal, (24, 15)), (sagittal, (24, 15))):
        (contour,) = axes.collections
        ends = contour.get_paths()[0].vertices
        assert np.allclose(ends.max(axis=0) - ends.min(axis=0), size, atol=0.1)


def test_bright_voxel_is_shown_where_it_is_in_the_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bright block at the patient's right, front and head must be at the left and top of the pictures."""
    mask = np.zeros(SHAPE, dtype=bool)
    mask[2:6, 1:4, 3:9] = True  # small K, J, I: head, right, front by the affine
    array = np.random.default_rng(0).normal(0, 1, SHAPE)
    array[mask] += 100
    volume = Volume(array, AFFINE)
    assert (AFFINE @ (6, 2, 4, 1))[:3] @ (1, 1, 1) > (AFFINE @ (40, 15, 25, 1))[:3] @ (1, 1, 1)
    everything = BoxPrompt.from_ijk((0, 0, 0), SHAPE[::-1], volume)
    figures = saved_figure(monkeypatch)
    picture_of_prediction(tmp_path / "p.png", volume, mask, [everything], {})
    figure = figures[0]
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].min(axis=2)[::-1]  # bright in all channels: grey white
    for axes in figure.axes[:3]:
        box = axes.get_window_extent()
        inside = pixels[int(box.y0) + 4 : int(box.y1) - 4, int(box.x0) + 4 : int(box.x1) - 4]
        bright = np.argwhere(inside > 240)
        row, column = np.median(bright, axis=0) / inside.shape
        assert row > 0.5, axes.get_title()
        assert column < 0.5, axes.get_title()


def test_prompts_in_another_slice_are_fainter(
    a_picture_volume: Volume, a_mask: BoolArray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Prompt] = [
        PointPrompt.from_ijk((23, 9, 15), a_picture_volume),
        PointPrompt.from_ijk((2, 1, 1), a_picture_volume, Polarity.NEGATIVE),
        BoxPrompt.from_ijk((11, 5, 9), (37, 15, 21), a_picture_volume),
        ScribblePrompt.from_ijk([(15, 9, 15), (30, 9, 15)], a_picture_volume, radius=2.0),
    ]
    figures = saved_figure(monkeypatch)
    picture_of_prediction(tmp_path / "p.png", a_picture_volume, a_mask, prompts, {}, reference=None)
    axial = figures[0].axes[0]
    positive, negative = axial.lines
    assert (positive.get_marker(), positive.get_alpha()) == ("P", 1.0)
    assert (negative.get_marker(), negative.get_alpha()) == ("_", 0.4)
    (box,) = axial.patches
    assert (box.get_width(), box.get_height()) == (10 * 3.0, 26 * 1.0)
    labels = {text.get_text() for text in figures[0].legends[0].get_texts()}
    assert labels == {"mask", "box", "positive click", "negative click"}


def test_empty_mask_is_still_a_picture(a_picture_volume: Volume, tmp_path: Path) -> None:
    empty = np.zeros(SHAPE, dtype=bool)
    point = PointPrompt.from_ijk((0, 0, 0), a_picture_volume)
    picture_of_prediction(tmp_path / "p.png", a_picture_volume, empty, [point], experts_of(empty, 2))
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_opinions_are_a_row_for_each_case(
    tmp_path: Path, a_picture_volume: Volume, a_mask: BoolArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = saved_figure(monkeypatch)
    maps = {"foundation, weight 40 %": a_mask * 0.4, "disagreement": a_mask * 0.1}
    case = Opinions("heart: ventricle", a_picture_volume, a_mask, np.roll(a_mask, 2, axis=2), maps)
    picture_of_opinions(tmp_path / "o.png", [case, case])
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles == 2 * ["heart: ventricle", *maps]
    overlay = figures[0].axes[1].images[-1].get_array()
    assert overlay.max() == pytest.approx(0.4)


def test_importing_pictures_does_not_import_matplotlib() -> None:
    code = "import sys, KA2ERSegment.pictures; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "False"
