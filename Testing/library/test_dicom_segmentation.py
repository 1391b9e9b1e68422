"""DICOM SEG: read back with highdicom, voxels are where they were, and segments are called and coded what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from KA2ERSegment.cli import app
from KA2ERSegment.errors import VolumeError
from KA2ERSegment.image_files import LPS_FLIP, series_files
from KA2ERSegment.segmentation_files import write_segmentation
from KA2ERSegment.volume import Volume

highdicom = pytest.importorskip("highdicom", reason="needs the extra dicom")
from KA2ERSegment.dicom_segmentation import TISSUE, Code, Structure, series_headers, structure_of  # noqa: E402

WriteSeries = Callable[..., list[Path]]
NODULE = Structure(
    Code("49755003", "SCT", "Morphologically Abnormal Structure"), Code("27925004", "SCT", "Nodule"), None
)


@pytest.fixture
def a_series(any_volume: Volume, write_series: WriteSeries, tmp_path: Path) -> Path:
    """A folder with a CT series; oblique, anisotropic and mirrored ones in turn."""
    write_series(tmp_path / "series", any_volume.array_kji.astype(np.int16), any_volume.ijk_to_ras)
    return tmp_path / "series"


def some_masks(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    masks = {name: np.zeros(shape, bool) for name in ("Liver", "left kidney", "Fleck", "nothing")}
    masks["Liver"][2:6, 3:9, 4:20] = True
    masks["Liver"][6, 3, 4] = True  # no symmetric block: a flip would show
    masks["left kidney"][9:12, 12:15, 2:9] = True
    masks["Fleck"][11, 20, 28] = True
    return masks


def masks_on(volume: Volume, segmentation: Any) -> dict[str, np.ndarray]:
    """Masks of a read DICOM SEG on a volume's grid: each frame goes where its own plane lies."""
    found = {}
    for number in segmentation.segment_numbers:
        read = segmentation.get_volume(segment_numbers=[number], combine_segments=True)
        filled = np.argwhere(np.asarray(read.array) > 0)
        world = filled @ read.affine[:3, :3].T + read.affine[:3, 3]
        ijk = (world @ LPS_FLIP[:3, :3]) @ volume.ras_to_ijk[:3, :3].T + volume.ras_to_ijk[:3, 3]
        assert np.abs(ijk - ijk.round()).max(initial=0) < 0.02
        mask = np.zeros(volume.shape_kji, bool)
        mask[tuple(ijk.round().astype(int)[:, ::-1].T)] = True
        found[segmentation.get_segment_description(number).SegmentLabel] = mask
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_masks_come_back_where_they_were_under_their_names(a_series: Path, overlap: bool, tmp_path: Path) -> None:
    volume = Volume.read(a_series)
    masks = some_masks(volume.shape_kji)
    if overlap:
        masks["Fleck"][3:11, 5:14, 6:12] = True

    headers = series_headers(series_files(a_series))
    write_segmentation(tmp_path / "all.seg.dcm", masks, volume, headers=headers)

    read = highdicom.seg.segread(tmp_path / "all.seg.dcm")
    found = masks_on(volume, read)
    assert list(found) == list(masks)
    for name, mask in masks.items():
        assert (found[name] == mask).all(), name


def test_object_belongs_to_the_study_and_frames_refer_to_their_slices(a_series: Path, tmp_path: Path) -> None:
    volume = Volume.read(a_series)
    headers = series_headers(reversed(series_files(a_series)))
    masks = {"Fleck": some_masks(volume.shape_kji)["Fleck"]}

    write_segmentation(tmp_path / "a.seg.dcm", masks, volume, headers=headers)

    read = highdicom.seg.segread(tmp_path / "a.seg.dcm")
    assert read.StudyInstanceUID == headers[0].StudyInstanceUID
    assert read.FrameOfReferenceUID == headers[0].FrameOfReferenceUID
    assert read.PatientID == "0"
    assert read.SeriesInstanceUID != headers[0].SeriesInstanceUID
    (frame,) = read.PerFrameFunctionalGroupsSequence
    (source,) = frame.DerivationImageSequence[0].SourceImageSequence
    (slice_,) = [one for one in headers if one.SOPInstanceUID == source.ReferencedSOPInstanceUID]
    assert frame.PlanePositionSequence[0].ImagePositionPatient == slice_.ImagePositionPatient
    place = LPS_FLIP @ volume.ijk_to_ras @ [0, 0, 11, 1]
    assert np.allclose([float(x) for x in slice_.ImagePositionPatient], place[:3], atol=1e-3)


