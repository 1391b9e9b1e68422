"""Experts put into a bundle and taken out again: nothing else may change, not by one bit."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from KA2ERSegment import PointPrompt, Polarity, Session, Volume
from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import Bundle, load_bundle, look_into_bundle, user_bundles_folder
from KA2ERSegment.encoders.expert import Expert
from KA2ERSegment.errors import BundleError
from KA2ERSegment.experts import (
    SECTION,
    UNHEARD,
    Content,
    arm_tensors,
    with_arm,
    with_expert,
    without_expert,
)
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.plans import AmalgamationPlans, ExpertPlans, Plans
from KA2ERSegment.testing import tiny_bundle, tiny_plans

GROWN = {f"amalgamation.{stride}.{kind}" for stride in (8, 16) for kind in ("codes", "bias")}
"""Tensors with one row for each arm."""


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two experts."""
    return tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def a_content(a_bundle: Bundle) -> Content:
    return Content.of(a_bundle)


@pytest.fixture(scope="module")
def a_stranger() -> tuple[ExpertPlans, dict[str, torch.Tensor]]:
    """Plans and encoder of somebody's expert."""
    plans = replace(
        tiny_plans(("beads",)).experts[0], task="beads", licence="CC0", origin="a lab", sha256="ab" * 32, note=""
    )
    torch.manual_seed(7)
    return plans, {name: t.detach().half().float() for name, t in tensors_by_name(Expert(plans).encoder).items()}


@pytest.fixture
def a_larger_content(a_content: Content, a_stranger: tuple[ExpertPlans, dict[str, torch.Tensor]]) -> Content:
    return with_expert(a_content, *a_stranger)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def an_image(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, 32, 32, 32, generator=torch.Generator().manual_seed(seed))


def model_of(content: Content) -> PromptableModel:
    return build_model(content.plans, dict(content.tensors))


def test_every_other_tensor_of_the_written_bundle_is_the_same(
    a_bundle: Bundle, a_larger_content: Content, tmp_path: Path
) -> None:
    before, after = a_bundle.weights(), a_larger_content.save(tmp_path / "larger").weights()

    for name, tensor in before.items():
        kept = after[name][:-1] if name in GROWN else after[name]
        assert digest(kept) == digest(tensor), name
    new = after.keys() - before.keys()
    arm = {name for name, row in arm_tensors(a_larger_content.plans, "beads").items() if row is None}
    assert new == arm | {name for name in after if name.startswith("experts.beads.")}


