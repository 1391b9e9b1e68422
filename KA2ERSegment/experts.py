"""Put an expert into a bundle, or take one out; every other tensor stays as it was, bit for bit.

An expert is its encoder and its arm: in each level of the amalgamation a projection, a code and a bias. Some have a
mask decoder of their own, which goes with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from KA2ERSegment.amalgamation import STRIDES
from KA2ERSegment.build import build_model, load_tensors, tensors_by_name
from KA2ERSegment.bundle import CARD, CHECKSUMS, PLANS, WEIGHTS, Bundle, default_bundle_folder, save_bundle
from KA2ERSegment.encoders.expert import Expert
from KA2ERSegment.errors import BundleError
from KA2ERSegment.plans import ExpertPlans, GatePlans, Plans

UNHEARD = -1e4
"""Bias of an arm that was never trained: beside any other arm its share is exactly 0."""
SECTION = "## Experts added to this bundle"
_RESULTS = "## What it reaches"
"""As `training.card` writes it, at the end."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a bundle holds, in memory, to be changed and written elsewhere.

    Args:
        plans: the recipe.
        tensors: by parameter name, float32.
        card: the model card.
        licences: text of each by file name.
    """

    plans: Plans
    tensors: Mapping[str, Tensor]
    card: str
    licences: Mapping[str, str]

    @classmethod
    def of(cls, bundle: Bundle) -> Content:
        """All of a bundle."""
        others = [name for name in bundle.checksums if name not in (CARD, CHECKSUMS, PLANS, WEIGHTS)]
        card, *licences = ((bundle.folder / name).read_text(encoding="utf-8") for name in (CARD, *others))
        return cls(bundle.plans, bundle.weights(), card, dict(zip(others, licences, strict=True)))

    def save(self, folder: Path, force: bool = False) -> Bundle:
        """Write it as a bundle of its own; the folder appears whole or not at all.

        Args:
            folder: to write.
            force: replace the bundle that is there. The one that the package ships is never replaced.
        """
        self.check_target(folder, force)
        return save_bundle(folder, self.plans, self.tensors, self.card, self.licences)

    def check_target(self, folder: Path, force: bool = False) -> None:
        """BundleError where `save` would refuse the folder; worth knowing before the work."""
        shipped = False
        with suppress(BundleError):  # a package may come without one
            shipped = folder.resolve() == default_bundle_folder().resolve()
        if folder.exists() and (shipped or not force):
            advice = "Choose another one." if shipped else "Choose another one, or force it."
            message = f"the folder of the new bundle must not exist yet, got {str(folder)!r}. {advice}"
            raise BundleError(message)


def with_expert(content: Content, expert: ExpertPlans, encoder: Mapping[str, Tensor], seed: int = 0) -> Content:
    """The content with one more expert, last, whose arm is never heard until it is trained.

    Args:
        content: of a bundle.
        expert: its plans.
        encoder: its tensors by name.
        seed: of the projections and the codes.

    Raises:
        BundleError: the name is taken, the encoder gives no features at strides 8 and 16, or the bundle's amalgamation
            hears every expert, trained or not.
    """
    _check_kind(content.plans, "added")
    if not content.plans.amalgamation.no_expert:
        message = 'an expert can be added where the amalgamation has the "no expert" arm; this bundle\'s has none.'
        raise BundleError(message)
    names = [known.name for known in content.plans.experts]
    if expert.name in (*names, "foundation"):
        message = f"the expert's name must be new to the bundle, got {expert.name!r} beside {names}. Give another."
        raise BundleError(message)
    plans = replace(content.plans, experts=(*content.plans.experts, expert))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(plans)
    load_tensors(cast("Expert", model.experts[expert.name]).encoder, dict(encoder))
    fresh = tensors_by_name(model)
    tensors = {}
    for name, tensor in fresh.items():
        former = content.tensors.get(name)
        if former is None:
            tensors[name] = tensor.detach()
        elif former.shape == tensor.shape:
            tensors[name] = former
        else:  # codes or bias: one row more
            row = torch.full_like(tensor[-1:], UNHEARD) if name.endswith(".bias") else tensor[-1:]
            tensors[name] = torch.cat([former, row.detach()])
    licences = {**content.licences, _licence_file(expert.name): f"{expert.licence}\n"}
    return Content(plans, tensors, _card_with(content.card, expert), licences)


def _check_kind(plans: Plans, what: str) -> None:
    """Only KA2ER's level 3 can pass over an arm; the other kinds are there to be compared with it."""
    if plans.amalgamation.kind != "hierarchical":
        message = (
            f"an expert can be {what} where the amalgamation is 'hierarchical', got {plans.amalgamation.kind!r}. "
            "Choose another bundle, or train one."
        )
        raise BundleError(message)


def arm_tensors(plans: Plans, name: str) -> dict[str, int | None]:
    """Names of the tensors of an expert's arm; where it has one row of a tensor, which."""
    at = [expert.name for expert in plans.experts].index(name)
    arm: dict[str, int | None] = {}
    for stride in STRIDES:
        level = f"amalgamation.{stride}."
        arm |= {f"{level}project_experts.{at}.{part}": None for part in ("0.weight", "0.bias", "1.weight", "1.bias")}
        arm |= {f"{level}codes": at + 1, f"{level}bias": at + 1}
    return arm


