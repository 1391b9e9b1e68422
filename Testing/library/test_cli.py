"""The command line: parsing, exit codes, JSON, files; with a fake session, and with the shipped bundle where it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from KA2ERSegment.bundle import Bundle
from KA2ERSegment.cli import app
from KA2ERSegment.cli.evaluate import System
from KA2ERSegment.errors import BundleError
from KA2ERSegment.geometry import Box
from KA2ERSegment.plans import SYSTEMS
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity, Prompt, prompt_from_json
from KA2ERSegment.volume import Volume

SHAPE = (12, 20, 24)
AFFINE = np.array([[1.0, 0, 0, -12], [0, 1.2, 0, -10], [0, 0, 2.0, -8], [0, 0, 0, 1]])
BUNDLE = Path(__file__).parents[2] / "Resources" / "Models" / "ka2er-base"


class FakeSession:
    """Each object is what its positive prompts cover, less what its negative ones cover."""

    last: FakeSession
    shares: ClassVar = {"foundation": 0.75, "ct organs": 0.25}

    def __init__(self, bundle: object, device: str = "auto") -> None:
        FakeSession.last = self
        self.device = device
        self.prompts: dict[str, tuple[Prompt, ...]] = {}
        self.selected = "object"

    def set_volume(self, volume: Volume) -> None:
        self.volume = volume

    def select(self, name: str) -> None:
        self.selected = name

    def add(self, prompt: Prompt) -> Any:
        prompt.region(self.volume)
        self.prompts[self.selected] = (*self.prompts.get(self.selected, ()), prompt)
        return self.prediction

    def _mask(self, name: str) -> np.ndarray:
        mask = np.zeros(self.volume.shape_kji, dtype=bool)
        for prompt in self.prompts[name]:
            box, covered = prompt.region(self.volume)
            box.crop(mask)[covered] = prompt.polarity is Polarity.POSITIVE
        return mask

    @property
    def prediction(self) -> Any:
        if self.selected not in self.prompts:
            return None
        mask = self._mask(self.selected)
        i, j, k = (n - 1 for n in self.volume.shape_ijk)
        box = Box((0, 0, 0), (i, j, k))

        def opinion_crop(name: str) -> tuple[Box, np.ndarray, np.ndarray]:
            seen = box.crop(mask).astype(np.float32)
            return box, seen * 0.5, np.full(seen.shape, self.shares[name], dtype=np.float32)

        opinions = {
            name: SimpleNamespace(probability=mask * 0.5, weight=np.full(mask.shape, share), mean_weight=share)
            for name, share in self.shares.items()
        }
        return SimpleNamespace(
            mask=mask, probability=mask.astype(np.float32), experts=opinions, arms=tuple(opinions), shares=self.shares,
            opinion_crop=opinion_crop, quality=0.5, volume=self.volume,
        )  # fmt: skip

    def label_map(self) -> tuple[np.ndarray, tuple[str, ...]]:
        labels = np.zeros(self.volume.shape_kji, dtype=np.uint16)
        for value, name in enumerate(self.prompts, 1):
            labels[self._mask(name)] = value
        return labels, tuple(self.prompts)

    @classmethod
    def replay(cls, path: Path, volume: Volume, bundle: object = None, device: str = "auto") -> FakeSession:
        session = cls(bundle, device)
        session.set_volume(volume)
        for name, prompts in json.loads(Path(path).read_text()).items():
            session.select(name)
            for prompt in prompts:
                session.add(prompt_from_json(prompt))
        return session


@dataclass(frozen=True)
class FakeBundle:
    folder: Path
    plans: Any
    checksums: Mapping[str, str]
    identity: str = "fake@0"
    nbytes = Bundle.nbytes


@pytest.fixture(autouse=True)
def _a_fake_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """No weights and no torch: `session` and `bundle` are stand-ins, except where a test is marked weights."""
    if "real_bundle" in request.fixturenames:
        return
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(bytes(2_500_000))
    (folder / "plans.json").write_bytes(b"")
    expert = SimpleNamespace(name="ct", task="organs in CT", classes=("liver",))
    plans = SimpleNamespace(patch_size=64, experts=(expert,), without=lambda *systems: plans)
    bundle = FakeBundle(folder, plans, {"weights.safetensors": "0" * 64, "plans.json": "1" * 64})

    def load_bundle(path: Path | None = None) -> FakeBundle:
        if path is not None and not path.exists():
            message = f"bundle folder {str(path)!r} must exist."
            raise BundleError(message)
        return bundle

    facts = {"parameters": 7, "seconds_per_patch": 0.5}
    monkeypatch.setattr("KA2ERSegment.evaluation.SessionSegmenter.facts", lambda _: facts)  # imports the real modules
    for name, content in (("session", {"Session": FakeSession}), ("bundle", {"load_bundle": load_bundle})):
        module = ModuleType(f"KA2ERSegment.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, f"KA2ERSegment.{name}", module)


@pytest.fixture
def an_image(tmp_path: Path) -> Path:
    array = np.random.default_rng(0).normal(0, 10, SHAPE).astype(np.float32)
    path = tmp_path / "image.nii.gz"
    nibabel.Nifti1Image(array.T, AFFINE).to_filename(path)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def mask_of(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj).T


# --- segment: prompts -----------------------------------------------------------------------------------------------


def test_box_and_points_become_prompts_in_that_order(an_image: Path, tmp_path: Path) -> None:
    out = tmp_path / "mask.nii.gz"
    words = ("--point", "5,6,7", "--negative-point", "1,2,3", "--box", "2,3,4,8,9,10", "--point", "6,6,7")
    result = run("segment", an_image, "--output", out, *words)
    assert result.exit_code == 0, result.output
    volume = Volume.read(an_image)
    box, first, second, negative = FakeSession.last.prompts["object"]
    assert isinstance(box, BoxPrompt)
    assert (box.box(volume).start, box.box(volume).stop) == ((2, 3, 4), (8, 9, 10))
    assert isinstance(first, PointPrompt)
    assert isinstance(second, PointPrompt)
    assert (first.ijk(volume), second.ijk(volume)) == ((5, 6, 7), (6, 6, 7))
    assert isinstance(negative, PointPrompt)
    assert negative.polarity is Polarity.NEGATIVE
    assert mask_of(out).sum() == 6 * 6 * 6
    assert "object: 216 voxels" in result.stdout


@pytest.mark.parametrize("form", [("--point=-10,-9.5,4",), ("--point", "-10,-9.5,4")])
def test_negative_coordinates_are_numbers_and_not_options(
    form: tuple[str, ...], an_image: Path, tmp_path: Path
) -> None:
    result = run("segment", an_image, "--output", tmp_path / "mask.mha", "--ras", *form)
    assert result.exit_code == 0, result.output
    (point,) = FakeSession.last.prompts["object"]
    assert isinstance(point, PointPrompt)
    assert point.ras == (-10.0, -9.5, 4.0)


def test_box_in_ras_is_two_opposite_corners_in_any_order(an_image: Path, tmp_path: Path) -> None:
    # Voxels 2..5 of I and J, 1..3 of K, from outer edge to outer edge, with corners mixed.
    low, high = AFFINE[:3, :3] @ (1.5, 1.5, 0.5) + AFFINE[:3, 3], AFFINE[:3, :3] @ (5.5, 5.5, 3.5) + AFFINE[:3, 3]
    corners = ",".join(str(x) for x in (high[0], low[1], high[2], low[0], high[1], low[2]))
    result = run("segment", an_image, "--output", tmp_path / "mask.nii.gz", "--ras", f"--box={corners}")
    assert result.exit_code == 0, result.output
    expected = np.zeros(SHAPE, dtype=bool)
    expected[1:4, 2:6, 2:6] = True
    assert np.array_equal(mask_of(tmp_path / "mask.nii.gz") > 0, expected)


def test_saved_prompts_come_first_and_keep_their_objects(an_image: Path, tmp_path: Path) -> None:
    volume = Volume.read(an_image)
    liver = [BoxPrompt.from_ijk((1, 1, 1), (5, 5, 5), volume).to_json()]
    spleen = [PointPrompt.from_ijk((9, 9, 9), volume).to_json()]
    (tmp_path / "prompts.json").write_text(json.dumps({"liver": liver, "spleen": spleen}))
    words = ("--prompts", tmp_path / "prompts.json", "--object", "liver", "--negative-point", "2,2,2")
    result = run("segment", an_image, "--output", tmp_path / "mask.nii.gz", *words, "--json")
    assert result.exit_code == 0, result.output
    objects = json.loads(result.stdout)["objects"]
    assert {name: entry["voxels"] for name, entry in objects.items()} == {"liver": 63, "spleen": 1}
    assert sorted(np.unique(mask_of(tmp_path / "mask.nii.gz"))) == [0, 1, 2]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--point", "1,2"),
        ("--point", "1,2,x"),
        ("--point", "1.5,2,3"),
        ("--box", "1,2,3,4,5"),
        ("--point", "1,2,3", "--device", "tpu"),
    ],
    ids=["no prompt", "two numbers", "no number", "half a voxel", "five numbers", "unknown device"],
)
def test_wrong_usage_exits_with_2(words: tuple[str, ...], an_image: Path, tmp_path: Path) -> None:
    result = run("segment", an_image, "--output", tmp_path / "mask.nii.gz", *words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr
    assert not (tmp_path / "mask.nii.gz").exists()


def test_unknown_extension_is_wrong_usage(an_image: Path, tmp_path: Path) -> None:
    result = run("segment", an_image, "--output", tmp_path / "mask.png", "--point", "1,2,3")
    assert result.exit_code == 2
    assert ".seg.nrrd" in result.stderr


# --- segment: files -------------------------------------------------------------------------------------------------


def test_existing_output_is_only_replaced_with_force_and_before_computing(an_image: Path, tmp_path: Path) -> None:
    out = tmp_path / "mask.nii.gz"
    out.write_bytes(b"mine")
    FakeSession.last = None  # type: ignore[assignment]
    result = run("segment", an_image, "--output", out, "--point", "1,2,3")
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert FakeSession.last is None
    assert out.read_bytes() == b"mine"
    assert run("segment", an_image, "--output", out, "--point", "1,2,3", "--force").exit_code == 0
    assert mask_of(out).sum() == 1


def test_missing_output_folder_is_told_before_computing(an_image: Path, tmp_path: Path) -> None:
    result = run("segment", an_image, "--output", tmp_path / "no" / "mask.nii.gz", "--point", "1,2,3")
    assert result.exit_code == 1
    assert "must exist" in result.stderr


def test_confidence_maps_of_every_expert_are_written(an_image: Path, tmp_path: Path) -> None:
    words = ("--point", "5,6,7", "--confidence", tmp_path / "maps", "--json")
    result = run("segment", an_image, "--output", tmp_path / "mask.nii.gz", *words)
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert names == [f"{e}_{kind}.nii.gz" for e in ("ct_organs", "foundation") for kind in ("probability", "weight")]
    image = nibabel.load(tmp_path / "maps" / "foundation_probability.nii.gz")
    assert np.allclose(image.affine, AFFINE)
    assert np.asarray(image.dataobj).T[7, 6, 5] == 0.5
    assert json.loads(result.stdout)["expert_weights"] == {"foundation": 0.75, "ct organs": 0.25}
    again = run("segment", an_image, "--output", tmp_path / "other.nii.gz", *words)
    assert again.exit_code == 1
    assert "--confidence" in json.loads(again.stdout)["error"]


def test_experts_of_like_names_have_maps_of_their_own(
    an_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeSession, "shares", {"decoder_x": 0.7, "decoder x": 0.2, "Decoder_X": 0.1})
    words = ("--point", "5,6,7", "--confidence", tmp_path / "maps", "--json")
    result = run("segment", an_image, "--output", tmp_path / "mask.nii.gz", *words)
    assert result.exit_code == 0, result.output
    weights = {path.name: nibabel.load(path).get_fdata().max() for path in (tmp_path / "maps").glob("*_weight*")}
    assert weights == {
        "decoder_x_weight.nii.gz": pytest.approx(0.7),
        "decoder_x_2_weight.nii.gz": pytest.approx(0.2),
        "Decoder_X_3_weight.nii.gz": pytest.approx(0.1),
    }
    assert len(list((tmp_path / "maps").iterdir())) == 6


def test_interrupted_run_leaves_no_file(an_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: FakeSession, prompt: Prompt) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeSession, "add", interrupt)
    before = sorted(tmp_path.iterdir())
    words = ("--point", "1,2,3", "--confidence", tmp_path / "maps")
    result = run("segment", an_image, "--output", tmp_path / "mask.nii.gz", *words)
    assert result.exit_code == 1
    assert "interrupted" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("extension", [".nii.gz", ".nrrd", ".mha", ".seg.nrrd"])
def test_every_format_of_the_help_can_be_written(extension: str, an_image: Path, tmp_path: Path) -> None:
    out = tmp_path / f"mask{extension}"
    result = run("segment", an_image, "-o", out, "--object", "left lung", "--box", "2,3,4,8,9,10")
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 100
    if extension == ".seg.nrrd":
        assert b"Segment0_Name:=left lung" in out.read_bytes()


# --- failures -------------------------------------------------------------------------------------------------------


def test_failed_run_is_one_line_and_exit_code_1(an_image: Path, tmp_path: Path) -> None:
    result = run("segment", an_image, "--output", tmp_path / "mask.nii.gz", "--point", "1,2,300")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "outside" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "mask.nii.gz").exists()


def test_failed_run_tells_machines_in_json(tmp_path: Path) -> None:
    words = ("--output", tmp_path / "mask.nii.gz", "--point", "1,2,3", "--json")
    result = run("segment", tmp_path / "none.nii.gz", *words)
    assert result.exit_code == 1
    assert json.loads(result.stdout)["kind"] == "VolumeError"
    assert "error" in result.stderr


def test_full_disk_is_one_line(an_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("KA2ERSegment.segmentation_files.write_segmentation", full)
    result = run("segment", an_image, "--output", tmp_path / "mask.nii.gz", "--point", "1,2,3")
    assert result.exit_code == 1
    assert "No space left" in result.stderr


# --- the other commands ---------------------------------------------------------------------------------------------


def test_bundle_info_and_verify(tmp_path: Path) -> None:
    info = json.loads(run("bundle", "info", "--json").stdout)
    assert info["experts"] == [{"name": "ct", "task": "organs in CT", "classes": ["liver"]}]
    assert info["megabytes"] == 2.5
    verified = json.loads(run("bundle", "verify", tmp_path / "bundle", "--json").stdout)
    assert verified["verified"] is True
    assert "organs in CT" in run("bundle", "info").stdout
    bad = run("bundle", "verify", tmp_path / "none")
    assert bad.exit_code == 1
    assert "must exist" in bad.stderr


def test_doctor_fails_only_for_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = run("doctor", "--json")
    report = json.loads(healthy.stdout)
    assert healthy.exit_code == 0, healthy.output
    assert report["ok"] is True
    assert {"torch", "device", "shipped bundle", "threads"} <= {check["name"] for check in report["checks"]}

    def damaged(path: Path | None = None) -> None:
        message = "weights.safetensors must have SHA-256 0000, got 1111. Install again."
        raise BundleError(message)

    monkeypatch.setattr(sys.modules["KA2ERSegment.bundle"], "load_bundle", damaged)
    broken = run("doctor", "--json")
    assert broken.exit_code == 1
    report = json.loads(broken.stdout)
    assert report["ok"] is False
    assert [c["name"] for c in report["checks"] if c["needed"] and not c["ok"]] == ["shipped bundle"]
    assert run("doctor").exit_code == 1


@pytest.fixture
def a_manifest(tmp_path: Path) -> Path:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[3:8, 4:10, 5:12] = 1
    nibabel.Nifti1Image((100 * labels).T.astype(np.int16), AFFINE).to_filename(tmp_path / "a_img.nii.gz")
    nibabel.Nifti1Image(labels.T, AFFINE).to_filename(tmp_path / "a_lbl.nii.gz")
    (tmp_path / "names.json").write_text('{"1": "block"}')
    head = "id,split,has_image,images,label,labels_json,source_repo"
    (tmp_path / "manifest.csv").write_text(f"{head}\na,val,yes,a_img.nii.gz,a_lbl.nii.gz,names.json,group/a\n")
    return tmp_path / "manifest.csv"


def test_evaluate_scores_a_manifest_and_resumes(a_manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("evaluate", a_manifest, "--output", tmp_path / "results", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    # The fake fills the box, so Dice with it alone is that of the drawn box and the object.
    assert 0.5 < summary["sources"]["group/a"]["box_dice"] <= 1.0
    assert summary["settings"]["method"] == "ka2er fake@0 plans 11111111"
    assert summary["about"].keys() == {"parameters", "seconds_per_patch", "seconds_per_click"}
    assert summary["about"]["parameters"] == 7
    assert (tmp_path / "results" / "objects.csv").exists()
    again = run("evaluate", a_manifest, "--output", tmp_path / "results")
    assert again.exit_code == 1
    resumed = run("evaluate", a_manifest, "--output", tmp_path / "results", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "group/a" in resumed.stdout
    assert "mean over sources" in resumed.stdout


def test_evaluate_says_what_was_switched_off(a_manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("--without", "gate", "--without", "experts", "--without", "gate", "--json")
    result = run("evaluate", a_manifest, "--output", tmp_path / "results", *words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["method"] == "ka2er fake@0 plans 11111111 without experts, gate"
    assert run("evaluate", a_manifest, "--output", tmp_path / "results", "--resume").exit_code == 1  # another method
    assert run("evaluate", a_manifest, "--without", "growcut").exit_code == 2
    assert run("evaluate", a_manifest, "--method", "growcut", "--without", "gate").exit_code == 2
    assert [system.value for system in System] == list(SYSTEMS)


def test_evaluate_runs_grow_from_seeds_without_a_box(a_manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("slicer", reason="Grow from seeds needs slicer-core: pip install ka2ersegment[slicer]")
    pytest.importorskip("matplotlib")
    words = ("--method", "growcut", "--no-box", "--output", tmp_path / "results", "--json")
    result = run("evaluate", a_manifest, *words)
    assert result.exit_code == 0, result.output
    means: Mapping[str, float | None] = json.loads(result.stdout)["sources"]["group/a"]
    assert means["box_dice"] is None
    assert means["dsc_final"] is not None
    assert means["dsc_final"] > 0.9


def test_evaluate_without_a_manifest_fails(tmp_path: Path) -> None:
    result = run("evaluate", tmp_path / "none.csv", "--output", tmp_path / "results")
    assert result.exit_code == 1
    assert "none.csv" in result.stderr
    assert not (tmp_path / "results").exists()


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = "import sys, KA2ERSegment.cli; print(sorted({'torch', 'monai', 'matplotlib', 'scipy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "words", [("--help",), ("segment", "--help"), ("evaluate", "--help"), ("bundle", "--help"), ("assess", "--help")]
)
def test_help_of_every_command(words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 0
    assert "Usage" in result.stdout


# --- the demo and the real bundle -----------------------------------------------------------------------------------


def test_demo_on_the_fake_session_writes_masks_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    pytest.importorskip("matplotlib")
    result = run("demo", "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [step["after"].split()[0] for step in report["steps"]][:2] == ["box", "positive"]
    assert all(0 < step["dice"] < 1 for step in report["steps"])
    assert all(Path(path).stat().st_size > 1000 for path in report["files"])
    assert {Path(path).suffix for path in report["files"]} == {".gz", ".nrrd", ".png"}
    assert "ka2ersegment segment" in report["own_file_command"]


@pytest.fixture
def real_bundle() -> Path:
    assert (BUNDLE / "checksums.json").is_file(), "the shipped bundle belongs under Resources/Models"
    return BUNDLE


def test_shipped_bundle_segments_a_ball_from_a_box(real_bundle: Path, tmp_path: Path) -> None:
    k, j, i = np.ogrid[:24, :40, :44]
    ball = (2 * (k - 12)) ** 2 + (j - 20) ** 2 + (i - 22) ** 2 <= 12**2
    array = np.where(ball, 120, 20) + np.random.default_rng(0).normal(0, 6, ball.shape)
    image, out = tmp_path / "image.nii.gz", tmp_path / "mask.nii.gz"
    nibabel.Nifti1Image(array.T.astype(np.float32), np.diag([1.0, 1, 2, 1])).to_filename(image)
    words = ("--box", "9,7,5,36,34,19", "--point", "22,20,12", "--bundle", real_bundle, "--device", "cpu", "--json")
    result = run("segment", image, "--output", out, *words)
    assert result.exit_code == 0, result.output
    mask = mask_of(out) > 0
    assert 2 * (mask & ball).sum() / (mask.sum() + ball.sum()) > 0.5
    assert mask[12, 20, 22]


def test_shipped_bundle_verifies_and_the_doctor_is_content(real_bundle: Path) -> None:
    assert run("bundle", "verify", "--json").exit_code == 0
    info = json.loads(run("bundle", "info", "--json").stdout)
    assert len(info["experts"]) >= 2
    assert info["megabytes"] <= 16
