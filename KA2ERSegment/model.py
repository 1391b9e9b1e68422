"""`PromptableModel`: encode a patch once, decode it for every prompt. Read after `session.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor

from KA2ERSegment.amalgamation import STRIDES, Amalgamation
from KA2ERSegment.cancellation import watch_layers
from KA2ERSegment.convolution import QuickConvolution, quick_layout
from KA2ERSegment.encoders.expert import Expert
from KA2ERSegment.encoders.foundation import Foundation
from KA2ERSegment.mask_decoder import Decoded, MaskDecoder
from KA2ERSegment.prompt_encoder import PatchPrompts, PromptEncoder, dense_maps, edge_costs


@dataclass(frozen=True, slots=True)
class PatchFeatures:
    """Everything that depends on the image alone; B patches at once.

    Args:
        image: (B, 2, S, S, S), normalised.
        edges: (B, 3, S, S, S), geodesic lengths.
        stem: (B, C, S, S, S), full-resolution features.
        foundation: {stride: (B, C, ...)} at strides 2, 4, 8 and 16.
        experts: for each expert {stride: (B, C, ...)} at strides 8 and 16.
        embedding: (B, width, S/8, ...), amalgamated over the arms in `present`.
        weights: (B, K+1, S/8, ...), share of "no expert" and of each expert at stride 8.
        present: (B, K+1) bool, arms used.
    """

    image: Tensor
    edges: Tensor
    stem: Tensor
    foundation: dict[int, Tensor]
    experts: list[dict[int, Tensor]]
    embedding: Tensor
    weights: Tensor
    present: Tensor

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        tensors = [self.image, self.edges, self.stem, self.embedding, self.weights, *self.foundation.values()]
        tensors += [features for expert in self.experts for features in expert.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class PromptableModel(nn.Module):
    """Foundation and experts, their amalgamation, prompt encoder and mask decoder. No input or output here.

    Args:
        stem: (B, 2, S, S, S) to full-resolution features.
        foundation: features at strides 2 to 16.
        experts: frozen encoders by name.
        amalgamation: one level for each stride of `STRIDES`.
        prompt_encoder: points and boxes to tokens.
        mask_decoder: embedding and prompts to logits.
    """

    def __init__(
        self,
        stem: nn.Module,
        foundation: Foundation,
        experts: dict[str, Expert],
        amalgamation: dict[int, Amalgamation],
        merge: nn.Module,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
    ) -> None:
        super().__init__()
        self.stem, self.foundation = stem, foundation
        self.experts = nn.ModuleDict(experts)
        self.amalgamation = nn.ModuleDict({str(stride): level for stride, level in amalgamation.items()})
        self.merge = merge
        self.prompt_encoder, self.mask_decoder = prompt_encoder, mask_decoder
        for parameter in self.experts.parameters():
            parameter.requires_grad_(False)
        watch_layers(self)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms of the amalgamation: the foundation alone, then each expert."""
        return ("foundation", *self.experts)

    def encode(self, image: Tensor, present: Tensor | None = None) -> PatchFeatures:
        """The slow part, once per patch.

        Args:
            image: (B, 2, S, S, S) from `preprocessing.normalise`.
            present: (B, K+1) bool, arms to use; all of them by default.
        """
        if present is None:
            present = torch.ones(len(image), len(self.arms), dtype=torch.bool, device=image.device)
        zscore = image[:, :1]
        experts = []
        with QuickConvolution():
            foundation = self.foundation(zscore)
            with torch.no_grad():
                for expert in self.experts.values():
                    features = expert(zscore)
                    experts.append({stride: features[stride] for stride in STRIDES})
            stem = self.stem(quick_layout(image))
        embedding, weights = self.amalgamate(foundation, experts, present)
        return PatchFeatures(image, edge_costs(image), stem, foundation, experts, embedding, weights, present)

    def amalgamate(
        self, foundation: dict[int, Tensor], experts: list[dict[int, Tensor]], present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """KA2ER's amalgamation at both strides, merged at stride 8: embedding and weights of its finer level."""
        with QuickConvolution():
            levels = {
                stride: self.amalgamation[str(stride)](foundation[stride], [e[stride] for e in experts], present)
                for stride in STRIDES
            }
            (fine, weights), (coarse, _) = levels[8], levels[16]
            coarse = nn.functional.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False)
            return self.merge(torch.cat([fine, coarse], dim=1)), weights

    def decode(self, features: PatchFeatures, prompts: PatchPrompts) -> Decoded:
        """The quick part, for every prompt: logits (B, S, S, S) and expected quality (B,)."""
        maps = dense_maps(features.image, features.edges, prompts)
        tokens, ignore = self.prompt_encoder(prompts, features.image.shape[-1])
        skips = (features.foundation[4], features.foundation[2], features.stem)
        with QuickConvolution():
            decoded: Decoded = self.mask_decoder(features.embedding, skips, tokens, ignore, maps)
        return decoded

    def only(self, features: PatchFeatures, arm: int) -> PatchFeatures:
        """The same patch as one arm alone sees it: 0 the foundation without experts, k the k-th expert."""
        return self.among(features, (arm,))

    def among(self, features: PatchFeatures, arms: Sequence[int]) -> PatchFeatures:
        """The same patch with these arms alone; cheap, their features are there already."""
        present = torch.zeros_like(features.present)
        present[:, list(arms)] = True
        embedding, weights = self.amalgamate(features.foundation, features.experts, present)
        return replace(features, embedding=embedding, weights=weights, present=present)