def test_the_encoder_in_the_bundle_is_the_labs_own(
    a_larger_content: Content, a_stranger: tuple[ExpertPlans, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    weights = a_larger_content.save(tmp_path / "larger").weights()

    for name, tensor in a_stranger[1].items():
        assert torch.equal(weights[f"experts.beads.encoder.{name}"], tensor), name


def test_without_its_arm_the_output_is_bit_identical_to_the_bundle_before(
    a_content: Content, a_larger_content: Content
) -> None:
    image = an_image()
    present = torch.tensor([[True, True, True, False]])
    with torch.no_grad():
        before = model_of(a_content).encode(image)
        after = model_of(a_larger_content).encode(image, present)

    assert torch.equal(after.embedding, before.embedding)
    assert torch.equal(after.weights[:, :3], before.weights)
    assert not after.weights[:, 3].any()


def test_a_session_with_the_expert_off_answers_as_with_the_bundle_before(
    a_bundle: Bundle, a_larger_content: Content, a_volume: Volume, tmp_path: Path
) -> None:
    loud = {name: tensor + (1 if "experts.2" in name else 0) for name, tensor in a_larger_content.tensors.items()}
    for stride in (8, 16):
        loud[f"amalgamation.{stride}.bias"] = loud[f"amalgamation.{stride}.bias"].clone()
        loud[f"amalgamation.{stride}.bias"][-1] = 3.0
    larger = with_arm(a_larger_content, "beads", loud, "loud").save(tmp_path / "larger")
    answers = []
    for bundle, experts in ((a_bundle, None), (larger, ["tiny_trunk", "tiny_brain"]), (larger, None)):
        session = Session(bundle, device="cpu")
        session.set_volume(a_volume)
        session.use_experts(experts)
        session.select("bead")
        session.add(PointPrompt.from_ijk((12, 12, 6), a_volume))
        answers.append(session.add(PointPrompt.from_ijk((25, 4, 2), a_volume, Polarity.NEGATIVE)).probability)

    np.testing.assert_array_equal(answers[1], answers[0])
    assert np.abs(answers[2] - answers[0]).max() > 1e-4


def test_an_arm_that_was_not_trained_has_no_share(a_content: Content, a_larger_content: Content) -> None:
    with torch.no_grad():
        before = model_of(a_content).encode(an_image())
        after = model_of(a_larger_content).encode(an_image())

    assert not after.weights[:, 3].any()
    torch.testing.assert_close(after.embedding, before.embedding)
    assert all(a_larger_content.tensors[f"amalgamation.{stride}.bias"][-1] == UNHEARD for stride in (8, 16))


def test_a_trained_arm_counts_and_nothing_else_of_the_training_is_kept(a_larger_content: Content) -> None:
    everything_moved = {name: tensor + 1 for name, tensor in a_larger_content.tensors.items()}
    trained = with_arm(a_larger_content, "beads", everything_moved, "trained in a test")

    own = arm_tensors(a_larger_content.plans, "beads")
    for name, tensor in a_larger_content.tensors.items():
        row = own.get(name)
        if name not in own:
            assert torch.equal(trained.tensors[name], tensor), name
        elif row is None:
            assert torch.equal(trained.tensors[name], tensor + 1), name
        else:
            moved = trained.tensors[name] != tensor
            assert moved[row].all(), name
            assert not moved[:row].any(), name
    assert trained.plans.experts[-1].note == "trained in a test"
    assert "trained in a test" in trained.card


@pytest.mark.parametrize("removed", ["tiny_trunk", "tiny_brain"])
def test_a_bundle_without_an_expert_answers_as_with_its_arm_off(a_content: Content, removed: str) -> None:
    smaller = without_expert(a_content, removed)
    left = torch.tensor([[True, removed != "tiny_trunk", removed != "tiny_brain"]])
    with torch.no_grad():
        expected = model_of(a_content).encode(an_image(), left)
        got = model_of(smaller).encode(an_image())

    assert [expert.name for expert in smaller.plans.experts] == [
        n for n in ("tiny_trunk", "tiny_brain") if n != removed
    ]
    assert torch.equal(got.embedding, expected.embedding)
    assert torch.equal(got.weights, expected.weights[:, left[0]])


def test_the_last_expert_can_be_removed_too(a_content: Content) -> None:
    alone = without_expert(without_expert(a_content, "tiny_trunk"), "tiny_brain")

    with torch.no_grad():
        features = model_of(alone).encode(an_image())
    assert features.weights.shape[1] == 1
    assert (features.weights == 1).all()


def test_an_expert_added_and_removed_leaves_the_bundle_as_it_was(
    a_bundle: Bundle, a_content: Content, a_larger_content: Content, tmp_path: Path
) -> None:
    back = without_expert(a_larger_content, "beads")

    assert back.plans == a_content.plans
    assert back.card.strip() == a_content.card.strip()
    assert back.licences == a_content.licences
    assert back.save(tmp_path / "back").checksums["weights.safetensors"] == a_bundle.checksums["weights.safetensors"]


def test_card_and_licence_say_what_was_added(a_larger_content: Content, tmp_path: Path) -> None:
    bundle = a_larger_content.save(tmp_path / "larger")
    card = (bundle.folder / "model_card.md").read_text(encoding="utf-8")

    line = next(line for line in card.splitlines() if line.startswith("- **beads**:"))
    for words in ("classes bright, dark", "Licence: CC0", "a lab", "SHA-256 " + "ab" * 32, "not trained"):
        assert words in line
    assert (bundle.folder / "LICENSE-beads.txt").read_text(encoding="utf-8") == "CC0\n"
    assert load_bundle(bundle.folder).plans.experts[-1].licence == "CC0"


def test_measured_results_stay_last_in_the_card(
    a_content: Content, a_stranger: tuple[ExpertPlans, dict[str, torch.Tensor]]
) -> None:
    measured = replace(a_content, card=a_content.card + "\n## What it reaches\n| a | table |\n")
    card = with_expert(measured, *a_stranger).card

    assert card.index(SECTION) < card.index("## What it reaches")
    assert card.endswith("| a | table |\n")


@pytest.mark.parametrize("name", ["tiny_brain", "foundation"])
def test_a_name_that_is_taken_is_refused(
    a_content: Content, a_stranger: tuple[ExpertPlans, dict[str, torch.Tensor]], name: str
) -> None:
    plans, encoder = a_stranger

    with pytest.raises(BundleError, match="name must be new"):
        with_expert(a_content, replace(plans, name=name), encoder)


def test_an_encoder_of_other_shapes_is_refused(
    a_content: Content, a_stranger: tuple[ExpertPlans, dict[str, torch.Tensor]]
) -> None:
    plans, encoder = a_stranger
    name = next(iter(encoder))

    with pytest.raises(BundleError, match="names and shapes"):
        with_expert(a_content, plans, {**encoder, name: encoder[name][:1]})


def test_an_unknown_expert_cannot_be_removed(a_content: Content) -> None:
    with pytest.raises(BundleError, match="one of the bundle's"):
        without_expert(a_content, "beads")


def test_a_bundle_that_is_there_is_replaced_only_when_forced(a_content: Content, tmp_path: Path) -> None:
    folder = tiny_bundle(tmp_path / "mine", seed=5).folder
    before = load_bundle(folder).checksums

    with pytest.raises(BundleError, match="must not exist yet"):
        a_content.save(folder)
    assert load_bundle(folder).checksums == before
    assert a_content.save(folder, force=True).checksums != before


def test_the_shipped_bundle_is_never_replaced() -> None:
    shipped = look_into_bundle()
    content = Content(shipped.plans, {}, "", {})

    with pytest.raises(BundleError, match="must not exist yet"):
        content.save(shipped.folder, force=True)


def test_plans_of_experts_without_origin_are_written_as_before() -> None:
    plans = tiny_plans()

    assert not {"licence", "origin", "sha256", "note"} & plans.to_json()["experts"][0].keys()
    marked = replace(plans, experts=(replace(plans.experts[0], note="a note"),))
    assert Plans.from_json(marked.to_json()) == marked


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_DATA_HOME", "{}/KA2ERSegment/bundles"),
        ("win32", "LOCALAPPDATA", "{}/KA2ERSegment/bundles"),
        ("darwin", "HOME", "{}/Library/Application Support/KA2ERSegment/bundles"),
    ],
)
def test_bundles_of_ones_own_go_to_the_users_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, expected: str
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))

    assert user_bundles_folder().as_posix() == expected.format(tmp_path.as_posix())


