"""`python -m KA2ERSegment.training.domains BUNDLE OUTPUT`: which volumes each expert was trained on, into the plans.

Domains (`domain.py`) are fitted to the packed training items, label maps without an image too: their spacing is that of
the images that they were drawn on, their extent that of the crops of these that were published. Then the biases of
level 3 of the amalgamation are set so that all arms have the same share of the training patches' objects while nothing
is known of the volume. What differs between volumes is then said by their fingerprints and by what the experts see, and
not by which arm was ahead when training ended. All else stays as it was. A gate and a voting head were fitted to the
embedding as it was, so they are trained after this.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, cast

import numpy as np
import numpy.typing as npt
import torch
import typer

from KA2ERSegment.amalgamation import STRIDES, Amalgamation
from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.domain import AIR, TRUST, Fingerprint, log_prior
from KA2ERSegment.errors import BundleError
from KA2ERSegment.experts import Content
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.plans import DomainPlans, Plans
from KA2ERSegment.training.calibrate import uncalibrated
from KA2ERSegment.training.card import with_section
from KA2ERSegment.training.config import read_config
from KA2ERSegment.training.encoded import EncodedBatch, amalgamation_alone, encode_divided, tasks_in_order, together
from KA2ERSegment.training.items import TrainingItem, pack_where_missing
from KA2ERSegment.training.losses import shares_inside
from KA2ERSegment.training.sampling import ClassMap, family_of

SECTION = "## Whose volumes the experts know"
"""Of the model card."""
LEAST = 0.35
"""Standard deviation of a logarithm is at least this: a source or two do not show all that there is."""
SUBJECTS = 12
"""Of one source no more count: its spacing is known after that."""
TRUSTS = (0.0, 0.25, TRUST, 0.75, 1.0)
"""Powers of the likelihoods that are compared."""


def fingerprint_of(item: TrainingItem) -> Fingerprint:
    """Of a packed item; where it has no image, the manifest says whether its label map was drawn on CT."""
    k, j, i = item.packed_kji or item.labels.shape
    extent = tuple(n * mm for n, mm in zip((i, j, k), item.spacing, strict=True))
    hounsfield: bool | None = None
    if item.images:
        hounsfield = any(float(image.min()) < AIR for image in item.images)
    elif re.search(r"\bCT\b", item.modality):
        hounsfield = True
    elif re.search(r"\b(MR|MRI|T1|T2)\b", item.modality):
        hounsfield = False
    return Fingerprint(item.spacing, extent, hounsfield)


def fit_domain(fingerprints: Sequence[Fingerprint], sources: Sequence[str]) -> DomainPlans:
    """The distribution of fingerprints.

    Args:
        fingerprints: of at least one volume.
        sources: of each.
    """
    weights = _weights(sources)
    features = np.stack([fingerprint.features() for fingerprint in fingerprints])
    mean = weights @ features
    std = np.maximum(np.sqrt(weights @ (features - mean) ** 2), LEAST)
    known = np.array([fingerprint.hounsfield is not None for fingerprint in fingerprints])
    found = float(sum(weight for weight, f in zip(weights, fingerprints, strict=True) if f.hounsfield))
    seen = len({source for source, is_known in zip(sources, known, strict=True) if is_known})
    total = float(weights[known].sum())
    share = (found / total * seen + 0.5) / (seen + 1) if seen else 0.5  # a source more of each kind, half as heavy
    return DomainPlans(_rounded(mean), _rounded(std), round(share, 4))


def _weights(sources: Sequence[str]) -> npt.NDArray[np.float64]:
    """Of each item, summing to 1; a source counts by the root of what it has."""
    weights = np.array([min(sources.count(source), SUBJECTS) ** 0.5 / sources.count(source) for source in sources])
    return np.asarray(weights / weights.sum())


def _rounded(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


def with_domains(plans: Plans, items: Sequence[TrainingItem], tasks: Sequence[ClassMap]) -> Plans:
    """Plans whose experts know their volumes; an expert of whose task there is no item keeps what it has.

    Args:
        plans: of the bundle.
        items: everything that was trained on.
        tasks: of the experts, by name.
    """
    prints, sources = [fingerprint_of(item) for item in items], [item.source for item in items]
    families = [family_of(item, tasks) for item in items]

    def fitted(chosen: Sequence[int]) -> DomainPlans:
        return fit_domain([prints[n] for n in chosen], [sources[n] for n in chosen])

    of_task = {task.name: [n for n, family in enumerate(families) if family == k] for k, task in enumerate(tasks, 1)}
    experts = [
        replace(expert, domain=fitted(of_task[expert.name])) if of_task.get(expert.name) else expert
        for expert in plans.experts
    ]
    amalgamation = replace(plans.amalgamation, domain=fitted(range(len(items))))
    return replace(plans, amalgamation=amalgamation, experts=tuple(experts))


@torch.no_grad()
def level_shares(model: PromptableModel, batches: Sequence[EncodedBatch], rounds: int = 8) -> None:
    """Set the biases of level 3 in place, so that all arms have the same share inside the objects of these cases."""
    present = torch.ones(1, len(model.arms), dtype=torch.bool, device=next(model.parameters()).device)
    for stride in STRIDES:
        level = cast("Amalgamation", model.amalgamation[str(stride)])
        for _ in range(rounds):
            shares = []
            for batch in batches:
                experts = [expert[stride] for expert in batch.features.experts]
                _, weights = level(batch.features.foundation[stride], experts, present)
                shares.append(shares_inside(weights, batch.target)[0])
            bias = level.bias - (torch.stack(shares).mean(0) * len(model.arms)).clamp_min(1e-6).log()
            level.bias.copy_(bias - bias.mean())


@dataclass(frozen=True, slots=True)
class LeftOut:
    """One item, and what domains that were fitted without its source say of it.

    Args:
        source: it came from.
        subject: whose it is.
        family: arm of the expert whose task it belongs to, 0 for none.
        prior: {trust: log prior (K+1,)} for each of `TRUSTS`.
    """

    source: str
    subject: str
    family: int
    prior: dict[float, npt.NDArray[np.float64]]


def each_left_out(items: Sequence[TrainingItem], plans: Plans, tasks: Sequence[ClassMap]) -> list[LeftOut]:
    """Every item by domains fitted without its source; where that is a task's only one, without half of its subjects.

    What the plans knew before does not count: it may come from the very source.

    Args:
        items: everything that was trained on.
        plans: of the bundle.
        tasks: of the experts, in the order of the model's arms.
    """
    families = [family_of(item, tasks) for item in items]
    unknowing, found = plans.without("domains"), []
    for source in sorted({item.source for item in items}):
        own = [n for n, item in enumerate(items) if item.source == source]
        others = {0, *(family for item, family in zip(items, families, strict=True) if item.source != source)}
        alone = {families[n] for n in own} - others
        second = _halves([(families[n], _whose(items[n])) for n in own if families[n] in alone])
        for half in (False, True) if second else (False,):
            asked = [n for n in own if (_whose(items[n]) in second) == half]
            out = {n for n in own if families[n] not in alone} | set(asked)
            fitted = with_domains(unknowing, [item for n, item in enumerate(items) if n not in out], tasks)
            for n in asked:
                prior, fingerprint = {}, fingerprint_of(items[n])
                for trust in TRUSTS:
                    told = log_prior(fitted, fingerprint, trust)
                    assert told is not None, "the plans were given domains"
                    prior[trust] = told
                found.append(LeftOut(source, _whose(items[n]), families[n], prior))
    return found


def _halves(members: Sequence[tuple[int, str]]) -> set[str]:
    """The second half of the subjects: of each family every other one, as far as it was not in one before."""
    first: set[str] = set()
    second: set[str] = set()
    for family in sorted({family for family, _ in members}):
        new = sorted({subject for other, subject in members if other == family} - first - second)
        first |= set(new[::2])
        second |= set(new[1::2])
    return second


def _whose(item: TrainingItem) -> str:
    return item.subject or item.name


def own_first(found: Sequence[LeftOut], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each expert: subjects of its task for whom it is the likeliest of all experts, and subjects."""
    rows = {}
    for number, name in enumerate(names, start=1):
        own = {
            (item.source, item.subject): int(item.prior[TRUST][1:].argmax()) + 1 == number
            for item in found
            if item.family == number
        }
        if own:
            rows[name] = sum(own.values()), len(own)
    return rows


