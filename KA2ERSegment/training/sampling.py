"""What to segment and where to look: targets and patches drawn from training items, on the CPU, cheap."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import Box
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.preprocessing import Patch, RawPatch, normalise, sample_image, sample_nearest
from KA2ERSegment.training.items import MIN_VOXELS, TrainingItem

LESION, PART = 60000, 60001
"""Label values of structures that are made up here."""


IGNORE = 255
"""Class of samples that a task says nothing about."""


@dataclass(frozen=True, slots=True)
class ClassMap:
    """An expert's task: which items it covers, and which of their labels make up its classes.

    Args:
        name: of the expert.
        items: regular expression on "id modality region"; searched, lower case.
        names: for each class, a regular expression on the label's name; the first that is found counts.
    """

    name: str
    items: str
    names: dict[str, str]

    @classmethod
    def of_config(cls, tasks: Mapping[str, Any]) -> list[ClassMap]:
        """The tasks of a training config, in its order."""
        return [cls(name, task["items"], task["classes"]) for name, task in tasks.items()]

    def covers(self, item: TrainingItem) -> bool:
        """Whether the item belongs to the task."""
        return self.matches(item.name, item.modality, item.region)

    def matches(self, name: str, modality: str, region: str) -> bool:
        """Whether an item of a manifest belongs to the task."""
        return re.search(self.items, f"{name} {modality} {region}".lower()) is not None

    def classes(self, item: TrainingItem, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Class of each sample: 0 background, n the n-th class; 0 too for labels of no class."""
        return self.table(item.names)[labels]

    def table(self, names: dict[int, str]) -> npt.NDArray[np.int64]:
        """(65536,) class of each label value, by the labels' names."""
        table = np.zeros(65536, dtype=np.int64)
        for value, name in names.items():
            hits = [n for n, words in enumerate(self.names.values(), start=1) if re.search(words, name.lower())]
            table[value] = hits[0] if hits else 0
        return table


def family_of(item: TrainingItem, tasks: Sequence[ClassMap]) -> int:
    """Number of the first task that covers an item, from 1; 0 where none does."""
    return next((number for number, task in enumerate(tasks, start=1) if task.covers(item)), 0)


class Mode(Enum):
    """How the user starts."""

    BOX = 0
    """A 3D box."""
    SLICE_BOX = 1
    """A box drawn on one slice."""
    CLICK = 2
    """A click, in a patch of a size that knows nothing of the object."""
    REFIT = 3
    """A click, in a patch refitted to a first rough mask."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How often what is drawn."""

    patch_size: int = 64
    margin: float = 1 / 3
    real_images: float = 0.7
    """Share of items with an image that are shown with it; the others get an image made from their labels."""
    modes: tuple[float, float, float, float] = (0.4, 0.08, 0.3, 0.22)
    """Probabilities of the four modes."""
    lesions: float = 0.15
    """Share of made images whose target is a made-up lesion."""
    parts: float = 0.15
    """Share of made images whose target is a part of a label."""
    unions: float = 0.15
    """Share of cases whose target is a union of labels."""