def test_segments_have_codes_sides_and_colours(a_volume: Volume, write_series: WriteSeries, tmp_path: Path) -> None:
    write_series(tmp_path / "series", a_volume.array_kji.astype(np.int16), a_volume.ijk_to_ras)
    volume = Volume.read(tmp_path / "series")

    write_segmentation(
        tmp_path / "a.seg.dcm",
        some_masks(volume.shape_kji),
        volume,
        headers=series_headers(series_files(tmp_path / "series")),
        colours={"Liver": (0.8, 0.4, 0.2)},
        structures={"Fleck": NODULE},
    )

    read = highdicom.seg.segread(tmp_path / "a.seg.dcm")
    liver, kidney, fleck, nothing = read.SegmentSequence
    assert liver.segmented_property_type.meaning == "Liver"
    assert liver.segmented_property_category.meaning == "Anatomical Structure"
    assert kidney.segmented_property_type.meaning == "Kidney"
    side = kidney.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert side.CodeMeaning == "Left"
    assert fleck.segmented_property_type.value == "27925004"
    assert nothing.segmented_property_type.value == TISSUE.value
    lab = highdicom.color.CIELabColor(*_lab(liver.RecommendedDisplayCIELabValue))
    assert np.allclose(lab.to_rgb(), (204, 102, 51), atol=2)


def _lab(stored: list[int]) -> tuple[float, float, float]:
    lightness, a, b = (value / 65535 for value in stored)
    return 100 * lightness, 255 * a - 128, 255 * b - 128


@pytest.mark.parametrize(
    ("name", "meaning", "side"),
    [
        ("liver", "Liver", None),
        ("Kidney_Right", "Kidney", "Right"),
        ("right adrenal gland", "Adrenal gland", "Right"),
        ("Neoplasm", "Neoplasm", None),
        ("tissue", "Tissue", None),
        ("Segment_1", "Tissue", None),
        ("left", "Tissue", None),
        ("", "Tissue", None),
    ],
)
def test_structures_are_known_by_name(name: str, meaning: str, side: str | None) -> None:
    structure = structure_of(name)

    assert structure.kind.meaning.lower() == meaning.lower()
    assert (structure.modifier and structure.modifier.meaning) == side


def test_volume_of_another_grid_is_refused_and_nothing_is_written(
    a_volume: Volume, write_series: WriteSeries, tmp_path: Path
) -> None:
    write_series(tmp_path / "series", a_volume.array_kji.astype(np.int16), a_volume.ijk_to_ras)
    volume = Volume.read(tmp_path / "series")
    headers = series_headers(series_files(tmp_path / "series"))
    moved = volume.ijk_to_ras.copy()
    moved[0, 3] += 1
    fewer = Volume(volume.array_kji[:-1], volume.ijk_to_ras)

    for other, words in ((Volume(volume.array_kji, moved), "mm from it"), (fewer, "14 slices for 13")):
        with pytest.raises(VolumeError, match=words):
            write_segmentation(tmp_path / "a.seg.dcm", some_masks(other.shape_kji), other, headers=headers)

    assert not (tmp_path / "a.seg.dcm").exists()


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("x" * 65, {}, "64 characters"),
        ("a\\b", {}, "no backslash"),
        ("liver", {"ImageOrientationPatient": None}, "without a place"),
        ("liver", {"FrameOfReferenceUID": None, "StudyInstanceUID": None}, "take"),
    ],
)
def test_what_dicom_cannot_hold_is_refused(
    name: str, fields: dict[str, Any], words: str, a_volume: Volume, write_series: WriteSeries, tmp_path: Path
) -> None:
    write_series(tmp_path / "series", a_volume.array_kji.astype(np.int16), a_volume.ijk_to_ras)
    volume = Volume.read(tmp_path / "series")
    headers = series_headers(series_files(tmp_path / "series"))
    for header in headers:
        for field in fields:
            delattr(header, field)
    mask = some_masks(volume.shape_kji)["Liver"]

    with pytest.raises(VolumeError, match=words):
        write_segmentation(tmp_path / "a.seg.dcm", {name: mask}, volume, headers=headers)

    assert not (tmp_path / "a.seg.dcm").exists()


def test_volume_without_a_series_is_refused(a_volume: Volume, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="belongs to a DICOM series"):
        write_segmentation(tmp_path / "a.seg.dcm", {"liver": some_masks(a_volume.shape_kji)["Liver"]}, a_volume)


def test_file_that_is_no_dicom_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.dcm").write_text("Dear doctor")

    with pytest.raises(VolumeError, match=r"letter.dcm' must be a DICOM file"):
        series_headers([tmp_path / "letter.dcm"])


def test_command_line_refuses_a_dicom_seg_of_a_single_file(tmp_path: Path) -> None:
    image = tmp_path / "ct.nii.gz"
    image.write_bytes(b"")

    result = CliRunner().invoke(app, ["segment", str(image), "-o", str(tmp_path / "a.seg.dcm"), "--point", "1,2,3"])

    assert result.exit_code == 1
    assert "must be its folder" in result.output
