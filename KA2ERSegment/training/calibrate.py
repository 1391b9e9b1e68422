"""`python -m KA2ERSegment.training.calibrate BUNDLE OUTPUT`: temperatures that make a bundle's probabilities honest.

Fitted on items of split `train` that were held out, in sessions as users have them (a box or a click, then clicks in
the error), on samples of the patch within 10 mm of the object, every source counting the same. Sources with too few
subjects to hold one out lend items that the weights have seen, and the card says so: temperatures of the heart alone
would be worse. One temperature for the mask and one for each expert of every mode (`KA2ERSegment.calibration`); each is
kept only where, fitted without a source, it lowers the calibration error on that source. Nothing but plans and card
changes: every mask stays as it was.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from scipy import ndimage, special

from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.calibration import NEAR_MM, Reliability, fit_temperature
from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.evaluation import drawn_box, next_click
from KA2ERSegment.experts import Content
from KA2ERSegment.geometry import BoolArray
from KA2ERSegment.manifests import seed_of
from KA2ERSegment.prediction import Prediction, experts_by_mode
from KA2ERSegment.preprocessing import sample_nearest
from KA2ERSegment.prompts import BoxPrompt, PointPrompt
from KA2ERSegment.session import Session
from KA2ERSegment.training.items import TrainingItem, split_held_out
from KA2ERSegment.volume import Volume

logger = logging.getLogger("KA2ERSegment")

MASK = "mask"
SAMPLES = 4000
"""Of one prediction, at most."""
ITEMS = 6
"""Of one source, at most."""
_SENTENCE, _FORMER, _LIMITS = "- Calibration: ", "- The confidence maps are not calibrated.", "## Known limits"


@dataclass(frozen=True, slots=True)
class Samples:
    """What the model said of samples whose truth is known.

    Args:
        names: of the columns: the mask, then each expert as in `Prediction.experts`.
        logits: (N, names) float32.
        truth: (N,) bool.
        weights: (N,), the same sum for each source, and in it for each prediction.
        prediction: (N,) int, which one each sample is of.
        sources: name of each prediction's.
    """

    names: tuple[str, ...]
    logits: npt.NDArray[np.float32]
    truth: BoolArray
    weights: npt.NDArray[np.float64]
    prediction: npt.NDArray[np.intp]
    sources: tuple[str, ...]

    @property
    def folds(self) -> npt.NDArray[np.intp]:
        """(N,), what each is left out together with: its source, or its prediction where there are under three."""
        names = sorted(set(self.sources))
        if len(names) < 3:
            return self.prediction
        of_prediction = np.array([names.index(source) for source in self.sources])
        return np.asarray(of_prediction[self.prediction])


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was fitted, and what is kept of it.

    Args:
        fitted: temperature of the mask and of each expert.
        error_before: expected calibration error of the samples, as they are.
        error_after: the same with temperatures that were fitted without the source they are used on.
        sources: how many.
        predictions: how many.
    """

    fitted: dict[str, float]
    error_before: dict[str, float]
    error_after: dict[str, float]
    sources: int
    predictions: int

    @property
    def temperatures(self) -> dict[str, float]:
        """Those that help where they were not fitted; the others are 1."""
        return {name: value for name, value in self.fitted.items() if self.error_after[name] < self.error_before[name]}

    @property
    def note(self) -> str:
        """For the model card."""
        kept = ", ".join(f"{name} {value:.2f}" for name, value in self.temperatures.items())
        dropped = ", ".join(name for name in self.fitted if name not in self.temperatures)
        parts = []
        if kept:
            parts.append(f"logits are divided by temperatures before they are probabilities ({kept})")
        if dropped:
            parts.append(
                f"no temperature is kept for {dropped}: on a source that it was not fitted on it does not help"
            )
        return (
            f"{_SENTENCE}{'; '.join(parts)}. Fitted on {self.predictions} predictions on items of {self.sources} "
            f"sources; the expected calibration error of the mask is {self.error_before[MASK]:.3f} without a "
            f"temperature and {self.error_after[MASK]:.3f} with one of other sources."
        )


