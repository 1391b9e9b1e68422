"""`read_image`: every format lands at the same place in RAS, and everything that is no 3D image is refused."""

import gzip
import logging
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from KA2ERSegment import Volume
from KA2ERSegment.errors import GeometryError, KA2ERError, VolumeError
from KA2ERSegment.image_files import read_image

SPACING = np.array([0.7, 1.3, 2.9])


def an_affine(*, handed=1, origin=(-12.5, 31, 107.25)):
    """Oblique and anisotropic; left-handed with `handed=-1`."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix() * SPACING * [handed, 1, 1]
    matrix[:3, 3] = origin
    return matrix


def an_array(dtype=np.int16, shape=(5, 6, 7)):
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


def write_nifti(path, array_kji, matrix, *, code="sform"):
    image = nibabel.Nifti1Image(array_kji.T, matrix)
    image.set_sform(matrix, int(code == "sform"))
    image.set_qform(matrix, int(code == "qform"))
    image.to_filename(path)


def write_itk(path, array_kji, matrix, *, compress=False):
    """By SimpleITK, whose space is LPS: an independent way to the same place."""
    image = SimpleITK.GetImageFromArray(array_kji)
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    flip = np.diag([-1.0, -1.0, 1.0])
    image.SetSpacing(spacing.tolist())
    image.SetDirection((flip @ matrix[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin((flip @ matrix[:3, 3]).tolist())
    SimpleITK.WriteImage(image, str(path), compress)


def write_dicom(
    folder, array_kji, *, step=(0, 0, 2.5), row=(1, 0, 0), column=(0, 1, 0), uid="1.2.3", number="3", skip=(), tags=()
):
    """A series of CT slices; positions and directions are LPS mm. File names run against the slice order."""
    folder.mkdir(exist_ok=True)
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k, slice_ji in enumerate(array_kji):
        if k in skip:
            continue
        image = SimpleITK.GetImageFromArray(slice_ji)
        image.SetSpacing((0.7, 0.8))
        position = np.array([10, -20, 30]) + k * np.array(step)
        for key, value in {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{k + 1}",
            "0008|0060": "CT",
            "0010|0010": "Doe^Jane",
            "0010|0020": "patient77",
            "0020|000d": "1.2.99",
            "0020|000e": uid,
            "0020|0011": number,
            "0020|0032": "\\".join(f"{x:.6f}" for x in position),
            "0020|0037": "\\".join(f"{x:.9f}" for x in (*row, *column)),
            **dict(tags),
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}-{99 - k}.dcm"))
        writer.Execute(image)
    return folder


@pytest.mark.parametrize("handed", [1, -1])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.nhdr", "a.mha", "a.mhd", "A.NRRD"])
def test_all_formats_land_at_the_same_place_with_the_same_values(tmp_path, name, handed):
    array, matrix = an_array(), an_affine(handed=handed)
    write = write_nifti if ".nii" in name else write_itk
    write(tmp_path / name, array, matrix)
    read, ijk_to_ras, stem = read_image(tmp_path / name)
    assert np.array_equal(read, array)
    assert read.dtype == np.int16
    assert np.allclose(ijk_to_ras, matrix, atol=1e-4)
    assert stem == name[0]
    volume = Volume.read(str(tmp_path / name))
    assert volume.same_grid(array.shape, matrix)


@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), signs=st.tuples(*[st.sampled_from([-1, 1])] * 3))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_nibabel_and_simpleitk_agree_for_any_orientation(tmp_path, angles, signs):
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() * SPACING * signs
    matrix[:3, 3] = 17, -40, 300
    array = an_array(shape=(2, 3, 4))
    for code in ("sform", "qform"):
        write_nifti(tmp_path / "a.nii", array, matrix, code=code)
        write_itk(tmp_path / "a.mha", array, matrix)
        by_nibabel, by_itk = Volume.read(tmp_path / "a.nii"), Volume.read(tmp_path / "a.mha")
        assert by_nibabel.same_grid(by_itk.shape_kji, by_itk.ijk_to_ras)
        assert np.array_equal(by_nibabel.array_kji, by_itk.array_kji)


def test_the_sform_goes_before_the_qform(tmp_path):
    image = nibabel.Nifti1Image(an_array().T, np.eye(4))
    image.set_sform(an_affine(), 1)
    image.set_qform(np.diag([5, 5, 5, 1]), 1)
    image.to_filename(tmp_path / "a.nii")
    assert np.allclose(read_image(tmp_path / "a.nii")[1], an_affine(), atol=1e-4)


@pytest.mark.parametrize("unit", ["meter", "micron", "mm", "unknown"])
def test_nifti_units_become_mm_as_in_simpleitk(tmp_path, unit):
    image = nibabel.Nifti1Image(an_array().T, np.diag([1, 2, 3, 1]))
    image.header.set_xyzt_units(unit)
    image.to_filename(tmp_path / "a.nii")
    ours = read_image(tmp_path / "a.nii")[1]
    assert np.linalg.norm(ours[:3, :3], axis=0) == pytest.approx(
        SimpleITK.ReadImage(str(tmp_path / "a.nii")).GetSpacing()
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd"])
def test_voxel_types_stay_as_they_are(tmp_path, dtype, name):
    (write_nifti if ".nii" in name else write_itk)(tmp_path / name, an_array(dtype), np.eye(4))
    array, _, _ = read_image(tmp_path / name)
    assert array.dtype == dtype
    assert np.array_equal(array, an_array(dtype))


@pytest.mark.parametrize("name", ["a.nii", "a.mha"])
def test_doubles_become_float32(tmp_path, name):
    values = an_array(np.float64) / 7
    (write_nifti if ".nii" in name else write_itk)(tmp_path / name, values, np.eye(4))
    array, _, _ = read_image(tmp_path / name)
    assert array.dtype == np.float32
    assert np.allclose(array, values)


def test_scaled_nifti_voxels_become_float32(tmp_path):
    image = nibabel.Nifti1Image(an_array().T, np.eye(4))
    image.header.set_slope_inter(0.5, -1024)
    image.to_filename(tmp_path / "a.nii.gz")  # nibabel keeps this slope and scales the voxels back by it
    array, _, _ = read_image(tmp_path / "a.nii.gz")
    assert array.dtype == np.float32
    assert np.allclose(array, np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj).T)
    raw = bytearray(gzip.decompress((tmp_path / "a.nii.gz").read_bytes()))
    assert struct.unpack_from("<2f", raw, 112) == (0.5, -1024)  # so that this test tests something


def test_big_endian_nifti_becomes_native(tmp_path):
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nibabel.Nifti1Image(an_array().T, an_affine(), header).to_filename(tmp_path / "a.nii.gz")
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[:4] == (348).to_bytes(4, "big")
    array, ijk_to_ras, _ = read_image(tmp_path / "a.nii.gz")
    assert array.dtype.isnative
    assert np.array_equal(array, an_array())
    assert np.allclose(ijk_to_ras, an_affine(), atol=1e-4)


def test_nifti_2_and_header_extensions_are_read(tmp_path):
    image = nibabel.Nifti2Image(an_array().T, an_affine())
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 100))
    image.to_filename(tmp_path / "a.nii")
    array, ijk_to_ras, _ = read_image(tmp_path / "a.nii")
    assert np.array_equal(array, an_array())
    assert np.allclose(ijk_to_ras, an_affine())


def test_a_gzipped_file_that_is_called_nii_is_read(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", an_array(), np.eye(4))
    (tmp_path / "b.nii").write_bytes((tmp_path / "a.nii.gz").read_bytes())
    assert np.array_equal(read_image(tmp_path / "b.nii")[0], an_array())


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_a_fourth_axis_of_length_one_is_dropped(tmp_path, name):
    array = an_array()
    if ".nii" in name:
        write_nifti(tmp_path / name, array[None], an_affine())
    else:
        four = SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(array)])
        SimpleITK.WriteImage(four, str(tmp_path / name))
    read, ijk_to_ras, _ = read_image(tmp_path / name)
    assert np.array_equal(read, array)
    assert np.allclose(ijk_to_ras, an_affine() if ".nii" in name else np.diag([-1, -1, 1, 1]), atol=1e-4)


def four_dimensional(path):
    if path.name.endswith(".nii.gz"):
        write_nifti(path, an_array(shape=(2, 4, 5, 6)), np.eye(4))
    else:
        SimpleITK.WriteImage(SimpleITK.JoinSeries([SimpleITK.GetImageFromArray(an_array())] * 2), str(path))


def two_dimensional(path):
    if path.name.endswith(".nii.gz"):
        write_nifti(path, an_array(shape=(4, 5)), np.eye(4))
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(an_array(shape=(4, 5))), str(path))


def colour(path):
    if path.name.endswith(".nii.gz"):
        rgb = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
        nibabel.Nifti1Image(rgb, np.eye(4)).to_filename(path)
    else:
        vectors = SimpleITK.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True)
        SimpleITK.WriteImage(vectors, str(path))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
@pytest.mark.parametrize(
    ("write", "words"),
    [(four_dimensional, "got a 4D image"), (two_dimensional, "got a 2D image"), (colour, "one real")],
)
def test_what_is_not_one_number_per_voxel_of_a_3d_grid_is_refused(tmp_path, write, words, name):
    write(tmp_path / name)
    with pytest.raises(VolumeError, match=words) as error:
        read_image(tmp_path / name)
    assert name in str(error.value)


def test_complex_voxels_are_refused(tmp_path):
    write_nifti(tmp_path / "a.nii", an_array(np.complex64), np.eye(4))
    with pytest.raises(VolumeError, match="complex64"):
        read_image(tmp_path / "a.nii")


@pytest.mark.parametrize("keep", [0.97, 0.5, 30, 0])
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
def test_truncated_files_are_refused(tmp_path, name, keep, compress):
    path = tmp_path / name
    if ".nii" in name:
        write_nifti(path, an_array(), np.eye(4))
    else:
        write_itk(path, an_array(), np.eye(4), compress=compress)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep < 1 else keep])
    with pytest.raises(VolumeError, match="truncated, damaged") as error:
        read_image(path)
    assert name in str(error.value)
    assert error.value.__cause__ is not None or keep in (0, 30)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
def test_one_flipped_byte_in_compressed_voxels_is_noticed(tmp_path, name):
    """ITK returns what was in memory for a damaged .mha, and what came out for a damaged .nrrd; we look first."""
    path = tmp_path / name
    (write_nifti if ".nii" in name else lambda *a: write_itk(*a, compress=True))(path, an_array(), np.eye(4))
    data = {"a.mhd": tmp_path / "a.zraw", "a.nhdr": tmp_path / "a.raw.gz"}.get(name, path)
    content = bytearray(data.read_bytes())
    content[-60] ^= 0x55
    data.write_bytes(content)
    with pytest.raises(VolumeError, match="truncated, damaged") as error:
        read_image(path)
    assert error.value.__cause__ is not None


def test_a_header_without_its_voxel_file_is_refused(tmp_path):
    write_itk(tmp_path / "a.mhd", an_array(), np.eye(4))
    (tmp_path / "a.raw").unlink()
    with pytest.raises(VolumeError, match=r"a\.mhd"):
        read_image(tmp_path / "a.mhd")


@pytest.mark.parametrize("form", ["sform", "qform", "neither"])
def test_zero_spacing_in_nifti_is_refused(tmp_path, form, caplog):
    write_nifti(tmp_path / "a.nii", an_array(), np.diag([1, 2, 3, 1]), code=form)
    content = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<f", content, 80, 0.0)  # pixdim[1]
    struct.pack_into("<4f", content, 280, 0, 0, 0, 0)  # first row of the sform
    (tmp_path / "a.nii").write_bytes(content)
    with caplog.at_level(logging.CRITICAL), pytest.raises(KA2ERError, match="spacing must be above zero"):
        Volume.read(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("a.mha", b"ElementSpacing = 1 1 1", b"ElementSpacing = 0 1 1"),
        ("a.mha", b"Matrix = -1 0 0 0 -1", b"Matrix = -1 0 0 -1 0"),
        ("a.nrrd", b"(0,-1,0)", b"(0,0,0)"),
        ("a.nrrd", b"(0,-1,0)", b"(1,0,0)"),
    ],
)
def test_zero_spacing_and_parallel_axes_are_refused(tmp_path, name, good, bad):
    write_itk(tmp_path / name, an_array(), np.eye(4))
    content = (tmp_path / name).read_bytes()
    assert good in content
    (tmp_path / name).write_bytes(content.replace(good, bad))
    with pytest.raises(VolumeError, match="spacing must be above zero and axes not parallel"):
        read_image(tmp_path / name)


def test_a_singular_sform_is_refused(tmp_path):
    matrix = np.eye(4)
    matrix[:3, 1] = matrix[:3, 0]
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    image = nibabel.Nifti1Image(an_array().T, None, header)
    image.header["sform_code"] = 1
    for row, values in zip(("srow_x", "srow_y", "srow_z"), matrix, strict=False):
        image.header[row] = values
    image.to_filename(tmp_path / "a.nii")
    with pytest.raises(GeometryError, match="parallel"):
        Volume.read(tmp_path / "a.nii")


def test_nan_and_constant_files_are_refused_by_the_volume(tmp_path):
    array = an_array(np.float32)
    array[1, 2, 3] = np.nan
    write_nifti(tmp_path / "nan.nii.gz", array, np.eye(4))
    with pytest.raises(VolumeError, match="'nan' has NaN"):
        Volume.read(tmp_path / "nan.nii.gz")
    write_nifti(tmp_path / "one.nii.gz", np.ones((2, 3, 4), np.int16), np.eye(4))
    with pytest.raises(VolumeError, match="'one' has the value 1"):
        Volume.read(tmp_path / "one.nii.gz")


def test_a_missing_path_and_an_unknown_extension_are_refused(tmp_path):
    with pytest.raises(VolumeError, match="does not exist"):
        read_image(tmp_path / "a.nii.gz")
    for name in ("a.png", "a.nii.zip", "noextension"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(VolumeError, match=r"\.nii\.gz, \.nii, \.nrrd, .* or be a folder with one DICOM series"):
            read_image(tmp_path / name)
    (tmp_path / "a.dcm").write_bytes(b"x")
    with pytest.raises(VolumeError, match="give the folder"):
        read_image(tmp_path / "a.dcm")


def test_a_dicom_folder_is_read_in_the_order_of_its_positions(tmp_path):
    array = an_array()
    read, ijk_to_ras, name = read_image(write_dicom(tmp_path / "Doe_Jane", array))
    assert np.array_equal(read, array)
    assert read.dtype == np.int16
    expected = np.array([[-0.7, 0, 0, -10], [0, -0.8, 0, 20], [0, 0, 2.5, 30], [0, 0, 0, 1]])
    assert np.allclose(ijk_to_ras, expected)
    assert name == "CT series 3"


def test_an_oblique_dicom_series_lands_where_its_header_says(tmp_path):
    row, column, normal = Rotation.from_euler("xyz", [10, 25, -40], degrees=True).as_matrix().T
    folder = write_dicom(tmp_path / "dicom", an_array(), step=normal * 1.5, row=row, column=column)
    read, ijk_to_ras, _ = read_image(folder)
    expected = np.eye(4)
    expected[:3, :3] = np.stack([row * 0.7, column * 0.8, normal * 1.5], axis=1)
    expected[:3, 3] = 10, -20, 30
    assert np.array_equal(read, an_array())
    assert np.allclose(ijk_to_ras, np.diag([-1, -1, 1, 1]) @ expected, atol=1e-4)


def test_a_tilted_gantry_shears_the_affine(tmp_path):
    _, ijk_to_ras, _ = read_image(write_dicom(tmp_path / "dicom", an_array(), step=(0, 0.5, 2.5)))
    assert np.allclose(ijk_to_ras[:3, 2], [0, -0.5, 2.5])


def test_dicom_values_are_rescaled(tmp_path):
    """PET and CT store integers with slope and intercept."""
    folder = tmp_path / "dicom"
    write_dicom(folder, an_array(), tags={"0028|1052": "0", "0028|1053": "1"})
    changed = 0
    for path in folder.iterdir():
        content = path.read_bytes()
        changed += b"\x28\x00\x53\x10\x02\x00\x00\x001 " in content
        path.write_bytes(content.replace(b"\x28\x00\x53\x10\x02\x00\x00\x001 ", b"\x28\x00\x53\x10\x02\x00\x00\x00.5"))
    assert changed == len(an_array())
    array, _, _ = read_image(folder)
    assert array.dtype == np.float32
    assert np.allclose(array, an_array() * 0.5)


def test_a_folder_with_two_series_is_refused_with_their_numbers(tmp_path):
    folder = write_dicom(tmp_path / "dicom", an_array())
    write_dicom(folder, an_array(shape=(3, 6, 7)), uid="1.2.4", number="8")
    with pytest.raises(VolumeError, match="got 2") as error:
        read_image(folder)
    assert "CT series 3 (5 files)" in str(error.value)
    assert "CT series 8 (3 files)" in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"skip": (2,)}, "distances from 2.5 to 5 mm between 4 slices"),
        ({"skip": (1, 2, 3, 4)}, "at least two slices, got 1"),
        ({"step": (0, 0, 0)}, "one slice per position, got 4 of 5"),
    ],
)
def test_incomplete_series_are_refused(tmp_path, options, words):
    with pytest.raises(VolumeError, match=words):
        read_image(write_dicom(tmp_path / "dicom", an_array(), **options))


@pytest.mark.parametrize(("element", "name"), [(0x32, "ImagePositionPatient"), (0x37, "ImageOrientationPatient")])
def test_slices_without_a_place_in_the_patient_are_refused(tmp_path, element, name):
    folder = write_dicom(tmp_path / "dicom", an_array())
    for path in folder.iterdir():
        content = path.read_bytes()
        assert content.count(bytes([0x20, 0, element, 0])) == 1
        path.write_bytes(content.replace(bytes([0x20, 0, element, 0]), bytes([0x20, 0, element + 1, 0])))
    with pytest.raises(VolumeError, match=name):
        read_image(folder)


def test_slices_of_two_sizes_or_orientations_are_refused(tmp_path):
    folder = write_dicom(tmp_path / "sizes", an_array(), skip=(4,))
    write_dicom(folder, an_array(shape=(5, 3, 3)), skip=(0, 1, 2, 3))
    with pytest.raises(VolumeError, match="one size, got 3x3x1, 7x6x1"):
        read_image(folder)
    folder = write_dicom(tmp_path / "turned", an_array(), skip=(4,))
    write_dicom(folder, an_array(), skip=(0, 1, 2, 3), row=(0, 1, 0), column=(0, 0, -1))
    with pytest.raises(VolumeError, match="one orientation"):
        read_image(folder)


@pytest.mark.parametrize("keep", [0, 400, -20])
def test_a_truncated_last_slice_does_not_just_shorten_the_volume(tmp_path, keep):
    folder = write_dicom(tmp_path / "dicom", an_array())
    last = min(folder.iterdir())
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.raises(VolumeError, match="got 1 truncated or damaged slices beside 4 good ones"):
        read_image(folder)


def test_zero_pixel_spacing_in_dicom_is_refused(tmp_path):
    folder = write_dicom(tmp_path / "dicom", an_array())
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b".8\\.7 ", b"0\\.70 "))
    with pytest.raises(VolumeError, match=r"valid PixelSpacing, got \[0.0, 0.7\]"):
        read_image(folder)


def test_colour_dicom_is_refused(tmp_path):
    (tmp_path / "dicom").mkdir()
    image = SimpleITK.GetImageFromArray(np.zeros((5, 6, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(image, str(tmp_path / "dicom" / "a.dcm"))
    with pytest.raises(VolumeError, match="one real number per voxel"):
        read_image(tmp_path / "dicom")


def test_a_folder_without_dicom_is_refused_with_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("no image here", encoding="utf-8")
    (tmp_path / "inner").mkdir()
    with pytest.raises(VolumeError, match=r"got no DICOM images: 1 x \.txt, 1 folders"):
        read_image(tmp_path)


def test_no_name_of_a_patient_gets_out_of_a_dicom_header(tmp_path):
    tags = {"0008|0060": "Doe^Jane", "0020|0011": "1", "0008|103e": "Doe Jane head"}
    folder = write_dicom(tmp_path / "good", an_array(), tags=tags)
    name = read_image(folder)[2]
    assert name == "DICOM series 1"
    messages = []
    for options in ({"skip": (2,)}, {"skip": (0, 1, 2, 3)}, {"step": (0, 0, 0)}):
        with pytest.raises(VolumeError) as error:
            read_image(write_dicom(tmp_path / f"bad{len(messages)}", an_array(), tags=tags, **options))
        messages.append(str(error.value))
    write_dicom(folder, an_array(), uid="1.2.4")
    with pytest.raises(VolumeError) as error:
        read_image(folder)
    for message in (*messages, str(error.value)):
        assert "Doe" not in message
        assert "patient77" not in message
