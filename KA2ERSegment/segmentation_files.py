"""Writing masks and confidence maps, on the volume's own grid.

| ends in            | holds                                                       | overlapping objects |
|--------------------|-------------------------------------------------------------|---------------------|
| .seg.nrrd          | a Slicer segmentation: names, colours, any number of layers | layers              |
| .seg.dcm           | DICOM SEG beside the series of the image: names, codes      | overlap             |
| .nii.gz .nii       | label map: the first object is 1, the second 2, ...         | refused             |
| .nrrd .mha         | the same                                                    | refused             |

Files are written beside their target under another name and moved into place when complete: a failed run leaves
no half file, and an old file as it was.
"""

from __future__ import annotations

import colorsys
import errno
import io
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from KA2ERSegment.dicom_segmentation import Structure, segmentation_object
from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import BoolArray, Box, FloatArray
from KA2ERSegment.image_files import LPS_FLIP, read_image, simple_itk
from KA2ERSegment.volume import Volume

Colour = tuple[float, float, float]

_FORMATS = (".seg.nrrd", ".seg.dcm", ".nii.gz", ".nii", ".nrrd", ".mha")
# Level 1 of 9: label maps shrink a hundredfold with any, and level 9 takes ten times as long.
_COMPRESSION = 1


def check_output(path: str | os.PathLike[str], *, force: bool = False) -> str:
    """Refuse a path that `write_segmentation` could not write to; to be called before the work is done.

    Returns:
        Its extension, such as `.seg.nrrd`.

    Raises:
        VolumeError: an unknown extension, a missing folder, a file that exists and is not to be replaced.
    """
    path = Path(path)
    extension = next((e for e in _FORMATS if path.name.lower().endswith(e)), None)
    if extension is None:
        message = f"output {str(path)!r} must end in one of {', '.join(_FORMATS)}. Rename it."
        raise VolumeError(message)
    _check_free(path, force)
    return extension


def write_segmentation(
    path: str | os.PathLike[str],
    masks: Mapping[str, BoolArray],
    volume: Volume,
    *,
    colours: Mapping[str, Colour] | None = None,
    headers: Sequence[Any] = (),
    structures: Mapping[str, Structure] | None = None,
    force: bool = False,
) -> None:
    """Write named masks as a label map, a Slicer segmentation or a DICOM SEG; the extension decides.

    Args:
        path: ends in `.seg.nrrd`, `.seg.dcm`, `.nii.gz`, `.nii`, `.nrrd` or `.mha`.
        masks: object name -> (K, J, I) bool on the grid of `volume`. The n-th object gets label value n. Masks may
            overlap in `.seg.nrrd` and `.seg.dcm` only; a mask may be empty.
        volume: whose grid and affine the file gets.
        colours: object name -> red, green, blue in 0..1, for `.seg.nrrd` and `.seg.dcm`; objects without one get one.
        headers: of the DICOM series that the volume is from (`dicom_segmentation.series_headers`), for `.seg.dcm`.
        structures: object name -> what it is, for `.seg.dcm`; objects without one are coded by their names.
        force: replace an existing file.

    Raises:
        VolumeError: see `check_output`; masks of another shape or dtype, overlapping ones in a label map, names or
            colours that cannot be stored, a full disk. Nothing is left behind, and an old file is unchanged.
    """
    path = Path(path)
    extension = check_output(path, force=force)
    _check_masks(masks, volume)
    _check_colours(colours or {})
    layers, layer_of = _stack(masks, volume)
    if extension == ".seg.nrrd":
        content = _seg_nrrd(layers, layer_of, volume, colours or {})
        with _replacing([path], extension) as (temporary,):
            temporary.write_bytes(content)
        return
    if extension == ".seg.dcm":
        content = _seg_dcm(layers, layer_of, volume, colours or {}, headers, structures or {})
        with _replacing([path], extension) as (temporary,):
            temporary.write_bytes(content)
        return
    if len(layers) > 1:
        raise _overlap(layers[0], layer_of, masks, path)
    with _replacing([path], extension) as (temporary,):
        if extension.startswith(".nii"):
            _write_nifti(temporary, layers[0], volume)
        else:
            _write_itk(temporary, layers[0], volume)


