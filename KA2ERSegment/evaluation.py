"""The challenge protocol: how well a method follows prompts, object by object.

The protocol is that of the CVPR 2025 challenge on interactive 3D segmentation: a box, then five clicks, each at
the distance maximum of the largest error that is left; scores are Dice (DSC) and surface Dice at 2 mm (NSD) after
each click. It differs in one point: the box is one that a hand would draw, not the exact one. Every random choice
is seeded by item and label, so that two methods see the same boxes and, for the same mask, the same clicks.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from KA2ERSegment.bundle import PLANS
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.geometry import BoolArray, Box, Ijk
from KA2ERSegment.manifests import Item, LeftOut, Target, read_item, read_manifest, seed_of, targets_of
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity, Prompt
from KA2ERSegment.volume import Volume

if TYPE_CHECKING:
    from KA2ERSegment.bundle import Bundle
    from KA2ERSegment.session import Session

CLICKS = 5
TOLERANCE_MM = 2.0
DICE_BELOW_WHICH_NSD_IS_ZERO = 0.2
FACE_MOVES = (-0.02, 0.10)
"""How far a hand misses each face of a box, as a share of the extent along that axis; outward is positive."""


class Segmenter(Protocol):
    """What the protocol needs of a method: a volume, then prompts, each answered by a mask."""

    identity: str
    """What exactly was evaluated, with version or checksum; results of two identities are never mixed."""

    def start(self, volume: Volume) -> None:
        """Forget everything and begin with this volume."""

    def add(self, prompt: Prompt) -> BoolArray:
        """The (K, J, I) mask after this prompt and all earlier ones."""


class SessionSegmenter:
    """A `Session` under the protocol."""

    def __init__(self, session: Session, identity: str = "ka2er") -> None:
        self._session = session
        self.identity = identity

    @classmethod
    def of(cls, folder: Path | None, off: Sequence[str] = (), device: str = "auto") -> SessionSegmenter:
        """A bundle (None: the one shipped) with systems switched off (`plans.SYSTEMS`); its identity names them."""
        from KA2ERSegment.bundle import load_bundle
        from KA2ERSegment.session import Session

        bundle = load_bundle(folder)
        bundle = replace(bundle, plans=bundle.plans.without(*off))
        return cls(Session(bundle, device=device), identity_of(bundle, off))

    def facts(self) -> dict[str, float]:
        """Number of learnt parameters, and seconds for the features of one patch of noise (the quickest of three)."""
        import torch

        from KA2ERSegment.preprocessing import RawPatch

        model, size = self._session.model, self._session.bundle.plans.patch_size
        noise = torch.randn(1, 2, size, size, size, generator=torch.Generator().manual_seed(0)).to(self._session.device)
        inside = torch.ones_like(noise[:, 0], dtype=torch.bool)
        raw = RawPatch.without_unit(noise[:, 0], inside, torch.ones_like(noise[0, :1, 0, 0, :3]))  # 1 mm
        seconds = []
        with torch.inference_mode():
            for _ in range(3):
                begin = time.perf_counter()
                model.encode(noise, raw=raw).embedding.sum().item()  # a GPU is done once the number is here
                seconds.append(time.perf_counter() - begin)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return {"parameters": parameters, "seconds_per_patch": min(seconds)}

    def start(self, volume: Volume) -> None:
        """Set the volume afresh: features are computed again, so that the seconds of every object count them."""
        self._session.set_volume(volume)

    def add(self, prompt: Prompt) -> BoolArray:
        """The (K, J, I) mask after this prompt."""
        return self._session.add(prompt).mask


def identity_of(bundle: Bundle, off: Sequence[str] = ()) -> str:
    """What results of a bundle with these systems switched off are named by: weights, plans and what is off."""
    plans = bundle.checksums[PLANS][:8]
    return f"ka2er {bundle.identity} plans {plans}" + (f" without {', '.join(sorted(set(off)))}" if off else "")


def drawn_box(truth: BoolArray, rng: np.random.Generator) -> Box:
    """The box of an object as a hand draws it, half-open.

    Each face is moved by a random -2 % to +10 % of the extent along its axis (outward positive), rounded to
    whole voxels and clipped to the array.

    Args:
        truth: (K, J, I) mask with at least one voxel.
        rng: decides the moves; six numbers are drawn, in the order I, J, K, lower face before upper.
    """
    box = Box.around(truth)
    if box is None:
        message = "an object must have at least one voxel to draw a box around, got an empty mask."
        raise KA2ERError(message)
    start, stop = [], []
    for a, b, size in zip(box.start, box.stop, truth.shape[::-1], strict=True):
        lower, upper = rng.uniform(*FACE_MOVES, size=2) * (b - a)
        start.append(max(0, int(np.floor(a - lower + 0.5))))
        stop.append(min(size, int(np.floor(b + upper + 0.5))))
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))


def next_click(mask: BoolArray, truth: BoolArray, rng: np.random.Generator) -> tuple[Ijk, Polarity] | None:
    """Where the protocol clicks next, or None where the mask is perfect.

    The click is the voxel farthest from the border (in voxels) of the largest 26-connected component of errors;
    of several that are equally far, `rng` chooses. It is positive where the object was missed. For an empty mask
    this is the distance maximum of the object itself.

    Args:
        mask: (K, J, I) what the method gave.
        truth: (K, J, I) what it should have given.
        rng: decides ties.
    """
    wrong = mask != truth
    box = Box.around(wrong)
    if box is None:
        return None
    components, _ = ndimage.label(box.crop(wrong), structure=np.ones((3, 3, 3)))
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    largest = np.pad(components == sizes.argmax(), 1)  # the zeros around count as border
    distance = ndimage.distance_transform_edt(largest)
    farthest = np.argwhere(distance == distance.max()) - 1
    k, j, i = (int(x) for x in farthest[rng.integers(len(farthest))])
    ijk = (box.start[0] + i, box.start[1] + j, box.start[2] + k)
    missed = bool(truth[ijk[2], ijk[1], ijk[0]])
    return ijk, Polarity.POSITIVE if missed else Polarity.NEGATIVE


def dice(mask: BoolArray, truth: BoolArray) -> float:
    """Dice of two masks of one shape; 1 where both are empty."""
    total = int(np.count_nonzero(mask)) + int(np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(mask & truth)) / total if total else 1.0


def surface_dice(
    mask: BoolArray, truth: BoolArray, spacing: tuple[float, float, float], tolerance: float = TOLERANCE_MM
) -> float:
    """Share of both surfaces that lies within `tolerance` mm of the other; 0 where one mask is empty.

    MONAI's measure with sub-voxel surface areas, which is the definition that the challenge uses.

    Args:
        mask: (K, J, I) bool.
        truth: (K, J, I) bool.
        spacing: mm along I, J and K.
        tolerance: mm.
    """
    import torch
    from monai.metrics.surface_dice import compute_surface_dice

    box = Box.around(mask | truth)
    if box is None:
        return 1.0
    if not (mask.any() and truth.any()):
        return 0.0
    ours, theirs = (torch.from_numpy(np.pad(box.crop(m), 1))[None, None] for m in (mask, truth))
    with warnings.catch_warnings():  # MONAI 1.6 warns of an option that it sets itself
        warnings.simplefilter("ignore", FutureWarning)
        score = compute_surface_dice(
            ours, theirs, [tolerance], include_background=True, spacing=list(spacing[::-1]), use_subvoxels=True
        )
    return float(score)


def area_under_clicks(scores: Sequence[float]) -> float:
    """Trapezoid under the scores after clicks 1 to 5: at most 4. The box's own score is no part of it."""
    return float(sum((a + b) / 2 for a, b in pairwise(scores)))


