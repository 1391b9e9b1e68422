"""What the amalgamated model learns from its experts beside the labels: their features and their predictions.

KA2ER (arXiv 2410.21085) distils both; how is this project's own design, after common-feature learning (Luo et al.,
IJCAI 2019) and tempered predictions (Hinton et al., 2015). Of a case that belongs to the task of expert k*:

    L_feat = mean over strides |LN e_k* - H_k*(G)|     e_k*: its features in the common space, no gradient
    L_kd   = KL(sigmoid(expert logit / 2) || sigmoid(mask logit / 2)) in the box around the object, dilated

The heads H_k (1x1x1) and the experts' decoders are thrown away afterwards. The expert is a teacher of such a case
whether the case may hear it or not, so that the model also learns to do without.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from KA2ERSegment.amalgamation import STRIDES, Amalgamation
from KA2ERSegment.convolution import QuickConvolution
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.training import losses
from KA2ERSegment.training.sampling import IGNORE
from KA2ERSegment.training.simulation import box_corners

MARGIN = 0.25
"""Of the object's extent, by which its box is dilated on each side."""
AGREEMENT = 0.7
"""Dice that the expert's class, by the labels, must have with the object in that box: a part of an organ, or a lesion
in it, is not what the expert was asked."""


@dataclass(slots=True)
class Overheard:
    """What passed through a model while it encoded B patches.

    Args:
        levels: for each stride the experts' features (B, C_k, n, n, n) and the level's G (B, width, n, n, n).
        skips: by expert name, what its encoder gave, finest first.
    """

    levels: dict[int, tuple[list[Tensor], Tensor]] = field(default_factory=dict)
    skips: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def overhear(model: PromptableModel, experts: Collection[str] = ()) -> Iterator[Overheard]:
    """Within it, what a model computes on its way to an embedding is kept; `skips` of the named experts alone."""
    heard = Overheard()
    with ExitStack() as listening:
        for stride in STRIDES:

            def keep_level(module: nn.Module, given: Any, answer: Any, stride: int = stride) -> None:
                heard.levels[stride] = given[1], answer[0]

            listening.enter_context(model.amalgamation[str(stride)].register_forward_hook(keep_level))
        for name in experts:

            def keep_skips(module: nn.Module, given: Any, answer: Any, name: str = name) -> None:
                heard.skips[name] = list(answer)

            listening.enter_context(cast("nn.Module", model.experts[name].encoder).register_forward_hook(keep_skips))
        yield heard


class Distillation(nn.Module):
    """Both losses, with the layers that only they need.

    Args:
        arms: names of the model's arms, the foundation first.
        width: of its common space.
        decoders: of the experts' nnU-Nets, by expert name; one without is not asked for predictions.
    """

    def __init__(self, arms: tuple[str, ...], width: int, decoders: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.arms = arms
        self.heads = nn.ModuleDict(
            {str(stride): nn.ModuleList(nn.Linear(width, width) for _ in arms[1:]) for stride in STRIDES}
        )
        self.decoders = nn.ModuleDict(dict(decoders or {})).requires_grad_(False)

    def feature_loss(self, model: PromptableModel, heard: Overheard, task: Tensor) -> Tensor:
        """L_feat, a mean over the cases that belong to a task; 0 where none does or experts are not asked.

        Args:
            model: that was overheard.
            heard: of B patches.
            task: (B,) int64, arm of the case's own expert; 0: none.
        """
        found = [task.new_zeros(0, dtype=torch.float32)]
        for stride, (experts, embedding) in heard.levels.items():
            level = cast("Amalgamation", model.amalgamation[str(stride)])
            if not level.asks_experts:
                continue
            heads = cast("nn.ModuleList", self.heads[str(stride)])
            for arm in range(1, len(self.arms)):
                cases = (task == arm).nonzero()[:, 0]
                if not len(cases):
                    continue
                with torch.no_grad():
                    taught = _tokens(level.project_experts[arm - 1](experts[arm - 1][cases]))
                    taught = F.layer_norm(taught.float(), taught.shape[-1:])
                found.append(losses.feature_loss(heads[arm - 1](_tokens(embedding[cases])), taught))
        each = torch.cat(found)
        return each.mean() if len(each) else task.sum() * 0.0

    @torch.no_grad()
    def taught(self, heard: Overheard, task: Tensor, classes: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What the cases' own experts say of the object.

        The object's class is the one with most samples under it, by the labels.

        Args:
            heard: of B patches.
            task: (B,) int64, arm of the case's own expert; 0: none.
            classes: (B, S, S, S) int64, labels in the words of that expert.
            target: (B, S, S, S) bool.

        Returns:
            logits: (B, S, S, S) float32.
            where: (B, S, S, S) bool, where they are to be learnt from: the dilated box, nowhere in a case whose expert
                has no decoder, or is not asked for such an object.
        """
        where = dilated_box(target)
        logits = torch.zeros(target.shape, device=target.device)
        for case, (arm, own, truth) in enumerate(zip(task.tolist(), classes, target, strict=True)):
            name = self.arms[arm]
            wanted = _class_of(own, truth, where[case]) if name in self.decoders and name in heard.skips else 0
            if not wanted:
                where[case] = False
                continue
            with QuickConvolution():
                probability = self.decoders[name]([skip[case : case + 1] for skip in heard.skips[name]])
            said = probability[0].float().log_softmax(0)
            others = torch.cat([said[:wanted], said[wanted + 1 :]]).logsumexp(0)
            logits[case] = said[wanted] - others
        return logits, where


def dilated_box(target: Tensor) -> Tensor:
    """The box around an object with `MARGIN` on each side, (B, S, S, S) bool; nothing where there is no object."""
    start, stop = box_corners(target)
    margin = MARGIN * (stop - start)
    box = target.flatten(1).any(1)[:, None, None, None].expand(target.shape)
    for axis in range(3):
        shape = [-1, 1, 1, 1]
        at = torch.arange(target.shape[axis + 1], device=target.device)[None]
        first, last = (start - margin)[:, axis, None], (stop + margin)[:, axis, None]
        shape[axis + 1] = target.shape[axis + 1]
        box = box & ((at > first) & (at < last)).view(shape)
    return box


def _class_of(classes: Tensor, target: Tensor, box: Tensor) -> int:
    """The class that the object is, by the labels (S, S, S); 0 where it is none of them."""
    under = classes[target & (classes != IGNORE)]
    counts = under.bincount(minlength=2)[1:]
    if not int(counts.sum()):
        return 0
    wanted = int(counts.argmax()) + 1
    labelled, object_ = (classes == wanted) & box, target & box
    dice = 2 * int((labelled & object_).sum()) / max(1, int(labelled.sum()) + int(object_.sum()))
    return wanted if dice >= AGREEMENT else 0


def _tokens(features: Tensor) -> Tensor:
    """(B, C, n, n, n) to (B, N, C)."""
    return features.flatten(2).transpose(1, 2)
