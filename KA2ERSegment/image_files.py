"""Reading images: NIfTI by nibabel; NRRD, MHA and DICOM by SimpleITK. The library sees only KJI and RAS.

SimpleITK and DICOM speak LPS; the flip to RAS happens here (and on the way back in `segmentation_files`) and
nowhere else. nibabel and SimpleITK are imported where they are used: they cost start-up time.

Messages and names never hold a patient's name or an identifier out of a DICOM header, only series numbers,
modalities and counts.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import FloatArray

AnyArray = npt.NDArray[Any]

LPS_FLIP: FloatArray = np.diag([-1.0, -1.0, 1.0, 1.0])
"""4x4 matrix from LPS to RAS mm, and back."""

_READERS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
_CHUNK = 1 << 20
_SLICE_TAGS = (
    ("0028|0030", "PixelSpacing", 2),
    ("0020|0032", "ImagePositionPatient", 3),
    ("0020|0037", "ImageOrientationPatient", 6),
)
_SLICE_TOLERANCE = 0.1  # of the slice distance: headers round positions, a missing slice is off by 1


def simple_itk() -> Any:
    """The SimpleITK module, imported at the first call. It has no types."""
    import SimpleITK

    return SimpleITK


def read_image(path: str | os.PathLike[str]) -> tuple[AnyArray, FloatArray, str]:
    """Read a 3D image from a file, or from a folder with the slices of one DICOM series.

    Args:
        path: `.nii`, `.nii.gz`, `.nrrd`, `.nhdr`, `.mha`, `.mhd`, or a folder.

    Returns:
        array_kji: (K, J, I). Integers as the file holds them; float32 where it holds fractions or scales its values.
        ijk_to_ras: 4x4 float64, voxel index (I, J, K) to RAS mm, not validated: `Volume` does that.
        name: the file's name without its extension; modality and series number for DICOM.

    Raises:
        VolumeError: a missing, damaged, 2D, 4D or colour file, an unknown extension, a DICOM folder without
            exactly one complete series.
    """
    path = Path(path)
    if path.is_dir():
        return _read_dicom(path)
    if not path.exists():
        message = f"image {str(path)!r} does not exist. Check the path."
        raise VolumeError(message)
    if not os.access(path, os.R_OK):
        message = f"image {str(path)!r} must be readable, got no permission. Change its access rights."
        raise VolumeError(message)
    extension = next((e for e in _READERS if path.name.lower().endswith(e)), None)
    if extension is None:
        hint = " For DICOM give the folder that holds the slices." if path.suffix.lower() in (".dcm", ".ima") else ""
        message = (
            f"image {str(path)!r} must end in one of {', '.join(_READERS)}, or be a folder with one DICOM series.{hint}"
        )
        raise VolumeError(message)
    if extension.startswith(".nii"):
        array, ijk_to_ras = _read_nifti(path)
    else:
        array, ijk_to_ras = _read_itk(path)
    return array, ijk_to_ras, path.name[: -len(extension)]


def series_files(folder: str | os.PathLike[str]) -> list[str]:
    """Files of the one DICOM series that `read_image` reads from a folder.

    Raises:
        VolumeError: see `read_image`.
    """
    return _only_series(Path(folder))[0]


def _read_nifti(path: Path) -> tuple[AnyArray, FloatArray]:
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError, HeaderTypeError
    from nibabel.wrapstruct import WrapStructError

    damaged = (OSError, EOFError, zlib.error, ValueError, KeyError, MemoryError, OverflowError)
    damaged_header = (ImageFileError, HeaderDataError, HeaderTypeError, WrapStructError)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        # Content decides, not the name: `.nii` files that are gzip inside exist.
        with gzip.open(path) if packed else path.open("rb") as stream:
            return _read_nifti_stream(stream, path)
    except VolumeError:
        raise
    except (*damaged, *damaged_header) as error:
        raise _damaged(path) from error


def _read_nifti_stream(stream: Any, path: Path) -> tuple[AnyArray, FloatArray]:
    """Header by nibabel, voxels straight into the array: one copy in memory, and the gzip checksum is verified."""
    import nibabel

    size = stream.read(4)
    stream.seek(0)
    headers: dict[bytes, Any] = {}
    for order in ("little", "big"):
        headers[(348).to_bytes(4, order)] = nibabel.Nifti1Header
        headers[(540).to_bytes(4, order)] = nibabel.Nifti2Header
    if size not in headers:
        raise _damaged(path)
    raw = headers[size].from_fileobj(stream, check=False)
    no_spacing = (raw["pixdim"][1:4] == 0).any() and raw["sform_code"] == 0
    if no_spacing:  # nibabel would put 1 mm there and only log it
        message = (
            f"spacing must be above zero, got {raw['pixdim'][1:4].tolist()} mm (IJK) in image {str(path)!r}. "
            "Repair the image's header."
        )
        raise VolumeError(message)
    header = headers[size](raw.binaryblock, raw.endianness)  # this one validates
    shape = header.get_data_shape()
    dtype = header.get_data_dtype()
    _check_shape(shape, path)
    if dtype.names or not (np.issubdtype(dtype, np.integer) or np.issubdtype(dtype, np.floating)):
        kind = "colour (RGB)" if dtype.names else str(dtype)
        raise _not_scalar(kind, path)
    slope, inter = header.get_slope_inter()

    stream.seek(header.get_data_offset())
    array = np.empty(shape[2::-1], dtype)  # NIfTI stores I fastest
    view = array.view(np.uint8).reshape(-1).data
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled : filled + _CHUNK])
        if not count:
            message = f"the voxels end after {filled} of {len(view)} bytes"
            raise EOFError(message)
        filled += count
    if isinstance(stream, gzip.GzipFile):
        while stream.read(_CHUNK):  # the checksum is compared at the end of the stream only
            pass

    ijk_to_ras = np.array(header.get_best_affine(), dtype=np.float64)
    # Units are metres (1), mm (2) or micrometres (3); 0 is unknown and means mm in practice.
    ijk_to_ras[:3] *= {1: 1e3, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)
    if slope is None or (slope == 1 and inter == 0):
        return _native(array), ijk_to_ras
    scaled = array.astype(np.float32)
    scaled *= np.float32(slope)
    scaled += np.float32(inter)
    return scaled, ijk_to_ras


def _read_itk(path: Path) -> tuple[AnyArray, FloatArray]:
    sitk = simple_itk()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_itk_header(reader, path)
        _check_checksum(path)
        image = reader.Execute()
    except VolumeError:
        raise
    except (RuntimeError, OSError, zlib.error) as error:
        reason = str(error).replace(str(path), "")  # the file's own name may hold these words
        if "spacing" in reason or "determinant" in reason:  # ITK refuses these two before we see them
            message = (
                f"spacing must be above zero and axes not parallel in image {str(path)!r}. Repair the image's header."
            )
            raise VolumeError(message) from error
        raise _damaged(path) from error
    return _from_itk(image)


def _from_itk(image: Any) -> tuple[AnyArray, FloatArray]:
    array = simple_itk().GetArrayFromImage(image)
    ijk_to_lps = np.eye(4)
    n = image.GetDimension()
    ijk_to_lps[:3, :3] = np.reshape(image.GetDirection(), (n, n))[:3, :3] * image.GetSpacing()[:3]
    ijk_to_lps[:3, 3] = image.GetOrigin()[:3]
    return _native(array.reshape(array.shape[-3:])), LPS_FLIP @ ijk_to_lps


def _check_itk_header(reader: Any, path: Path) -> None:
    sitk = simple_itk()
    if reader.GetNumberOfComponents() != 1:
        kind = f"vector or colour of {reader.GetNumberOfComponents()} components"
        raise _not_scalar(kind, path)
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        kind = "complex"
        raise _not_scalar(kind, path)
    _check_shape(reader.GetSize(), path)


def _check_checksum(path: Path) -> None:
    """Raise zlib.error where the compressed voxels of an NRRD or MHA file are damaged.

    ITK 5.4 prints "Uncompress failed" for such an MHA file and returns whatever was in memory, and reads an NRRD
    file without a look at its checksum.
    """
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    with path.open("rb") as file:
        compressed, data_file = False, "LOCAL"
        for line in file:
            key, _, value = line.decode("latin-1").strip().partition(":" if nrrd else "=")
            key, value = key.strip().lower(), value.strip()
            if (key, value.lower()) in (("compresseddata", "true"), ("encoding", "gzip"), ("encoding", "gz")):
                compressed = True
            if key in ("elementdatafile", "data file", "datafile"):
                data_file = value
            if key == "elementdatafile" or (nrrd and not key):  # the last line of the header
                break
        if not compressed:
            return
        if data_file.upper() == "LOCAL":
            _check_zlib(file)
        elif (path.parent / data_file).is_file():
            with (path.parent / data_file).open("rb") as data:
                _check_zlib(data)


def _check_zlib(stream: BinaryIO) -> None:
    unpacker = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # zlib or gzip, whichever it says it is
    while not unpacker.eof and (chunk := stream.read(_CHUNK)):
        unpacker.decompress(chunk)
    if not unpacker.eof:
        message = "the compressed voxels end too early"
        raise zlib.error(message)


@dataclass(frozen=True, slots=True)
class _Slice:
    """One DICOM file of a series: where it is, and what its geometry is (LPS mm)."""

    file: str
    position: FloatArray
    direction: FloatArray
    size: tuple[int, ...]
    pixel_id: int


def _read_dicom(folder: Path) -> tuple[AnyArray, FloatArray, str]:
    sitk = simple_itk()
    files, label = _only_series(folder)
    slices = [_read_slice(file, folder, label) for file in files]
    if len(slices) == 1 and slices[0].size[2] > 1:  # one file with many frames
        try:
            array, ijk_to_ras = _from_itk(sitk.ReadImage(slices[0].file))
        except RuntimeError as error:
            raise _damaged(folder) from error
        return array, ijk_to_ras, label
    slices, step = _order_slices(slices, folder, label)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([s.file for s in slices])
    if len({s.pixel_id for s in slices}) > 1:  # rescaled differently from slice to slice
        reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _damaged(folder) from error
    array, ijk_to_ras = _from_itk(image)
    # Positions instead of ITK's "spacing times normal": right for a tilted gantry too.
    ijk_to_ras[:3, 2] = LPS_FLIP[:3, :3] @ step
    ijk_to_ras[:3, 3] = LPS_FLIP[:3, :3] @ slices[0].position
    return array, ijk_to_ras, label


def _only_series(folder: Path) -> tuple[list[str], str]:
    """Files and label of the one image series in a folder."""
    sitk = simple_itk()
    series: list[tuple[list[str], str]] = []
    damaged = 0
    for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
        files = list(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid))
        reader = _dicom_header(files[0])
        if reader is not None:  # None: a report, a plan, contours
            series.append((files, _series_label(reader)))
            damaged = _count_damaged(folder, _tag(reader, "0008|0016"), [name for names, _ in series for name in names])
    if len(series) == 1 and damaged:
        message = (
            f"{series[0][1]} in folder {str(folder)!r} must be readable, got {damaged} truncated or damaged slices "
            f"beside {len(series[0][0])} good ones. Copy or export it again."
        )
        raise VolumeError(message)
    if len(series) == 1:
        return series[0]
    if series:
        found = ", ".join(f"{label} ({len(files)} files)" for files, label in series)
        message = (
            f"folder {str(folder)!r} must hold one DICOM series, got {len(series)}: {found}. "
            "Put the one you want into a folder of its own."
        )
        raise VolumeError(message)
    content = list(folder.iterdir())
    kinds = Counter(p.suffix.lower() or "no extension" for p in content if p.is_file())
    found = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(5)) or "no files"
    message = (
        f"folder {str(folder)!r} must hold one DICOM series, got no DICOM images: {found}, "
        f"{sum(p.is_dir() for p in content)} folders. Give the folder that holds the slices themselves."
    )
    raise VolumeError(message)


def _count_damaged(folder: Path, sop_class: str, good: list[str]) -> int:
    """Files that say they are slices of this class, or nothing at all, and that GDCM left out without a word.

    A damaged first or last slice would otherwise just make the volume shorter.
    """
    names = {Path(file).name for file in good} | {"DICOMDIR"}
    count = 0
    for path in folder.iterdir():
        if path.name in names or not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(1024)
        # (0002,0002) MediaStorageSOPClassUID, always explicit little endian; reports and contours have another one.
        stated = re.search(rb"\x02\x00\x02\x00UI..([0-9.]+)", head, re.DOTALL)
        no_dicom = path.suffix.lower() == ".dcm" and head[128:132] != b"DICM"
        count += no_dicom or (stated is not None and stated[1].decode() == sop_class)
    return count


def _dicom_header(file: str) -> Any | None:
    """SimpleITK reader with the header of a DICOM image read, or None where the file is no image."""
    sitk = simple_itk()
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return reader


def _series_label(reader: Any) -> str:
    """Such as 'CT series 3': two fields that cannot hold a name."""
    modality = _tag(reader, "0008|0060")
    number = _tag(reader, "0020|0011")
    words = [modality if re.fullmatch("[A-Z]{2,6}", modality) else "DICOM", "series"]
    return " ".join(words + ([number] if re.fullmatch("[0-9]{1,6}", number) else []))


def _tag(reader: Any, key: str) -> str:
    return str(reader.GetMetaData(key)).strip(" \0") if reader.HasMetaDataKey(key) else ""


def _numbers(text: str) -> list[float]:
    with suppress(ValueError):
        return [float(number) for number in text.split("\\")]
    return []


def _read_slice(file: str, folder: Path, label: str) -> _Slice:
    reader = _dicom_header(file)
    if reader is None:
        raise _damaged(folder)
    _check_itk_header(reader, folder)
    size = tuple(reader.GetSize())
    direction = np.reshape(reader.GetDirection(), (len(size), len(size)))[:3, :3]
    if size[2] == 1:  # where these are absent ITK reads 1 mm, (0, 0, 0) and an upright patient
        for key, name, count in _SLICE_TAGS:
            numbers = _numbers(_tag(reader, key))
            if len(numbers) != count or (name == "PixelSpacing" and min(numbers) <= 0):
                message = (
                    f"every slice of {label} in folder {str(folder)!r} must have a valid {name}, got {numbers} in one. "
                    "Repair the header or export the series again."
                )
                raise VolumeError(message)
    position = np.array(reader.GetOrigin()[:3], dtype=np.float64)
    return _Slice(file, position, direction, size, reader.GetPixelID())


def _order_slices(slices: list[_Slice], folder: Path, label: str) -> tuple[list[_Slice], FloatArray]:
    """Slices along their normal, and the step in LPS mm from one to the next."""
    where = f"{label} in folder {str(folder)!r}"
    if len(slices) < 2:
        message = f"{where} must have at least two slices, got {len(slices)}: a 2D image is not a volume."
        raise VolumeError(message)
    first = slices[0]
    if any(s.size != first.size or s.size[2] != 1 for s in slices):
        found = ", ".join(sorted({"x".join(map(str, s.size)) for s in slices}))
        message = f"{where} must have slices of one size, got {found}. Split it into one folder per size."
        raise VolumeError(message)
    if any(not np.allclose(s.direction, first.direction, atol=1e-3) for s in slices):
        message = f"{where} must have slices of one orientation, got several (a localizer?). Split it first."
        raise VolumeError(message)
    normal = first.direction[:, 2]
    slices = sorted(slices, key=lambda s: float(normal @ s.position))
    steps = np.diff([s.position for s in slices], axis=0)  # (slices - 1, 3)
    gaps = steps @ normal
    typical = np.median(steps, axis=0)
    gap = float(np.median(gaps))
    if gaps.min() < 1e-3:
        message = (
            f"{where} must have one slice per position, got {int((gaps < 1e-3).sum())} of {len(slices)} at the place "
            "of another one (several phases or echoes in one series?). Put one of them into a folder of its own."
        )
        raise VolumeError(message)
    if np.linalg.norm(steps - typical, axis=1).max() > _SLICE_TOLERANCE * gap:
        message = (
            f"{where} must have evenly spaced slices, got distances from {gaps.min():g} to {gaps.max():g} mm between "
            f"{len(slices)} slices: some are missing, or the spacing changes. Export the whole series again."
        )
        raise VolumeError(message)
    mean: FloatArray = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    return slices, mean


def _native(array: AnyArray) -> AnyArray:
    """In this machine's byte order (in place where it is not), and no floats but float32."""
    if np.issubdtype(array.dtype, np.floating) and array.dtype != np.float32:
        with np.errstate(over="ignore"):  # becomes infinite, which Volume refuses
            return array.astype(np.float32)
    if not array.dtype.isnative:
        return array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))
    return array


def _check_shape(shape_ijk: tuple[int, ...], path: Path) -> None:
    """Three axes, all of at least one voxel; further axes of one voxel are dropped by the caller."""
    if len(shape_ijk) < 3 or any(n != 1 for n in shape_ijk[3:]):
        what = "2D" if len(shape_ijk) < 3 else f"{len(shape_ijk)}D"
        message = (
            f"image {str(path)!r} must be 3D, got a {what} image of shape IJK {tuple(map(int, shape_ijk))}. "
            "Choose one frame or channel of a 4D image; stack 2D images first."
        )
        raise VolumeError(message)
    if min(shape_ijk) < 1:
        raise _damaged(path)


def _not_scalar(kind: str, path: Path) -> VolumeError:
    return VolumeError(
        f"image {str(path)!r} must hold one real number per voxel, got {kind} voxels. Extract one channel first."
    )


def _damaged(path: Path) -> VolumeError:
    return VolumeError(
        f"image {str(path)!r} could not be read: it is truncated, damaged or not what its name says. "
        "Copy or export it again."
    )
