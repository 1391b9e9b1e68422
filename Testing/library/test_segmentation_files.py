"""Written masks come back where they were, in every format; a failed run changes nothing."""

import errno
import os
import signal
import weakref
from collections.abc import Mapping
from contextlib import contextmanager

import nibabel
import numpy as np
import pytest
import SimpleITK
import slicerio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from KA2ERSegment import Volume
from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import apply_affine
from KA2ERSegment.image_files import read_image
from KA2ERSegment.segmentation_files import check_output, write_confidence, write_segmentation

SHAPE = (9, 8, 7)
LABEL_MAPS = ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"]
ALL = [*LABEL_MAPS, "a.seg.nrrd"]


def an_oblique_volume(*, angles=(20, -35, 50), signs=(1, 1, 1), shear=0.0):
    matrix = np.eye(4)
    rotation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    matrix[:3, :3] = rotation @ [[1, 0, shear], [0, 1, 0], [0, 0, 1]] * [0.7, 1.3, 2.9] * signs
    matrix[:3, 3] = -12.5, 31, 107.25
    return Volume(np.arange(np.prod(SHAPE)).reshape(SHAPE), matrix, "ct")


def some_masks():
    masks = {name: np.zeros(SHAPE, bool) for name in ("liver", "left kidney", "nothing")}
    masks["liver"][1:4, 2:6, 3:5] = True
    masks["liver"][4, 2, 3] = True  # no symmetric block: a flip would show
    masks["left kidney"][6:8, 1:3, 0:7] = True
    return masks


def overlapping_masks():
    masks = some_masks()
    masks["tumour"] = np.zeros(SHAPE, bool)
    masks["tumour"][3:7, 3:5, 4:7] = True
    return masks


def read_masks(path, names):
    """Masks and affine of a file, by other code than the one that wrote it where there is some."""
    if not path.name.endswith(".seg.nrrd"):
        array, ijk_to_ras, _ = read_image(path)
        assert array.max() <= len(names)
        return {name: array == n for n, name in enumerate(names, start=1)}, ijk_to_ras
    segmentation = slicerio.read_segmentation(str(path))
    voxels = segmentation["voxels"]
    masks = {}
    for segment in segmentation["segments"]:
        layer = voxels[segment["layer"]] if voxels.ndim == 4 else voxels
        masks[segment["name"]] = (layer == segment["labelValue"]).T
    return masks, np.diag([-1, -1, 1, 1]) @ segmentation["ijkToLPS"]


def assert_same_place(path, masks, volume):
    read, ijk_to_ras = read_masks(path, list(masks))
    assert volume.same_grid(SHAPE, ijk_to_ras)
    assert read.keys() == masks.keys()
    for name, mask in masks.items():
        assert np.array_equal(read[name], mask), name


@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), signs=st.tuples(*[st.sampled_from([-1, 1])] * 3))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_masks_come_back_where_they_were_in_all_formats(tmp_path, angles, signs):
    volume = an_oblique_volume(angles=angles, signs=signs)
    for name in ALL:
        write_segmentation(tmp_path / name, some_masks(), volume, force=True)
        assert_same_place(tmp_path / name, some_masks(), volume)


@pytest.mark.parametrize("name", ALL)
def test_masks_on_a_sheared_grid_come_back_where_they_were(tmp_path, name):
    """A tilted gantry gives such a grid; a NIfTI quaternion cannot hold it, its sform can."""
    volume = an_oblique_volume(shear=0.2)
    write_segmentation(tmp_path / name, some_masks(), volume)
    assert_same_place(tmp_path / name, some_masks(), volume)
    if ".nii" in name:
        assert nibabel.load(tmp_path / name).header["qform_code"] == 0


def test_nifti_has_sform_and_qform_and_small_integers(tmp_path):
    volume = an_oblique_volume()
    write_segmentation(tmp_path / "a.nii.gz", some_masks(), volume)
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == np.uint8
    for matrix, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code == 1
        assert volume.same_grid(SHAPE, matrix)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_simpleitk_places_the_nifti_file_where_it_places_the_nrrd_file(tmp_path):
    volume = an_oblique_volume(signs=(-1, 1, 1))
    placed = []
    for name in LABEL_MAPS:
        write_segmentation(tmp_path / name, some_masks(), volume)
        image = SimpleITK.ReadImage(str(tmp_path / name))
        placed.append(image.TransformIndexToPhysicalPoint((6, 3, 8)))
    x, y, z = apply_affine(volume.ijk_to_ras, (6, 3, 8))
    for point in placed:
        assert point == pytest.approx((-x, -y, z), abs=1e-3)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.seg.nrrd"])
