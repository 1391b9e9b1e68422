"""The mask decoder: full resolution, started from the geodesic prior, deaf to padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from KA2ERSegment.convolution import QuickConvolution
from KA2ERSegment.mask_decoder import Fusion, MaskDecoder
from KA2ERSegment.prompt_encoder import MAPS, PRIOR

WIDTH, SIZE, SKIPS, CHANNELS = 36, 16, (10, 6, 4), (8, 8, 4)


@pytest.fixture(scope="module")
def a_decoder() -> MaskDecoder:
    torch.manual_seed(0)
    return MaskDecoder(WIDTH, 2, SKIPS, CHANNELS).eval()


def inputs(batch: int = 2, tokens: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "embedding": draw(WIDTH, SIZE // 8, SIZE // 8, SIZE // 8),
        "skips": tuple(draw(n, *[SIZE // s] * 3) for n, s in zip(SKIPS, (4, 2, 1), strict=True)),
        "tokens": draw(tokens, WIDTH),
        "ignore": torch.zeros(batch, tokens, dtype=torch.bool),
        "maps": draw(MAPS, SIZE, SIZE, SIZE).clamp(-1, 1),
    }


def test_logits_have_the_resolution_of_the_patch_and_quality_is_a_share(a_decoder: MaskDecoder) -> None:
    decoded = a_decoder(**inputs())

    assert decoded.logits.shape == (2, SIZE, SIZE, SIZE)
    assert decoded.logits.dtype == torch.float32
    assert decoded.quality.shape == (2,)
    assert ((decoded.quality > 0) & (decoded.quality < 1)).all()


def test_without_any_token_there_is_an_answer_too(a_decoder: MaskDecoder) -> None:
    assert a_decoder(**inputs(tokens=0)).logits.isfinite().all()


@torch.no_grad()
def test_logits_start_from_the_geodesic_prior(a_decoder: MaskDecoder) -> None:
    """The channel that is added must be the prior and not its neighbour, the mask so far."""
    given = inputs()
    before = a_decoder(**given).logits
    gain = a_decoder.prior_gain.item()
    a_decoder.prior_gain.fill_(gain + 3)
    after = a_decoder(**given).logits
    a_decoder.prior_gain.fill_(gain)

    torch.testing.assert_close(after - before, 3 * given["maps"][:, PRIOR], atol=1e-4, rtol=1e-4)
    assert gain > 0


@torch.no_grad()
def test_padding_changes_nothing_and_a_real_token_does(a_decoder: MaskDecoder) -> None:
    given = inputs()
    plain = a_decoder(**given)
    extra = torch.cat([given["tokens"], torch.full((2, 4, WIDTH), 9.0)], dim=1)
    padding = torch.cat([given["ignore"], torch.ones(2, 4, dtype=torch.bool)], dim=1)
    padded = a_decoder(**given | {"tokens": extra, "ignore": padding})
    heard = a_decoder(**given | {"tokens": extra, "ignore": torch.zeros_like(padding)})

    torch.testing.assert_close(padded.logits, plain.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(padded.quality, plain.quality, atol=1e-5, rtol=1e-4)
    assert (heard.quality - plain.quality).abs().max() > 1e-5
    assert (heard.logits - plain.logits).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("channel", range(MAPS))
def test_every_map_is_read(a_decoder: MaskDecoder, channel: int) -> None:
    given = inputs(batch=1)
    maps = given["maps"].clone()
    maps[:, channel] = -maps[:, channel]

    assert (a_decoder(**given | {"maps": maps}).logits - a_decoder(**given).logits).abs().max() > 1e-4


@torch.no_grad()
def test_reading_the_features_apart_changes_nothing() -> None:
    """Against the layers one after the other, on all three together."""
    torch.manual_seed(0)
    fusion = Fusion(own=8, skip=6)
    x, skip, maps = (torch.randn(2, channels, 6, 6, 6) for channels in (8, 6, MAPS))
    expected = torch.cat([x, skip, maps], dim=1)
    for layer in fusion:
        expected = layer(expected)

    torch.testing.assert_close(fusion(x, fusion.read(skip), maps), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_was_read_can_be_given_again(a_decoder: MaskDecoder) -> None:
    given = inputs()
    read = a_decoder.read_skips(given["skips"])
    plain, again = a_decoder(**given), a_decoder(**given, read=read)
    other = a_decoder(**given, read=a_decoder.read_skips((*given["skips"][:2], given["skips"][2] + 1)))

    assert torch.equal(again.logits, plain.logits)
    assert (other.logits - plain.logits).abs().max() > 1e-4


def test_one_case_is_decoded_with_channels_last(a_decoder: MaskDecoder) -> None:
    """Twice as quick on a CPU, from its first layer to its last."""
    with torch.inference_mode(), QuickConvolution():
        voxels = a_decoder(**inputs(batch=1)).voxels

    assert voxels.is_contiguous(memory_format=torch.channels_last_3d)
