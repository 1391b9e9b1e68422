"""Training patches that were encoded once: what frozen encoders gave, kept in half precision, in bounded memory.

Whatever is compared around the same frozen encoders is trained on the same of these. The stem is cheap and its
features are large: they are computed again from the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import Bundle
from KA2ERSegment.convolution import QuickConvolution, quick_layout
from KA2ERSegment.errors import VolumeError
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.plans import Plans
from KA2ERSegment.prompt_encoder import edge_costs
from KA2ERSegment.training import synthesis
from KA2ERSegment.training.items import ItemName, TrainingItem, split_held_out
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions, draw_case, encoded

OF_ONE_ITEM = 2
"""Patches drawn of an item each time it is read."""


@dataclass(frozen=True, slots=True)
class EncodedCase:
    """One patch; without a batch axis, on the CPU.

    Args:
        item: it was drawn from.
        image: (2, S, S, S) float16, normalised.
        foundation: {stride: (C, n, n, n)} float16.
        experts: for each expert {stride: (C, n, n, n)} float16.
        target: (S, S, S) bool.
        box: (S, S, S) bool, all false without box.
        outside: (S, S, S) bool, known outside of the box.
        task: arm of the expert whose task the item belongs to; 0: none's.
        real: whether the image is the item's own; else it was made from its label map.
    """

    item: ItemName
    image: Tensor
    foundation: dict[int, Tensor]
    experts: list[dict[int, Tensor]]
    target: Tensor
    box: Tensor
    outside: Tensor
    task: int
    real: bool

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        tensors = [self.image, self.target, self.box, self.outside, *self.foundation.values()]
        tensors += [features for expert in self.experts for features in expert.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """Some cases together, on a device; B of them.

    Args:
        features: float32, as the model's `encode` gives them, but not amalgamated yet.
        target: (B, S, S, S) bool.
        box: (B, S, S, S) bool.
        outside: (B, S, S, S) bool.
        task: (B,) int64.
    """

    features: PatchFeatures
    target: Tensor
    box: Tensor
    outside: Tensor
    task: Tensor

    def amalgamated(self, model: PromptableModel, present: Tensor) -> PatchFeatures:
        """With the embedding over some arms, (B, K+1) bool."""
        embedding, weights = model.amalgamate(self.features.foundation, self.features.experts, present)
        return replace(self.features, embedding=embedding, weights=weights, present=present)


def together(model: PromptableModel, cases: Sequence[EncodedCase], device: torch.device) -> EncodedBatch:
    """Cases as a batch for a model whose stem is the one they were encoded with."""

    def stacked(tensors: list[Tensor]) -> Tensor:
        values = torch.stack(tensors).to(device, non_blocking=True)
        return values.float() if values.is_floating_point() else values

    image = stacked([case.image for case in cases])
    first = cases[0]
    foundation = {stride: stacked([case.foundation[stride] for case in cases]) for stride in first.foundation}
    experts = [
        {stride: stacked([case.experts[n][stride] for case in cases]) for stride in expert}
        for n, expert in enumerate(first.experts)
    ]
    with torch.no_grad(), QuickConvolution():
        stem = model.stem(quick_layout(image))
    nothing = image.new_zeros(0)
    features = PatchFeatures(image, edge_costs(image), stem, foundation, experts, nothing, nothing, nothing)
    task = torch.tensor([case.task for case in cases], device=device)
    target, box, outside = (stacked([getattr(c, key) for c in cases]) for key in ("target", "box", "outside"))
    return EncodedBatch(features, target, box, outside, task)


def encode_cases(
    model: PromptableModel,
    items: Sequence[tuple[ItemName, Path]],
    tasks: Sequence[ClassMap],
    options: SamplingOptions,
    count: int,
    seed: int,
    most_bytes: float,
    disturbed: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[EncodedCase]:
    """Draw patches and encode them; one item is in memory at a time.

    Args:
        model: with the encoders, on its device.
        items: to draw from, sources evenly, with their packed files.
        tasks: of the experts, in the order of the model's arms.
        options: how cases are drawn.
        count: patches wanted.
        seed: of all that is drawn.
        most_bytes: memory for them; fewer are drawn where they need more.
        disturbed: as training images are; else they are as they come.
        on_progress: called with patches encoded and patches wanted.

    Raises:
        VolumeError: nothing can be drawn from these items.
    """
    rng = np.random.default_rng(seed)
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    cases: list[EncodedCase] = []
    empty = 0
    for name, path in _turns(items, rng):
        item = TrainingItem.load(path)
        drawn = [case for _ in range(OF_ONE_ITEM) if (case := draw_case(item, options, rng, tasks)) is not None]
        for case in drawn[: count - len(cases)]:
            batch = {key: value[None].to(device) for key, value in case.items()}
            cases.append(_encoded(model, name, batch, generator, disturbed))
        empty = 0 if drawn else empty + 1
        if on_progress is not None:
            on_progress(len(cases), count)
        held = sum(case.nbytes for case in cases)
        if len(cases) >= count or (cases and held + cases[-1].nbytes * OF_ONE_ITEM > most_bytes) or empty > 50:
            break
    if not cases:
        message = f"training needs items with labels to draw patches from, got {len(items)} items without."
        raise VolumeError(message)
    return cases


def _turns(items: Sequence[tuple[ItemName, Path]], rng: np.random.Generator) -> Iterator[tuple[ItemName, Path]]:
    """Items without end: one of each source in turn, those of a source in random order."""
    sources: dict[str, list[tuple[ItemName, Path]]] = {}
    for n in rng.permutation(len(items)):
        sources.setdefault(items[n][0].source, []).append(items[n])
    turn = 0
    while items:
        for members in sources.values():
            yield members[turn % len(members)]
        turn += 1


@torch.no_grad()
def _encoded(
    model: PromptableModel, name: ItemName, batch: dict[str, Tensor], generator: torch.Generator, disturbed: bool
) -> EncodedCase:
    shown = batch["image"]
    if not bool(batch["real"]):
        shown = synthesis.make_image(batch["labels"], batch["target"], generator)
    if disturbed:
        shown = synthesis.disturb(shown, generator)
    features = encoded(model, batch, shown)

    def kept(maps: dict[int, Tensor]) -> dict[int, Tensor]:
        return {stride: values[0].half().cpu() for stride, values in maps.items()}

    return EncodedCase(
        item=name,
        image=features.image[0].half().cpu(),
        foundation=kept(features.foundation),
        experts=[kept(expert) for expert in features.experts],
        target=batch["target"][0].cpu(),
        box=batch["box"][0].cpu(),
        outside=batch["outside"][0].cpu(),
        task=int(batch["task"]),
        real=bool(batch["real"]),
    )


def tasks_in_order(plans: Plans, given: dict[str, Any]) -> list[ClassMap]:
    """The experts' tasks in the order of the model's arms; an expert without one is nobody's own."""
    nobody = {"items": "(?!)", "classes": {}}
    return ClassMap.of_config({expert.name: given.get(expert.name, nobody) for expert in plans.experts})


