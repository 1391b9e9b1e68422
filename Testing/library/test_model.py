"""The promptable model, tiny: the slow part once, the quick part for every prompt, frozen experts."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from KA2ERSegment.build import build_model
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.preprocessing import normalise
from KA2ERSegment.prompt_encoder import NEGATIVE, NOT_A_POINT, POSITIVE, PatchPrompts
from KA2ERSegment.testing import tiny_plans

SIZE = 32


@pytest.fixture(scope="module")
def a_model() -> PromptableModel:
    torch.manual_seed(0)
    return build_model(tiny_plans())


@pytest.fixture(scope="module")
def an_image() -> Tensor:
    values = torch.randn(2, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    values[:, 10:20, 8:22, 6:18] += 3
    return normalise(values, torch.ones_like(values, dtype=torch.bool))


@pytest.fixture(scope="module")
def some_features(a_model: PromptableModel, an_image: Tensor) -> PatchFeatures:
    with torch.no_grad():
        return a_model.encode(an_image)


def clicks(*points: tuple[int, int, int, int], batch: int = 2) -> PatchPrompts:
    """(k, j, i, label) each, the same for all cases."""
    positive = torch.zeros(batch, SIZE, SIZE, SIZE, dtype=torch.bool)
    negative = positive.clone()
    for k, j, i, label in points:
        if label != NOT_A_POINT:
            (positive if label == POSITIVE else negative)[:, k, j, i] = True
    return PatchPrompts(
        points=torch.tensor([[p[:3] for p in points]] * batch, dtype=torch.float32),
        labels=torch.tensor([[p[3] for p in points]] * batch),
        positive=positive,
        negative=negative,
        box=torch.zeros_like(positive),
        outside=torch.zeros_like(positive),
        previous=torch.full(positive.shape, 0.5),
    )


ONE_CLICK = clicks((15, 15, 12, POSITIVE))
TWO_CLICKS = clicks((15, 15, 12, POSITIVE), (4, 5, 6, NEGATIVE))


def test_arms_are_the_foundation_and_the_experts_by_name(a_model: PromptableModel) -> None:
    assert a_model.arms == ("foundation", "tiny_trunk", "tiny_brain")


def test_features_have_the_shapes_that_their_text_says(some_features: PatchFeatures) -> None:
    assert some_features.embedding.shape == (2, 36, 4, 4, 4)
    assert some_features.weights.shape == (2, 3, 4, 4, 4)
    assert some_features.stem.shape[2:] == (SIZE, SIZE, SIZE)
    assert {stride: f.shape[-1] for stride, f in some_features.foundation.items()} == {2: 16, 4: 8, 8: 4, 16: 2}
    assert [sorted(expert) for expert in some_features.experts] == [[8, 16], [8, 16]]
    assert some_features.present.all()


def test_what_decoders_read_of_the_image_is_kept_where_nothing_learns_and_counted(
    a_model: PromptableModel, an_image: Tensor
) -> None:
    """Kept while weights may change, it would be of former weights."""
    with torch.no_grad():
        features = a_model.encode(an_image)
        before, plain = features.nbytes, a_model.decode(features, ONE_CLICK).logits
        assert features.read == {}
    with torch.inference_mode():
        first = a_model.decode(features, ONE_CLICK).logits
        kept = {name: [id(part) for part in read] for name, read in features.read.items()}
        again = a_model.decode(features, ONE_CLICK).logits

    assert kept
    assert {name: [id(part) for part in read] for name, read in features.read.items()} == kept
    assert features.nbytes > before
    torch.testing.assert_close(first, plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(again, first)


def test_what_was_kept_is_not_used_where_weights_may_change(an_image: Tensor) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_plans())
    fuse = model.mask_decoder.fuse[0]
    of_features = slice(fuse.own, fuse.own + fuse.skip)
    with torch.no_grad():
        features = model.encode(an_image)
    with torch.inference_mode():
        model.decode(features, ONE_CLICK)
    with torch.no_grad():
        fuse[0].weight[:, of_features] *= -1

    found = model.decode(features, ONE_CLICK).logits
    found.square().mean().backward()

    assert torch.equal(found, model.decode(replace(features, read={}), ONE_CLICK).logits)
    assert fuse[0].weight.grad[:, of_features].abs().amax((0, 2, 3, 4)).min() > 0


def test_memory_is_counted_whole(some_features: PatchFeatures) -> None:
    at_least = 4 * (2 + 3) * 2 * SIZE**3  # image and edges alone, float32

    assert at_least < some_features.nbytes < 10 * at_least


@torch.no_grad()
def test_the_same_prompts_give_the_same_mask(a_model: PromptableModel, some_features: PatchFeatures) -> None:
    one, other = (a_model.decode(some_features, TWO_CLICKS) for _ in range(2))

    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.quality, other.quality)


@torch.no_grad()
def test_features_encoded_once_serve_every_prompt(
    a_model: PromptableModel, an_image: Tensor, some_features: PatchFeatures
) -> None:
    first = a_model.decode(some_features, ONE_CLICK).logits
    second = a_model.decode(some_features, TWO_CLICKS).logits

    assert torch.equal(a_model.decode(a_model.encode(an_image), TWO_CLICKS).logits, second)
    assert torch.equal(a_model.decode(some_features, ONE_CLICK).logits, first), "decoding leaves no trace"
    assert (first - second).abs().max() > 1e-2
    assert first.shape == (2, SIZE, SIZE, SIZE)


@torch.no_grad()
def test_padding_points_change_nothing(a_model: PromptableModel, some_features: PatchFeatures) -> None:
    padded = clicks((15, 15, 12, POSITIVE), (31, 0, 31, NOT_A_POINT), (3, 3, 3, NOT_A_POINT))
    one, other = a_model.decode(some_features, ONE_CLICK), a_model.decode(some_features, padded)

    torch.testing.assert_close(other.logits, one.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.quality, one.quality, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_cases_of_a_batch_do_not_mix(a_model: PromptableModel, an_image: Tensor, some_features: PatchFeatures) -> None:
    together = a_model.decode(some_features, ONE_CLICK).logits
    alone = a_model.decode(a_model.encode(an_image[1:]), clicks((15, 15, 12, POSITIVE), batch=1)).logits

    torch.testing.assert_close(together[1:], alone, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("arm", [0, 1, 2])
def test_one_arm_alone_has_the_whole_weight_and_its_own_opinion(
    a_model: PromptableModel, an_image: Tensor, some_features: PatchFeatures, arm: int
) -> None:
    alone = a_model.only(some_features, arm)
    one_hot = torch.zeros(3)
    one_hot[arm] = 1

    assert torch.equal(alone.weights, one_hot[None, :, None, None, None].expand_as(alone.weights))
    assert (alone.embedding - some_features.embedding).abs().max() > 1e-3
    assert some_features.present.all(), "the features it was taken from are as they were"
    present = torch.zeros(2, 3, dtype=torch.bool)
    present[:, arm] = True
    torch.testing.assert_close(alone.embedding, a_model.encode(an_image, present).embedding)


@torch.no_grad()
def test_without_experts_the_model_has_the_same_shapes(an_image: Tensor) -> None:
    alone = build_model(tiny_plans(experts=()))
    features = alone.encode(an_image)

    assert alone.arms == ("foundation",)
    assert (features.weights == 1).all()
    assert alone.decode(features, ONE_CLICK).logits.shape == (2, SIZE, SIZE, SIZE)


def fingerprint(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def test_experts_are_frozen_and_everything_else_learns(an_image: Tensor) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_plans()).train()
    assert not any(parameter.requires_grad for parameter in model.experts.parameters())
    before, rest = fingerprint(model.experts), {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    decoded = model.decode(model.encode(an_image[:1]), clicks((15, 15, 12, POSITIVE), batch=1))
    (decoded.logits.square().mean() + decoded.quality.sum()).backward()
    optimizer.step()

    assert fingerprint(model.experts) == before
    still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert still == [], "a part that no gradient reaches is not used"
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, rest[n])]
    assert len(moved) > 0.9 * sum(not n.startswith("experts.") for n in rest)


@torch.no_grad()
def test_the_box_reaches_the_mask(a_model: PromptableModel, some_features: PatchFeatures) -> None:
    box = torch.zeros(2, SIZE, SIZE, SIZE, dtype=torch.bool)
    box[:, 8:22, 6:24, 4:20] = True
    with_box = replace(ONE_CLICK, box=box, outside=~box)
    one, other = a_model.decode(some_features, ONE_CLICK).logits, a_model.decode(some_features, with_box).logits

    assert other[~box].mean() < one[~box].mean() - 0.1
