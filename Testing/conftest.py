"""Fixtures named as things. Volumes are anisotropic and non-cubic: a cube with an identity affine hides axis swaps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from KA2ERSegment.volume import Volume

# Before torch is loaded, here and in what tests start. Sums of several threads round differently, after which a gate
# may choose another decoder: sessions and engines that are compared must have the same number. And threads that wait
# for each other are slow on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

SHAPE_KJI = (14, 22, 30)
SPACING_IJK = (0.8, 1.1, 2.5)  # mm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, saying so, where there is no CUDA. torch is only loaded when one is collected.

    The longest test comes first: with several processes, the others do the rest meanwhile.
    """
    items.sort(key=lambda item: item.path.name != "test_soak.py")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture
def an_array() -> np.ndarray:
    """(K, J, I) float32: a bright ellipsoid off the centre, 100 above noise of 5; no mirror image is the same."""
    return synthetic_array()


@pytest.fixture
def an_affine() -> np.ndarray:
    """Axes along R, A and S, anisotropic, the origin elsewhere."""
    return affine()


@pytest.fixture
def an_oblique_affine() -> np.ndarray:
    """Turned about two axes, so that no voxel axis runs along R, A or S."""
    return affine(degrees=(20, -35, 12))


@pytest.fixture
def a_volume(an_array: np.ndarray, an_affine: np.ndarray) -> Volume:
    """Axes along R, A and S; anisotropic, non-cubic."""
    return Volume(an_array, an_affine, "a volume")


@pytest.fixture
def an_oblique_volume(an_array: np.ndarray, an_oblique_affine: np.ndarray) -> Volume:
    """No voxel axis along R, A or S."""
    return Volume(an_array, an_oblique_affine, "an oblique volume")


@pytest.fixture
def a_left_handed_volume(an_array: np.ndarray) -> Volume:
    """Columns run from right to left: the determinant of the affine is negative."""
    return Volume(an_array, affine(flips=(-1, 1, 1)), "a left-handed volume")


@pytest.fixture
def an_oblique_left_handed_volume(an_array: np.ndarray) -> Volume:
    """Oblique, mirrored, and with K along A: what a coronal acquisition looks like."""
    return Volume(an_array, oblique_left_handed(), "an oblique left-handed volume")


@pytest.fixture(params=["aligned", "oblique", "left-handed", "oblique left-handed"])
def any_volume(request: pytest.FixtureRequest, an_array: np.ndarray) -> Volume:
    """Each of the four geometries in turn."""
    affines = {
        "aligned": affine(),
        "oblique": affine(degrees=(20, -35, 12)),
        "left-handed": affine(flips=(-1, 1, 1)),
        "oblique left-handed": oblique_left_handed(),
    }
    return Volume(an_array, affines[request.param], f"a volume, {request.param}")


@pytest.fixture
def a_mask(a_volume: Volume) -> np.ndarray:
    """(K, J, I) bool: the ellipsoid of the synthetic volumes, on the grid of each of them."""
    return ellipsoid(a_volume.shape_kji)


@pytest.fixture
def write_series() -> Callable[..., list[Path]]:
    """Writes a CT series, one file a slice: (folder, (K, J, I) int16, 4x4 to RAS mm, further header fields)."""
    return dicom_series


def dicom_series(folder: Path, array_kji: np.ndarray, ijk_to_ras: np.ndarray, **fields: object) -> list[Path]:
    """Files of the slices, in the order of K; their names are in another order."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ ijk_to_ras
    across, down = np.linalg.norm(lps[:3, :2], axis=0)
    series, frame, study = (generate_uid() for _ in range(3))
    folder.mkdir(exist_ok=True)
    files = []
    for k, voxels in enumerate(array_kji):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.Modality, data.SeriesDescription, data.PatientName, data.PatientID = "CT", "Slices", "Nobody", "0"
        data.PatientBirthDate = data.PatientSex = data.StudyDate = data.StudyTime = data.StudyID = ""
        data.AccessionNumber = data.ReferringPhysicianName = ""
        data.SeriesInstanceUID, data.FrameOfReferenceUID, data.StudyInstanceUID = series, frame, study
        data.InstanceNumber, data.SeriesNumber, data.AcquisitionNumber = k + 1, 3, 1
        data.ImagePositionPatient = [f"{x:.10g}" for x in lps[:3, 3] + k * lps[:3, 2]]
        axes = [*(lps[:3, 0] / across), *(lps[:3, 1] / down)]
        data.ImageOrientationPatient = [f"{x:.10f}" for x in axes]
        data.PixelSpacing = [f"{down:.10g}", f"{across:.10g}"]
        data.SliceThickness = f"{np.linalg.norm(lps[:3, 2]):.10g}"
        data.Rows, data.Columns = voxels.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = np.ascontiguousarray(voxels, np.int16).tobytes()
        for name, value in fields.items():
            setattr(data, name, value)
        files.append(folder / f"{(7 * k) % 101:03d}.dcm")
        pydicom.dcmwrite(files[-1], data, enforce_file_format=True)
    return files


def synthetic_array(shape_kji: tuple[int, int, int] = SHAPE_KJI, seed: int = 0) -> np.ndarray:
    """(K, J, I) float32: the ellipsoid at 100 over noise of standard deviation 5."""
    noise = np.random.default_rng(seed).normal(0, 5, shape_kji)
    return (noise + 100 * ellipsoid(shape_kji)).astype(np.float32)


def ellipsoid(shape_kji: tuple[int, int, int] = SHAPE_KJI) -> np.ndarray:
    """(K, J, I) bool: an ellipsoid with its centre off the middle along every axis."""
    size = np.array(shape_kji)
    centre, radii = size * (0.45, 0.55, 0.4), size * (0.25, 0.2, 0.22)
    kji = np.moveaxis(np.indices(shape_kji), 0, -1)
    return (((kji - centre) / radii) ** 2).sum(axis=-1) <= 1


def affine(
    degrees: tuple[float, float, float] = (0, 0, 0),
    flips: tuple[int, int, int] = (1, 1, 1),
    spacing_ijk: tuple[float, float, float] = SPACING_IJK,
    origin_ras: tuple[float, float, float] = (-31.5, 12.25, 140.0),
) -> np.ndarray:
    """4x4 from voxel index to RAS mm: voxel axes along R, A, S, mirrored by `flips`, turned about R, then A, then S."""
    matrix = np.eye(4)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(4)
        turn[[a, b], [a, b]] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    matrix[:3, :3] *= np.multiply(spacing_ijk, flips)
    matrix[:3, 3] = origin_ras
    return matrix


def oblique_left_handed() -> np.ndarray:
    """4x4, determinant below zero: I along R, J along -S, K along -A, turned a little."""
    matrix = affine(degrees=(-15, 25, 40))
    matrix[:3, :3] = matrix[:3, [0, 2, 1]] * (1, -1, -1)
    return matrix