def amalgamation_alone(plans: Plans) -> Plans:
    """The plans with the amalgamation on, and without what follows on the general decoder."""
    plans = plans.without("gate", "voting", "calibration")
    return replace(plans, amalgamation=replace(plans.amalgamation, enabled=True))


def encode_divided(
    bundle: Bundle,
    cache: Path,
    tasks: Sequence[ClassMap],
    settings: dict[str, Any],
    cases: int,
    held_out: int,
    gigabytes: float,
    seed: int,
    device: str,
) -> tuple[list[EncodedCase], list[EncodedCase]]:
    """Cases to learn from and, of other subjects, some to measure on: real images as they are, where there are any.

    Args:
        bundle: whose frozen encoders encode them.
        cache: folder of packed items.
        tasks: of the experts, in the order of the model's arms.
        settings: the config.
        cases: patches to learn from.
        held_out: patches to measure on; of each source with two subjects one subject in four.
        gigabytes: memory for all of them; fewer are drawn where they need more.
        seed: of what is drawn.
        device: of the network.

    Raises:
        VolumeError: there is nobody to hold out.
    """
    plans = amalgamation_alone(bundle.plans)
    model = build_model(plans, bundle.weights()).to(device)
    paths = {ItemName.read(path): path for path in sorted(cache.glob("*.npz"))}
    learning, apart = split_held_out(list(paths), 4, least=2)
    if not apart:
        message = f"what is trained is measured on other subjects, got none: no source in {str(cache)!r} has two."
        raise VolumeError(message)
    given = {"patch_size": plans.patch_size, "margin": plans.margin, **settings.get("sampling", {})}
    real = given | {"real_images": 1.0, "lesions": 0.0, "parts": 0.0}
    share = held_out / (cases + held_out)

    def encode(names: list[ItemName], count: int, drawn: dict[str, Any], part: float, disturbed: bool) -> Any:
        def progress(done: int, wanted: int) -> None:
            if done % 16 < 2:
                typer.echo(f"encoded {done} of {wanted} patches")

        items = [(name, paths[name]) for name in names]
        options, most = SamplingOptions(**drawn), part * gigabytes * 1e9
        return encode_cases(model, items, tasks, options, count, seed, most, disturbed, progress)

    measured = encode(apart, held_out, real, share, disturbed=False)
    return encode(learning, cases, given, 1 - share, disturbed=True), measured
