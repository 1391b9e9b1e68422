"""Whose kind of volume: fingerprints, priors, and what they do to the shares of a session."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.domain import Fingerprint, log_prior
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import DomainPlans, Plans
from KA2ERSegment.prompts import PointPrompt
from KA2ERSegment.session import Session
from KA2ERSegment.testing import tiny_bundle, tiny_plans
from KA2ERSegment.volume import Volume

ANYTHING = DomainPlans(mean=(0.0, 0.7, 4.7, 5.3), std=(0.5, 0.9, 0.8, 0.8), hounsfield=0.4)
TRUNK = DomainPlans(mean=(0.2, 0.6, 5.3, 5.9), std=(0.4, 0.6, 0.4, 0.4), hounsfield=0.95)
BRAIN = DomainPlans(mean=(0.0, 0.0, 5.0, 5.3), std=(0.4, 0.4, 0.4, 0.4), hounsfield=0.05)


def known(plans: Plans, *domains: DomainPlans | None) -> Plans:
    experts = tuple(replace(expert, domain=domain) for expert, domain in zip(plans.experts, domains, strict=True))
    return replace(plans, experts=experts, amalgamation=replace(plans.amalgamation, domain=ANYTHING))


def oblique(lowest: float, spacing: tuple[float, float, float], shape_kji: tuple[int, int, int]) -> Volume:
    """Noise above a lowest value, on axes turned by 20 degrees."""
    values = np.random.default_rng(0).normal(60, 15, shape_kji).astype(np.float32).clip(0)
    values[: shape_kji[0] // 4] = lowest
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    return Volume(values, affine)


CT = oblique(-1000, (3.0, 2.0, 6.0), (52, 150, 110))
HEAD = oblique(0, (1.5, 1.5, 2.0), (90, 150, 110))


def test_a_fingerprint_is_spacing_extent_and_unit_whatever_the_axes() -> None:
    found = Fingerprint.of(CT)
    assert found.spacing == pytest.approx((3.0, 2.0, 6.0))
    assert found.extent == pytest.approx((330.0, 300.0, 312.0))
    assert found.hounsfield
    assert found.features() == pytest.approx(np.log([2.0, 3.0, 300.0, 330.0]))
    assert Fingerprint.of(CT.canonical()).features() == pytest.approx(found.features())
    assert not Fingerprint.of(HEAD).hounsfield


def test_the_prior_names_the_expert_whose_volumes_are_alike() -> None:
    plans = known(tiny_plans(), TRUNK, BRAIN)
    of_ct, of_head = (log_prior(plans, Fingerprint.of(volume)) for volume in (CT, HEAD))
    assert of_ct is not None
    assert of_head is not None
    for prior, best in ((of_ct, 1), (of_head, 2)):
        assert np.exp(prior).sum() == pytest.approx(1)
        assert prior.argmax() == best


def test_a_volume_between_the_experts_is_nobodys() -> None:
    prior = log_prior(known(tiny_plans(), TRUNK, BRAIN), Fingerprint((0.5, 0.5, 2.5), (60.0, 60.0, 90.0), False))
    assert prior is not None
    assert prior.argmax() == 0


def test_a_volume_far_from_all_tells_nothing_of_the_experts() -> None:
    plans = known(tiny_plans(), TRUNK, BRAIN)
    crumb = Fingerprint((0.003, 0.003, 5.0), (0.03, 1.0, 0.1), None)
    prior = log_prior(plans, crumb)
    assert prior is not None
    assert np.exp(prior) == pytest.approx([1 / 3] * 3)


def test_an_expert_of_unknown_domain_is_as_likely_as_none() -> None:
    prior = log_prior(known(tiny_plans(), None, BRAIN), Fingerprint.of(CT))
    assert prior is not None
    assert prior[1] == pytest.approx(prior[0])


def test_without_domains_there_is_no_prior() -> None:
    plans = known(tiny_plans(), TRUNK, BRAIN)
    assert log_prior(tiny_plans(), Fingerprint.of(CT)) is None
    assert log_prior(plans.without("domains"), Fingerprint.of(CT)) is None
    assert plans.without("domains") == tiny_plans()


def test_domains_come_back_from_json_and_plans_without_them_are_written_as_before() -> None:
    plans = known(tiny_plans(), TRUNK, None)
    assert Plans.from_json(json.loads(json.dumps(plans.to_json()))) == plans
    assert "domain" not in json.dumps(tiny_plans().to_json())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": [0.0, 1.0]}, "domain.mean must be four numbers"),
        ({"std": [0.1, 0.1, 0.1, 0.0]}, "domain.std must be four numbers above zero"),
        ({"hounsfield": 1.0}, "domain.hounsfield must be a number between 0 and 1"),
        ({"skew": 1.0}, "skew"),
    ],
)
def test_a_domain_that_is_no_distribution_is_refused(change: dict[str, object], words: str) -> None:
    data = json.loads(json.dumps(known(tiny_plans(), TRUNK, BRAIN).to_json()))
    data["experts"][0]["domain"] |= change
    with pytest.raises(BundleError, match=words):
        Plans.from_json(data)


@pytest.fixture(scope="module")
def a_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("domains") / "tiny"
    return load_bundle(tiny_bundle(folder, known(tiny_plans(), TRUNK, BRAIN)).folder)


def shares_of(bundle: Bundle, volume: Volume) -> dict[str, float]:
    session = Session(bundle, device="cpu")
    session.set_volume(volume)
    middle = volume.ijk_to_ras @ [*(np.array(volume.shape_ijk) // 2), 1]
    return session.add(PointPrompt(tuple(middle[:3]))).shares


def test_in_a_session_the_expert_of_such_volumes_has_the_largest_share(a_bundle: Bundle, tmp_path: Path) -> None:
    of_ct, of_head = shares_of(a_bundle, CT), shares_of(a_bundle, HEAD)
    assert max(of_ct, key=of_ct.__getitem__) == "tiny_trunk"
    assert max(of_head, key=of_head.__getitem__) == "tiny_brain"
    off = replace(a_bundle, plans=a_bundle.plans.without("domains"))
    bare = load_bundle(tiny_bundle(tmp_path / "bare").folder)
    assert shares_of(off, CT) == shares_of(bare, CT), "switched off, nothing of it is left"