def write_confidence(
    folder: str | os.PathLike[str],
    maps: Mapping[str, npt.NDArray[Any]],
    volume: Volume,
    *,
    force: bool = False,
) -> list[Path]:
    """Write each map as `<name>.nii.gz` (float32, on the volume's grid) into a folder, which is made where missing.

    Args:
        folder: its parent must exist.
        maps: name -> (K, J, I) real numbers. Names become file names. Each map is asked for once and let go before the
            next: a mapping may compute them as they are written.
        volume: whose grid and affine the files get.
        force: replace existing files.

    Returns:
        The files, in the order of `maps`.

    Raises:
        VolumeError: as `write_segmentation`; all files are written or none.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        message = f"output folder {str(folder)!r} must be a folder, got a file. Choose another one."
        raise VolumeError(message)
    if not folder.exists() and not folder.parent.is_dir():
        raise _no_folder(folder)
    if len({name.casefold() for name in maps}) < len(maps):  # the same file on Windows and macOS
        message = f"names of maps must differ in more than case, got {list(maps)}. Rename one."
        raise VolumeError(message)
    for name in maps:
        if not re.fullmatch(r"\w[\w .+-]*", name):
            message = f"a map's name must be a file name of letters, digits, ' ', '.', '+', '-' and '_', got {name!r}."
            raise VolumeError(message)
    paths = [folder / f"{name}.nii.gz" for name in maps]
    made = not folder.exists()
    try:
        if made:
            folder.mkdir()
        for path in paths:
            _check_free(path, force)
        with _replacing(paths, ".nii.gz", (OSError,)) as temporaries:  # a network out of memory is a RuntimeError
            for temporary, name in zip(temporaries, maps, strict=True):
                _write_nifti(temporary, _map_of(maps[name], name, volume), volume)
    except OSError as error:
        message = f"output folder {str(folder)!r} could not be made: {error.strerror}. Choose another one."
        raise VolumeError(message) from error
    finally:
        if made:
            with suppress(OSError):  # stays where files are in it
                folder.rmdir()
    return paths


def _map_of(array: npt.NDArray[Any], name: str, volume: Volume) -> npt.NDArray[np.float32]:
    """As float32, once it is known to lie on the volume's grid."""
    if array.shape != volume.shape_kji or not np.issubdtype(array.dtype, np.floating):
        message = (
            f"map {name!r} must be floats of shape KJI {volume.shape_kji} as volume {volume.name!r}, "
            f"got {array.dtype} of shape {array.shape}."
        )
        raise VolumeError(message)
    return array.astype(np.float32, copy=False)


