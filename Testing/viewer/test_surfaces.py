"""Surfaces of segments in the 3D view."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("trame_slicer")

import slicer
import vtk.util.numpy_support

from KA2ERViewer.shared import use_shared_code

use_shared_code()

from KA2ERViewer.page.surfaces import MANY, surface_of  # noqa: E402

ORGAN, LESION, NOBODY = 1, 2, 3
SPACING = (0.8, 1.0, 5.0)
FIRST = (7, -4, 3)
"""Index of the labelmap's first voxel."""


def a_shared_labelmap(lesion: tuple[slice, slice, slice]) -> Any:
    """A large organ and a lesion in it (K, J, I)."""
    labels = np.zeros((40, 200, 200), np.uint8)
    labels[2:38, 5:195, 4:194] = ORGAN
    labels[lesion] = LESION
    assert (labels == ORGAN).sum() > MANY
    return a_labelmap(labels)


def a_labelmap(labels: np.ndarray) -> Any:
    (k, j, i), (i0, j0, k0) = labels.shape, FIRST
    image = slicer.vtkOrientedImageData()
    image.SetExtent(i0, i0 + i - 1, j0, j0 + j - 1, k0, k0 + k - 1)
    image.SetSpacing(SPACING)
    image.GetPointData().SetScalars(vtk.util.numpy_support.numpy_to_vtk(labels.ravel(), deep=True))
    return image


def faces(lesion: tuple[slice, slice, slice]) -> np.ndarray:
    """Where the voxels of a lesion begin and end along I, J and K, in millimetres."""
    ends = [(part.start - 0.5, part.stop - 0.5) for part in lesion[::-1]]
    return np.array([[(n + first) * mm for n in two] for two, first, mm in zip(ends, FIRST, SPACING, strict=True)])


@pytest.mark.parametrize("k", [20, 21])
def test_lesion_in_one_slice_of_a_large_organ_is_shown(k: int) -> None:
    lesion = (slice(k, k + 1), slice(60, 90), slice(61, 88))

    bounds = np.reshape(surface_of(a_shared_labelmap(lesion), LESION).GetBounds(), (3, 2))

    np.testing.assert_allclose(bounds, faces(lesion), atol=0.6)


def test_large_organ_is_where_its_voxels_are() -> None:
    image = a_shared_labelmap((slice(0, 1), slice(0, 1), slice(0, 1)))

    bounds = np.reshape(surface_of(image, ORGAN).GetBounds(), (3, 2))

    voxels = np.array(SPACING)[:, None]
    np.testing.assert_array_less(abs(bounds - faces((slice(2, 38), slice(5, 195), slice(4, 194)))) / voxels, 1.6)


def test_label_that_no_voxel_has_gives_no_surface() -> None:
    image = a_shared_labelmap((slice(0, 1), slice(0, 1), slice(0, 1)))

    assert surface_of(image, NOBODY).GetNumberOfPoints() == 0


@pytest.mark.parametrize("i", [100, 101])
def test_thin_sheet_over_a_large_box_has_no_holes(i: int) -> None:
    labels = np.zeros((40, 200, 200), np.uint8)
    labels[1:39, 1:199, i] = LESION
    labels[20, 100, :] = LESION  # its box is the whole width
    assert labels.size > MANY

    points = vtk.util.numpy_support.vtk_to_numpy(surface_of(a_labelmap(labels), LESION).GetPoints().GetData())

    points = points / SPACING - FIRST
    sheet = points[abs(points[:, 0] - i) < 3]
    found = np.histogram2d(sheet[:, 1], sheet[:, 2], bins=(40, 10), range=((4, 195), (3, 36)))[0]
    assert (found > 0).all()