@pytest.mark.parametrize("kind", ["cross_attention", "concatenation", "foundation"])
def test_a_bundle_without_level_3_keeps_the_experts_that_it_has(
    kind: str, tmp_path: Path, a_stranger: tuple[ExpertPlans, dict[str, torch.Tensor]]
) -> None:
    plans = replace(tiny_plans(), amalgamation=AmalgamationPlans(kind))
    content = Content.of(tiny_bundle(tmp_path / "tiny", plans))

    with pytest.raises(BundleError, match=f"'hierarchical', got '{kind}'"):
        with_expert(content, *a_stranger)
    with pytest.raises(BundleError, match=f"'hierarchical', got '{kind}'"):
        without_expert(content, "tiny_trunk")


def test_an_untrained_expert_is_not_put_where_only_experts_count(
    tmp_path: Path, a_stranger: tuple[ExpertPlans, dict[str, torch.Tensor]]
) -> None:
    plans = replace(tiny_plans(), amalgamation=AmalgamationPlans(no_expert=False))
    content = Content.of(tiny_bundle(tmp_path / "tiny", plans))

    with pytest.raises(BundleError, match="no expert"):
        with_expert(content, *a_stranger)
    assert [expert.name for expert in without_expert(content, "tiny_trunk").plans.experts] == ["tiny_brain"]