def _check_free(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise _no_folder(path)
    if path.is_dir():
        message = f"output {str(path)!r} must be a file, got a folder. Choose another name."
        raise VolumeError(message)
    if path.exists() and not force:
        message = f"output {str(path)!r} exists already. Pass --force (in Python force=True) to replace it."
        raise VolumeError(message)


def _no_folder(path: Path) -> VolumeError:
    return VolumeError(f"the folder of output {str(path)!r} must exist: {str(path.parent)!r} does not. Make it first.")


def _check_masks(masks: Mapping[str, BoolArray], volume: Volume) -> None:
    if not 1 <= len(masks) <= 65535:
        message = f"a segmentation must have 1 to 65535 objects, got {len(masks)}."
        raise VolumeError(message)
    for name, mask in masks.items():
        if not name.strip() or not name.isprintable():
            message = f"an object's name must be printable text on one line, got {name!r}. Rename the object."
            raise VolumeError(message)
        if mask.shape != volume.shape_kji or mask.dtype != np.bool_:
            message = (
                f"mask of {name!r} must be bool of shape KJI {volume.shape_kji} as volume {volume.name!r}, "
                f"got {mask.dtype} of shape {mask.shape}."
            )
            raise VolumeError(message)


def _check_colours(colours: Mapping[str, Colour]) -> None:
    for name, colour in colours.items():
        if len(colour) != 3 or not all(0 <= c <= 1 for c in colour):
            message = f"colour of {name!r} must be red, green and blue in 0..1, got {colour!r}."
            raise VolumeError(message)


def _stack(masks: Mapping[str, BoolArray], volume: Volume) -> tuple[list[npt.NDArray[Any]], dict[str, int]]:
    """Masks in as few (K, J, I) layers as first fit needs, the n-th with value n; and the layer of each."""
    dtype = np.uint8 if len(masks) < 256 else np.uint16
    layers = [np.zeros(volume.shape_kji, dtype)]
    layer_of = {}
    for value, (name, mask) in enumerate(masks.items(), start=1):
        box = Box.around(mask) or Box((0, 0, 0), (0, 0, 0))
        inside = box.crop(mask)  # a box saves passes over the whole grid
        index = next((n for n, layer in enumerate(layers) if not box.crop(layer)[inside].any()), len(layers))
        if index == len(layers):
            layers.append(np.zeros(volume.shape_kji, dtype))
        box.crop(layers[index])[inside] = value
        layer_of[name] = index
    return layers, layer_of


def _overlap(
    first_layer: npt.NDArray[Any], layer_of: dict[str, int], masks: Mapping[str, BoolArray], path: Path
) -> VolumeError:
    """The error for the first object that did not fit into the first layer."""
    names = list(masks)
    later = next(name for name in names if layer_of[name] > 0)
    values = first_layer[masks[later]]
    # Objects after `later` may lie in the first layer too; it made way for one before it.
    earlier = next(names[value - 1] for value in np.unique(values) if 0 < value <= names.index(later))
    shared = int((values == names.index(earlier) + 1).sum())
    return VolumeError(
        f"objects {earlier!r} and {later!r} must not overlap in label map {str(path)!r}, got {shared} common voxels. "
        "Write a .seg.nrrd, which has layers, or resolve the overlap."
    )


def _write_nifti(path: Path, array_kji: npt.NDArray[Any], volume: Volume) -> None:
    import nibabel

    nifti_image: Any = nibabel.Nifti1Image  # it has no types
    image = nifti_image(array_kji.T, volume.ijk_to_ras)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.ijk_to_ras, code=1)
    image.set_qform(volume.ijk_to_ras, code=1)
    if not volume.same_grid(volume.shape_kji, image.get_qform()):
        image.set_qform(None, code=0)  # a quaternion has no shear: better none than a wrong place
    image.to_filename(path)


def _write_itk(path: Path, array_kji: npt.NDArray[Any], volume: Volume) -> None:
    sitk = simple_itk()
    ijk_to_lps = LPS_FLIP @ volume.ijk_to_ras
    image = sitk.GetImageFromArray(array_kji)
    image.SetSpacing(volume.spacing)
    image.SetOrigin(ijk_to_lps[:3, 3].tolist())
    image.SetDirection((ijk_to_lps[:3, :3] / volume.spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), True, _COMPRESSION)
    # ITK does not notice when the last buffer of a file does not fit on the disk any more.
    message = "the file is incomplete, the disk may be full"
    try:
        written, _, _ = read_image(path)
    except VolumeError as error:
        raise OSError(errno.EIO, message) from error
    if not np.array_equal(written, array_kji):
        raise OSError(errno.EIO, message)


