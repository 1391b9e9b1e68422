"""DICOM SEG: named masks as an object that joins its series' study in an archive. Made by highdicom, an extra.

A mask on the grid of a DICOM series becomes one binary segment; its frames have the planes of the series' own slices
and refer to them. Headers are read without voxels. Messages hold nothing out of a header that could name a patient.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import FloatArray
from KA2ERSegment.image_files import LPS_FLIP
from KA2ERSegment.volume import Volume

LONGEST_NAME = 64
"""Characters of a segment's label in DICOM."""
_OFF_GRID = 0.1
"""Of the smallest spacing: how far a slice may be from where the volume has it."""
_GROUPS = ("cid7192", "cid7153", "cid7166")
"""DICOM's context groups of anatomical structures, parts of the brain, and tissues."""
_LESIONS = "cid7159"


@dataclass(frozen=True, slots=True)
class Code:
    """An entry of a coding scheme, such as SNOMED CT (`SCT`)."""

    value: str
    scheme: str
    meaning: str


TISSUE = Code("85756007", "SCT", "Tissue")
_ANATOMY = Code("123037004", "SCT", "Anatomical Structure")
_ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
_SIDES = {"left": Code("7771000", "SCT", "Left"), "right": Code("24028007", "SCT", "Right")}


@dataclass(frozen=True, slots=True)
class Structure:
    """What a segment is, in codes.

    Args:
        category: such as tissue or anatomical structure.
        kind: such as liver.
        modifier: such as left.
    """

    category: Code = TISSUE
    kind: Code = TISSUE
    modifier: Code | None = None


def structure_of(name: str) -> Structure:
    """What DICOM's own lists call by that name, in any case and with `left` or `right`; tissue where they do not."""
    from pydicom.sr.codedict import codes

    words = re.findall(r"[a-z0-9]+", name.lower())
    side = next((_SIDES[word] for word in words if word in _SIDES), None)
    plain = "".join(word for word in words if word not in _SIDES)
    for category, groups in ((_ANATOMY, _GROUPS), (_ABNORMAL, (_LESIONS,))):
        for group in groups:
            listed = getattr(codes, group)
            for keyword in listed.dir():
                if keyword.lower() == plain:
                    code = getattr(listed, keyword)
                    kind = Code(code.value, code.scheme_designator, code.meaning)
                    return Structure() if kind == TISSUE else Structure(category, kind, side)
    return Structure()


def series_headers(files: Iterable[str | os.PathLike[str]]) -> list[Any]:
    """Headers of a series' slices, without their voxels.

    Raises:
        VolumeError: highdicom is not installed, or a file is no DICOM.
    """
    _highdicom()
    import pydicom
    from pydicom.errors import InvalidDicomError

    headers = []
    for file in files:
        try:
            headers.append(pydicom.dcmread(os.fspath(file), stop_before_pixels=True))
        except (InvalidDicomError, OSError) as error:
            message = f"{os.fspath(file)!r} must be a DICOM file, it could not be read as one. Export the series again."
            raise VolumeError(message) from error
    return headers


def check_series(headers: Sequence[Any], volume: Volume) -> list[Any]:
    """The headers in the order of the volume's slices.

    Raises:
        VolumeError: the volume is not on the grid of that series.
    """
    lps = LPS_FLIP @ volume.ijk_to_ras
    places = [lps[:3, 3] + k * lps[:3, 2] for k in range(volume.shape_kji[0])]
    if len(headers) != len(places):
        raise _off_grid(volume, f"{len(headers)} slices for {len(places)}")
    ordered: dict[int, Any] = {}
    for header in headers:
        try:
            corner, axes = _plane(header)
        except (AttributeError, TypeError, ValueError) as error:
            raise _off_grid(volume, "slices without a place in the patient") from error
        distances = np.linalg.norm(np.subtract(places, corner), axis=1)
        k = int(distances.argmin())
        _, rows, columns = volume.shape_kji
        sizes = np.array([columns - 1, rows - 1])
        apart = max(float(distances[k]), float(np.abs((axes - lps[:3, :2]) * sizes).max()))
        if k in ordered or (int(header.Rows), int(header.Columns)) != (rows, columns):
            raise _off_grid(volume, "slices of another size or place")
        if apart > _OFF_GRID * min(volume.spacing):
            raise _off_grid(volume, f"slices {apart:.2g} mm from it")
        ordered[k] = header
    return [ordered[k] for k in sorted(ordered)]