def cross_entropies(found: Sequence[LeftOut]) -> dict[float, float]:
    """For each of `TRUSTS` the mean of -log(probability of the item's own arm), sources weighed as in the domains."""
    weights = _weights([item.source for item in found])
    return {trust: float(-weights @ np.array([item.prior[trust][item.family] for item in found])) for trust in TRUSTS}


def _words(
    first: dict[str, tuple[int, int]], losses: dict[float, float], before: Sequence[float], cases: int, items: int
) -> str:
    """For the model card."""
    rows = "\n".join(f"| {name} | {right} of {subjects} |" for name, (right, subjects) in first.items())
    trusted = ", ".join(f"{loss:.2f} with {trust:g}" for trust, loss in losses.items())
    shares = ", ".join(f"{share:.3f}" for share in before)
    return (
        f"Spacing, extent and unit of {items} training items tell beforehand which expert a volume suits; with what "
        "the experts see this gives the shares that are shown. Subjects whose own expert is the likeliest of all "
        "experts by that alone, their source (where a task has no other: half of its subjects) left out of what was "
        f"fitted:\n\n| task | subjects |\n|---|---|\n{rows}\n\n"
        f"Likelihoods are taken to the power of {TRUST:g} (cross-entropy of the own arm, sources left out: {trusted}). "
        f"Biases of level 3 were set on {cases} training patches so that all arms have the same share where nothing "
        f"is known of the volume; before, the shares were {shares} (foundation first)."
    )