@dataclass(frozen=True, slots=True)
class ObjectResult:
    """One row of `objects.csv`: how one object of one item went."""

    item: str
    source: str
    label: int
    name: str
    voxels: int
    box_dice: float | None
    """Dice with the box alone; None in a run without boxes."""
    box_nsd: float | None
    dsc1: float
    dsc2: float
    dsc3: float
    dsc4: float
    dsc5: float
    nsd1: float
    nsd2: float
    nsd3: float
    nsd4: float
    nsd5: float
    dsc_auc: float
    nsd_auc: float
    dsc_final: float
    nsd_final: float
    seconds_first_prompt: float
    """From the volume to the first mask: features and all."""
    seconds_per_click: float | None
    """Mean of the later prompts; None where the first mask was perfect."""
    subject: str = ""
    """Whose image it is, as the manifest says; results of older versions do not."""

    @property
    def dsc(self) -> tuple[float, ...]:
        """Dice after clicks 1 to 5."""
        return self.dsc1, self.dsc2, self.dsc3, self.dsc4, self.dsc5

    @property
    def nsd(self) -> tuple[float, ...]:
        """Surface Dice after clicks 1 to 5."""
        return self.nsd1, self.nsd2, self.nsd3, self.nsd4, self.nsd5


def evaluate_object(
    segmenter: Segmenter, volume: Volume, truth: BoolArray, rng: np.random.Generator, *, with_box: bool
) -> dict[str, Any]:
    """Box (or none) and five clicks on one object.

    Args:
        segmenter: the method.
        volume: the image.
        truth: (K, J, I) the object.
        rng: decides the box and ties of clicks.
        with_box: False: clicks only; the first one is at the distance maximum of the object.

    Returns:
        The scores and seconds of an `ObjectResult`, by column name.
    """
    seconds: list[float] = []
    mask = np.zeros(truth.shape, dtype=bool)

    def timed(prompt: Prompt) -> BoolArray:
        begin = time.perf_counter()
        if not seconds:
            segmenter.start(volume)
        answer = segmenter.add(prompt)
        seconds.append(time.perf_counter() - begin)
        return answer

    def scores() -> tuple[float, float]:
        dsc = dice(mask, truth)
        return dsc, surface_dice(mask, truth, volume.spacing) if dsc > DICE_BELOW_WHICH_NSD_IS_ZERO else 0.0

    box_scores: tuple[float | None, float | None] = (None, None)
    if with_box:
        box = drawn_box(truth, rng)
        mask = timed(BoxPrompt.from_ijk(box.start, box.stop, volume))
        box_scores = scores()
    after: list[tuple[float, float]] = []
    for _ in range(CLICKS):
        click = next_click(mask, truth, rng)
        if click is None:  # perfect: nothing to click, the score stays
            after.append((1.0, 1.0))
            continue
        ijk, polarity = click
        mask = timed(PointPrompt.from_ijk(ijk, volume, polarity))
        after.append(scores())
    dsc, nsd = [a for a, _ in after], [b for _, b in after]
    return {
        "box_dice": box_scores[0],
        "box_nsd": box_scores[1],
        **{f"dsc{n}": value for n, value in enumerate(dsc, 1)},
        **{f"nsd{n}": value for n, value in enumerate(nsd, 1)},
        "dsc_auc": area_under_clicks(dsc),
        "nsd_auc": area_under_clicks(nsd),
        "dsc_final": dsc[-1],
        "nsd_final": nsd[-1],
        "seconds_first_prompt": seconds[0],
        "seconds_per_click": float(np.mean(seconds[1:])) if len(seconds) > 1 else None,
    }