def test_more_than_255_objects_fit(tmp_path, name):
    masks = {f"object {n}": np.zeros(SHAPE, bool) for n in range(300)}
    for n, mask in enumerate(masks.values()):
        mask.flat[n] = True
    write_segmentation(tmp_path / name, masks, an_oblique_volume())
    assert_same_place(tmp_path / name, masks, an_oblique_volume())


def test_overlapping_objects_become_layers_in_seg_nrrd(tmp_path):
    write_segmentation(tmp_path / "a.seg.nrrd", overlapping_masks(), an_oblique_volume())
    assert_same_place(tmp_path / "a.seg.nrrd", overlapping_masks(), an_oblique_volume())
    segmentation = slicerio.read_segmentation(str(tmp_path / "a.seg.nrrd"))
    assert segmentation["voxels"].shape == (2, *SHAPE[::-1])


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_overlapping_objects_are_refused_by_label_maps_with_both_names(tmp_path, name):
    masks = overlapping_masks()
    masks["late"] = ~np.any(list(masks.values()), axis=0)  # fits; must not be blamed
    shared = int((masks["liver"] & masks["tumour"]).sum())
    with pytest.raises(VolumeError, match=f"'liver' and 'tumour' must not overlap .* {shared} common") as error:
        write_segmentation(tmp_path / name, masks, an_oblique_volume())
    assert "seg.nrrd" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_seg_nrrd_holds_names_colours_and_label_values(tmp_path):
    path = tmp_path / "A.SEG.NRRD"
    write_segmentation(path, some_masks(), an_oblique_volume(), colours={"liver": (1, 0.5, 0)})
    segments = slicerio.read_segmentation(str(path))["segments"]
    assert [s["name"] for s in segments] == list(some_masks())
    assert [s["labelValue"] for s in segments] == [1, 2, 3]
    assert len({s["id"] for s in segments}) == 3
    assert segments[0]["color"] == [1, 0.5, 0]
    assert [s["colorAutoGenerated"] for s in segments] == [False, True, True]
    colours = {tuple(s["color"]) for s in segments}
    assert len(colours) == 3
    assert all(0 <= c <= 1 for colour in colours for c in colour)


@pytest.mark.parametrize("many_layers", [False, True])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1)])
def test_slicer_itself_reads_seg_nrrd_in_the_right_place(tmp_path, many_layers, signs):
    slicer = pytest.importorskip("slicer", reason="slicer-core is not installed")
    from vtkmodules.util.numpy_support import vtk_to_numpy
    from vtkmodules.vtkCommonMath import vtkMatrix4x4

    # As Slicer's Segmentations module does at start; conversion parameters are known through these rules only.
    slicer.vtkSegmentationConverterFactory.GetInstance().RegisterConverterRule(
        slicer.vtkClosedSurfaceToBinaryLabelmapConversionRule()
    )
    volume = an_oblique_volume(signs=signs)
    masks = overlapping_masks() if many_layers else some_masks()
    masks["Schädel \\ 肝臓 | a:b"] = masks.pop("left kidney")
    write_segmentation(tmp_path / "a.seg.nrrd", masks, volume, colours={"liver": (1, 0.5, 0)})

    scene = slicer.vtkMRMLScene()
    node, storage = slicer.vtkMRMLSegmentationNode(), slicer.vtkMRMLSegmentationStorageNode()
    scene.AddNode(node)
    scene.AddNode(storage)
    storage.SetFileName(str(tmp_path / "a.seg.nrrd"))
    assert storage.ReadData(node)
    segmentation = node.GetSegmentation()
    assert segmentation.GetNumberOfLayers() == (2 if many_layers else 1)
    names = []
    for n in range(segmentation.GetNumberOfSegments()):
        segment = segmentation.GetNthSegment(n)
        names.append(segment.GetName())
        image, matrix = segment.GetRepresentation("Binary labelmap"), vtkMatrix4x4()
        image.GetImageToWorldMatrix(matrix)
        ijk_to_ras = np.array([[matrix.GetElement(r, c) for c in range(4)] for r in range(4)])
        assert volume.same_grid(SHAPE, ijk_to_ras)
        assert image.GetExtent() == (0, 6, 0, 7, 0, 8)
        array = vtk_to_numpy(image.GetPointData().GetScalars()).reshape(SHAPE)
        assert np.array_equal(array == segment.GetLabelValue(), masks[segment.GetName()])
        if segment.GetName() == "liver":
            assert segment.GetColor() == pytest.approx((1, 0.5, 0))
    assert names == list(masks)
    geometry = segmentation.GetConversionParameter("Reference image geometry")
    numbers = [float(x) for x in geometry.strip(";").split(";")]
    assert np.allclose(np.reshape(numbers[:16], (4, 4)), volume.ijk_to_ras)
    assert numbers[16:] == [0, 6, 0, 7, 0, 8]


