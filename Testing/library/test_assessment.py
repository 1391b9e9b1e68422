"""Assessing a bundle: what is measured, on constructed answers and with a tiny bundle from manifest to tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from KA2ERSegment import assessment
from KA2ERSegment.assessment import (
    GOAL,
    MOST_CLICKS,
    Assessed,
    Assessment,
    Look,
    Trial,
    assess,
    look_at,
    own_expert,
    targets_to_assess,
    try_object,
)
from KA2ERSegment.assessment_report import (
    by_source,
    cases_to_show,
    failures_to_show,
    markdown,
    reliability,
    summary,
    write_report,
)
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.calibration import Reliability, near_object
from KA2ERSegment.cli import app
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.geometry import BoolArray
from KA2ERSegment.manifests import Item, Target, seed_of
from KA2ERSegment.plans import ExpertPlans, GatePlans, VotingPlans
from KA2ERSegment.prediction import Ballots, PackedMask, Prediction
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.prompts import BoxPrompt
from KA2ERSegment.session import Session
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.volume import Volume

SHAPE = (14, 18, 22)
AFFINE = np.array([[-1.0, 0, 0, 12], [0, 1.2, 0, -10], [0, 0, 2.5, -8], [0, 0, 0, 1]])  # I runs to the left


def labels_kji() -> np.ndarray:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[3:10, 4:14, 5:17] = 1
    labels[11:13, 14:17, 17:21] = 2
    return labels


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With experts of every mode."""
    names = ("tiny_trunk", "tiny_brain")
    voting = VotingPlans(names, prototypes=4, adaptive=2, top=1, rank=2, width=8)
    plans = replace(tiny_plans(), gate=GatePlans(names, hidden=8), voting=voting)
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", plans)


@pytest.fixture
def a_manifest(tmp_path: Path) -> Path:
    labels = labels_kji()
    image = labels * 150 + np.random.default_rng(0).normal(0, 9, SHAPE)
    nibabel.Nifti1Image(image.T.astype(np.int16), AFFINE).to_filename(tmp_path / "img.nii.gz")
    nibabel.Nifti1Image(labels.T, AFFINE).to_filename(tmp_path / "lbl.nii.gz")
    (tmp_path / "names.json").write_text('{"1": "block", "2": "brick"}')
    head = "id,split,has_image,images,label,labels_json,source_repo,subject,modality,body_region"
    files = "val,yes,img.nii.gz,lbl.nii.gz,names.json"
    rows = [f"{name},{files},group/{name[0]},{name},CT,abdomen" for name in ("a1", "a2", "a3", "b1")]
    (tmp_path / "manifest.csv").write_text("\n".join([head, *rows]) + "\n")
    return tmp_path / "manifest.csv"


# -- one look ---------------------------------------------------------------------------------------------------------


def a_plain_volume() -> Volume:
    return Volume(np.arange(16**3, dtype=np.float32).reshape(16, 16, 16), np.diag([2.0, 2.0, 2.0, 1.0]))


