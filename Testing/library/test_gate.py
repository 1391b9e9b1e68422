"""The gate over mask decoders: its selection, its fusion, and that the general model is never lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from KA2ERSegment import BoxPrompt, PointPrompt, Session, Volume
from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import BundleError
from KA2ERSegment.experts import Content, with_expert, without_expert
from KA2ERSegment.gate import GENERAL, choose, fuse, gate_query
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.plans import GatePlans, Plans
from KA2ERSegment.preprocessing import normalise
from KA2ERSegment.prompt_encoder import MAPS, NOT_A_POINT, POSITIVE, PatchPrompts
from KA2ERSegment.testing import tiny_bundle, tiny_plans

SIZE = 32
NAMES = ("tiny_trunk", "tiny_brain")
ANYTHING_GOES = torch.ones(1, 2, dtype=torch.bool)


def gated_plans(threshold: float = 0.0, **changes: Any) -> Plans:
    return replace(tiny_plans(), gate=GatePlans(NAMES, hidden=16, threshold=threshold, **changes))


def a_model(plans: Plans | None = None, seed: int = 0) -> PromptableModel:
    torch.manual_seed(seed)
    return build_model(plans or gated_plans())


def with_gate_plans(model: PromptableModel, **changes: Any) -> PromptableModel:
    """The same network with other settings of its gate."""
    plans = replace(gated_plans().gate, **changes)  # type: ignore[type-var]
    return build_model(replace(tiny_plans(), gate=plans), tensors_by_name(model))


def without_gate(model: PromptableModel) -> PromptableModel:
    """The general model alone: the same tensors, no gate and no specialists."""
    own = {n: t for n, t in tensors_by_name(model).items() if not n.startswith(("gate.", "specialists."))}
    return build_model(tiny_plans(), own)


def features_of(model: PromptableModel, batch: int = 3) -> PatchFeatures:
    values = torch.randn(batch, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    values[:, 10:20, 8:22, 6:18] += torch.arange(1, batch + 1)[:, None, None, None]
    with torch.no_grad():
        return model.encode(normalise(values, torch.ones_like(values, dtype=torch.bool)))


def clicks(batch: int = 3) -> PatchPrompts:
    """One positive click in each case, elsewhere in each."""
    nothing = torch.zeros(batch, SIZE, SIZE, SIZE, dtype=torch.bool)
    points = torch.tensor([[[12 + n, 15, 9 + n]] for n in range(batch)])
    positive = nothing.clone()
    for n, (k, j, i) in enumerate(points[:, 0].tolist()):
        positive[n, k, j, i] = True
    labels = torch.full((batch, 1), POSITIVE)
    return PatchPrompts(points.float(), labels, positive, nothing, nothing, nothing, torch.full(positive.shape, 0.5))


def steer(model: PromptableModel, *favourites: int) -> None:
    """Make the gate sure of a decoder for each case, whatever it reads."""
    assert model.gate is not None
    wanted = torch.full((len(favourites), len(NAMES) + 1), -8.0)
    wanted[range(len(favourites)), favourites] = 8.0
    model.gate.forward = lambda query: wanted  # type: ignore[method-assign]


def calls(model: PromptableModel) -> Counter[tuple[str, int]]:
    """Counts (decoder, cases) of every run from now on."""
    seen: Counter[tuple[str, int]] = Counter()
    for name, decoder in {GENERAL: model.mask_decoder, **dict(model.specialists.items())}.items():
        decoder.register_forward_hook(lambda _, inputs, __, name=name: seen.update([(name, len(inputs[0]))]))
    return seen


# -- selection and fusion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "threshold", "heard"),
    [
        ((0.2, 0.7, 0.1), 0.5, 1),
        ((0.2, 0.1, 0.7), 0.5, 2),
        ((0.8, 0.15, 0.05), 0.5, 0),
        ((0.3, 0.4, 0.3), 0.5, 0),
        ((0.3, 0.4, 0.3), 0.3, 1),
        ((0.5, 0.4, 0.1), 0.3, 0),  # the top choice is "general", though the best specialist is above tau
        ((0.0, 1.0, 0.0), 1.0, 0),  # tau = 1: never
        ((0.3, 0.36, 0.34), 0.0, 1),  # tau = 0: wherever one of them is the top choice
        ((0.98, 0.01, 0.01), 0.0, 0),
    ],
)
def test_a_specialist_is_heard_where_it_is_the_top_choice_and_above_tau(
    weights: tuple[float, ...], threshold: float, heard: int
) -> None:
    logits = torch.tensor([weights]).clamp_min(1e-30).log()
    got, chosen = choose(logits, ANYTHING_GOES, temperature=1.0, threshold=threshold)

    torch.testing.assert_close(got, torch.tensor([weights]), atol=1e-5, rtol=0)
    assert chosen.tolist() == [heard]


def test_temperature_makes_the_gate_less_sure_and_changes_no_order() -> None:
    logits = torch.tensor([[0.0, 4.0, 1.0]])
    cold, _ = choose(logits, ANYTHING_GOES, 0.5, 0.5)
    hot, heard = choose(logits, ANYTHING_GOES, 8.0, 0.5)

    assert cold[0, 1] > 0.99
    assert 1 / 3 < hot[0, 1] < 0.5
    assert heard.tolist() == [0]
    assert hot[0].argsort().tolist() == cold[0].argsort().tolist()


def test_what_is_not_allowed_has_no_weight_and_the_general_decoder_always_is() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0], [0.0, 9.0, 1.0]])
    weights, heard = choose(logits, torch.tensor([[False, True], [False, False]]), 1.0, 0.5)

    assert weights[:, 1].tolist() == [0, 0]
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert heard.tolist() == [2, 0]
    assert weights[1].tolist() == [1, 0, 0]


def test_fusion_is_the_mean_of_probabilities_by_weight() -> None:
    general, specialist = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * 4
    weight = torch.tensor([0.0, 0.3, 1.0])
    expected = (
        weight[:, None, None, None] * specialist.sigmoid() + (1 - weight)[:, None, None, None] * general.sigmoid()
    )
    fused = fuse(general, specialist, weight)

    torch.testing.assert_close(fused.sigmoid(), expected)
    torch.testing.assert_close(fused[0], general[0])
    torch.testing.assert_close(fused[2], specialist[2])


def test_fusion_of_sure_decoders_is_finite_and_keeps_their_certainty() -> None:
    sure = torch.tensor([[-200.0, 200.0, 200.0, -90.0]])
    other = torch.tensor([[-150.0, 150.0, -200.0, 0.0]])
    fused = fuse(sure, other, torch.tensor([0.25]))

    assert fused.isfinite().all()
    assert fused[0, 0] < -100
    assert fused[0, 1] > 100
    assert fused[0, 2] == pytest.approx(np.log(3), abs=1e-4)  # three quarters against one
    assert fused[0, 3] == pytest.approx(np.log(0.125 / 0.875), abs=1e-4)


# -- what the gate reads ---------------------------------------------------------------------------------------------


def query_of(prompts: PatchPrompts, width: int = 6) -> tuple[Tensor, Tensor]:
    """The gate's query on a random embedding of cells of 8^3 samples, and that embedding."""
    embedding = torch.randn(len(prompts.labels), width, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    tokens = prompts.points.new_tensor(range(prompts.labels.shape[1] * width)).view(1, -1, width)
    ignore, maps = prompts.labels == NOT_A_POINT, torch.rand(len(embedding), MAPS, SIZE, SIZE, SIZE)
    query = gate_query(embedding, tokens.expand(len(embedding), -1, -1), ignore, maps, prompts)
    assert query.shape == (len(embedding), 3 * width + MAPS)
    torch.testing.assert_close(query[:, :width], embedding.mean((2, 3, 4)))
    torch.testing.assert_close(query[:, 3 * width :], maps.mean((2, 3, 4)))
    return query, embedding


def test_the_gate_reads_the_embedding_where_the_positive_click_is() -> None:
    query, embedding = query_of(clicks(2))

    torch.testing.assert_close(query[0, 6:12], embedding[0, :, 12 // 8, 15 // 8, 9 // 8])
    torch.testing.assert_close(query[1, 6:12], embedding[1, :, 13 // 8, 15 // 8, 10 // 8])


def test_without_a_positive_click_the_gate_reads_the_core_of_the_box_else_zeros() -> None:
    prompts = clicks(2)
    box = torch.zeros_like(prompts.box)
    box[0, 8:32, 0:24, 8:32] = True  # its core is one cell
    query, embedding = query_of(replace(prompts, positive=torch.zeros_like(box), box=box))

    torch.testing.assert_close(query[0, 6:12], embedding[0, :, 2, 1, 2])
    assert not query[1, 6:12].any()


def test_padding_tokens_are_not_read() -> None:
    prompts = clicks(1)
    padded = replace(
        prompts,
        points=torch.cat([prompts.points, torch.zeros(1, 2, 3)], dim=1),
        labels=torch.tensor([[POSITIVE, NOT_A_POINT, NOT_A_POINT]]),
    )
    alone, _ = query_of(prompts)
    together, _ = query_of(padded)

    torch.testing.assert_close(together[:, 12:18], alone[:, 12:18])
    assert not query_of(replace(padded, labels=torch.full((1, 3), NOT_A_POINT)))[0][:, 12:18].any()


# -- the model with it -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("changes", [{"threshold": 1.0}, {"threshold": 0.0, "enabled": False}])
def test_tau_of_one_or_a_gate_that_is_off_gives_the_general_model_bit_for_bit(
    batch: int, changes: dict[str, Any]
) -> None:
    model = with_gate_plans(a_model(), **changes)
    steer(model, *[1] * batch)  # as sure of a specialist as can be
    general, prompts = without_gate(model), clicks(batch)
    got, expected = (
        model.decode(features_of(model, batch), prompts),
        general.decode(features_of(general, batch), prompts),
    )

    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.quality, expected.quality)
    assert (got.gate is None) == ("enabled" in changes)
    assert got.heard is None or not got.heard.any()


@torch.no_grad()
def test_only_the_chosen_specialist_is_run_and_only_on_its_cases() -> None:
    model = a_model()
    steer(model, 2, 0, 2)
    model.gate.plans = replace(model.gate.plans, threshold=0.5)  # type: ignore[union-attr]
    features, general = features_of(model), without_gate(model)
    seen = calls(model)
    decoded = model.decode(features, clicks())

    assert seen == {(GENERAL, 3): 1, ("tiny_brain", 2): 1}
    assert decoded.heard.tolist() == [2, 0, 2]  # type: ignore[union-attr]
    alone = general.decode(features, clicks())
    assert torch.equal(decoded.logits[1], alone.logits[1]), "the general decoder's own answer, bit for bit"
    assert decoded.quality[1] == alone.quality[1]
    specialist = model.run_decoder(model.specialists["tiny_brain"], model.decoder_inputs(features, clicks()))
    for n in (0, 2):
        weight = decoded.gate[n, 2]  # type: ignore[index]
        expected = weight * specialist.logits[n].sigmoid() + (1 - weight) * alone.logits[n].sigmoid()
        torch.testing.assert_close(decoded.logits[n].sigmoid(), expected, atol=1e-5, rtol=1e-4)
        assert (decoded.logits[n] - alone.logits[n]).abs().max() > 1e-2


@torch.no_grad()
def test_the_specialist_of_an_expert_that_is_off_is_not_asked() -> None:
    model = a_model()
    features = features_of(model, 1)
    steer(model, 1)
    seen = calls(model)
    decoded = model.decode(model.among(features, (0, 2)), clicks(1))

    assert decoded.gate[0, 1] == 0  # type: ignore[index]
    assert seen[("tiny_trunk", 1)] == 0


@torch.no_grad()
def test_the_opinion_of_an_arm_is_its_own_specialists_on_its_own_embedding() -> None:
    model = a_model(replace(tiny_plans(), gate=GatePlans(("tiny_brain",), hidden=16)))
    features, prompts = features_of(model), clicks()
    seen = calls(model)
    opinions = [model.opinion(features, prompts, arm) for arm in range(3)]

    assert seen == {(GENERAL, 3): 2, ("tiny_brain", 3): 1}
    for arm, decoder in enumerate((model.mask_decoder, model.mask_decoder, model.specialists["tiny_brain"])):
        expected = model.run_decoder(decoder, model.decoder_inputs(model.only(features, arm), prompts)).logits
        assert torch.equal(opinions[arm], expected)
    off = with_gate_plans(a_model(), enabled=False)
    assert torch.equal(off.opinion(features, prompts, 2), without_gate(off).opinion(features, prompts, 2))


def test_specialists_and_gate_learn_in_their_own_stages_alone() -> None:
    model = a_model()

    assert not any(p.requires_grad for part in (model.specialists, model.gate) for p in part.parameters())  # type: ignore[union-attr]
    assert all(p.requires_grad for p in model.mask_decoder.parameters())


# -- in a bundle -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def a_gated_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Its gate listens to the best specialist always."""
    folder = tmp_path_factory.mktemp("bundles")
    content = Content.of(tiny_bundle(folder / "random", gated_plans(threshold=0.0)))
    bias = content.tensors["gate.head.bias"] - torch.tensor([20.0, 0, 0])
    return replace(content, tensors={**content.tensors, "gate.head.bias": bias}).save(folder / "gated")


@torch.no_grad()
def test_a_bundle_keeps_gate_and_specialists(a_gated_bundle: Bundle, tmp_path: Path) -> None:
    again = load_bundle(Content.of(a_gated_bundle).save(tmp_path / "again").folder)
    one, other = (build_model(bundle.plans, bundle.weights()) for bundle in (a_gated_bundle, again))
    features = features_of(one)

    assert again.plans == a_gated_bundle.plans
    assert again.plans.gate == GatePlans(NAMES, hidden=16, threshold=0.0)
    assert torch.equal(one.decode(features, clicks()).logits, other.decode(features, clicks()).logits)


def test_a_prediction_says_which_decoders_were_heard(a_gated_bundle: Bundle, a_volume: Volume, tmp_path: Path) -> None:
    session = Session(a_gated_bundle, device="cpu")
    session.set_volume(a_volume)
    prediction = session.add(PointPrompt.from_ijk((12, 12, 6), a_volume))
    best = max(NAMES, key=lambda name: prediction.gate[name])

    assert list(prediction.gate) == [GENERAL, *NAMES]
    assert sum(prediction.gate.values()) == pytest.approx(1)
    assert list(prediction.decoders) == [GENERAL, best]
    assert prediction.decoders[best] == prediction.gate[best]
    assert sum(prediction.decoders.values()) == pytest.approx(1)
    assert prediction.experts["tiny_brain"].probability.max() > 0
    assert prediction.modes["decoders"] == ("decoder general", "decoder tiny_trunk", "decoder tiny_brain")
    shares = {name: prediction.shares[f"decoder {name}"] for name in prediction.gate}
    assert shares == dict.fromkeys(NAMES, 0.0) | dict(prediction.decoders)
    session.use_experts(["tiny_trunk"])
    session.select("another")
    assert session.add(PointPrompt.from_ijk((20, 9, 3), a_volume)).gate["tiny_brain"] == 0


def test_what_each_decoder_says_makes_up_the_answer(
    a_gated_bundle: Bundle, a_volume: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(a_gated_bundle, device="cpu")
    session.set_volume(a_volume)
    asked: list[str] = []
    ask = session.model.decoder_opinion
    monkeypatch.setattr(session.model, "decoder_opinion", lambda *given: asked.append(given[2]) or ask(*given))
    prediction = session.add(PointPrompt.from_ijk((12, 12, 6), a_volume))
    names = prediction.modes["decoders"]
    assert asked == []

    said = {name: prediction.opinion_on_patch(name) for name in names}
    assert asked == [name.removeprefix("decoder ") for name in names]
    prediction.opinion_on_patch(names[1])
    assert len(asked) == 3, "the newest ones are kept"
    read = prediction.patch.read_by(prediction.canonical.shape_kji)
    for name, (probability, weight) in said.items():
        assert probability.dtype == weight.dtype == np.float32
        np.testing.assert_allclose(weight, prediction.shares[name] * read, rtol=1e-6)
    assert not np.allclose(said[names[1]][0], said[names[2]][0], atol=1e-3)
    fused = sum(probability * weight for probability, weight in said.values())
    decided = 1 / (1 + np.exp(-prediction.logits)) * read
    as_answered = np.isclose(fused, decided, atol=1e-4)  # islands that no prompt touches were taken away since
    assert as_answered.mean() > 0.5
    assert (fused[~as_answered] > 0.5).all()
    assert prediction.experts[names[0]].mean_weight == prediction.decoders[GENERAL]


def test_a_bundle_without_a_gate_hears_the_general_decoder(a_volume: Volume, tmp_path: Path) -> None:
    answers = []
    base = Content.of(tiny_bundle(tmp_path / "gated", gated_plans(threshold=1.0)))
    own = {n: t for n, t in base.tensors.items() if not n.startswith(("gate.", "specialists."))}
    plain = replace(base, plans=replace(base.plans, gate=None), tensors=own)
    for content, name in ((base, "one"), (plain, "other")):
        session = Session(content.save(tmp_path / name), device="cpu")
        session.set_volume(a_volume)
        answers.append(session.add(BoxPrompt.from_ijk((8, 8, 4), (20, 18, 9), a_volume)))

    assert [answer.decoders for answer in answers] == [{GENERAL: 1.0}] * 2
    assert answers[0].gate
    assert answers[1].gate == {}
    assert answers[0].shares["decoder general"] == 1
    assert not answers[0].experts["decoder tiny_brain"].weight.any()
    assert "decoders" not in answers[1].modes
    np.testing.assert_array_equal(answers[0].probability, answers[1].probability)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"specialists": ["nobody"]}, "names of the experts"),
        ({"specialists": ["tiny_trunk", "tiny_trunk"]}, "each once"),
        ({"specialists": []}, "gate.specialists"),
        ({"specialists": ["general"]}, "general"),
        ({"hidden": 0}, "gate.hidden"),
        ({"threshold": 1.5}, "gate.threshold"),
        ({"temperature": 0}, "gate.temperature"),
        ({"enabled": "yes"}, "gate.enabled"),
        ({"dance": True}, "dance"),
    ],
)
def test_plans_of_a_gate_that_make_no_sense_are_refused(change: dict[str, Any], words: str) -> None:
    data = gated_plans().to_json()
    data["gate"] = {**data["gate"], **change}

    with pytest.raises(BundleError, match=words):
        Plans.from_json(data)


def test_weights_without_the_specialists_of_the_plans_are_refused() -> None:
    with pytest.raises(BundleError, match=r"236 differ: gate\.body"):
        build_model(gated_plans(), tensors_by_name(without_gate(a_model())))


@torch.no_grad()
@pytest.mark.parametrize("removed", NAMES)
def test_an_expert_takes_its_specialist_with_it(a_gated_bundle: Bundle, removed: str) -> None:
    content = Content.of(a_gated_bundle)
    smaller = without_expert(content, removed)
    before = build_model(content.plans, dict(content.tensors))
    after = build_model(smaller.plans, dict(smaller.tensors))
    arms = (0, 1 + (removed == "tiny_trunk"))
    expected = before.decode(before.among(features_of(before), arms), clicks())
    got = after.decode(features_of(after), clicks())

    assert smaller.plans.gate == replace(content.plans.gate, specialists=tuple(n for n in NAMES if n != removed))  # type: ignore[type-var]
    torch.testing.assert_close(got.gate, expected.gate[:, [0, arms[1]]])  # type: ignore[index]
    torch.testing.assert_close(got.logits, expected.logits)


def test_the_gate_goes_with_the_last_specialist(a_gated_bundle: Bundle) -> None:
    alone = without_expert(without_expert(Content.of(a_gated_bundle), "tiny_trunk"), "tiny_brain")

    assert alone.plans.gate is None
    assert build_model(alone.plans, dict(alone.tensors)).gate is None


@torch.no_grad()
def test_a_new_expert_leaves_gate_and_specialists_alone(a_gated_bundle: Bundle) -> None:
    content = Content.of(a_gated_bundle)
    plans = replace(tiny_plans(("beads",)).experts[0], licence="CC0")
    encoder = tensors_by_name(build_model(tiny_plans(("beads",))).experts["beads"].encoder)
    larger = with_expert(content, plans, encoder)

    assert larger.plans.gate == content.plans.gate
    for name, tensor in content.tensors.items():
        if name.startswith(("gate.", "specialists.")):
            assert torch.equal(larger.tensors[name], tensor), name
    model = build_model(larger.plans, dict(larger.tensors))
    assert model.decode(features_of(model), clicks()).gate.shape == (3, 3)  # type: ignore[union-attr]
