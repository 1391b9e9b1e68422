"""`Volume`: what it refuses, and that its canonical view moves no voxel in patient space."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from KA2ERSegment import Volume
from KA2ERSegment.errors import GeometryError, VolumeError
from KA2ERSegment.geometry import Box, apply_affine


@st.composite
def affines(draw):
    """Oblique, anisotropic, permuted and flipped; every second one is left-handed."""
    angles = [draw(st.floats(-44, 44)) for _ in range(3)]
    spacing = [draw(st.floats(0.3, 6)) for _ in range(3)]
    signs = [draw(st.sampled_from([-1, 1])) for _ in range(3)]
    order = draw(st.permutations([0, 1, 2]))
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()[:, order] * signs * spacing
    matrix[:3, 3] = [draw(st.floats(-300, 300)) for _ in range(3)]
    return matrix


@st.composite
def volumes(draw):
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(2, 5)))
    return Volume(np.arange(np.prod(shape)).reshape(shape), draw(affines()))


def _two():
    return np.array([[[0, 1]]])


def where_and_what(volume):
    """RAS position and value of every voxel, sorted by value (values are unique in `volumes`)."""
    ijk = np.argwhere(np.ones(volume.shape_kji))[:, ::-1]
    values = volume.array_kji[tuple(ijk[:, ::-1].T)]
    order = np.argsort(values)
    return apply_affine(volume.ijk_to_ras, ijk)[order], values[order]


@given(volumes())
def test_the_canonical_view_keeps_every_voxels_place_and_value(volume):
    canonical = volume.canonical()
    places, values = where_and_what(volume)
    canonical_places, canonical_values = where_and_what(canonical)
    assert np.array_equal(values, canonical_values)
    assert np.allclose(places, canonical_places, atol=1e-9)
    assert np.shares_memory(volume.array_kji, canonical.array_kji)
    assert canonical.name == volume.name


@given(volumes())
def test_canonical_axes_run_towards_right_anterior_superior(volume):
    canonical = volume.canonical()
    directions = canonical.ijk_to_ras[:3, :3] / canonical.spacing
    assert (np.diag(directions) > 0).all()
    assert sorted(canonical.spacing) == pytest.approx(sorted(volume.spacing))
    again = canonical.canonical()
    assert np.array_equal(again.array_kji, canonical.array_kji)
    assert np.array_equal(again.ijk_to_ras, canonical.ijk_to_ras)


@given(volumes(), st.data())
def test_a_canonical_box_comes_back_to_the_same_voxels(volume, data):
    canonical = volume.canonical()
    start = tuple(data.draw(st.integers(0, n - 1)) for n in canonical.shape_ijk)
    stop = tuple(data.draw(st.integers(a + 1, n)) for a, n in zip(start, canonical.shape_ijk, strict=True))
    box = Box(start, stop)
    own = volume.from_canonical_box(box)
    assert set(own.crop(volume.array_kji).flat) == set(box.crop(canonical.array_kji).flat)
    assert own.size == box.size


@given(volumes())
def test_writing_through_the_canonical_view_reaches_the_same_voxels(volume):
    mask = np.zeros(volume.shape_kji, bool)
    chosen = volume.canonical().array_kji % 3 == 0
    volume.to_canonical(mask)[chosen] = True
    assert np.array_equal(mask, volume.array_kji % 3 == 0)


@given(affines(), st.tuples(*[st.floats(-50, 50)] * 3))
@settings(max_examples=50)
def test_ras_to_ijk_undoes_ijk_to_ras(matrix, ijk):
    volume = Volume(_two(), matrix)
    ras = apply_affine(volume.ijk_to_ras, ijk)
    assert apply_affine(volume.ras_to_ijk, ras) == pytest.approx(np.array(ijk), abs=1e-6)


def test_shape_and_spacing_are_in_the_order_that_they_name():
    volume = Volume(np.arange(24).reshape(2, 3, 4), np.diag([0.5, 0.75, -3, 1]), name="ct")
    assert volume.shape_kji == (2, 3, 4)
    assert volume.shape_ijk == (4, 3, 2)
    assert volume.spacing == (0.5, 0.75, 3)
    assert volume.box == Box((0, 0, 0), (4, 3, 2))


def test_the_array_is_not_copied():
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    assert np.shares_memory(Volume(array, np.eye(4)).array_kji, array)


def test_voxels_do_not_show_in_the_text_of_a_volume():
    assert repr(Volume(_two(), np.eye(4), "ct")) == "Volume(name='ct')"


def test_same_grid_allows_rounding_and_nothing_more():
    volume = Volume(np.arange(6000).reshape(10, 20, 30), np.diag([0.5, 0.6, 2, 1]))
    matrix = volume.ijk_to_ras.copy()
    assert volume.same_grid((10, 20, 30), matrix.astype(np.float32))
    assert not volume.same_grid((30, 20, 10), matrix)
    matrix[0, 0] *= 1.01  # a quarter of a voxel at the far end
    assert not volume.same_grid((10, 20, 30), matrix)
    assert not volume.same_grid((10, 20, 30), volume.ijk_to_ras * np.nan)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.arange(6).reshape(2, 3), r"must be a 3D array \(K, J, I\), got shape \(2, 3\)"),
        (np.arange(24).reshape(1, 2, 3, 4), "must be a 3D array"),
        (np.zeros((0, 2, 3)), "must be a 3D array"),
        (np.ones((2, 3, 4), bool), "real numbers, got dtype bool"),
        (np.arange(24).reshape(2, 3, 4) * 1j, "real numbers, got dtype complex128"),
        (np.full((2, 3, 4), "a"), "real numbers"),
        (np.array([[[0, np.nan]]]), "NaN or infinite"),
        (np.array([[[0, np.inf]]]), "NaN or infinite"),
        (np.array([[[0, -np.inf]]], dtype=np.float16), "NaN or infinite"),
        (np.full((2, 3, 4), 7), "has the value 7 in every voxel"),
    ],
)
def test_images_that_cannot_be_segmented_are_refused(array, words):
    with pytest.raises(VolumeError, match=words) as error:
        Volume(array, np.eye(4), name="ct7")
    assert "'ct7'" in str(error.value)


def test_a_singular_affine_is_refused():
    with pytest.raises(GeometryError, match="spacing must be above zero"):
        Volume(_two(), np.diag([1, 1, 0, 1]))


def test_big_endian_and_unsigned_voxels_are_fine():
    for dtype in (">i2", "<u2", "u1", "f2", "f8", "i8"):
        assert Volume(np.arange(6, dtype=dtype).reshape(1, 2, 3), np.eye(4)).canonical().array_kji.dtype == dtype
