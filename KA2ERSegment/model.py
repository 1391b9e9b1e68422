"""`PromptableModel`: encode a patch once, decode it for every prompt. Read after `session.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

import torch
import torch.nn as nn
from torch import Tensor

from KA2ERSegment.amalgamation import STRIDES, Amalgamation
from KA2ERSegment.cancellation import watch_layers
from KA2ERSegment.convolution import QuickConvolution, quick_layout
from KA2ERSegment.encoders.expert import Expert
from KA2ERSegment.encoders.foundation import Foundation
from KA2ERSegment.gate import GENERAL, Gate, fuse, gate_query
from KA2ERSegment.mask_decoder import Decoded, MaskDecoder, Skips
from KA2ERSegment.preprocessing import RawPatch
from KA2ERSegment.prompt_encoder import PatchPrompts, PromptEncoder, dense_maps, edge_costs
from KA2ERSegment.voting import Votes, VotingHead

DecoderInputs: TypeAlias = tuple[Tensor, Skips, Tensor, Tensor, Tensor]
"""What `MaskDecoder.forward` takes: embedding, skips, tokens, which of them are padding, prompt maps."""


@dataclass(frozen=True, slots=True)
class PatchFeatures:
    """Everything that depends on the image alone; B patches at once.

    Args:
        image: (B, 2, S, S, S), normalised.
        edges: (B, 3, S, S, S), geodesic lengths.
        stem: (B, C, S, S, S), full-resolution features.
        foundation: {stride: (B, C, ...)} at strides 2, 4, 8 and 16.
        experts: for each expert {stride: (B, C, ...)} at strides 8 and 16; empty where the plans leave experts out.
        embedding: (B, width, S/8, ...), amalgamated over the arms in `present`.
        weights: (B, K+1, S/8, ...), share of "no expert" and of each expert at stride 8.
        present: (B, K+1) bool, arms used.
        prior: (B, K+1), log probability that the volume is one of each arm's (`domain.log_prior`), or None.
        read: what the mask decoders that were heard make of the skips (`MaskDecoder.read_skips`), by their names; kept
            and used in inference mode alone, where no weight changes.
    """

    image: Tensor
    edges: Tensor
    stem: Tensor
    foundation: dict[int, Tensor]
    experts: list[dict[int, Tensor]]
    embedding: Tensor
    weights: Tensor
    present: Tensor
    prior: Tensor | None = None
    read: dict[str, Skips] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        tensors = [self.image, self.edges, self.stem, self.embedding, self.weights, *self.foundation.values()]
        tensors += [features for expert in self.experts for features in expert.values()]
        tensors += [part for read in self.read.values() for part in read]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class PromptableModel(nn.Module):
    """Foundation and experts, their amalgamation, prompt encoder and mask decoder. No input or output here.

    Args:
        stem: (B, 2, S, S, S) to full-resolution features.
        foundation: features at strides 2 to 16.
        experts: frozen encoders by name.
        amalgamation: one level for each stride of `STRIDES`.
        merge: both levels' embeddings, (B, 2 width, S/8, ...), to one.
        prompt_encoder: points and boxes to tokens.
        mask_decoder: embedding and prompts to logits; the general one where there are specialists.
        specialists: finetuned copies of it by expert name; frozen.
        gate: chooses among them; frozen. None: the general decoder alone.
        voting: head whose experts vote on the logits; None where the bundle has none.
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
        specialists: dict[str, MaskDecoder] | None = None,
        gate: Gate | None = None,
        voting: VotingHead | None = None,
    ) -> None:
        super().__init__()
        self.stem, self.foundation = stem, foundation
        self.experts = nn.ModuleDict(experts)
        self.amalgamation = nn.ModuleDict({str(stride): level for stride, level in amalgamation.items()})
        self.merge = merge
        self.prompt_encoder, self.mask_decoder = prompt_encoder, mask_decoder
        self.specialists, self.gate = nn.ModuleDict(specialists or {}), gate
        self.voting = voting
        for frozen in (self.experts, self.specialists, self.gate):
            if frozen is not None:
                frozen.requires_grad_(False)
        watch_layers(self)

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms of the amalgamation: the foundation alone, then each expert."""
        return ("foundation", *self.experts)

    @property
    def voters(self) -> tuple[str, ...]:
        """Names of the experts that vote on the answer; none where there is no voting head, or it is switched off."""
        return self.voting.names if self.voting is not None and self.voting.plans.enabled else ()

    @property
    def decoders(self) -> tuple[str, ...]:
        """Names of the mask decoders that the gate chooses among; none without a gate that is switched on."""
        return self.gate.decoders if self.gate is not None and self.gate.plans.enabled else ()

    @property
    def _asks_experts(self) -> bool:
        """Whether any level of the amalgamation reads experts' features."""
        return any(cast("Amalgamation", level).asks_experts for level in self.amalgamation.values())

    @property
    def reads_raw(self) -> bool:
        """Whether an expert reads the patch by plans of its own, so that `encode` needs it in its own unit."""
        return self._asks_experts and any(cast("Expert", expert).reads_raw for expert in self.experts.values())

    def encode(
        self,
        image: Tensor,
        present: Tensor | None = None,
        raw: RawPatch | None = None,
        prior: Tensor | None = None,
    ) -> PatchFeatures:
        """The slow part, once per patch.

        Args:
            image: (B, 2, S, S, S) from `preprocessing.normalise`.
            present: (B, K+1) bool, arms to use; all of them by default.
            raw: the same patches in their own unit; needed where `reads_raw`.
            prior: (B, K+1), as in `PatchFeatures`; by default nothing is known of the volumes.

        Raises:
            ValueError: `raw` is needed and was not given.
        """
        if present is None:
            present = torch.ones(len(image), len(self.arms), dtype=torch.bool, device=image.device)
        zscore = image[:, :1]
        experts = []
        with QuickConvolution():
            foundation = self.foundation(zscore)
            with torch.no_grad():
                for expert in self.experts.values() if self._asks_experts else ():
                    experts.append(self._features(cast("Expert", expert), zscore, raw))
            stem = self.stem(quick_layout(image))
        embedding, weights = self.amalgamate(foundation, experts, present, prior)
        return PatchFeatures(image, edge_costs(image), stem, foundation, experts, embedding, weights, present, prior)

    def _features(self, expert: Expert, zscore: Tensor, raw: RawPatch | None) -> dict[int, Tensor]:
        """One expert's features at `STRIDES`."""
        if not expert.reads_raw:
            features = expert(zscore)
            return {stride: features[stride] for stride in STRIDES}
        if raw is None:
            message = f"expert {expert.plans.name!r} reads grey values in their own unit: give encode() the raw patch."
            raise ValueError(message)
        return expert.read(raw, STRIDES)

    def amalgamate(
        self,
        foundation: dict[int, Tensor],
        experts: list[dict[int, Tensor]],
        present: Tensor,
        prior: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """KA2ER's amalgamation at both strides, merged at stride 8: embedding and weights of its finer level."""
        with QuickConvolution():
            levels = {
                stride: self.amalgamation[str(stride)](foundation[stride], [e[stride] for e in experts], present, prior)
                for stride in STRIDES
            }
            (fine, weights), (coarse, _) = levels[8], levels[16]
            coarse = nn.functional.interpolate(coarse, scale_factor=2, mode="trilinear", align_corners=False)
            return self.merge(torch.cat([fine, coarse], dim=1)), weights

    def decode(self, features: PatchFeatures, prompts: PatchPrompts) -> Decoded:
        """The quick part, for every prompt: logits (B, S, S, S) and expected quality (B,).

        The general decoder answers; where the gate trusts a specialist enough, that one is run too and both are fused;
        the experts of the voting head have the last word.
        """
        base, maps = self.decode_base(features, prompts)
        if self.voting is None or not self.voters:
            return base
        with QuickConvolution():
            answer: Decoded = self.voting(features.embedding, base, maps)
        return answer

    def decode_base(self, features: PatchFeatures, prompts: PatchPrompts) -> tuple[Decoded, Tensor]:
        """The answer before the vote, and the prompts as dense maps (B, MAPS, S, S, S)."""
        inputs = self.decoder_inputs(features, prompts)
        decoded = self._answer_of(GENERAL, features, inputs)
        if self.gate is not None and self.decoders:
            decoded = self._gated(self.gate, decoded, features, prompts, inputs)
        return decoded, inputs[-1]

    def votes(self, features: PatchFeatures, prompts: PatchPrompts) -> Votes | None:
        """What each of `voters` says and counts at each sample; None where there are none."""
        base, maps = self.decode_base(features, prompts)
        if self.voting is None or not self.voters:
            return None
        with QuickConvolution():
            return self.voting.votes(features.embedding, base, maps)

    def decoder_inputs(self, features: PatchFeatures, prompts: PatchPrompts) -> DecoderInputs:
        """What all mask decoders read, made once for each prompt."""
        maps = dense_maps(features.image, features.edges, prompts)
        tokens, ignore = self.prompt_encoder(prompts, features.image.shape[-1])
        skips = (features.foundation[4], features.foundation[2], features.stem)
        return features.embedding, skips, tokens, ignore, maps

    def run_decoder(self, decoder: nn.Module, inputs: DecoderInputs, read: Skips | None = None) -> Decoded:
        """One decoder's answer.

        Args:
            decoder: any `MaskDecoder`.
            inputs: of `decoder_inputs`.
            read: what that decoder makes of the skips, where it is known.
        """
        with QuickConvolution():
            decoded: Decoded = decoder(*inputs, read)
        return decoded

    def _answer_of(self, name: str, features: PatchFeatures, inputs: DecoderInputs) -> Decoded:
        """The answer of a decoder by its name; what it makes of the skips is kept in inference mode."""
        decoder = cast("MaskDecoder", self.mask_decoder if name == GENERAL else self.specialists[name])
        if not torch.is_inference_mode_enabled():  # what was kept may be of former weights, and has no gradients
            return self.run_decoder(decoder, inputs)
        if name not in features.read:
            with QuickConvolution():
                features.read[name] = decoder.read_skips(inputs[1])
        return self.run_decoder(decoder, inputs, features.read[name])

    def _gated(
        self, gate: Gate, general: Decoded, features: PatchFeatures, prompts: PatchPrompts, inputs: DecoderInputs
    ) -> Decoded:
        """SAM-Med3D-MoE (arXiv 2407.04938): only the chosen specialist is run, only on the cases that chose it.

        Specialists of experts that are switched off are not asked.
        """
        embedding, _, tokens, ignore, maps = inputs
        allowed = features.present[:, [self.arms.index(name) for name in self.specialists]]
        weights, heard = gate.route(gate_query(embedding, tokens, ignore, maps, prompts), allowed)
        logits, quality = general.logits, general.quality
        for number, (name, specialist) in enumerate(self.specialists.items(), start=1):
            cases = (heard == number).nonzero()[:, 0]
            if not len(cases):
                continue
            if len(cases) == len(heard):  # a session has one case
                own = self._answer_of(name, features, inputs)
            else:
                own = self.run_decoder(specialist, _of_cases(inputs, cases))
            weight = weights[cases, number]
            logits = logits.index_copy(0, cases, fuse(general.logits[cases], own.logits, weight))
            fused = weight * own.quality + (1 - weight) * general.quality[cases]
            quality = quality.index_copy(0, cases, fused)
        return replace(general, logits=logits, quality=quality, gate=weights, heard=heard)

    def opinion(self, features: PatchFeatures, prompts: PatchPrompts, arm: int) -> Tensor:
        """What one arm alone answers: its own specialist decoder on the embedding that it alone gives.

        Args:
            features: of B patches.
            prompts: of the same B cases.
            arm: 0 the foundation, k the k-th expert; one without a specialist is read by the general decoder.

        Returns:
            (B, S, S, S) float32 logits.
        """
        name = self.arms[arm]
        decoder = name if name in self.decoders else GENERAL
        return self.decoder_opinion(self.only(features, arm), prompts, decoder)

    def decoder_opinion(self, features: PatchFeatures, prompts: PatchPrompts, name: str) -> Tensor:
        """What one mask decoder alone answers, before any vote: (B, S, S, S) float32 logits.

        Args:
            features: of B patches.
            prompts: of the same B cases.
            name: "general", or that of a specialist.
        """
        return self._answer_of(name, features, self.decoder_inputs(features, prompts)).logits

    def only(self, features: PatchFeatures, arm: int) -> PatchFeatures:
        """The same patch as one arm alone sees it: 0 the foundation without experts, k the k-th expert."""
        return self.among(features, (arm,))

    def among(self, features: PatchFeatures, arms: Sequence[int]) -> PatchFeatures:
        """The same patch with these arms alone; cheap, their features are there already."""
        present = torch.zeros_like(features.present)
        present[:, list(arms)] = True
        embedding, weights = self.amalgamate(features.foundation, features.experts, present, features.prior)
        return replace(features, embedding=embedding, weights=weights, present=present)


def _of_cases(inputs: DecoderInputs, cases: Tensor) -> DecoderInputs:
    """The inputs of some of the cases."""
    embedding, (quarter, half, full), tokens, ignore, maps = inputs
    skips = (quarter[cases], half[cases], full[cases])
    return embedding[cases], skips, tokens[cases], ignore[cases], maps[cases]
