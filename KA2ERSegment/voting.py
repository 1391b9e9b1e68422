"""IC-MoE's voting head: experts around frozen weights, each with an opinion of every voxel, and a vote between them.

After Zhang, Chen, Yuan, Tian and Feng, IC-MoE (arXiv 2510.17684). The abstract gives the idea (three kinds of experts,
adaptive voting by pixel probability from label consistency and load balance, pretrained weights left whole); it is in
2D and without equations: those below are this project's own. All but the last line happens at stride 2: a correction
of the base answer is smooth, and so the head costs an eighth.

    z       = LN(W_x x + W_b tanh(b / 4) + up(W_G G))      from the decoder's features x, its logits b, the embedding G
    f_i     = U_i e_i(z),  U_i = 0 at first                one for each expert that is heard: e_i is
              GELU(depthwise 3x3x3)                          of the basic one,
              softmax(Q z . prototypes)                      of a semantic one (U_i: what each prototype says),
              GELU(D_i z), of low rank                       of an adaptive one
    delta_i = h . f_i,     p_i = sigmoid(b + delta_i)      its opinion
    s_i     = r_i + beta log(conf_i + eps) + gamma cons_i - eta load_i
              conf_i = |2 p_i - 1|,  cons_i = 1 - |p_i - mean of the others'|, in training partly 1 - |p_i - truth|
    w       = softmax of s_i / T over the experts that are heard
    answer  = b + up(sum_i w_i delta_i)

At first every delta is 0 and the answer is the base answer to the last bit, whatever the weights are. What speaks for
an expert (conf, cons, load) is evidence, not something to be learnt: no gradient passes it, r alone is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from KA2ERSegment.convolution import quick_layout
from KA2ERSegment.mask_decoder import Decoded
from KA2ERSegment.plans import VotingPlans
from KA2ERSegment.prompt_encoder import MAPS

STRIDE = 2
"""Between the voxels that vote."""
CONFIDENCE, CONSISTENCY, LOAD = 0.5, 1.0, 4.0
"""beta, gamma and eta: what an expert's confidence, its agreement with the others and its load count in the vote.