@pytest.mark.parametrize("name", ["Schädel", "肝臓", "a\\nb", "x|y:z^~", " spaced "])
def test_any_printable_name_is_stored_as_utf_8_with_escaped_backslashes(tmp_path, name):
    write_segmentation(tmp_path / "a.seg.nrrd", {name: some_masks()["liver"]}, an_oblique_volume())
    header = (tmp_path / "a.seg.nrrd").read_bytes().partition(b"\n\n")[0].decode()
    assert f"\nSegment0_Name:={name.replace(chr(92), chr(92) * 2)}\n" in header


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "nul\0"])
def test_names_that_would_break_the_header_are_refused(tmp_path, name):
    with pytest.raises(VolumeError, match="printable text on one line"):
        write_segmentation(tmp_path / "a.seg.nrrd", {name: some_masks()["liver"]}, an_oblique_volume())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({}, "1 to 65535 objects, got 0"),
        ({"liver": np.zeros(SHAPE[::-1], bool)}, r"'liver' must be bool of shape KJI \(9, 8, 7\) as volume 'ct'"),
        ({"liver": np.zeros(SHAPE, np.uint8)}, "got uint8"),
    ],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, masks, words):
    with pytest.raises(VolumeError, match=words):
        write_segmentation(tmp_path / "a.nii.gz", masks, an_oblique_volume())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("colour", [(1, 0), (0, 0, 255), (0, 0, float("nan"))])
def test_colours_outside_0_to_1_are_refused(tmp_path, colour):
    with pytest.raises(VolumeError, match=r"red, green and blue in 0\.\.1"):
        write_segmentation(tmp_path / "a.seg.nrrd", some_masks(), an_oblique_volume(), colours={"liver": colour})


@pytest.mark.parametrize("name", ["a.png", "a", "a.nii.zip", "a.nhdr", "a.mhd"])
def test_an_unknown_extension_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(
        VolumeError, match=r"must end in one of \.seg\.nrrd, \.seg\.dcm, \.nii\.gz, \.nii, \.nrrd, \.mha"
    ):
        write_segmentation(tmp_path / name, some_masks(), an_oblique_volume())
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_and_a_folder_as_file_are_refused(tmp_path):
    with pytest.raises(VolumeError, match=r"gone' does not\. Make it first"):
        write_segmentation(tmp_path / "gone" / "a.nrrd", some_masks(), an_oblique_volume())
    (tmp_path / "a.nrrd").mkdir()
    with pytest.raises(VolumeError, match="got a folder"):
        write_segmentation(tmp_path / "a.nrrd", some_masks(), an_oblique_volume(), force=True)


