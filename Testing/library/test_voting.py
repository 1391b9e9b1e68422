"""The voting head: nothing changes before it has learnt, nobody unheard counts, votes go to the sure and the agreed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from KA2ERSegment import BoxPrompt, PointPrompt, Session, voting
from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.errors import BundleError, SessionStateError
from KA2ERSegment.experts import Content
from KA2ERSegment.geometry import apply_affine
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.plans import GatePlans, Plans, VotingPlans
from KA2ERSegment.preprocessing import normalise
from KA2ERSegment.prompt_encoder import POSITIVE, PatchPrompts
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.volume import Volume
from KA2ERSegment.voting import Ballot, VotingHead, evidence

SIZE = 32
GROUPS = ("tiny_trunk", "tiny_brain")
NAMES = ("basic", *GROUPS, "adaptive 1", "adaptive 2", "adaptive 3")
VOTERS = tuple(f"head {name}" for name in NAMES)
"""The same in a prediction."""


def voting_plans(**changes: Any) -> VotingPlans:
    given: dict[str, Any] = {"semantic": GROUPS, "adaptive": 3, "top": 2, "rank": 2, "prototypes": 4, "width": 8}
    return VotingPlans(**given | changes)


def a_model_of(plans: Plans) -> PromptableModel:
    torch.manual_seed(0)
    return build_model(plans)


def with_head(base: PromptableModel, plans: Plans, learnt: bool) -> PromptableModel:
    """The same base with a head; `learnt` gives every expert of it something to say."""
    model = a_model_of(plans)
    with torch.no_grad():
        for name, tensor in tensors_by_name(base).items():
            tensors_by_name(model)[name].copy_(tensor)
    if learnt:
        teach(model.voting)
    return model


@torch.no_grad()
def teach(head: VotingHead | None) -> None:
    assert head is not None
    generator = torch.Generator().manual_seed(3)
    for out in (head.basic_out, head.semantic_out, head.adaptive_out):
        out.copy_(torch.randn(out.shape, generator=generator))


@pytest.fixture(scope="module")
def a_base() -> PromptableModel:
    return a_model_of(tiny_plans())


@pytest.fixture(scope="module")
def a_model(a_base: PromptableModel) -> PromptableModel:
    return with_head(a_base, replace(tiny_plans(), voting=voting_plans()), learnt=True)


@pytest.fixture(scope="module")
def an_image() -> Tensor:
    values = torch.randn(2, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    values[:, 10:20, 8:22, 6:18] += 3
    return normalise(values, torch.ones_like(values, dtype=torch.bool))


@pytest.fixture(scope="module")
def some_features(a_base: PromptableModel, an_image: Tensor) -> PatchFeatures:
    with torch.no_grad():
        return a_base.encode(an_image)


def a_click(batch: int = 2) -> PatchPrompts:
    nowhere = torch.zeros(batch, SIZE, SIZE, SIZE, dtype=torch.bool)
    positive = nowhere.clone()
    positive[:, 15, 15, 12] = True
    return PatchPrompts(
        points=torch.tensor([[[15.0, 15.0, 12.0]]] * batch),
        labels=torch.full((batch, 1), POSITIVE),
        positive=positive,
        negative=nowhere,
        box=nowhere,
        outside=nowhere,
        previous=torch.full(positive.shape, 0.5),
    )


@torch.no_grad()
def a_ballot(model: PromptableModel, features: PatchFeatures, **given: Tensor) -> Ballot:
    base, maps = model.decode_base(features, a_click(len(features.image)))
    assert model.voting is not None
    return model.voting.ballot(features.embedding, base, maps, **given)


# -- structural integrity ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_before_it_has_learnt_the_answer_is_the_base_answer_to_the_last_bit(
    an_image: Tensor, batch: int, gated: bool
) -> None:
    gate = GatePlans(GROUPS, hidden=8, threshold=0.0) if gated else None
    plans = replace(tiny_plans(), gate=gate)
    base = a_model_of(plans)
    if base.gate is not None:
        base.gate.head.bias[0] = -20  # a specialist is heard
    model = with_head(base, replace(plans, voting=voting_plans()), learnt=False)
    features = base.encode(an_image[:batch])
    before, after = base.decode(features, a_click(batch)), model.decode(features, a_click(batch))

    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.quality, before.quality)
    assert before.heard is None or bool(before.heard.all())
    teach(model.voting)
    assert not torch.equal(model.decode(features, a_click(batch)).logits, before.logits)


@torch.no_grad()
def test_switched_off_it_leaves_no_trace(a_base: PromptableModel, some_features: PatchFeatures) -> None:
    model = with_head(a_base, replace(tiny_plans(), voting=voting_plans(enabled=False)), learnt=True)

    assert model.voters == ()
    assert model.votes(some_features, a_click()) is None
    assert torch.equal(model.decode(some_features, a_click()).logits, a_base.decode(some_features, a_click()).logits)


def test_the_first_step_already_reaches_every_expert(a_base: PromptableModel, some_features: PatchFeatures) -> None:
    model = with_head(a_base, replace(tiny_plans(), voting=voting_plans(top=3)), learnt=False)
    head = model.voting
    assert head is not None
    model.requires_grad_(False)
    head.requires_grad_(True)
    (model.decode(some_features, a_click()).logits - 1).square().mean().backward()

    for out in (head.basic_out, head.semantic_out, head.adaptive_out):
        assert out.grad is not None
        assert (out.grad.flatten(1).abs().sum(1) > 0).all()


# -- the vote ----------------------------------------------------------------------------------------------------------


def test_the_experts_have_names(a_model: PromptableModel) -> None:
    assert a_model.voters == NAMES


@torch.no_grad()
def test_weights_sum_to_one_and_nobody_unheard_has_any(a_model: PromptableModel, some_features: PatchFeatures) -> None:
    votes = a_model.votes(some_features, a_click())
    heard = a_ballot(a_model, some_features).heard

    assert votes is not None
    assert votes.weights.shape == votes.opinions.shape == (2, len(NAMES), SIZE, SIZE, SIZE)
    torch.testing.assert_close(votes.weights.sum(1), torch.ones(2, SIZE, SIZE, SIZE))
    assert heard[:, :3].tolist() == [[0, 1, 2]] * 2, "basic and semantic experts are always heard"
    for case in range(2):
        assert len(set(heard[case].tolist())) == 5
        for expert in range(len(NAMES)):
            weight = votes.weights[case, expert]
            assert bool((weight > 0).all() if expert in heard[case] else (weight == 0).all())


@torch.no_grad()
def test_the_answer_is_what_the_ballot_says(
    a_model: PromptableModel, a_base: PromptableModel, some_features: PatchFeatures
) -> None:
    """At stride 2 it is the base with the experts' weighted residuals, linear between."""
    ballot = a_ballot(a_model, some_features)
    added = a_model.decode(some_features, a_click()).logits - a_base.decode(some_features, a_click()).logits

    by_hand = (ballot.weights * ballot.deltas).sum(1).view(2, 1, SIZE // 2, SIZE // 2, SIZE // 2)
    by_hand = torch.nn.functional.interpolate(by_hand, scale_factor=2, mode="trilinear")[:, 0]
    torch.testing.assert_close(added, by_hand, atol=1e-4, rtol=1e-4)
    assert ballot.features.shape == (2, (SIZE // 2) ** 3, 8)
    torch.testing.assert_close(ballot.opinions, ballot.base[:, None] + ballot.deltas)


@torch.no_grad()
def test_the_answer_has_the_share_of_each_expert_in_every_cell(
    a_model: PromptableModel, some_features: PatchFeatures
) -> None:
    votes = a_model.votes(some_features, a_click())
    answer = a_model.decode(some_features, a_click())
    cells = some_features.embedding.shape[-1]

    assert votes is not None
    assert answer.votes is not None
    assert answer.votes.shape == (2, len(NAMES), cells, cells, cells)
    expected = torch.nn.functional.avg_pool3d(votes.weights, SIZE // cells)
    torch.testing.assert_close(answer.votes, expected, atol=0.02, rtol=0)
    torch.testing.assert_close(answer.votes.sum(1), torch.ones(2, cells, cells, cells))


@torch.no_grad()
def test_who_is_not_heard_is_not_computed(a_base: PromptableModel, some_features: PatchFeatures) -> None:
    model = with_head(a_base, replace(tiny_plans(), voting=voting_plans(top=1)), learnt=True)
    heard = set(a_ballot(model, some_features).heard[:, -1].tolist())
    head = model.voting
    assert head is not None
    for n in range(3):
        if 3 + n not in heard:
            head.down[n] = head.adaptive_out[n] = torch.nan

    assert head.down.isnan().any()
    assert model.decode(some_features, a_click()).logits.isfinite().all()


def test_confident_and_consistent_experts_are_preferred() -> None:
    """One voxel, four experts: sure and agreed, unsure, sure against all others, and one like the first but loaded."""
    opinions = torch.tensor([5.0, 0.1, -5.0, 5.0]).view(1, 4, 1)
    load = torch.tensor([[0.0, 0.0, 0.0, 0.5]])
    agreed, unsure, opposed, loaded = evidence(opinions, load)[0, :, 0].tolist()

    assert agreed > opposed > unsure
    assert agreed > loaded


def test_in_training_the_truth_can_decide_who_is_consistent() -> None:
    """The majority is wrong: by the others it is preferred, by the label it is not."""
    opinions = torch.tensor([[3.0, 3.0, 3.0, -3.0]] * 2)[..., None]
    told = torch.tensor([False, True])
    scores = evidence(opinions, torch.zeros(2, 4), torch.zeros(2, 1), told)[..., 0]

    assert scores[0, 0] > scores[0, 3]
    assert scores[1, 0] < scores[1, 3]


@torch.no_grad()
@pytest.mark.parametrize("vote", ["mean", "case"])
def test_the_vote_can_be_coarser(a_base: PromptableModel, some_features: PatchFeatures, vote: str) -> None:
    model = with_head(a_base, replace(tiny_plans(), voting=voting_plans(vote=vote)), learnt=True)
    weights = a_ballot(model, some_features).weights

    assert torch.equal(weights, weights[..., :1].expand_as(weights))
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    assert (weights == 1 / 5).all() == (vote == "mean")


@torch.no_grad()
def test_balance_spreads_the_load(
    a_base: PromptableModel, some_features: PatchFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router wants one adaptive expert alone and the basic one above all: they are heard less and less."""
    monkeypatch.setattr(voting, "MEMORY", 0.9)  # of fewer steps
    model = with_head(a_base, replace(tiny_plans(), voting=voting_plans(top=1)), learnt=True)
    head = model.voting
    assert head is not None
    head.route_voxel.zero_()
    head.route_case[-1].weight.zero_()
    head.route_case[-1].bias.copy_(torch.tensor([3.0, 0, 0, 1.0, 0, 0]))
    shares, chosen = [], set()
    base, maps = model.decode_base(some_features, a_click())
    for _ in range(60):
        ballot = head.ballot(some_features.embedding, base, maps)
        shares.append(ballot.of_all(6).mean((0, 2)))
        chosen |= set(ballot.heard[:, -1].tolist())
        head.observe(ballot)
    early, late = torch.stack(shares[:2]).mean(0), torch.stack(shares[-20:]).mean(0)

    assert early[0] > 0.6
    assert late[0] < 0.75 * early[0]
    assert set(shares[0].nonzero()[:, 0].tolist()) == {0, 1, 2, 3}
    assert chosen == {3, 4, 5}, "each adaptive expert had its turn"
    assert -(late * late.log()).sum() > -(early[:4] * early[:4].log()).sum() + 0.3


# -- plans and bundles -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bundle_keeps_its_head(tmp_path: Path, a_model: PromptableModel, some_features: PatchFeatures) -> None:
    plans = replace(tiny_plans(), voting=voting_plans())
    content = Content.of(tiny_bundle(tmp_path / "random", plans))
    saved = replace(content, tensors=tensors_by_name(a_model)).save(tmp_path / "voting")
    bundle = load_bundle(saved.folder)
    model = build_model(bundle.plans, bundle.weights())

    assert bundle.plans == plans
    assert model.voters == NAMES
    found, expected = (each.decode(some_features, a_click()).logits for each in (model, a_model))
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)  # float16
    assert Plans.from_json(replace(plans, voting=voting_plans(vote="case")).to_json()).voting == voting_plans(
        vote="case"
    )
    assert "voting" not in tiny_plans().to_json(), "older versions read a bundle without a head"


@pytest.mark.parametrize(
    "changes",
    [
        {"semantic": ("a", "a")},
        {"semantic": ("basic",)},
        {"semantic": ("no word",)},
        {"top": 4},
        {"width": 0},
        {"vote": "loud"},
        {"enabled": 1},
    ],
)
def test_plans_that_no_head_can_be_built_from_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="voting"):
        voting_plans(**changes)


# -- predictions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a_session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    session = Session(
        tiny_bundle(tmp_path_factory.mktemp("voting") / "tiny", replace(tiny_plans(), voting=voting_plans())),
        device="cpu",
    )
    teach(session.model.voting)
    return session


def test_the_head_is_asked_when_somebody_looks_and_once(
    a_session: Session, a_volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    votes_of = a_session.model.votes
    monkeypatch.setattr(a_session.model, "votes", lambda *given: asked.append(1) or votes_of(*given))
    a_session.set_volume(a_volume)
    prediction = a_session.add(PointPrompt.from_ijk((12, 12, 6), a_volume))
    experts = prediction.experts

    assert prediction.modes == {"amalgamation": ("foundation", *GROUPS), "head": VOTERS}
    assert tuple(experts) == ("foundation", *GROUPS, *VOTERS)
    assert set(prediction.shares) == set(experts)
    assert asked == []
    assert experts["head basic"].weight.max() > 0
    assert experts["head adaptive 1"].weight.shape == a_volume.shape_kji
    assert asked == [1]
    for name in ("basic", "adaptive 1", "head nobody", "decoder general"):
        assert name not in experts
        with pytest.raises(KeyError):
            experts[name]
        with pytest.raises(KeyError):
            prediction.opinion_on_patch(name)


def test_shares_of_voters_are_their_mean_weights_inside_the_mask(a_session: Session, a_volume: Volume) -> None:
    a_session.set_volume(a_volume)
    prediction = a_session.add(BoxPrompt.from_ijk((6, 7, 3), (19, 18, 10), a_volume))
    shares = [prediction.shares[name] for name in VOTERS]

    assert prediction.mask.any()
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert np.std(shares) > 0.02
    for name, share in zip(VOTERS, shares, strict=True):
        vote = prediction.experts[name]
        assert vote.mean_weight == share
        assert share == pytest.approx(float(vote.weight[prediction.mask].mean()), abs=0.05)
        assert (share == 0) == (not vote.weight.any())


def test_votes_lie_where_the_voxels_are(a_session: Session, an_oblique_left_handed_volume: Volume) -> None:
    volume = an_oblique_left_handed_volume
    a_session.set_volume(volume)
    prediction = a_session.add(BoxPrompt.from_ijk((10, 8, 5), (15, 12, 8), volume))
    seen = np.zeros(volume.shape_kji, dtype=bool)
    seen[volume.from_canonical_box(prediction.patch.box(prediction.canonical.shape_kji)).slices] = True
    assert not seen.all()
    ijk = np.argwhere(seen)[:, ::-1]
    ras = apply_affine(volume.ijk_to_ras, ijk)
    kji_of_patch = apply_affine(np.linalg.inv(prediction.patch_to_ras), ras)[:, ::-1]
    total = np.zeros(volume.shape_kji)
    for name in VOTERS:
        vote = prediction.experts[name]
        probability, weight = prediction.opinion_on_patch(name)
        for image, samples in ((vote.probability, probability), (vote.weight, weight)):
            assert image.dtype == np.float32
            assert not image[~seen].any()
            expected = map_coordinates(samples, kji_of_patch.T, order=1, mode="nearest")
            np.testing.assert_allclose(image[seen], expected, atol=1e-4)
        total += vote.weight
    np.testing.assert_allclose(total[seen], 1, atol=1e-4)


def test_votes_of_a_former_volume_cannot_be_asked(
    a_session: Session, a_volume: Volume, an_oblique_volume: Volume
) -> None:
    a_session.set_volume(a_volume)
    prediction = a_session.add(PointPrompt.from_ijk((12, 12, 6), a_volume))
    a_session.set_volume(an_oblique_volume)
    with pytest.raises(SessionStateError, match="while its volume is the session's"):
        prediction.experts["head basic"]


def test_a_bundle_without_a_head_has_no_votes(tmp_path: Path, a_volume: Volume) -> None:
    session = Session(tiny_bundle(tmp_path / "plain"), device="cpu")
    session.set_volume(a_volume)

    prediction = session.add(PointPrompt.from_ijk((12, 12, 6), a_volume))
    assert list(prediction.modes) == ["amalgamation"]
    assert tuple(prediction.experts) == prediction.arms