class TargetDataset(IterableDataset[dict[str, Tensor]]):
    """An endless stream of cases: labels and image on a patch, the target, and the box a hand would draw.

    Args:
        items: to draw from; sources evenly, then items of a source evenly.
        options: how.
        seed: first random state.
        tasks: of the experts.

    Each worker draws a stream of its own; `stream` tells ranks and resumed runs apart.
    """

    stream: tuple[int, ...] = ()

    def __init__(
        self, items: Sequence[TrainingItem], options: SamplingOptions, seed: int, tasks: Sequence[ClassMap] = ()
    ) -> None:
        super().__init__()
        if not any(item.boxes for item in items):
            message = (
                f"training needs items with labels of {MIN_VOXELS} voxels or more, got {len(items)} items without."
            )
            raise VolumeError(message)
        self.items, self.options, self.seed, self.tasks = items, options, seed, tasks
        self.sources: dict[str, list[TrainingItem]] = {}
        for item in items:
            self.sources.setdefault(item.source, []).append(item)
        weights = np.array([min(len(members), 8) ** 0.5 for members in self.sources.values()])
        self.source_weights = weights / weights.sum()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Cases without end."""
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((self.seed, *self.stream, worker.id if worker else 0))
        members = list(self.sources.values())
        while True:
            choices = members[int(rng.choice(len(members), p=self.source_weights))]
            case = draw_case(choices[int(rng.integers(len(choices)))], self.options, rng, self.tasks)
            if case is not None:
                yield case


def draw_case(
    item: TrainingItem, options: SamplingOptions, rng: np.random.Generator, tasks: Sequence[ClassMap] = ()
) -> dict[str, Tensor] | None:
    """One case, or None where the draw came out empty.

    Returns:
        labels (S, S, S) int64; image (S, S, S) float32 (zeros where `real` is false); inside (S, S, S) bool;
        target (S, S, S) bool; box (S, S, S) bool and outside (S, S, S) bool (all false without box);
        classes (S, S, S) int64, of the first task the item belongs to, IGNORE elsewhere; step (3,) float32, mm between
        samples along K, J, I; statistics (6,) float32 of the image (`image_statistics`; zeros where `real` is false);
        real, mode and task (index of that task + 1, 0 for none) as scalars.
    """
    if not item.boxes:
        return None
    size = options.patch_size
    real = bool(item.images) and rng.random() < options.real_images
    values = list(item.boxes)
    sizes = np.array([item.boxes[value].size for value in values], dtype=float) ** 0.25
    chosen = [int(rng.choice(values, p=sizes / sizes.sum()))]
    if rng.random() < options.unions and len(values) > 1:
        chosen += _neighbours(item, chosen[0], rng)
    made_up = "" if real else _pick(rng, {"lesion": options.lesions, "part": options.parts})
    around = item.boxes[chosen[0]]
    for value in chosen[1:]:
        around = around.union(item.boxes[value])
    if made_up == "lesion":
        around = _lesion_box(item, chosen, rng)
    mode = Mode(int(rng.choice(4, p=options.modes)))
    drawn = hand_drawn(around, rng)
    patch = _draw_patch(drawn, item, mode, options, rng)
    labels = sample_nearest(item.labels, patch).astype(np.int64)
    target = np.isin(labels, chosen)
    if made_up == "lesion":
        target = _blob(patch, around, size, rng)
        labels[target] = LESION
    elif made_up == "part":
        target = target & _half_space(size, rng)
        labels[target] = PART
    if target.sum() < 8 or (mode is not Mode.CLICK and target.mean() > 0.9):
        return None
    box, outside = np.zeros_like(target), np.zeros_like(target)
    if mode in (Mode.BOX, Mode.SLICE_BOX):
        shown = None if made_up == "part" else drawn
        box, outside = _box_maps(target, patch, shown, mode, rng)
    image, inside = torch.zeros(size, size, size), torch.ones(size, size, size, dtype=torch.bool)
    statistics = torch.zeros(6)
    if real:
        channel = int(rng.integers(len(item.images)))
        image, inside = sample_image(item.images[channel], patch)
        statistics = item.statistics[channel]
    family = family_of(item, tasks)
    classes = tasks[family - 1].classes(item, labels) if family else np.full_like(labels, IGNORE)
    arrays = [labels, image.numpy(), inside.numpy(), target, box, outside, classes]
    arrays, order = _flip_and_turn(arrays, rng)
    keys = ("labels", "image", "inside", "target", "box", "outside", "classes")
    case = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in zip(keys, arrays, strict=True)}
    step = np.multiply(patch.step, item.spacing)[::-1][order]  # KJI, in the order that the arrays were turned to
    case["step"], case["statistics"] = torch.from_numpy(step.astype(np.float32)), statistics
    case["real"], case["mode"], case["task"] = torch.tensor(real), torch.tensor(mode.value), torch.tensor(family)
    return case


def hand_drawn(box: Box, rng: np.random.Generator) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A box as a hand draws it: each face moved outward by -2 % to +10 % of the extent, to the nearest voxel.

    Returns:
        start, stop: corners in continuous voxel index (I, J, K), at outer faces.
    """
    start, stop = np.array(box.start, dtype=float), np.array(box.stop, dtype=float)
    extent = stop - start
    start = np.round(start - rng.uniform(-0.02, 0.10, 3) * extent)
    stop = np.round(stop + rng.uniform(-0.02, 0.10, 3) * extent)
    return start, np.maximum(stop, start + 1)