def _seg_nrrd(
    layers: list[npt.NDArray[Any]], layer_of: dict[str, int], volume: Volume, colours: Mapping[str, Colour]
) -> bytes:
    """The content of a `.seg.nrrd` file. NRRD stores I fastest; with several layers the layer is faster still."""
    import slicerio

    extent = [bound for n in volume.shape_ijk for bound in (0, n - 1)]
    segments = [
        {
            "id": f"Segment_{value}",
            "name": f"object {value}",  # replaced below
            "nameAutoGenerated": False,
            "color": [round(float(c), 6) for c in colours.get(name, _colour(value))],
            "colorAutoGenerated": name not in colours,
            "labelValue": value,
            "layer": layer,
            "extent": extent,
        }
        for value, (name, layer) in enumerate(layer_of.items(), start=1)
    ]
    segmentation = {
        "voxels": layers[0].T if len(layers) == 1 else np.stack([layer.T for layer in layers]),
        "ijkToLPS": LPS_FLIP @ volume.ijk_to_ras,
        "containedRepresentationNames": ["Binary labelmap"],
        "conversionParameters": [_reference_geometry(volume.ijk_to_ras, extent)],
        "segments": segments,
    }
    stream = io.BytesIO()
    slicerio.write_segmentation(stream, segmentation, compression_level=_COMPRESSION)
    header, blank, voxels = stream.getvalue().partition(b"\n\n")
    # pynrrd encodes headers as ASCII and does not escape backslashes; Slicer reads UTF-8 and escapes.
    for n, name in enumerate(layer_of):
        line = f"\nSegment{n}_Name:="
        stored = name.replace("\\", "\\\\")
        header = header.replace(f"{line}object {n + 1}\n".encode(), f"{line}{stored}\n".encode())
    return header + blank + voxels


def _seg_dcm(
    layers: list[npt.NDArray[Any]],
    layer_of: dict[str, int],
    volume: Volume,
    colours: Mapping[str, Colour],
    headers: Sequence[Any],
    structures: Mapping[str, Structure],
) -> bytes:
    """The content of a DICOM SEG file."""
    if not headers:
        message = (
            f"a DICOM SEG belongs to a DICOM series, volume {volume.name!r} is from none. Write a .seg.nrrd, or "
            "segment the folder that holds the series."
        )
        raise VolumeError(message)
    all_colours = {name: colours.get(name, _colour(value)) for value, name in enumerate(layer_of, start=1)}
    stream = io.BytesIO()
    made = segmentation_object(layers, layer_of, volume, headers, all_colours, structures)
    made.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _reference_geometry(ijk_to_ras: FloatArray, extent: list[int]) -> dict[str, str]:
    """What tells Slicer which grid to edit on; without it the grid ends where the segments do."""
    numbers = [repr(float(x)) for x in ijk_to_ras.ravel()] + [str(bound) for bound in extent]
    return {
        "name": "Reference image geometry",
        "value": "".join(f"{number};" for number in numbers),
        # Slicer ends each parameter with "&" and skips one that does not; slicerio 1.4 puts it between them only.
        "description": "Image geometry description string determining the geometry of the labelmap.&",
    }


def _colour(value: int) -> Colour:
    """Steps of the golden ratio around the colour circle: neighbours differ, and no two are the same."""
    return colorsys.hsv_to_rgb((0.3 + 0.618034 * (value - 1)) % 1.0, 0.65, 0.85)


@contextmanager
def _replacing(
    paths: Sequence[Path], extension: str, failures: tuple[type[Exception], ...] = (OSError, RuntimeError)
) -> Iterator[list[Path]]:
    """Names to write to; on success they are moved to `paths`, on failure they are gone.

    Args:
        paths: files to be written.
        extension: of the names.
        failures: that mean that a file could not be written; RuntimeError is all that SimpleITK raises.
    """
    # The writers look at the extension, so it stays; lower case, because nibabel takes no `.NII.GZ`.
    temporaries = [path.with_name(f".{uuid.uuid4().hex[:12]}{extension}") for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # a full network disk may tell only now
        for temporary, path in zip(temporaries, paths, strict=True):
            temporary.replace(path)
    except failures as error:
        reason = error.strerror if isinstance(error, OSError) else "the disk may be full or read-only"
        folder = str(paths[0].parent)
        message = (
            f"output {', '.join(repr(path.name) for path in paths)} could not be written to {folder!r}: {reason}. "
            "Nothing was changed there. Free some space or choose another folder."
        )
        raise VolumeError(message) from error
    finally:
        for temporary in temporaries:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