def collect(
    bundle: Bundle,
    items: Sequence[TrainingItem],
    objects: int = 2,
    clicks: int = 2,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Simulated sessions on items with an image: with a box and without, after the first prompt and after the last.

    Args:
        bundle: the model.
        items: that it was not trained on.
        objects: of one item, chosen by its name.
        clicks: after the first prompt.
        device: of the network.
        on_progress: called with items done and items in all.
    """
    shown = [item for item in items if item.images and item.boxes]
    session = Session(bundle, device=device)
    logits: list[npt.NDArray[np.float32]] = []
    truths: list[BoolArray] = []
    sources: list[str] = []
    for number, item in enumerate(shown):
        if on_progress is not None:
            on_progress(number, len(shown))
        rng = seed_of("calibration", item.name)
        for label in rng.permutation(sorted(item.boxes))[:objects]:
            truth = np.asarray(item.labels == label)
            for prediction in _session_on(session, item, truth, clicks, rng):
                said, true = _samples(prediction, truth, rng)
                if true.size:
                    logits.append(said)
                    truths.append(true)
                    sources.append(item.source)
    if not truths:
        message = f"calibration needs items with image and labels, got {len(items)} items without."
        raise KA2ERError(message)
    count = Counter(sources)
    each = [np.full(len(true), 1 / len(true) / count[name]) for true, name in zip(truths, sources, strict=True)]
    model = session.model
    by_mode = experts_by_mode(model.arms, model.decoders, model.voters).values()
    names = (MASK, *(name for members in by_mode for name in members))
    which = np.concatenate([np.full(len(true), number) for number, true in enumerate(truths)])
    return Samples(names, np.concatenate(logits), np.concatenate(truths), np.concatenate(each), which, tuple(sources))


def _session_on(
    session: Session, item: TrainingItem, truth: BoolArray, clicks: int, rng: np.random.Generator
) -> Iterator[Prediction]:
    volume = Volume(item.images[0], np.diag([*item.spacing, 1.0]), item.name)
    for with_box in (True, False):
        session.set_volume(volume)
        if with_box:
            box = drawn_box(truth, rng)
            prediction: Prediction | None = session.add(BoxPrompt.from_ijk(box.start, box.stop, volume))
            assert prediction is not None
            yield prediction
        else:
            prediction = None
        for number in range(clicks + (not with_box)):
            mask = np.zeros_like(truth) if prediction is None else prediction.mask
            click = next_click(mask, truth, rng)
            if click is None:
                break
            prediction = session.add(PointPrompt.from_ijk(click[0], volume, click[1]))
            if number == 0 and not with_box:
                yield prediction
        if prediction is not None and clicks:
            yield prediction


def _samples(
    prediction: Prediction, truth: BoolArray, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], BoolArray]:
    """Logits (n, 1 + experts) and truth (n,) of random samples near the object, none where it is not in the patch."""
    canonical = prediction.canonical
    true = sample_nearest(prediction.volume.to_canonical(truth), prediction.patch).astype(bool)
    if not true.any():
        return np.zeros((0, 1 + len(prediction.experts)), dtype=np.float32), np.zeros(0, dtype=bool)
    step = (np.array(prediction.patch.step) * canonical.spacing)[::-1]
    near = ndimage.distance_transform_edt(~true, sampling=step) <= NEAR_MM
    at = np.flatnonzero(near & prediction.patch.read_by(canonical.shape_kji))
    at = rng.choice(at, min(SAMPLES, len(at)), replace=False)
    columns: list[npt.NDArray[Any]] = [prediction.logits, *map(prediction.logits_of, prediction.experts)]
    return np.stack([column.ravel()[at] for column in columns], axis=1), true.ravel()[at]


def fit(samples: Samples) -> Calibrated:
    """One temperature for each column, and what temperatures do where they were not fitted."""
    fitted: dict[str, float] = {}
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    truth, weights, folds = samples.truth, samples.weights, samples.folds
    for logits, name in zip(samples.logits.T.astype(np.float64), samples.names, strict=True):
        fitted[name] = round(fit_temperature(logits, truth, weights), 4)
        before[name] = Reliability.of(special.expit(logits), truth, weights).error
        elsewhere = np.ones_like(logits)
        for fold in np.unique(folds):
            own = folds == fold
            elsewhere[own] = fit_temperature(logits[~own], truth[~own], weights[~own])
        after[name] = Reliability.of(special.expit(logits / elsewhere), truth, weights).error
    return Calibrated(fitted, before, after, len(set(samples.sources)), len(samples.sources))


def items_to_fit_on(learning: Sequence[TrainingItem], held_out: Sequence[TrainingItem]) -> list[TrainingItem]:
    """Held-out items with an image, and of sources that have none of those some that were learnt from.

    Args:
        learning: what the weights were trained on.
        held_out: what they were not, of split `train` too.
    """
    chosen: dict[str, list[TrainingItem]] = {}
    for items in (held_out, learning):
        found: dict[str, list[TrainingItem]] = {}
        for item in items:
            if item.images and item.source not in chosen:
                found.setdefault(item.source, []).append(item)
        chosen |= {name: members[:ITEMS] for name, members in found.items()}
    return [item for members in chosen.values() for item in members]


def with_calibration(content: Content, calibrated: Calibrated, seen: int) -> Content:
    """The content with these temperatures in its plans, and a sentence on them in its card.

    Args:
        content: of a bundle.
        calibrated: by `fit`.
        seen: of so many of the sources, the weights were trained on the very items.
    """
    note = f"{calibrated.note} The items of {seen} of these sources were trained on too."
    lines = [line for line in content.card.splitlines() if not line.startswith((_SENTENCE, _FORMER))]
    if _LIMITS in lines:
        lines.insert(lines.index(_LIMITS) + 1, note)
    else:
        lines += ["", _LIMITS, note]
    plans = replace(content.plans, calibration=calibrated.temperatures)
    return replace(content, plans=plans, card="\n".join(lines) + "\n")


def uncalibrated(content: Content) -> Content:
    """The content without temperatures: those of a model whose answers change are no longer its own."""
    lines = [_FORMER if line.startswith(_SENTENCE) else line for line in content.card.splitlines()]
    return replace(content, plans=replace(content.plans, calibration={}), card="\n".join(lines) + "\n")


def calibrate(
    bundle: Bundle,
    learning: Sequence[TrainingItem],
    held_out: Sequence[TrainingItem],
    output: Path,
    device: str = "auto",
) -> Calibrated:
    """Fit a bundle's temperatures and write the bundle with them.

    Args:
        bundle: the model.
        learning: items of split `train` that the weights were trained on.
        held_out: items of split `train` that they were not trained on.
        output: folder of the new bundle; an older bundle there is replaced.
        device: of the network.
    """

    def tell(done: int, total: int) -> None:
        logger.info("calibration: item %d of %d", done + 1, total)

    items = items_to_fit_on(learning, held_out)
    calibrated = fit(collect(bundle, items, device=device, on_progress=tell))
    seen = len({item.source for item in items} - {item.source for item in held_out if item.images})
    with_calibration(Content.of(bundle), calibrated, seen).save(output, force=True)
    logger.info("%s", calibrated.note)
    return calibrated


def main(
    bundle: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Bundle to calibrate.")],
    output: Annotated[Path, typer.Argument(help="Folder of the new bundle.")],
    cache: Annotated[Path, typer.Option(help="Folder of packed items of split `train`.")] = Path("cache/train"),
    held_out: Annotated[int, typer.Option(help="As in the config of the training: one in so many subjects.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Fit a bundle's temperatures on training items, held-out ones where there are any."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    items = [TrainingItem.load(path) for path in sorted(cache.glob("*.npz"))]
    calibrate(load_bundle(bundle), *split_held_out(items, held_out), output, device)


if __name__ == "__main__":
    typer.run(main)