def _draw_patch(
    drawn: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    item: TrainingItem,
    mode: Mode,
    options: SamplingOptions,
    rng: np.random.Generator,
) -> Patch:
    start, stop = drawn
    spacing = np.array(item.spacing)
    if mode in (Mode.BOX, Mode.REFIT):
        margin = options.margin * rng.uniform(0.7, 1.4)
        shift = rng.normal(0, 0.04 if mode is Mode.BOX else 0.1, 3) * (stop - start)
        stretch = 1.0 if mode is Mode.BOX else rng.uniform(0.7, 1.2, 3)
        half = (stop - start) / 2 * stretch
        centre = (start + stop) / 2 + shift
        return Patch.fit(centre - half, centre + half, spacing, options.patch_size, margin)
    extent = ((stop - start) * spacing).max()
    if mode is Mode.SLICE_BOX:  # the third axis is unknown: as long as the box's longer side
        axis = int(rng.integers(3))
        start, stop = start.copy(), stop.copy()
        middle = (start[axis] + stop[axis]) / 2
        length = max(np.delete((stop - start) * spacing, axis)) / spacing[axis]
        start[axis], stop[axis] = middle - length / 2, middle + length / 2
        return Patch.fit(start, stop, spacing, options.patch_size, options.margin)
    side = extent * np.exp(rng.uniform(np.log(0.7), np.log(7.0)))
    centre = _voxel_inside(item, drawn, rng) + rng.normal(0, 0.08, 3) * side / spacing
    return Patch.cube(centre, max(side, 6 * spacing.min()), spacing, options.patch_size)


def _voxel_inside(
    item: TrainingItem, drawn: tuple[npt.NDArray[Any], npt.NDArray[Any]], rng: np.random.Generator
) -> npt.NDArray[Any]:
    """A voxel index (I, J, K) near the middle of the box, on a labelled voxel where the draw finds one."""
    start, stop = drawn
    voxel: npt.NDArray[Any] = (start + stop) / 2
    for _ in range(8):
        voxel = np.floor(start + rng.uniform(0.15, 0.85, 3) * (stop - start))
        i, j, k = voxel.clip(0, np.array(item.labels.shape[::-1]) - 1).astype(int)
        if item.labels[k, j, i]:
            break
    return voxel


def _neighbours(item: TrainingItem, value: int, rng: np.random.Generator) -> list[int]:
    """One to three labels whose boxes lie closest to that of `value`."""
    centres = {other: (np.array(box.start) + np.array(box.stop)) / 2 for other, box in item.boxes.items()}
    order = sorted(centres, key=lambda other: float(np.linalg.norm(centres[other] - centres[value])))
    return order[1 : 1 + int(rng.integers(1, 4))]


def _pick(rng: np.random.Generator, shares: dict[str, float]) -> str:
    drawn = rng.random()
    for name, share in shares.items():
        if drawn < share:
            return name
        drawn -= share
    return ""


def _lesion_box(item: TrainingItem, chosen: list[int], rng: np.random.Generator) -> Box:
    """The box of a lesion of 4 to 40 mm somewhere in the chosen label's box."""
    around = item.boxes[chosen[0]]
    centre = np.array([rng.uniform(a, b) for a, b in zip(around.start, around.stop, strict=True)])
    half = np.exp(rng.uniform(np.log(2.0), np.log(20.0))) * rng.uniform(0.6, 1.4, 3) / np.array(item.spacing)
    start = np.floor(centre - half).astype(int)
    (i0, j0, k0), (i1, j1, k1) = start.tolist(), np.maximum(np.ceil(centre + half).astype(int), start + 2).tolist()
    return Box((i0, j0, k0), (i1, j1, k1))