@pytest.mark.parametrize("name", ALL)
def test_an_existing_file_is_replaced_with_force_only(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises(VolumeError, match="--force"):
        write_segmentation(path, some_masks(), an_oblique_volume())
    with pytest.raises(VolumeError, match="--force"):
        check_output(path)
    assert path.read_bytes() == b"old"
    assert check_output(path, force=True) == name[1:]
    write_segmentation(path, some_masks(), an_oblique_volume(), force=True)
    assert_same_place(path, some_masks(), an_oblique_volume())
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def a_full_disk():
    """No file of this process may grow beyond 64 bytes, as with a full disk: the real writers really fail.

    Only around the call itself: pytest's own output may be a file too.
    """
    resource = pytest.importorskip("resource", reason="Windows has no limit for the size of files")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead of a killed process
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_leaves_the_old_file_and_no_half_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"old")
    with a_full_disk(), pytest.raises(VolumeError, match="could not be written") as error:
        write_segmentation(path, some_masks(), an_oblique_volume(), force=True)
    assert error.value.__cause__ is not None
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ALL)
def test_a_disk_that_says_no_at_the_very_end_changes_nothing_either(tmp_path, name, monkeypatch):
    def no_space(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(VolumeError, match=os.strerror(errno.ENOSPC)):
        write_segmentation(tmp_path / name, some_masks(), an_oblique_volume())
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_no_half_file(tmp_path, monkeypatch):
    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_segmentation(tmp_path / "a.nrrd", some_masks(), an_oblique_volume())
    assert not list(tmp_path.iterdir())


def some_maps():
    return {name: np.random.default_rng(n).random(SHAPE) for n, name in enumerate(("foundation", "ct_trunk"))}


def test_confidence_maps_are_float32_on_the_volumes_grid(tmp_path):
    volume = an_oblique_volume()
    paths = write_confidence(tmp_path / "new", some_maps(), volume)
    assert [path.name for path in paths] == ["foundation.nii.gz", "ct_trunk.nii.gz"]
    for path, values in zip(paths, some_maps().values(), strict=True):
        array, ijk_to_ras, _ = read_image(path)
        assert array.dtype == np.float32
        assert np.allclose(array, values)
        assert volume.same_grid(array.shape, ijk_to_ras)
    with pytest.raises(VolumeError, match="--force"):
        write_confidence(tmp_path / "new", some_maps(), volume)
    write_confidence(tmp_path / "new", some_maps(), volume, force=True)


class Computed(Mapping):
    """Maps that are computed as they are asked for; how many of them were still held then."""

    def __init__(self):
        self.held, self.found = [], []

    def __getitem__(self, name):
        self.found.append(sum(each() is not None for each in self.held))
        array = np.full(SHAPE, 0.5, dtype=np.float32)
        self.held.append(weakref.ref(array))
        return array

    def __iter__(self):
        return iter(("a", "b", "c"))

    def __len__(self):
        return 3


def test_confidence_maps_are_asked_for_one_at_a_time_and_let_go(tmp_path):
    maps = Computed()
    write_confidence(tmp_path, maps, an_oblique_volume())
    assert maps.found == [0, 0, 0]


def test_a_map_that_cannot_be_computed_is_no_full_disk(tmp_path):
    class Failing(Computed):
        def __getitem__(self, name):
            if name == "b":
                message = "out of memory"
                raise RuntimeError(message)
            return super().__getitem__(name)

    with pytest.raises(RuntimeError, match="out of memory"):
        write_confidence(tmp_path / "new", Failing(), an_oblique_volume())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("made", [False, True])
def test_all_confidence_maps_are_written_or_none(tmp_path, made):
    folder = tmp_path / "maps"
    if made:
        folder.mkdir()
    with a_full_disk(), pytest.raises(VolumeError, match="could not be written"):
        write_confidence(folder, some_maps(), an_oblique_volume())
    assert folder.exists() == made
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_one_existing_map_keeps_all_from_being_written(tmp_path):
    (tmp_path / "ct_trunk.nii.gz").write_bytes(b"old")
    with pytest.raises(VolumeError, match="--force"):
        write_confidence(tmp_path, some_maps(), an_oblique_volume())
    assert [path.name for path in tmp_path.iterdir()] == ["ct_trunk.nii.gz"]


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".hidden", "a\nb", "c:d"])
def test_map_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(VolumeError, match="must be a file name"):
        write_confidence(tmp_path / "new", {name: np.zeros(SHAPE)}, an_oblique_volume())
    assert not (tmp_path / "new").exists()


def test_maps_that_do_not_fit_are_refused(tmp_path):
    for array in (np.zeros(SHAPE[::-1]), np.zeros(SHAPE, np.uint8)):
        with pytest.raises(VolumeError, match=r"floats of shape KJI \(9, 8, 7\)"):
            write_confidence(tmp_path, {"a": array}, an_oblique_volume())
    with pytest.raises(VolumeError, match="more than case"):
        write_confidence(tmp_path, {"a": np.zeros(SHAPE), "A": np.zeros(SHAPE)}, an_oblique_volume())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(VolumeError, match="must be a folder, got a file"):
        write_confidence(tmp_path / "file", some_maps(), an_oblique_volume())
    with pytest.raises(VolumeError, match=r"does not\. Make it first"):
        write_confidence(tmp_path / "gone" / "maps", some_maps(), an_oblique_volume())