_WORDS = ("item", "source", "name", "subject")


def means_per_source(results: Sequence[ObjectResult]) -> dict[str, dict[str, float | None]]:
    """Mean of every score per source: first over the objects of an item, then over the items of a source.

    The entry `mean over sources` is their mean, each source counting once.
    """
    columns = [f.name for f in fields(ObjectResult) if f.name not in {*_WORDS, "label", "voxels"}]

    def mean(values: Sequence[float | None]) -> float | None:
        there = [v for v in values if v is not None]
        return float(np.mean(there)) if there else None

    table: dict[str, dict[str, float | None]] = {}
    for source in sorted({r.source for r in results}):
        of_source = [r for r in results if r.source == source]
        items = sorted({r.item for r in of_source})
        means = {c: mean([mean([getattr(r, c) for r in of_source if r.item == i]) for i in items]) for c in columns}
        table[source] = {"items": len(items), "objects": len(of_source), **means}
    if table:
        sources = list(table.values())
        counts = {c: sum(s[c] or 0 for s in sources) for c in ("items", "objects")}
        table["mean over sources"] = {**counts, **{c: mean([s[c] for s in sources]) for c in columns}}
    return table


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A whole run: its settings, one result per object, what was left out, and facts about the method."""

    settings: dict[str, Any]
    results: tuple[ObjectResult, ...]
    left_out: tuple[LeftOut, ...]
    complete: bool
    about: Mapping[str, float] = field(default_factory=dict)

    @property
    def sources(self) -> dict[str, dict[str, float | None]]:
        """Means per source and over sources."""
        return means_per_source(self.results)

    @property
    def seconds_per_click(self) -> float | None:
        """Median over the objects."""
        seconds = [r.seconds_per_click for r in self.results if r.seconds_per_click is not None]
        return float(np.median(seconds)) if seconds else None

    def to_json(self) -> dict[str, Any]:
        """Everything but the single objects, which are in `objects.csv`."""
        return {
            "settings": self.settings,
            "complete": self.complete,
            "about": {**self.about, "seconds_per_click": self.seconds_per_click},
            "sources": self.sources,
            "left_out": [asdict(entry) for entry in self.left_out],
        }

    def save(self, folder: Path) -> None:
        """Write `objects.csv` and `summary.json`; each appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{k: "" if v is None else v for k, v in asdict(r).items()} for r in self.results]
        with _replacing(folder / "objects.csv") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(ObjectResult)])
            writer.writeheader()
            writer.writerows(rows)
        with _replacing(folder / "summary.json") as file:
            json.dump(self.to_json(), file, indent=2)