def a_prediction(mask: BoolArray, logits: np.ndarray, opinions: list[np.ndarray], weights: list[float]) -> Prediction:
    """On a canonical volume of 16^3 voxels of 2 mm that the patch covers sample by sample."""
    volume = a_plain_volume()
    return Prediction(
        volume=volume,
        canonical=volume,
        name="object",
        patch=Patch((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 16),
        logits=logits.astype(np.float32),
        packed=PackedMask.pack(volume.box, mask),
        changed=volume.box,
        arms=("foundation", "one"),
        weights=np.stack([np.full((4, 4, 4), share, dtype=np.float32) for share in weights]),
        opinion=lambda arm: opinions[arm].astype(np.float32),
    )


def test_a_look_counts_voxels_near_the_object_alone() -> None:
    truth = np.zeros((16, 16, 16), dtype=bool)
    truth[6:10, 6:10, 6:10] = True
    mask = truth.copy()
    mask[6:10, 6:10, 10] = True  # sixteen voxels too many
    logits = np.where(mask, 2.0, -1.0)
    prediction = a_prediction(mask, logits, [np.where(truth, 2.0, -2.0), np.where(mask, 2.0, -2.0)], [0.25, 0.75])
    look = look_at(prediction, truth, 3, seed_of("look"))
    _, near = near_object(truth, (2.0, 2.0, 2.0))
    voxels = near.sum()
    high = 1 / (1 + np.exp(-2.0))
    assert look.reliability["mask"].weight.sum() == voxels
    assert look.reliability["foundation"].true.sum() == 64
    assert look.reliability["foundation"].error == pytest.approx(1 - high)  # both bins promise too little by as much
    # the two arms differ in the wrong voxels alone, and the mask is as sure of these as of the object
    assert look.roc_disagreement == 1.0
    assert look.roc_doubt == pytest.approx(0.5 * 64 / (voxels - 16))
    assert look.weights == pytest.approx({"foundation": 0.25, "one": 0.75})
    assert (look.clicks, look.dice) == (3, pytest.approx(2 * 64 / (64 + 80)))
    assert look.quality == prediction.quality
    assert (look.gate, look.heard, look.votes) == ({}, ("general",), {})


def test_a_look_says_who_was_heard_and_how_votes_were_weighed() -> None:
    truth = np.zeros((16, 16, 16), dtype=bool)
    truth[6:10, 6:10, 6:10] = True
    plain = np.where(truth, 2.0, -2.0)
    inside = np.where(truth, 0.8, 0.1).astype(np.float32)
    prediction = replace(
        a_prediction(truth, plain, [plain, plain], [0.5, 0.5]),
        gate={"general": 0.3, "one": 0.7},
        decoders={"general": 0.3, "one": 0.7},
        decoder=lambda name: (plain if name == "one" else -plain).astype(np.float32),
        voters=("base", "heart"),
        votes=np.full((2, 1, 1, 1), 0.5, dtype=np.float32),
        ballots=lambda: Ballots(np.stack([inside, 1 - inside]), np.zeros((2, 16, 16, 16), dtype=np.float32)),
    )
    look = look_at(prediction, truth, 0, seed_of("look"))
    assert look.gate == {"general": 0.3, "one": 0.7}
    assert look.heard == ("general", "one")
    assert look.votes == pytest.approx({"base": 0.8, "heart": 0.2})
    assert list(look.reliability) == [
        "mask", "foundation", "one", "decoder general", "decoder one", "head base", "head heart"
    ]  # fmt: skip
    assert look.reliability["decoder one"].error == pytest.approx(look.reliability["one"].error)
    assert look.reliability["decoder general"].error > 0.5, "it says the opposite"


def test_the_own_expert_knows_modality_and_region() -> None:
    experts = [
        ExpertPlans("trunk_ct", "organs, bones and muscles of the trunk, CT"),
        ExpertPlans("brain_mr", "tissues and structures of the brain, MR"),
        ExpertPlans("heart_mr", "left ventricle, cine MR of the heart"),
    ]

    def own(modality: str, region: str) -> str:
        return own_expert(Item("x", "s", Path(), Path(), {}, "", modality, region), experts)

    assert own("CT (PET/CT low dose)", "chest-abdomen-pelvis") == "trunk_ct"
    assert own("MR T1c (+FLAIR,T2,T1)", "brain") == "brain_mr"
    assert own("MR cine SSFP (short axis)", "heart") == "heart_mr"
    assert own("MR", "abdomen") == ""  # two know MR, none the abdomen
    assert own("US", "brain") == ""
    assert own("", "") == ""


# -- sessions ---------------------------------------------------------------------------------------------------------


class PerfectAfter:
    """A session that is right after a number of prompts, and empty before; suggests one voxel, then nothing."""

    def __init__(self, truth: BoolArray, prompts: int) -> None:
        self.truth, self.needed, self.given = truth, prompts, []
        self.suggested = 0

    def set_volume(self, volume: Volume) -> None:
        self.volume, self.given = volume, []

    def prompts(self) -> list[object]:
        return self.given

    def add(self, prompt: object) -> Prediction:
        self.given = [*self.given, prompt]
        return self.prediction

    def undo(self) -> None:
        self.given = self.given[:-1]

    def suggest(self) -> None:
        self.suggested += 1

    @property
    def prediction(self) -> Prediction:
        mask = self.truth if len(self.given) >= self.needed else np.zeros_like(self.truth)
        logits = np.where(mask, 1.0, -1.0)
        return replace(
            a_prediction(mask, logits, [logits, logits], [0.5, 0.5]), volume=self.volume, canonical=self.volume
        )


@pytest.mark.parametrize(("needed", "with_box", "clicks"), [(1, True, 0), (1, False, 1), (4, True, 3), (4, False, 4)])
def test_clicks_are_counted_up_to_the_goal(needed: int, with_box: bool, clicks: int) -> None:
    truth = np.zeros((16, 16, 16), dtype=bool)
    truth[5:11, 4:12, 6:10] = True
    volume = a_plain_volume()
    session = PerfectAfter(truth, needed)
    trial = try_object(session, volume, truth, "seed", with_box)  # type: ignore[arg-type]
    assert trial.clicks == dict.fromkeys(("protocol", "suggested", "random"), clicks)
    assert all(trial.reached.values())
    assert set(trial.dice.values()) == {1.0}
    assert isinstance(session.given[0], BoxPrompt) == with_box
    assert trial.unsuggested == needed - 1  # nothing was ever suggested: every click of that policy was a random one
    assert [look.dice for look in trial.looks] == ([1.0] if needed == 1 else [0.0, 1.0])
    assert trial.looks[-1].clicks == min(3, needed - 1)


def test_what_is_never_reached_counts_as_the_most_clicks() -> None:
    truth = np.zeros((16, 16, 16), dtype=bool)
    truth[5:11, 4:12, 6:10] = True
    volume = a_plain_volume()
    trial = try_object(PerfectAfter(truth, 99), volume, truth, "seed", False)  # type: ignore[arg-type]
    assert set(trial.clicks.values()) == {MOST_CLICKS}
    assert not any(trial.reached.values())


# -- from manifest to tables -------------------------------------------------------------------------------------------


def test_targets_are_few_of_each_source_and_always_the_same(a_manifest: Path) -> None:
    targets, left_out = targets_to_assess([a_manifest], "val", 1, 2)
    assert sorted(target.item.source for target in targets) == ["group/a", "group/a", "group/b"]
    assert len(left_out) == 3 + 1  # a second object of three items, and one item of group/a
    again, _ = targets_to_assess([a_manifest], "val", 1, 2)
    assert [(t.item.id, t.label) for t in targets] == [(t.item.id, t.label) for t in again]
    with pytest.raises(KA2ERError, match="split"):
        targets_to_assess([a_manifest], "test", 1, 2)


def test_an_assessment_is_saved_resumed_and_written(
    a_bundle: Bundle, a_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(assessment, "MOST_CLICKS", 2)
    session, folder = Session(a_bundle), tmp_path / "out"
    done = assess([a_manifest], session, folder, max_objects_per_item=1, max_items_per_source=1)
    assert len(done.objects) == 2
    for entry in done.objects:
        assert [trial.with_box for trial in entry.trials] == [True, False]
        for trial in entry.trials:
            assert all(0 <= count <= 2 for count in trial.clicks.values())
            assert all(look.weights.keys() == {"foundation", "tiny_trunk", "tiny_brain"} for look in trial.looks)
            first = trial.looks[0]
            for weights in (first.weights, first.gate, first.votes):
                assert sum(weights.values()) == pytest.approx(1, abs=0.02)
            assert {"mask", "tiny_brain", "decoder general", "head adaptive 2"} < first.reliability.keys()
    with pytest.raises(KA2ERError, match="no earlier results"):
        assess([a_manifest], session, folder, max_objects_per_item=1, max_items_per_source=1)
    with pytest.raises(KA2ERError, match="max_items_per_source"):
        assess([a_manifest], session, folder, max_objects_per_item=1, max_items_per_source=2, resume=True)
    stored = json.loads((folder / "objects.json").read_text())
    assert json.loads(json.dumps(Assessed.from_json(stored["objects"][0]).to_json())) == stored["objects"][0]
    session.add = None  # type: ignore[assignment]  # a resumed run that is done asks nothing any more
    again = assess([a_manifest], session, folder, max_objects_per_item=1, max_items_per_source=1, resume=True)
    assert summary(again) == summary(done)
    found = write_report(again, folder)
    assert json.loads((folder / "assessment.json").read_text()) == json.loads(json.dumps(found))
    text = (folder / "assessment.md").read_text()
    assert "| expected calibration error | |" in text
    for name in ("mask", "foundation", "tiny_brain", "decoder tiny_trunk", "head basic"):
        assert f"\n| {name} | {found['calibration_error'][name]:.3f} |" in text
    assert "| mean weight inside the object | images | own expert | foundation | tiny_trunk | tiny_brain |" in text
    for name in ("reliability.png", "reliability_heads.png"):
        assert f"({name})" in text
        assert (folder / name).stat().st_size > 1000

    words = ["assess", str(a_manifest), "--bundle", str(a_bundle.folder), "--max-items-per-source", "1", "--json"]
    result = CliRunner().invoke(app, [*words, "--output", str(folder), "--resume"])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert {key: shown[key] for key in found} == json.loads(json.dumps(found))
    assert (folder / "experts.png").stat().st_size > 1000
    assert (folder / "failures.png").stat().st_size > 1000
    assert CliRunner().invoke(app, [*words, "--output", str(folder)]).exit_code == 1  # there are results already


def test_every_source_counts_the_same_and_the_routing_table_is_worked_out_by_hand() -> None:
    sure, unsure = (Reliability.of(np.full(10, p), np.ones(10, dtype=bool)) for p in (1.0, 0.6))

    def entry(item: str, source: str, own: str, curve: Reliability, weights: dict[str, float], dice: float) -> Assessed:
        gate, heard = {"general": 1 - dice, "heart": dice}, ("general", "heart") if dice > GOAL else ("general",)
        look = Look(0, dice, dice**2, {"mask": curve}, 0.5 + dice / 2, None, weights, gate, heard, {"base": dice})
        counts = {"protocol": 2, "suggested": 3, "random": 4}
        trials = tuple(
            Trial(box, (look,), counts, dict.fromkeys(counts, dice > GOAL), dict.fromkeys(counts, dice), 0)
            for box in (True, False)
        )
        return Assessed(item, source, item, "MR", "heart", 1, "x", own, trials)

    heart, brain = {"foundation": 0.6, "heart": 0.3, "brain": 0.1}, {"foundation": 0.2, "heart": 0.3, "brain": 0.5}
    objects = [entry(f"a{n}", "a", "heart", sure, heart, 0.9) for n in range(3)]
    objects += [entry("b", "b", "heart", unsure, brain, 0.5), entry("c", "c", "", sure, brain, 0.7)]
    assert list(by_source(objects)) == ["a", "b", "c"]
    assert reliability(objects)["mask"].error == pytest.approx(0.4 / 3)
    found = summary(type("A", (), {"settings": {"bundle": "x", "split": "val"}, "objects": objects, "left_out": ()})())
    assert found["errors_found"] == {"disagreement": pytest.approx((0.95 + 0.75 + 0.85) / 3), "doubt": None}
    assert found["quality"]["spearman"] == pytest.approx(1)
    assert found["quality"]["mean_error"] == pytest.approx((0.81 - 0.9 + 0.25 - 0.5 + 0.49 - 0.7) / 3)
    assert found["routing"]["own_is_first_expert"] == pytest.approx(1 / 2)  # in source a, not in b; c has no own expert
    assert found["routing"]["own_is_first_arm"] == 0
    assert found["clicks"]["box"]["suggested"] == {
        "clicks": 3.0,
        "reached": pytest.approx(1 / 3),
        "dice": pytest.approx(0.7),
    }
    assert "| b | MR heart | heart | 0.200 | 0.300 | 0.500 |" in markdown(found)
    text = markdown(found)
    assert "in 50 % of predictions" in text
    assert "| mean weight of the gate | general | heart | a specialist is heard in |" in text
    assert "| a | 0.100 | 0.900 | 100 % |" in text
    assert "| b | 0.500 | 0.500 | 0 % |" in text
    assert "| mean weight in the vote inside the object | base |" in text


def test_cases_to_show_are_of_each_experts_own_task_first(a_bundle: Bundle, a_manifest: Path) -> None:
    targets, _ = targets_to_assess([a_manifest], "val", 1, 3)
    experts = tuple(
        replace(e, task=f"{e.name}, {m}") for e, m in zip(a_bundle.plans.experts, ("US", "CT"), strict=True)
    )
    bundle = replace(a_bundle, plans=replace(a_bundle.plans, experts=experts))
    chosen = cases_to_show(targets, Session(bundle), most=2)
    assert [target.item.source for target in chosen] == ["group/a", "group/b"]


def test_failures_are_the_worst_object_of_each_source(a_bundle: Bundle, a_manifest: Path) -> None:
    targets, _ = targets_to_assess([a_manifest], "val", 2, 3)

    def entry(target: Target, dice: float) -> Assessed:
        look = Look(3, dice, 0.5, {}, None, None, {})
        trials = (Trial(True, (replace(look, dice=0.0), look), {}, {}, {}, 0), Trial(False, (look,), {}, {}, {}, 0))
        item = target.item
        return Assessed(item.id, item.source, item.subject, "MR", "heart", target.label, "x", "", trials)

    dices = np.linspace(0.9, 0.1, len(targets))  # the last ones are the worst
    done = Assessment({}, tuple(entry(target, float(d)) for target, d in zip(targets, dices, strict=True)))
    last = {target.item.source: target for target in targets}
    expected = sorted(last.values(), key=targets.index, reverse=True)
    assert len(expected) == 2
    assert failures_to_show(done, targets) == expected
    assert failures_to_show(done, targets, most=1) == expected[:1]