The last one counts in the choice of adaptive experts too: there the load is how often each one is heard."""
EPSILON = 1e-3
"""Confidence that everybody has."""
MEMORY = 0.98
"""Of the running load, from one training step to the next."""
BASIC = "basic"
"""Name of the expert that is always there."""


@dataclass(frozen=True, slots=True)
class Votes:
    """What each expert of the head says and counts, at full resolution.

    Args:
        weights: (B, E, S, S, S) float32, summing to 1 over the experts; exactly 0 for those that were not heard.
        opinions: (B, E, S, S, S) float32, the logits that each would answer alone, heard or not.
    """

    weights: Tensor
    opinions: Tensor


@dataclass(frozen=True)
class Ballot:
    """One vote at stride 2; V = (S/2)^3 voxels, in the order of the patch; H experts are heard.

    Args:
        heard: (B, H) int64, their indices.
        base: (B, V) float32, the base answer's logits.
        voxels: (B, V, W), features that all experts see.
        hidden: for each expert (B, V, D), what it finds.
        maps: for each expert (B, D, W), what it makes of that.
        deltas: (B, H, V) float32, what each adds to the logits.
        weights: (B, H, V) float32, summing to 1 over the experts.
    """

    heard: Tensor
    base: Tensor
    voxels: Tensor
    hidden: list[Tensor]
    maps: list[Tensor]
    deltas: Tensor
    weights: Tensor

    @cached_property
    def opinions(self) -> Tensor:
        """(B, H, V) float32, logits of each expert alone."""
        return self.base[:, None] + self.deltas

    @cached_property
    def features(self) -> Tensor:
        """(B, V, W), features of the voxels with what the experts added, by their weights."""
        features = self.voxels
        for weight, hidden, out in zip(self.weights.unbind(1), self.hidden, self.maps, strict=True):
            features = features + weight[..., None] * torch.bmm(hidden, out)
        return features

    @property
    def correction(self) -> Tensor:
        """(B, V) float32, what all together add to the logits."""
        return (self.weights * self.deltas).sum(1)

    def of_all(self, experts: int) -> Tensor:
        """The weights (B, E, V) of all experts of the head, exactly 0 for those that are not heard."""
        weights = self.weights.new_zeros(len(self.weights), experts, self.weights.shape[2])
        return weights.scatter(1, self.heard[..., None].expand_as(self.weights), self.weights)

    @staticmethod
    def image(values: Tensor) -> Tensor:
        """Values (B, C, V) of the voxels as an image (B, C, S/2, S/2, S/2)."""
        side = round(values.shape[2] ** (1 / 3))
        return values.reshape(*values.shape[:2], side, side, side)


class VotingHead(nn.Module):
    """Basic, semantic and adaptive experts on the decoder's last features, and their vote.

    Args:
        plans: how many, and how large.
        embedding: channels of the amalgamated embedding.
        decoder: channels of the decoder's last features.
    """

    load: Tensor
    turns: Tensor
    temperature: Tensor

    def __init__(self, plans: VotingPlans, embedding: int, decoder: int) -> None:
        super().__init__()
        self.plans = plans
        width, groups = plans.width, len(plans.semantic)
        self.from_features = nn.Conv3d(decoder, width, STRIDE, stride=STRIDE)
        self.from_logits = nn.Conv3d(1, width, STRIDE, stride=STRIDE, bias=False)
        self.from_embedding = nn.Conv3d(embedding, width, 1, bias=False)
        self.norm = nn.LayerNorm(width)
        self.near = nn.Conv3d(width, width, 3, padding=1, groups=width)
        self.queries = nn.Parameter(torch.randn(groups, width, width) * width**-0.5)
        self.prototypes = nn.Parameter(torch.randn(groups, plans.prototypes, width))
        self.down = nn.Parameter(torch.randn(plans.adaptive, width, plans.rank) * width**-0.5)
        self.basic_out = nn.Parameter(torch.zeros(width, width))
        self.semantic_out = nn.Parameter(torch.zeros(groups, plans.prototypes, width))
        self.adaptive_out = nn.Parameter(torch.zeros(plans.adaptive, plans.rank, width))
        self.head = nn.Parameter(torch.randn(width, 1) * width**-0.5)
        self.route_case = nn.Sequential(
            nn.Linear(2 * embedding + MAPS, 4 * width), nn.GELU(), nn.Linear(4 * width, len(self.names))
        )
        self.route_voxel = nn.Parameter(torch.randn(len(self.names), width) * 0.02)
        self.register_buffer("load", torch.zeros(len(self.names)))
        self.register_buffer("turns", torch.zeros(plans.adaptive))
        self.register_buffer("temperature", torch.ones(()))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the experts, E of them: "basic", each semantic one, then "adaptive 1" and so on."""
        return (BASIC, *self.plans.semantic, *(f"adaptive {n + 1}" for n in range(self.plans.adaptive)))

    def forward(self, embedding: Tensor, decoded: Decoded, maps: Tensor) -> Decoded:
        """The answer after the vote, with the share of each expert on the grid of the embedding.

        Args:
            embedding: (B, width, S/8, ...), amalgamated.
            decoded: the base answer, frozen. Where no expert adds anything its logits stay as they are to the last bit.
            maps: (B, MAPS, S, S, S), the prompts.
        """
        ballot = self.ballot(embedding, decoded, maps)
        cells = ballot.image(ballot.of_all(len(self.names)).detach())
        votes = F.avg_pool3d(cells, cells.shape[-1] // embedding.shape[-1])
        return replace(decoded, logits=self.answer(decoded, ballot), votes=votes)

    def answer(self, decoded: Decoded, ballot: Ballot) -> Tensor:
        """The logits (B, S, S, S) that a ballot makes of the base answer."""
        return decoded.logits + _upsampled(ballot.correction[:, None])[:, 0]

    def votes(self, embedding: Tensor, decoded: Decoded, maps: Tensor) -> Votes:
        """What each expert says and counts; to be looked at, a click needs none of it."""
        ballot = self.ballot(embedding, decoded, maps)
        every = torch.arange(len(self.names), device=ballot.heard.device).expand(len(ballot.heard), -1)
        deltas = self._deltas(*self._experts(ballot.voxels, every))
        opinions = decoded.logits[:, None] + _upsampled(deltas)
        return Votes(_upsampled(ballot.of_all(len(self.names))), opinions)

    def ballot(
        self, embedding: Tensor, decoded: Decoded, maps: Tensor, truth: Tensor | None = None, told: Tensor | None = None
    ) -> Ballot:
        """One vote.

        Args:
            embedding: (B, width, S/8, ...).
            decoded: the base answer.
            maps: (B, MAPS, S, S, S).
            truth: (B, V) in 0..1, in training: share of each voxel that is inside the object.
            told: (B,) bool, cases whose experts are weighed by their consistency with the truth.
        """
        base = decoded.logits.float()
        voxels = self._voxels(embedding, decoded.voxels, base)
        case = self.route_case(_about(embedding, decoded.token, maps)).float()  # (B, E)
        heard = self._heard(case)
        hidden, out = self._experts(voxels, heard)
        deltas = self._deltas(hidden, out)
        coarse = F.avg_pool3d(base[:, None], STRIDE).flatten(1)
        with torch.no_grad():
            says = evidence(coarse[:, None] + deltas, self.load[heard], truth, told)
        routed = torch.bmm(self.route_voxel[heard].to(voxels.dtype), voxels.transpose(1, 2)).float()
        weights = self._weights(case.gather(1, heard)[..., None] + routed + says)
        return Ballot(heard, coarse, voxels, hidden, out, deltas, weights)

    @torch.no_grad()
    def observe(self, ballot: Ballot) -> None:
        """Remember how much each expert counts, and how often each adaptive one is heard.

        More than its part tells against it from now on. So the load is balanced without a loss, as Wang et al. do it
        for language models (arXiv 2408.15664).
        """
        experts, adaptive = len(self.names), self.plans.adaptive
        weights = ballot.of_all(experts).mean((0, 2))
        heard = F.one_hot(ballot.heard, experts)[:, :, experts - adaptive :].sum(1).float().mean(0)
        self.load.lerp_(weights - 1 / experts, 1 - MEMORY)
        self.turns.lerp_(heard - self.plans.top / adaptive, 1 - MEMORY)

    # -- experts -----------------------------------------------------------------------------------------------------

    def _voxels(self, embedding: Tensor, features: Tensor, base: Tensor) -> Tensor:
        """(B, V, W), what all experts see."""
        coarse = self.from_embedding(quick_layout(embedding))
        factor = base.shape[-1] // STRIDE // coarse.shape[-1]
        z = F.interpolate(coarse, scale_factor=factor, mode="trilinear", align_corners=False)
        z = z + self.from_features(quick_layout(features))
        z = z + self.from_logits(quick_layout(torch.tanh(base[:, None] / 4)))
        voxels: Tensor = self.norm(z.flatten(2).transpose(1, 2))
        return voxels

    def _heard(self, case: Tensor) -> Tensor:
        """(B, H) int64: the basic and all semantic experts, and the adaptive ones that fit each case best."""
        always = 1 + len(self.plans.semantic)
        scores = case.detach()[:, always:] - LOAD * self.turns
        best = scores.topk(self.plans.top, dim=1).indices + always
        first = torch.arange(always, device=case.device).expand(len(case), -1)
        return torch.cat([first, best], dim=1)

    def _experts(self, voxels: Tensor, heard: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """For each expert in `heard` (B, H) what it finds (B, V, D) and its map (B, D, W); nothing of the others."""
        always = 1 + len(self.plans.semantic)
        batch, dtype = len(voxels), voxels.dtype
        hidden = [self._basic(voxels), *self._semantic(voxels)]
        out = [values.expand(batch, -1, -1) for values in (self.basic_out, *self.semantic_out)]
        for adaptive in (heard[:, always:] - always).unbind(1):
            hidden.append(F.gelu(torch.bmm(voxels, self.down[adaptive].to(dtype))))
            out.append(self.adaptive_out[adaptive])
        return hidden, [values.to(dtype) for values in out]

    def _basic(self, voxels: Tensor) -> Tensor:
        """(B, V, W)."""
        side = round(voxels.shape[1] ** (1 / 3))
        image = voxels.transpose(1, 2).view(len(voxels), -1, side, side, side)
        return F.gelu(self.near(quick_layout(image)).flatten(2).transpose(1, 2))

    def _semantic(self, voxels: Tensor) -> list[Tensor]:
        """For each group (B, V, P), which of its prototypes a voxel attends to; its map says what they mean."""
        keys = torch.bmm(self.queries, self.prototypes.transpose(1, 2)) * self.plans.width**-0.5  # (M, W, P)
        return [torch.matmul(voxels, key.to(voxels.dtype)).softmax(-1) for key in keys]

    def _deltas(self, hidden: list[Tensor], out: list[Tensor]) -> Tensor:
        """(B, H, V) float32; through the width of the features only where somebody asks for those."""
        head = self.head.to(hidden[0].dtype)
        return torch.stack(
            [torch.bmm(x, values @ head)[..., 0] for x, values in zip(hidden, out, strict=True)], 1
        ).float()

    # -- the vote ----------------------------------------------------------------------------------------------------

    def _weights(self, scores: Tensor) -> Tensor:
        """(B, H, V), summing to 1 over the experts."""
        if self.plans.vote == "mean":
            return torch.full_like(scores, 1 / scores.shape[1])
        if self.plans.vote == "case":
            scores = scores.mean(2, keepdim=True).expand_as(scores)
        return (scores / self.temperature).softmax(1)


def evidence(opinions: Tensor, load: Tensor, truth: Tensor | None = None, told: Tensor | None = None) -> Tensor:
    """What speaks for each expert beside the router: confidence, consistency, little load.

    Args:
        opinions: (B, H, V) float32, logits.
        load: (B, H), how much more than its part each was heard so far.
        truth: (B, V) in 0..1, in training.
        told: (B,) bool, cases where consistency is that with the truth and not that with the others.

    Returns:
        (B, H, V) float32, for the softmax.
    """
    probability = opinions.sigmoid()
    confidence = (2 * probability - 1).abs()
    other = (probability.sum(1, keepdim=True) - probability) / (probability.shape[1] - 1)
    if truth is not None and told is not None:
        other = torch.where(told[:, None, None], truth[:, None], other)
    consistency = 1 - (probability - other).abs()
    return CONFIDENCE * (confidence + EPSILON).log() + CONSISTENCY * consistency - LOAD * load[..., None]


def _about(embedding: Tensor, token: Tensor, maps: Tensor) -> Tensor:
    """(B, 2 width + MAPS), statistics of image and prompts."""
    return torch.cat([embedding.mean((2, 3, 4)), token, maps.mean((2, 3, 4)).to(token.dtype)], dim=1)


def _upsampled(values: Tensor) -> Tensor:
    """(B, C, V) at stride 2 to (B, C, S, S, S), linear between the voxels."""
    return F.interpolate(Ballot.image(values), scale_factor=STRIDE, mode="trilinear", align_corners=False)