def evaluate(
    manifests: Sequence[str | os.PathLike[str]],
    segmenter: Segmenter,
    output: str | os.PathLike[str],
    *,
    split: str = "val",
    with_box: bool = True,
    max_objects_per_item: int | None = None,
    min_voxels: int = 20,
    resume: bool = False,
    about: Mapping[str, float] | None = None,
    on_progress: Callable[[int, int, ObjectResult | None], None] | None = None,
) -> Evaluation:
    """Evaluate every object of every item of a split, and save after each one.

    Args:
        manifests: CSV files, see `read_manifest`.
        segmenter: the method.
        output: folder for `objects.csv`, `summary.json` and `dice_against_clicks.png`.
        split: which items.
        with_box: False: clicks only.
        max_objects_per_item: at most that many objects of one item, chosen at random by the item's name alone, the
            same in every run and for every method. None: all.
        min_voxels: smaller objects are listed as left out.
        resume: continue what an interrupted run left in `output`; it must have had the same settings.
        about: facts about the method for the summary, such as `SessionSegmenter.facts`.
        on_progress: called with objects done, objects in all, and the newest result (None at the start).
    """
    folder = Path(output)
    settings = {
        "method": segmenter.identity,
        "split": split,
        "with_box": with_box,
        "max_objects_per_item": max_objects_per_item,
        "min_voxels": min_voxels,
        "manifests": [hashlib.sha256(Path(m).read_bytes()).hexdigest() if Path(m).is_file() else "" for m in manifests],
    }
    done = _earlier_results(folder, settings, resume=resume)
    items: list[Item] = []
    left_out: list[LeftOut] = []
    for manifest in manifests:
        more_items, without_image = read_manifest(manifest, split)
        items += more_items
        left_out += without_image
    tasks: list[Target] = []
    for item in items:
        more_tasks, too_small = targets_of(item, min_voxels, max_objects_per_item)
        tasks += more_tasks
        left_out += too_small
    if not tasks:
        message = f"split {split!r} must have objects of at least {min_voxels} voxels in items with an image, got none."
        raise KA2ERError(message)

    results = {(r.item, r.label): r for r in done}
    wanted = [(t.item.id, t.label) for t in tasks]
    current: tuple[str, Volume, npt.NDArray[Any]] | None = None

    def state() -> Evaluation:
        finished = tuple(results[key] for key in wanted if key in results)
        return Evaluation(settings, finished, tuple(left_out), len(finished) == len(tasks), dict(about or {}))

    if on_progress is not None:
        on_progress(len(state().results), len(tasks), None)
    for task in tasks:
        key = (task.item.id, task.label)
        if key in results:
            continue
        if current is None or current[0] != task.item.id:
            current = (task.item.id, *read_item(task.item))
        _, volume, labels = current
        truth = labels == task.label
        rng = seed_of(task.item.id, str(task.label))
        scores = evaluate_object(segmenter, volume, truth, rng, with_box=with_box)
        voxels = int(np.count_nonzero(truth))
        result = ObjectResult(
            task.item.id, task.item.source, task.label, task.name, voxels, **scores, subject=task.item.subject
        )
        results[key] = result
        state().save(folder)
        if on_progress is not None:
            on_progress(len(state().results), len(tasks), result)
    final = state()
    final.save(folder)
    from KA2ERSegment.charts import chart_of_sources

    chart_of_sources(folder / "dice_against_clicks.png", final.sources)
    return final


def _earlier_results(folder: Path, settings: dict[str, Any], *, resume: bool) -> list[ObjectResult]:
    rows_file, summary_file = folder / "objects.csv", folder / "summary.json"
    if not summary_file.exists() and not rows_file.exists():
        return []
    if not resume:
        message = f"output folder {str(folder)!r} must hold no earlier results. Resume them, or choose another folder."
        raise KA2ERError(message)
    try:
        earlier = json.loads(summary_file.read_text(encoding="utf-8"))["settings"]
        with rows_file.open(newline="", encoding="utf-8") as file:
            rows = [result_from_row(row) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"output folder {str(folder)!r} must hold the results of an earlier run to resume it: {error}."
        raise KA2ERError(message) from error
    different = sorted(key for key in settings if earlier.get(key) != settings[key])
    if different:
        message = (
            f"a resumed run must have the settings of the earlier one in {str(folder)!r}, got other values of "
            f"{', '.join(different)}. Choose another folder."
        )
        raise KA2ERError(message)
    return rows


def result_from_row(row: Mapping[str, str]) -> ObjectResult:
    """A row of `objects.csv`."""
    values: dict[str, Any] = {}
    for column in (f.name for f in fields(ObjectResult)):
        text = row.get(column, "") if column == "subject" else row[column]
        if column in _WORDS:
            values[column] = text
        elif column in {"label", "voxels"}:
            values[column] = int(text)
        else:
            values[column] = float(text) if text else None
    return ObjectResult(**values)


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Text file that takes its final name only when the block ends well, so that no half file is ever seen."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
