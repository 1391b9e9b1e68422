"""Can a bundle be believed, and are its suggestions worth following? Measured in sessions on held-out volumes.

Each object gets a session with a box and one with clicks alone. After the first prompt, and after LATE more clicks of
the challenge's protocol (`evaluation.next_click`), voxels within 10 mm of the object are looked at: are probabilities
what they say, does the experts' disagreement find the voxels that are wrong, does the predicted quality follow the real
Dice, whose weight is largest inside the object? From the first prompt on, three ways of clicking go on until Dice 0.85:
where the session suggests, at random in the error, and as the protocol does. `assessment_report` makes tables of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from KA2ERSegment.calibration import NEAR_MM, Reliability, area_under_roc, near_object
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.evaluation import dice, drawn_box, next_click
from KA2ERSegment.geometry import BoolArray
from KA2ERSegment.manifests import Item, LeftOut, Target, read_item, read_manifest, seed_of, targets_of
from KA2ERSegment.plans import ExpertPlans
from KA2ERSegment.prediction import HEAD, FloatImage, Prediction
from KA2ERSegment.preprocessing import Patch
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity, Prompt
from KA2ERSegment.session import Session
from KA2ERSegment.volume import Volume

MASK = "mask"
LATE = 3
"""Clicks after the first prompt before a session is looked at for the second time."""
GOAL = 0.85
"""Dice that clicks are counted up to."""
MOST_CLICKS = 10
"""Where the goal is not reached, this many are counted."""
VOXELS = 20000
"""Looked at around one object, at most; drawn at random."""
POLICIES = ("protocol", "suggested", "random")


@dataclass(frozen=True, slots=True)
class Look:
    """One prediction beside the truth.

    Args:
        clicks: that were given after the first prompt.
        dice: of the mask.
        quality: Dice that was predicted.
        reliability: of the mask's probability and of each expert's of every mode, by name.
        roc_disagreement: area under the ROC curve of the experts' disagreement for "this voxel is wrong"; None where
            all or none of the voxels are.
        roc_doubt: the same of min(p, 1 - p), the mask's own doubt.
        weights: mean share of each arm inside the object, as far as the patch reaches.
        gate: weight of each mask decoder, "general" first; empty without a gate.
        heard: decoders that were.
        votes: mean weight of each voting expert inside the object; empty without a voting head.
    """

    clicks: int
    dice: float
    quality: float
    reliability: dict[str, Reliability]
    roc_disagreement: float | None
    roc_doubt: float | None
    weights: dict[str, float]
    gate: dict[str, float] = field(default_factory=dict)
    heard: tuple[str, ...] = ("general",)
    votes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trial:
    """One object in sessions that began with one kind of prompt.

    Args:
        with_box: else the first prompt was a click.
        looks: after the first prompt, and later.
        clicks: to reach Dice GOAL by each policy, at most MOST_CLICKS; a first prompt that is a click counts.
        reached: whether it was.
        dice: where it ended.
        unsuggested: clicks of the policy "suggested" that were random ones, because nothing was suggested.
    """

    with_box: bool
    looks: tuple[Look, ...]
    clicks: dict[str, int]
    reached: dict[str, bool]
    dice: dict[str, float]
    unsuggested: int


@dataclass(frozen=True, slots=True)
class Assessed:
    """One object, in both kinds of sessions; `own` is the expert whose task its image is, if any."""

    item: str
    source: str
    subject: str
    modality: str
    region: str
    label: int
    name: str
    own: str
    trials: tuple[Trial, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        for trial, kept in zip(data["trials"], self.trials, strict=True):
            for look, own in zip(trial["looks"], kept.looks, strict=True):
                look["reliability"] = {name: value.to_json() for name, value in own.reliability.items()}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Assessed:
        """What `to_json` gave."""
        trials = []
        for trial in data["trials"]:
            looks = []
            for look in trial["looks"]:
                curves = {name: Reliability.from_json(curve) for name, curve in look["reliability"].items()}
                looks.append(Look(**{**look, "reliability": curves, "heard": tuple(look["heard"])}))
            trials.append(Trial(**{**trial, "looks": tuple(looks)}))
        return cls(**{**data, "trials": tuple(trials)})


@dataclass(frozen=True, slots=True)
class Assessment:
    """All objects of a run, its settings, and what was left out."""

    settings: dict[str, Any]
    objects: tuple[Assessed, ...]
    left_out: tuple[LeftOut, ...] = field(default=())


def own_expert(item: Item, experts: Sequence[ExpertPlans]) -> str:
    """The expert whose task, in words, names the item's modality and most words of its region; "" for none or several.

    "MR FLAIR" of a "brain" belongs to "tissues and structures of the brain, MR", and "MR" of an "abdomen" to nobody
    where two experts know some MR and none the abdomen.
    """

    def words(text: str) -> set[str]:
        return set(re.findall(r"[a-z]+", text.lower()))

    modality = re.match(r"\w+", item.modality.lower())
    wanted = words(f"{item.modality} {item.region}")
    scores = {e.name: len(wanted & words(e.task)) for e in experts if modality and modality[0] in words(e.task)}
    best = [name for name, score in scores.items() if score == max(scores.values())]
    return best[0] if len(best) == 1 else ""


def look_at(prediction: Prediction, truth: BoolArray, clicks: int, rng: np.random.Generator) -> Look:
    """Compare a prediction with the truth near the object.

    Args:
        prediction: on a canonical volume.
        truth: (K, J, I) bool on the same grid.
        clicks: that were given after the first prompt.
        rng: draws the voxels.
    """
    box, near = near_object(truth, prediction.volume.spacing, NEAR_MM)
    kji = np.argwhere(near) + np.array(box.start[::-1])
    kji = kji[rng.choice(len(kji), min(VOXELS, len(kji)), replace=False)]
    true = truth[tuple(kji.T)]
    mask = prediction.mask
    there, probability = prediction.probability_crop()
    inside = np.all((kji >= there.start[::-1]) & (kji < there.stop[::-1]), axis=1)
    said = np.zeros(len(kji), dtype=np.float32)
    said[inside] = probability[tuple((kji[inside] - there.start[::-1]).T)]
    reliability = {MASK: Reliability.of(said, true)}
    weights, votes = {}, {}
    voters = dict(zip(prediction.modes.get(HEAD, ()), prediction.voters, strict=True))
    seen = prediction.patch.box(prediction.canonical.shape_kji)
    known = np.all((kji >= seen.start[::-1]) & (kji < seen.stop[::-1]), axis=1)
    for name in prediction.experts:
        opinion, share = (_values(samples, prediction.patch, kji) for samples in prediction.opinion_on_patch(name))
        reliability[name] = Reliability.of(np.where(known, opinion, 0), true)
        if name in prediction.arms:
            weights[name] = _mean(share[known & true])
        elif name in voters:
            votes[voters[name]] = _mean(share[known & true])
    wrong = mask[tuple(kji.T)] != true
    disagreement = np.where(known, _values(prediction.disagreement_on_patch(), prediction.patch, kji), 0)
    return Look(
        clicks=clicks,
        dice=dice(mask, truth),
        quality=prediction.quality,
        reliability=reliability,
        roc_disagreement=area_under_roc(disagreement, wrong),
        roc_doubt=area_under_roc(np.minimum(said, 1 - said), wrong),
        weights=weights,
        gate=dict(prediction.gate),
        heard=tuple(prediction.decoders),
        votes=votes,
    )


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else 0.0


def _values(samples: FloatImage, patch: Patch, kji: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
    """Values on the samples of a patch at voxels (n, 3), linear between samples, as `preprocessing.upsample`."""
    at = patch.to_patch(kji[:, ::-1])[:, ::-1].T
    values: npt.NDArray[np.float64] = ndimage.map_coordinates(samples.astype(np.float64), at, order=1, mode="nearest")
    return values


def try_object(session: Session, volume: Volume, truth: BoolArray, seed: str, with_box: bool) -> Trial:
    """Sessions on one object that begin with the same prompt.

    Args:
        session: of the bundle.
        volume: canonical.
        truth: (K, J, I) bool.
        seed: of everything that is random.
        with_box: else a click begins.
    """
    rng = seed_of(seed, str(with_box))
    session.set_volume(volume)
    looks = [look_at(session.add(first_prompt(volume, truth, with_box, rng)), truth, 0, rng)]
    for _ in range(LATE):
        if not click_on(session, "protocol", truth, rng):
            break
    if (late := len(session.prompts()) - 1) > 0:
        looks.append(look_at(_present(session), truth, late, rng))
    clicks: dict[str, int] = {}
    ended: dict[str, float] = {}
    unsuggested = 0
    for policy in POLICIES:
        while len(session.prompts()) > 1:
            session.undo()
        clicks[policy] = 0 if with_box else 1
        while (now := dice(_present(session).mask, truth)) < GOAL and clicks[policy] < MOST_CLICKS:
            unsuggested += policy == "suggested" and session.suggest() is None
            click_on(session, policy, truth, rng)
            clicks[policy] += 1
        ended[policy] = now
    reached = {policy: now >= GOAL for policy, now in ended.items()}
    return Trial(with_box, tuple(looks), clicks, reached, ended, unsuggested)


def _present(session: Session) -> Prediction:
    assert session.prediction is not None, "the first prompt is never undone"
    return session.prediction


def first_prompt(volume: Volume, truth: BoolArray, with_box: bool, rng: np.random.Generator) -> Prompt:
    """A box as a hand draws it, or a click in the middle of the object."""
    if with_box:
        box = drawn_box(truth, rng)
        return BoxPrompt.from_ijk(box.start, box.stop, volume)
    click = next_click(np.zeros_like(truth), truth, rng)
    assert click is not None, "an object has voxels"
    return PointPrompt.from_ijk(click[0], volume, Polarity.POSITIVE)


def click_on(session: Session, policy: str, truth: BoolArray, rng: np.random.Generator) -> bool:
    """Click where a policy says, with the sign that is true there; False where there is no error to click on.

    Where nothing is suggested the user clicks anywhere in the error.
    """
    volume, mask = session.volume, _present(session).mask
    error = np.argwhere(mask != truth)
    if not len(error):
        return False
    k, j, i = (int(x) for x in error[rng.integers(len(error))])
    if policy == "protocol" and (click := next_click(mask, truth, rng)):
        i, j, k = click[0]
    elif policy == "suggested" and (suggestion := session.suggest()):
        i, j, k = PointPrompt(suggestion.ras, suggestion.polarity).ijk(volume)
    polarity = Polarity.POSITIVE if truth[k, j, i] else Polarity.NEGATIVE
    session.add(PointPrompt.from_ijk((i, j, k), volume, polarity))
    return True


def assess(
    manifests: Sequence[Path],
    session: Session,
    folder: Path,
    *,
    split: str = "val",
    max_objects_per_item: int | None = 1,
    max_items_per_source: int | None = 4,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Assessment:
    """Assess a bundle on objects of a split, and save after each one.

    Args:
        manifests: CSV files, see `manifests.read_manifest`.
        session: of the bundle; its volume is set anew.
        folder: for `objects.json`.
        split: which items.
        max_objects_per_item: chosen by the item's name; None: all.
        max_items_per_source: chosen by their names; None: all.
        resume: continue what an interrupted run of the same settings left.
        on_progress: called with objects done and objects in all.
    """
    settings = {
        "bundle": session.bundle.identity,
        "plans": hashlib.sha256(json.dumps(session.bundle.plans.to_json()).encode()).hexdigest()[:12],
        "split": split,
        "max_objects_per_item": max_objects_per_item,
        "max_items_per_source": max_items_per_source,
        "manifests": [hashlib.sha256(Path(m).read_bytes()).hexdigest() if Path(m).is_file() else "" for m in manifests],
    }
    targets, left_out = targets_to_assess(manifests, split, max_objects_per_item, max_items_per_source)
    done = _earlier(folder / "objects.json", settings, resume)
    current: tuple[str, Volume, npt.NDArray[Any]] | None = None
    for number, target in enumerate(targets):
        if on_progress is not None:
            on_progress(number, len(targets))
        item, key = target.item, (target.item.id, target.label)
        if key in done:
            continue
        if current is None or current[0] != item.id:
            current = (item.id, *canonical_item(item))
        _, volume, labels = current
        truth = labels == target.label
        seed = f"{item.id}/{target.label}"
        trials = tuple(try_object(session, volume, truth, seed, with_box) for with_box in (True, False))
        own = own_expert(item, session.bundle.plans.experts)
        about = (item.id, item.source, item.subject, item.modality, item.region)
        done[key] = Assessed(*about, target.label, target.name, own, trials)
        _save(folder / "objects.json", settings, list(done.values()))
    objects = tuple(done[target.item.id, target.label] for target in targets)
    return Assessment(settings, objects, tuple(left_out))


def targets_to_assess(
    manifests: Sequence[Path], split: str, max_objects_per_item: int | None, max_items_per_source: int | None
) -> tuple[list[Target], list[LeftOut]]:
    """Objects of at least 20 voxels, and what was left out; for the arguments see `assess`."""
    by_source: dict[str, list[Item]] = {}
    left_out: list[LeftOut] = []
    for manifest in manifests:
        items, without_image = read_manifest(manifest, split)
        left_out += without_image
        for item in items:
            by_source.setdefault(item.source, []).append(item)
    targets: list[Target] = []
    for items in by_source.values():
        order = sorted(items, key=lambda item: hashlib.sha256(item.id.encode()).digest())
        chosen = order[:max_items_per_source]
        left_out += [LeftOut(item.id, "", f"more than {max_items_per_source} items of a source") for item in order
                     if item not in chosen]  # fmt: skip
        for item in items:
            if item in chosen:
                more, too_small = targets_of(item, 20, max_objects_per_item)
                targets += more
                left_out += too_small
    if not targets:
        message = f"split {split!r} must have objects of at least 20 voxels in items with an image, got none."
        raise KA2ERError(message)
    return targets, left_out


def canonical_item(item: Item) -> tuple[Volume, npt.NDArray[Any]]:
    """Image and label map (K, J, I) in canonical axes."""
    volume, labels = read_item(item)
    return volume.canonical(), np.ascontiguousarray(volume.to_canonical(labels))


def _earlier(path: Path, settings: dict[str, Any], resume: bool) -> dict[tuple[str, int], Assessed]:
    if not path.exists():
        return {}
    if not resume:
        message = f"output folder {str(path.parent)!r} must hold no earlier results. Resume them, or choose another."
        raise KA2ERError(message)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        objects = [Assessed.from_json(entry) for entry in stored["objects"]]
        earlier = stored["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"output folder {str(path.parent)!r} must hold an earlier assessment to resume it: {error}."
        raise KA2ERError(message) from error
    different = sorted(key for key in settings if earlier.get(key) != settings[key])
    if different:
        message = f"a resumed run must have the settings of the earlier one, got other values of {different}."
        raise KA2ERError(message)
    return {(entry.item, entry.label): entry for entry in objects}


def _save(path: Path, settings: dict[str, Any], objects: Sequence[Assessed]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps({"settings": settings, "objects": [o.to_json() for o in objects]}), encoding="utf-8")
    part.replace(path)