def with_arm(content: Content, name: str, trained: Mapping[str, Tensor], note: str) -> Content:
    """The content with a trained arm for one expert; whatever else was trained is left where it was.

    Args:
        content: of a bundle that has the expert.
        name: of the expert.
        trained: tensors by name, those of the arm among them.
        note: how it was trained, for plans and card.
    """
    tensors = dict(content.tensors)
    for tensor, row in arm_tensors(content.plans, name).items():
        if row is None:
            tensors[tensor] = trained[tensor].detach().cpu()
        else:
            tensors[tensor] = tensors[tensor].clone()
            tensors[tensor][row] = trained[tensor][row].detach().cpu()
    experts = tuple(replace(e, note=note) if e.name == name else e for e in content.plans.experts)
    card = _card_with(_card_without(content.card, name), next(expert for expert in experts if expert.name == name))
    return replace(content, plans=replace(content.plans, experts=experts), tensors=tensors, card=card)


def without_expert(content: Content, name: str) -> Content:
    """The content without an expert.

    Raises:
        BundleError: the bundle has no expert of that name, or another kind of amalgamation.
    """
    _check_kind(content.plans, "taken out")
    names = [expert.name for expert in content.plans.experts]
    if name not in names:
        message = f"the expert must be one of the bundle's, {names}, got {name!r}."
        raise BundleError(message)
    at = names.index(name)
    own = arm_tensors(content.plans, name)
    tensors = {}
    for tensor, values in content.tensors.items():
        if own.get(tensor) is not None:
            row = at + 1
            tensors[tensor] = torch.cat([values[:row], values[row + 1 :]])
        elif tensor not in own and not tensor.startswith(f"experts.{name}."):
            tensors[_moved_up(tensor, at)] = values
    gate, tensors = _without_specialist(content.plans.gate, tensors, name)
    experts = tuple(expert for expert in content.plans.experts if expert.name != name)
    plans = replace(content.plans, experts=experts, gate=gate)
    licences = {file: text for file, text in content.licences.items() if file != _licence_file(name)}
    return Content(plans, tensors, _card_without(content.card, name), licences)


def _without_specialist(
    gate: GatePlans | None, tensors: dict[str, Tensor], name: str
) -> tuple[GatePlans | None, dict[str, Tensor]]:
    """Without an expert's own mask decoder and its class of the gate; without the gate where that was the last one."""
    if gate is None or name not in gate.specialists:
        return gate, tensors
    left = tuple(other for other in gate.specialists if other != name)
    gone = (f"specialists.{name}.",) if left else ("specialists.", "gate.")
    tensors = {tensor: values for tensor, values in tensors.items() if not tensor.startswith(gone)}
    if not left:
        return None, tensors
    row = gate.specialists.index(name) + 1
    for tensor in ("gate.head.weight", "gate.head.bias"):
        tensors[tensor] = torch.cat([tensors[tensor][:row], tensors[tensor][row + 1 :]])
    return replace(gate, specialists=left), tensors


def _moved_up(tensor: str, at: int) -> str:
    """The tensor's name once the projection at `at` is gone: those behind it move up."""
    level, found, rest = tensor.partition(".project_experts.")
    number, _, part = rest.partition(".")
    return f"{level}{found}{int(number) - 1}.{part}" if found and int(number) > at else tensor


def _licence_file(name: str) -> str:
    return f"LICENSE-{name}.txt"


def _card_with(card: str, expert: ExpertPlans) -> str:
    """One line for the expert, in a section of its own; what was measured before stays last."""
    parts = [f"{expert.task}; classes {', '.join(expert.classes)}", f"Licence: {expert.licence}"]
    parts += [f"From: {expert.origin}, SHA-256 {expert.sha256}"]
    if expert.reads_raw:
        spacing = " x ".join(f"{mm:.3g}" for mm in expert.spacing_kji)
        schemes = ", ".join(channel.scheme for channel in expert.normalisation)
        parts += [f"Reads the image at {spacing} mm (K, J, I), {schemes}"]
    if len(expert.normalisation) > 1:
        parts += [f"Each of its {len(expert.normalisation)} channels sees the same image"]
    parts += [expert.note or "Its arm was not trained: it does not count"]
    entry = f"- **{expert.name}**: {'. '.join(part.rstrip('.') for part in parts)}."
    head, entries, results = _parted(card)
    return _joined(head, f"{entries}\n{entry}", results)


def _card_without(card: str, name: str) -> str:
    """Without the expert's line, and without the section where that was its last one."""
    lines = [line for line in card.splitlines() if not line.startswith(f"- **{name}**:")]
    return _joined(*_parted("\n".join(lines)))


def _parted(card: str) -> tuple[str, str, str]:
    """What comes before the section of added experts, its entries, and the results."""
    front, found, results = card.partition(_RESULTS)
    head, _, entries = front.partition(SECTION)
    return head, entries, found + results


def _joined(head: str, entries: str, results: str) -> str:
    section = f"{SECTION}\n{entries.strip()}" if entries.strip() else ""
    return "\n\n".join(part.strip() for part in (head, section, results) if part.strip()) + "\n"
