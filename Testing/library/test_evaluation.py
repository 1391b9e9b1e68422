"""The challenge protocol against answers worked out by hand."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.evaluation import (
    ObjectResult,
    area_under_clicks,
    dice,
    drawn_box,
    evaluate,
    evaluate_object,
    means_per_source,
    next_click,
    surface_dice,
)
from KA2ERSegment.geometry import BoolArray, Box
from KA2ERSegment.manifests import read_manifest, seed_of
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity, Prompt
from KA2ERSegment.volume import Volume

AFFINE = np.array([[0.0, -1.5, 0, 30], [2.0, 0, 0, -10], [0, 0, 3.0, 5], [0, 0, 0, 1]])
"""Anisotropic, with axes that are swapped and flipped: I runs to A, J to L."""


def a_sphere(shape: tuple[int, int, int], centre_kji: tuple[float, float, float], radius: float) -> BoolArray:
    k, j, i = np.ogrid[tuple(slice(n) for n in shape)]
    z, y, x = centre_kji
    inside: BoolArray = (k - z) ** 2 + (j - y) ** 2 + (i - x) ** 2 <= radius**2
    return inside


def a_volume(truth: BoolArray) -> Volume:
    return Volume(truth * 100.0 + np.arange(truth.size).reshape(truth.shape) % 7, AFFINE)


class Scripted:
    """A segmenter that answers with prepared masks, and remembers what it was asked."""

    identity = "scripted"

    def __init__(self, *masks: BoolArray) -> None:
        self._masks = masks
        self.prompts: list[Prompt] = []
        self.starts = 0

    def start(self, volume: Volume) -> None:
        self.starts += 1
        self.prompts = []

    def add(self, prompt: Prompt) -> BoolArray:
        self.prompts.append(prompt)
        return self._masks[min(len(self.prompts), len(self._masks)) - 1]


class Thresholder:
    """A segmenter for items on disk: perfect after the first click, and empty with a box alone."""

    identity = "thresholder"

    def __init__(self, fail_after: int | None = None) -> None:
        self.objects = 0
        self._fail_after = fail_after

    def start(self, volume: Volume) -> None:
        self.objects += 1
        if self._fail_after is not None and self.objects > self._fail_after:
            raise KeyboardInterrupt
        self._volume = volume

    def add(self, prompt: Prompt) -> BoolArray:
        if isinstance(prompt, BoxPrompt):
            return np.zeros(self._volume.shape_kji, dtype=bool)
        assert isinstance(prompt, PointPrompt)
        i, j, k = prompt.ijk(self._volume)
        same: BoolArray = self._volume.array_kji == self._volume.array_kji[k, j, i]
        return same


# --- measures -------------------------------------------------------------------------------------------------------


def test_dice_of_known_overlaps() -> None:
    a, b = np.zeros((4, 5, 6), dtype=bool), np.zeros((4, 5, 6), dtype=bool)
    a[0, 0, :4] = True
    b[0, 0, 2:5] = True
    assert dice(a, b) == pytest.approx(2 * 2 / (4 + 3))
    assert dice(a, a) == 1.0
    assert dice(a, ~a) == 0.0
    assert dice(a & ~a, b & ~b) == 1.0


@pytest.mark.parametrize(("axis", "spacing"), [(0, (1.0, 1.0, 3.0)), (2, (3.0, 1.0, 1.0))])
def test_surface_dice_measures_in_mm_along_each_axis(axis: int, spacing: tuple[float, float, float]) -> None:
    """A slab moved by one voxel of 3 mm is outside the tolerance of 2 mm, by one voxel of 1 mm inside it."""
    truth = np.zeros((24, 24, 24), dtype=bool)
    truth[8:16, 8:16, 8:16] = True
    coarse = surface_dice(np.roll(truth, 1, axis=axis), truth, spacing)
    fine = surface_dice(np.roll(truth, 1, axis=1), truth, spacing)
    assert fine == 1.0
    # Two of six faces are 3 mm away: of the area 2 x 8x8 + 4 x 8x24 mm2 the share 128/896 = 0.14, or without their
    # rims, which are near to the sides of the other block, 2 x 7x7/896 = 0.11.
    assert 1 - 0.15 < coarse < 1 - 0.10


def test_surface_dice_of_spheres_is_the_share_of_surface_within_the_tolerance() -> None:
    shape, spacing = (40, 40, 40), (1.0, 1.0, 1.0)
    truth = a_sphere(shape, (20, 20, 20), 10)
    assert surface_dice(truth, truth, spacing) == 1.0
    assert surface_dice(a_sphere(shape, (20, 20, 20), 11.5), truth, spacing) > 0.99
    assert surface_dice(a_sphere(shape, (20, 20, 20), 14.0), truth, spacing) == 0.0


def test_surface_dice_of_a_moved_sphere_is_half() -> None:
    """A sphere of 10 mm moved by 4 mm, on a grid of 0.5 mm.

    A point at angle t to the move lies sqrt(116 - 80 cos t) mm from the other centre. That is 8 to 12 mm for cos t
    from -0.35 to 0.65: half of the surface. Distances are between voxels, which favours by about half a voxel:
    7.75 to 12.25 mm is 0.56.
    """
    truth, moved = a_sphere((60, 60, 60), (30, 30, 25), 20), a_sphere((60, 60, 60), (30, 30, 33), 20)
    assert 0.49 < surface_dice(moved, truth, (0.5, 0.5, 0.5)) < 0.57


def test_surface_dice_counts_masks_at_the_border_of_the_volume() -> None:
    truth = np.zeros((10, 10, 10), dtype=bool)
    truth[:4, :4, :4] = True
    assert surface_dice(truth, truth, (1.0, 2.0, 3.0)) == 1.0
    assert surface_dice(np.zeros_like(truth), truth, (1.0, 2.0, 3.0)) == 0.0
    everything = np.ones_like(truth)
    assert surface_dice(everything, everything, (1.0, 2.0, 3.0)) == 1.0


def test_area_under_clicks_is_a_trapezoid_of_at_most_four() -> None:
    assert area_under_clicks([1, 1, 1, 1, 1]) == 4.0
    assert area_under_clicks([0, 0, 0, 0, 1]) == 0.5
    assert area_under_clicks([0.2, 0.4, 0.5, 0.7, 0.8]) == pytest.approx(0.3 + 0.45 + 0.6 + 0.75)


# --- prompts --------------------------------------------------------------------------------------------------------


def test_drawn_box_moves_each_face_by_minus_2_to_plus_10_percent() -> None:
    truth = np.zeros((300, 320, 340), dtype=bool)
    truth[100:200, 60:260, 50:100] = True  # extents 100 (K), 200 (J), 50 (I)
    moves = []
    for n in range(40):
        box = drawn_box(truth, seed_of("box", str(n)))
        outward = np.array([np.array([50, 60, 100]) - box.start, box.stop - np.array([100, 260, 200])])
        moves.append(outward / [50, 200, 100])
    shares = np.array(moves)
    assert shares.min() >= -0.02 - 0.01  # half a voxel of 50 from rounding
    assert shares.max() <= 0.10 + 0.01
    assert shares.min() < 0.0
    assert shares.max() > 0.08
    assert (shares.std(axis=0) > 0.01).all()  # every face moves


def test_drawn_box_is_clipped_and_the_same_for_the_same_seed() -> None:
    truth = np.ones((20, 30, 40), dtype=bool)
    truth[0] = False
    for n in range(20):
        box = drawn_box(truth, seed_of(str(n)))
        assert box.intersect(Box.of_shape(truth.shape)) == box
        assert box == drawn_box(truth, seed_of(str(n)))
    assert len({drawn_box(truth, seed_of(str(n))) for n in range(20)}) > 1


def test_drawn_box_of_one_voxel_is_that_voxel() -> None:
    truth = np.zeros((5, 6, 7), dtype=bool)
    truth[2, 3, 4] = True
    assert drawn_box(truth, seed_of("")) == Box((4, 3, 2), (5, 4, 3))


def test_first_click_without_a_mask_is_the_distance_maximum_of_the_object() -> None:
    truth = a_sphere((20, 30, 40), (9, 14, 22), 6)
    assert next_click(np.zeros_like(truth), truth, seed_of("")) == ((22, 14, 9), Polarity.POSITIVE)


def test_click_is_negative_in_the_middle_of_the_largest_false_positive() -> None:
    truth = a_sphere((30, 30, 60), (15, 15, 12), 4)
    small, large = a_sphere(truth.shape, (15, 15, 30), 3), a_sphere(truth.shape, (15, 15, 47), 5)
    assert next_click(truth | small | large, truth, seed_of("")) == ((47, 15, 15), Polarity.NEGATIVE)
    assert next_click(large, truth, seed_of("")) == ((47, 15, 15), Polarity.NEGATIVE)


def test_largest_component_is_by_voxels_and_26_connected() -> None:
    truth = np.zeros((9, 20, 30), dtype=bool)
    truth[1:4, 1:4, 1:4] = True  # 27 voxels
    truth[4:7, 4:7, 4:7] = True  # touches only by a corner: one component of 54 with it
    truth[1:6, 10:15, 20:22] = True  # 50 voxels, less deep
    ijk, polarity = next_click(np.zeros_like(truth), truth, seed_of("")) or ((0, 0, 0), Polarity.NEGATIVE)
    assert ijk in {(2, 2, 2), (5, 5, 5)}
    assert polarity is Polarity.POSITIVE


def test_border_of_the_volume_counts_as_border() -> None:
    truth = np.zeros((9, 9, 9), dtype=bool)
    truth[:5, :9, :9] = True  # fills the volume in I and J: without padding the click would land at k = 0
    click = next_click(np.zeros_like(truth), truth, seed_of(""))
    assert click is not None
    i, j, k = click[0]
    assert k == 2
    assert 2 <= i <= 6
    assert 2 <= j <= 6


def test_ties_are_chosen_by_the_seed() -> None:
    truth = np.ones((3, 3, 12), dtype=bool)
    empty = np.zeros_like(truth)
    clicks = {next_click(empty, truth, seed_of(str(n))) for n in range(30)}
    assert clicks <= {((i, 1, 1), Polarity.POSITIVE) for i in range(1, 11)}
    assert len(clicks) > 3
    assert next_click(empty, truth, seed_of("5")) == next_click(empty, truth, seed_of("5"))


def test_perfect_mask_needs_no_click() -> None:
    truth = a_sphere((10, 10, 10), (5, 5, 5), 3)
    assert next_click(truth, truth, seed_of("")) is None


# --- one object -----------------------------------------------------------------------------------------------------


def test_scores_of_one_object_are_those_after_each_prompt() -> None:
    truth = a_sphere((30, 30, 30), (15, 15, 15), 8)
    half = truth.copy()
    half[15:] = False
    nothing = np.zeros_like(truth)
    segmenter = Scripted(half, nothing, half, truth)
    scores = evaluate_object(segmenter, a_volume(truth), truth, seed_of("a"), with_box=True)
    first = dice(half, truth)
    assert scores["box_dice"] == first
    assert [scores[f"dsc{n}"] for n in range(1, 6)] == [0.0, first, 1.0, 1.0, 1.0]
    assert scores["nsd1"] == 0.0
    assert scores["nsd2"] == surface_dice(half, truth, (2.0, 1.5, 3.0))
    assert scores["dsc_auc"] == pytest.approx(first / 2 + (first + 1) / 2 + 1 + 1)
    assert scores["dsc_final"] == 1.0
    assert [type(p) for p in segmenter.prompts] == [BoxPrompt, PointPrompt, PointPrompt, PointPrompt]  # then perfect
    assert segmenter.starts == 1


def test_without_a_box_there_are_clicks_only() -> None:
    truth = a_sphere((30, 30, 30), (15, 15, 15), 8)
    segmenter = Scripted(np.zeros_like(truth))
    volume = a_volume(truth)
    scores = evaluate_object(segmenter, volume, truth, seed_of("a"), with_box=False)
    assert scores["box_dice"] is None
    assert scores["dsc_auc"] == 0.0
    assert len(segmenter.prompts) == 5
    first = segmenter.prompts[0]
    assert isinstance(first, PointPrompt)
    assert first.ijk(volume) == (15, 15, 15)
    assert first.polarity is Polarity.POSITIVE


def test_nsd_is_zero_where_dice_is_at_most_a_fifth() -> None:
    truth = np.zeros((20, 20, 20), dtype=bool)
    truth[5:15, 5:15, 5:15] = True
    little = np.zeros_like(truth)
    little[5:15, 5:15, 5:6] = True  # Dice 2/11, and a tenth of the surface is right
    scores = evaluate_object(Scripted(little), a_volume(truth), truth, seed_of("a"), with_box=False)
    assert scores["dsc1"] == pytest.approx(2 / 11)
    assert surface_dice(little, truth, (2.0, 1.5, 3.0)) > 0
    assert scores["nsd1"] == 0.0


def test_mean_per_source_is_over_items_and_not_over_objects() -> None:
    def result(item: str, source: str, label: int, value: float) -> ObjectResult:
        dsc = {f"dsc{n}": value for n in range(1, 6)} | {f"nsd{n}": value for n in range(1, 6)}
        finals = {"dsc_auc": 4 * value, "nsd_auc": 4 * value, "dsc_final": value, "nsd_final": value}
        rest = {"box_dice": None, "box_nsd": None, "seconds_first_prompt": 1.0, "seconds_per_click": None}
        return ObjectResult(item, source, label, str(label), 30, **dsc, **finals, **rest)  # type: ignore[arg-type]

    results = [result("a", "x", 1, 0.2), result("a", "x", 2, 0.4), result("b", "x", 1, 0.9), result("c", "y", 1, 0.1)]
    table = means_per_source(results)
    assert table["x"]["dsc1"] == pytest.approx((0.3 + 0.9) / 2)
    assert table["x"]["items"] == 2
    assert table["x"]["objects"] == 3
    assert table["x"]["box_dice"] is None
    assert table["mean over sources"]["dsc_auc"] == pytest.approx(4 * (0.6 + 0.1) / 2)


# --- a manifest -----------------------------------------------------------------------------------------------------


@pytest.fixture
def a_manifest(tmp_path: Path) -> Path:
    """Two items with an image (three objects of at least 20 voxels, one of 3), and a label map alone."""
    folder = tmp_path / "data"
    (folder / "labels").mkdir(parents=True)
    names = {"1": "ball", "2": "block", "3": "speck"}
    (folder / "labels" / "names.json").write_text(json.dumps(names))
    rows = []
    for n, name in enumerate(("one", "two")):
        labels = np.zeros((14, 16, 18), dtype=np.uint8)
        labels[a_sphere(labels.shape, (7, 7, 6), 4)] = 1
        if n == 0:
            labels[2:6, 2:6, 13:17] = 2
            labels[10, 10, 10:13] = 3
        nibabel.Nifti1Image((labels * 50).T.astype(np.int16), AFFINE).to_filename(folder / f"{name}_img.nii.gz")
        nibabel.Nifti1Image(labels.T, AFFINE).to_filename(folder / f"{name}_lbl.nii.gz")
        images = f"{name}_img.nii.gz;{name}_img_other_channel.nii.gz"
        rows.append((name, "val", "yes", images, f"{name}_lbl.nii.gz", "labels/names.json", f"group/{name}"))
    rows.append(("map", "val", "no", "", "one_lbl.nii.gz", "labels/names.json", "group/one"))
    rows.append(("other", "train", "yes", "absent.nii.gz", "absent.nii.gz", "absent.json", "group/one"))
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "split", "has_image", "images", "label", "labels_json", "source_repo"])
        writer.writerows(rows)
    return folder / "manifest.csv"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "objects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_evaluation_of_a_manifest_writes_rows_means_and_a_picture(a_manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    seen: list[tuple[int, int]] = []
    output = tmp_path / "results"
    done = evaluate([a_manifest], Thresholder(), output, on_progress=lambda n, total, _: seen.append((n, total)))
    assert done.complete
    assert [(r["item"], r["name"]) for r in rows_of(output)] == [("one", "ball"), ("one", "block"), ("two", "ball")]
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["complete"]
    assert summary["sources"]["group/one"]["dsc_auc"] == 4.0
    assert summary["sources"]["mean over sources"]["box_dice"] == 0.0
    left_out = {(entry["item"], entry["name"]): entry["reason"] for entry in summary["left_out"]}
    assert "without an image" in left_out[("map", "")]
    assert "3 voxels, fewer than 20" in left_out[("one", "speck")]
    assert len(left_out) == 2
    assert (output / "dice_against_clicks.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob(".*"))


def test_interrupted_run_resumes_where_it_stopped(a_manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    whole, output = tmp_path / "whole", tmp_path / "results"
    evaluate([a_manifest], Thresholder(), whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate([a_manifest], Thresholder(fail_after=2), output)
    assert len(rows_of(output)) == 2
    assert not json.loads((output / "summary.json").read_text())["complete"]
    segmenter = Thresholder()
    done = evaluate([a_manifest], segmenter, output, resume=True)
    assert segmenter.objects == 1  # only what was missing
    assert done.complete

    def without_seconds(rows: list[dict[str, str]]) -> list[dict[str, str]]:
        return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]

    assert without_seconds(rows_of(output)) == without_seconds(rows_of(whole))


def test_resume_refuses_other_settings_and_a_new_run_refuses_old_results(a_manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    evaluate([a_manifest], Thresholder(), tmp_path / "results")
    with pytest.raises(KA2ERError, match="with_box"):
        evaluate([a_manifest], Thresholder(), tmp_path / "results", with_box=False, resume=True)
    with pytest.raises(KA2ERError, match="no earlier results"):
        evaluate([a_manifest], Thresholder(), tmp_path / "results")


def test_at_most_n_objects_per_item_are_the_same_in_every_run(a_manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chosen = []
    for run in ("a", "b"):
        done = evaluate([a_manifest], Thresholder(), tmp_path / run, max_objects_per_item=1)
        chosen.append([(r.item, r.name) for r in done.results])
    assert chosen[0] == chosen[1]
    assert [item for item, _ in chosen[0]] == ["one", "two"]
    assert any("more than 1 objects" in entry.reason for entry in done.left_out)


def test_bad_manifests_say_what_is_missing(tmp_path: Path, a_manifest: Path) -> None:
    with pytest.raises(KA2ERError, match=r"'none\.csv' must be a readable CSV"):
        read_manifest(tmp_path / "none.csv", "val")
    with pytest.raises(KA2ERError, match=r"items of split 'test', got \['train', 'val'\]"):
        read_manifest(a_manifest, "test")
    (tmp_path / "short.csv").write_text("id,split\na,val\n")
    with pytest.raises(KA2ERError, match="labels_json"):
        read_manifest(tmp_path / "short.csv", "val")
    with pytest.raises(KA2ERError, match=r"'other' must have label names"):
        read_manifest(a_manifest, "train")


def test_label_map_on_another_grid_is_refused(a_manifest: Path, tmp_path: Path) -> None:
    label = a_manifest.parent / "two_lbl.nii.gz"
    array = np.asarray(nibabel.load(label).dataobj)
    nibabel.Nifti1Image(array, AFFINE @ np.diag([1, 1, 1.5, 1])).to_filename(label)
    with pytest.raises(KA2ERError, match="label map of item 'two' must lie on its image's grid"):
        evaluate([a_manifest], Thresholder(), tmp_path / "results")


def test_results_know_the_subject_and_older_ones_without_it_are_still_read(tmp_path: Path) -> None:
    truth = a_sphere((16, 16, 16), (8, 8, 8), 5)
    manifest = tmp_path / "manifest.csv"
    nibabel.Nifti1Image((100 * truth).T.astype(np.int16), AFFINE).to_filename(tmp_path / "img.nii.gz")
    nibabel.Nifti1Image(truth.T.astype(np.uint8), AFFINE).to_filename(tmp_path / "lbl.nii.gz")
    (tmp_path / "names.json").write_text('{"1": "ball"}')
    head = "id,split,has_image,images,label,labels_json,source_repo,subject,modality,body_region"
    manifest.write_text(f"{head}\na_es,val,yes,img.nii.gz,lbl.nii.gz,names.json,group/a,somebody,MR cine,heart\n")
    (item,), _ = read_manifest(manifest, "val")
    assert (item.subject, item.modality, item.region) == ("somebody", "MR cine", "heart")

    about = {"parameters": 12.0}
    done = evaluate([manifest], Thresholder(), tmp_path / "results", about=about)
    assert done.results[0].subject == "somebody"
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["about"] == {**about, "seconds_per_click": done.seconds_per_click}
    assert done.seconds_per_click == done.results[0].seconds_per_click
    rows = [row.rsplit(",", 1)[0] for row in (tmp_path / "results" / "objects.csv").read_text().splitlines()]
    (tmp_path / "results" / "objects.csv").write_text("\n".join(rows) + "\n")
    resumed = evaluate([manifest], Thresholder(fail_after=0), tmp_path / "results", resume=True)
    assert resumed.results == (replace(done.results[0], subject=""),)