def _heads_of(plans: Plans) -> str:
    """For people: what was fitted to the embedding as it is; "" for nothing."""
    gate = "" if plans.gate is None else "the gate and its specialists"
    return " and ".join(filter(None, (gate, "" if plans.voting is None else "the experts of the voting head")))


def main(
    bundle: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Bundle to begin from.")],
    output: Annotated[Path, typer.Argument(help="Folder of the new bundle.")],
    config: Annotated[Path, typer.Option(help="With the experts' tasks.")] = Path(__file__).parent / "configs/cpu.json",
    data: Annotated[Path, typer.Option(help="Folder that holds the manifests' folders.")] = Path("../shared/data"),
    cache: Annotated[Path, typer.Option(help="Folder of packed items; made where missing.")] = Path("cache/train"),
    cases: Annotated[int, typer.Option(help="Training patches, encoded once.")] = 64,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    *,
    keep_heads: Annotated[
        bool, typer.Option(help="Go on with a gate and a voting head that were trained before; the card says so.")
    ] = False,
) -> None:
    """Fit the experts' domains, and let no arm be ahead by chance."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    opened, settings = load_bundle(bundle), read_config(config)
    if opened.plans.amalgamation.kind != "hierarchical" or not opened.plans.experts:
        message = "domains are told to a hierarchical amalgamation of experts, and the bundle has none."
        raise BundleError(message)
    heads = _heads_of(opened.plans)
    if heads and not keep_heads:
        message = (
            f"domains move the embedding that {heads} of bundle {opened.identity} were fitted to. Begin from a bundle "
            "of before these stages and train them afterwards, or give --keep-heads."
        )
        raise BundleError(message)
    tasks = tasks_in_order(opened.plans, settings["tasks"])
    pack_where_missing(cache, data, settings)
    items = [TrainingItem.load(path) for path in sorted(cache.glob("*.npz"))]
    content = uncalibrated(Content.of(opened))
    plans = with_domains(content.plans, items, tasks)
    left_out = each_left_out(items, content.plans, tasks)
    first, losses = own_first(left_out, [task.name for task in tasks]), cross_entropies(left_out)
    encoded, apart = encode_divided(opened, cache, tasks, settings, cases, len(tasks), 1.0, seed, device)
    model = build_model(amalgamation_alone(content.plans), opened.weights()).to(device)
    batches = [together(model, [case], next(model.parameters()).device) for case in (*encoded, *apart)]
    before = mean_shares(model, batches)
    level_shares(model, batches)
    own = {name: value for name, value in tensors_by_name(model).items() if name.startswith("amalgamation.")}
    words = _words(first, losses, before, len(batches), len(items))
    if heads:
        words += f" {heads[0].upper()}{heads[1:]} were fitted before that, and stay as they were."
    card = with_section(content.card, SECTION, words)
    replace(content, plans=plans, tensors={**content.tensors, **own}, card=card).save(output, force=True)
    for name, (right, subjects) in first.items():
        typer.echo(f"{name}: own expert first for {right} of {subjects} subjects")
    for trust, loss in losses.items():
        typer.echo(f"likelihoods to the power of {trust:g}: cross-entropy {loss:.3f}")
    typer.echo(f"mean shares before: {before}, after: {mean_shares(model, batches)}")


@torch.no_grad()
def mean_shares(model: PromptableModel, batches: Sequence[EncodedBatch]) -> list[float]:
    """Mean share of each arm inside the objects, nothing known of the volumes."""
    present = torch.ones(1, len(model.arms), dtype=torch.bool, device=next(model.parameters()).device)
    found = [shares_inside(one.amalgamated(model, present).weights, one.target)[0] for one in batches]
    return [round(value, 4) for value in torch.stack(found).mean(0).tolist()]


if __name__ == "__main__":
    typer.run(main)