def segmentation_object(
    layers: Sequence[npt.NDArray[Any]],
    layer_of: Mapping[str, int],
    volume: Volume,
    headers: Sequence[Any],
    colours: Mapping[str, tuple[float, float, float]],
    structures: Mapping[str, Structure],
) -> Any:
    """A pydicom dataset to be saved.

    Args:
        layers: (K, J, I) arrays in which the n-th name of `layer_of` has value n.
        layer_of: name -> which of `layers` it is in.
        volume: on whose grid they are.
        headers: of the series that the volume is from; any order.
        colours: name -> red, green, blue in 0..1.
        structures: name -> what it is; by its name where none is given.

    Raises:
        VolumeError: see `check_series`; a name that DICOM cannot hold, headers that lack what an object needs.
    """
    highdicom = _highdicom()
    for name in layer_of:
        if len(name) > LONGEST_NAME or "\\" in name:
            message = (
                f"names in DICOM have {LONGEST_NAME} characters at most and no backslash, got {name!r}. Rename it."
            )
            raise VolumeError(message)
    ordered = check_series(headers, volume)
    described = [
        _description(highdicom, number, name, colours.get(name), structures.get(name) or structure_of(name))
        for number, name in enumerate(layer_of, start=1)
    ]
    if len(layers) == 1:
        array = layers[0]
    else:
        masks = [layers[layer] == n for n, layer in enumerate(layer_of.values(), start=1)]
        array = np.stack(masks, axis=-1).view(np.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # one of highdicom's has the patient's name in it
            return highdicom.seg.Segmentation(
                source_images=ordered,
                pixel_array=array,
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=described,
                series_instance_uid=highdicom.UID(),
                series_number=1000 + int(getattr(ordered[0], "SeriesNumber", None) or 0),
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="KA2ERSegment contributors",
                manufacturer_model_name="KA2ERSegment",
                software_versions=_version(),
                device_serial_number="none",
                content_label="SEGMENTATION",
                series_description="KA2ERSegment",
                omit_empty_frames=bool(array.any()),
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = (
            f"the headers of the DICOM series must have what a DICOM SEG takes over, they have not ({error}). Write a "
            ".seg.nrrd instead."
        )
        raise VolumeError(message) from error


def _description(
    highdicom: Any, number: int, name: str, colour: tuple[float, float, float] | None, structure: Structure
) -> Any:
    from pydicom.sr.codedict import codes

    coded = highdicom.sr.CodedConcept
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="KA2ERSegment", version=_version(), family=codes.DCM.ArtificialIntelligence
    )
    category, kind = structure.category, structure.kind
    made = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=coded(category.value, category.scheme, category.meaning),
        segmented_property_type=coded(kind.value, kind.scheme, kind.meaning),
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.SEMIAUTOMATIC,
        algorithm_identification=algorithm,
        tracking_uid=highdicom.UID(),
        tracking_id=name,
        display_color=None
        if colour is None
        else highdicom.color.CIELabColor.from_rgb(*(round(255 * part) for part in colour)),
    )
    side = structure.modifier
    if side is not None:
        (coding,) = made.SegmentedPropertyTypeCodeSequence
        coding.SegmentedPropertyTypeModifierCodeSequence = [coded(side.value, side.scheme, side.meaning)]
    return made


def _plane(header: Any) -> tuple[FloatArray, FloatArray]:
    """Centre of a slice's first voxel, and the steps along I and J as columns; LPS mm."""
    numbers = np.array([float(x) for x in header.ImageOrientationPatient])
    down, across = (float(x) for x in header.PixelSpacing)
    corner = np.array([float(x) for x in header.ImagePositionPatient])
    if numbers.shape != (6,) or corner.shape != (3,):
        message = "an orientation has six numbers, a position three"
        raise ValueError(message)
    return corner, np.stack([across * numbers[:3], down * numbers[3:]], axis=1)


def _highdicom() -> Any:
    try:
        import highdicom
    except ImportError as error:
        message = "DICOM SEG needs highdicom: pip install 'ka2ersegment[dicom]', or write a .seg.nrrd."
        raise VolumeError(message) from error
    return highdicom


def _version() -> str:
    try:
        return version("ka2ersegment")
    except PackageNotFoundError:  # inside Slicer the package is a folder
        return "0"


def _off_grid(volume: Volume, got: str) -> VolumeError:
    message = (
        f"volume {volume.name!r} must lie on the slices of its DICOM series, one file each; got {got}. "
        "Write a .seg.nrrd instead."
    )
    return VolumeError(message)