def _blob(patch: Patch, around: Box, size: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """An ellipsoid with a rough surface, filling a box; (S, S, S) on the patch."""
    start, stop = patch.to_patch(np.array(around.start) - 0.5), patch.to_patch(np.array(around.stop) - 0.5)
    centre, half = (start + stop)[::-1] / 2, np.maximum((stop - start)[::-1] / 2, 0.5)
    axes = [((np.arange(size) - centre[a]) / half[a]) ** 2 for a in range(3)]
    radius = np.sqrt(axes[0][:, None, None] + axes[1][:, None] + axes[2])
    coarse = torch.from_numpy(rng.normal(0, rng.uniform(0.05, 0.35), (1, 1, 9, 9, 9)).astype(np.float32))
    rough = torch.nn.functional.interpolate(coarse, size=(size, size, size), mode="trilinear", align_corners=True)
    blob: npt.NDArray[np.bool_] = radius + rough[0, 0].numpy() < 0.95
    return blob


def _half_space(size: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """One side of a random plane through the middle half of the patch, (S, S, S)."""
    normal = rng.normal(size=3)
    normal /= np.linalg.norm(normal)
    grid = np.arange(size) - (size - 1) / 2
    side: npt.NDArray[np.bool_] = (
        normal[0] * grid[:, None, None] + normal[1] * grid[:, None] + normal[2] * grid < rng.uniform(-0.15, 0.15) * size
    )
    return side


def _box_maps(
    target: npt.NDArray[np.bool_],
    patch: Patch,
    drawn: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None,
    mode: Mode,
    rng: np.random.Generator,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Inside and known outside of the box, (S, S, S) each."""
    size = patch.size
    tight = Box.around(target)
    assert tight is not None, "checked by the caller"
    if drawn is None or mode is Mode.SLICE_BOX:
        start, stop = hand_drawn(tight, rng)
    else:
        start, stop = patch.to_patch(drawn[0] - 0.5) + 0.5, patch.to_patch(drawn[1] - 0.5) + 0.5
    box, slab = np.ones_like(target), np.ones_like(target)
    flat = int(rng.integers(3)) if mode is Mode.SLICE_BOX else -1
    if flat >= 0:  # the slice's own cross-section of the target
        section = int(rng.choice(np.flatnonzero(target.any(axis=tuple(a for a in range(3) if a != 2 - flat)))))
        across = np.take(target, [section], axis=2 - flat)
        around = Box.around(across)
        assert around is not None, "the section was chosen where the target is"
        start, stop = hand_drawn(around, rng)
        start[flat], stop[flat] = section, section + max(1, round(1 / patch.step[flat]))
    for axis in range(3):
        at = np.arange(size) + 0.5  # sample centres, counted in faces as start and stop are
        within = (at >= start[axis] - 1e-6) & (at < stop[axis] - 1e-6)
        within = within.reshape([-1 if a == 2 - axis else 1 for a in range(3)])
        box = box & within
        if axis == flat:
            slab = slab & within
    return box, slab & ~box


def encoded(
    model: PromptableModel, batch: Mapping[str, Tensor], shown: Tensor, present: Tensor | None = None
) -> PatchFeatures:
    """Features of a batch of cases, each encoder given what it reads in use.

    A session also tells the amalgamation whose kind of volume it is (`domain.log_prior`). A case does not: it may be
    turned, made up or cut out of another one, so that what is learnt or measured here is without that prior.

    Args:
        model: that encodes.
        batch: cases as `draw_case` makes them, (B, ...) each.
        shown: (B, S, S, S) float32, the images, made and disturbed ones among them.
        present: (B, K+1) bool, arms to use; all of them by default.
    """
    raw = raw_patch(batch, shown) if model.reads_raw else None
    return model.encode(normalise(shown, batch["inside"]), present, raw)


def raw_patch(batch: Mapping[str, Tensor], shown: Tensor) -> RawPatch:
    """What experts with plans of their own read of a batch: real images as they are, the others as they are shown.

    Args:
        batch: cases as `draw_case` makes them, (B, ...) each.
        shown: (B, S, S, S) float32, the images that the foundation is given, made and disturbed ones among them; their
            grey values have no unit.
    """
    real = batch["real"]
    made = RawPatch.without_unit(shown, batch["inside"], batch["step"])
    return replace(
        made,
        values=torch.where(real[:, None, None, None], batch["image"], shown),
        statistics=torch.where(real[:, None], batch["statistics"], made.statistics),
        has_unit=real,
    )


def _flip_and_turn(
    arrays: list[npt.NDArray[Any]], rng: np.random.Generator
) -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.int64]]:
    """The same random flips and, in a third of the cases, axis order for all arrays; and that order."""
    flips = tuple(slice(None, None, int(sign)) for sign in rng.choice([1, -1], 3, p=(0.8, 0.2)))
    order = rng.permutation(3) if rng.random() < 0.33 else np.arange(3)
    return [array[flips].transpose(order) for array in arrays], order
