"""What an assessment found, as numbers, as Markdown and as pictures. Every source counts the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from KA2ERSegment.assessment import (
    GOAL,
    LATE,
    MASK,
    MOST_CLICKS,
    POLICIES,
    Assessed,
    Assessment,
    Look,
    canonical_item,
    click_on,
    first_prompt,
    own_expert,
)
from KA2ERSegment.calibration import NEAR_MM, Reliability, spearman
from KA2ERSegment.charts import chart_of_reliability
from KA2ERSegment.evaluation import dice
from KA2ERSegment.geometry import BoolArray
from KA2ERSegment.manifests import Target, seed_of
from KA2ERSegment.pictures import Opinions, picture_of_opinions
from KA2ERSegment.prediction import FloatImage, Prediction
from KA2ERSegment.session import Session

FOUNDATION = "foundation"
LEAST_SHOWN = 0.05
"""Disagreement that is shown bright, at least: below it there is nothing to see."""


def summary(assessment: Assessment) -> dict[str, Any]:
    """Plain data: everything that `markdown` shows."""
    objects = assessment.objects
    return {
        "settings": assessment.settings,
        "objects": len(objects),
        "predictions": sum(1 for _ in _looks(objects)),
        "calibration_error": {name: curve.error for name, curve in reliability(objects).items()},
        "calibration_error_per_source": {
            source: reliability(members)[MASK].error for source, members in by_source(objects).items()
        },
        "errors_found": _errors_found(objects),
        "quality": _quality(objects),
        "routing": _routing(objects),
        "clicks": {"box": _clicks(objects, True), "clicks": _clicks(objects, False)},
        "left_out": len(assessment.left_out),
    }


def by_source(objects: Iterable[Assessed]) -> dict[str, list[Assessed]]:
    """Objects of each source, in the order of its name."""
    found: dict[str, list[Assessed]] = {}
    for entry in sorted(objects, key=lambda entry: entry.source):
        found.setdefault(entry.source, []).append(entry)
    return found


def reliability(objects: Iterable[Assessed]) -> dict[str, Reliability]:
    """Curves of the mask and of each expert; each source counts the same, and in it each prediction."""
    curves: dict[str, Reliability] = {}
    for members in by_source(objects).values():
        looks = [look for _, look in _looks(members)]
        for look in looks:
            for name, curve in look.reliability.items():
                share = curve.scaled(1 / (curve.weight.sum() * len(looks)))
                curves[name] = curves[name] + share if name in curves else share
    return curves


def _looks(objects: Iterable[Assessed]) -> Iterator[tuple[Assessed, Look]]:
    for entry in objects:
        for trial in entry.trials:
            for look in trial.looks:
                yield entry, look


def _over_sources(values: Iterable[tuple[str, float | None]]) -> float | None:
    """Mean over sources of the means of each; None where there is no value at all."""
    found: dict[str, list[float]] = {}
    for source, value in values:
        if value is not None:
            found.setdefault(source, []).append(value)
    return float(np.mean([np.mean(members) for members in found.values()])) if found else None


def _errors_found(objects: Sequence[Assessed]) -> dict[str, float | None]:
    looks = list(_looks(objects))
    return {
        "disagreement": _over_sources((entry.source, look.roc_disagreement) for entry, look in looks),
        "doubt": _over_sources((entry.source, look.roc_doubt) for entry, look in looks),
    }


def _quality(objects: Sequence[Assessed]) -> dict[str, float | None]:
    looks = list(_looks(objects))
    first, late = ([look for _, look in looks if (look.clicks > 0) == later] for later in (False, True))

    def rank(chosen: Sequence[Look]) -> float | None:
        return spearman((look.quality for look in chosen), (look.dice for look in chosen))

    return {
        "spearman": rank([look for _, look in looks]),
        "spearman_first_prompt": rank(first),
        "spearman_after_clicks": rank(late),
        "mean_error": _over_sources((entry.source, look.quality - look.dice) for entry, look in looks),
        "mean_absolute_error": _over_sources((entry.source, abs(look.quality - look.dice)) for entry, look in looks),
    }


def _routing(objects: Sequence[Assessed]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for source, members in by_source(objects).items():
        looks = [look for _, look in _looks(members)]
        rows[source] = {
            "images": ", ".join(sorted({f"{entry.modality} {entry.region}".strip() for entry in members})),
            "own": ", ".join(sorted({entry.own for entry in members if entry.own})),
            "weights": _means([look.weights for look in looks]),
            "gate": _means([look.gate for look in looks]),
            "specialist_heard": float(np.mean([len(look.heard) > 1 for look in looks])),
            "votes": _means([look.votes for look in looks]),
        }
    known = [(entry, look.weights) for entry, look in _looks(objects) if entry.own in look.weights]
    first = [(entry, max((arm for arm in w if arm != FOUNDATION), key=lambda arm: w[arm])) for entry, w in known]
    return {
        "sources": rows,
        "own_is_first_expert": _over_sources((entry.source, float(arm == entry.own)) for entry, arm in first),
        "own_is_first_arm": _over_sources((e.source, float(max(w, key=lambda arm: w[arm]) == e.own)) for e, w in known),
    }


def _means(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([each.get(name, 0.0) for each in values])) for name in values[0]}


def _clicks(objects: Sequence[Assessed], with_box: bool) -> dict[str, dict[str, float | None]]:
    trials = [(entry.source, trial) for entry in objects for trial in entry.trials if trial.with_box == with_box]
    return {
        policy: {
            "clicks": _over_sources((source, float(trial.clicks[policy])) for source, trial in trials),
            "reached": _over_sources((source, float(trial.reached[policy])) for source, trial in trials),
            "dice": _over_sources((source, trial.dice[policy]) for source, trial in trials),
        }
        for policy in POLICIES
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Tables of a `summary`."""
    settings, errors, quality, routing = (found[key] for key in ("settings", "errors_found", "quality", "routing"))
    arms = list(next(iter(routing["sources"].values()))["weights"])
    lines = [
        f"{settings['bundle']}, split {settings['split']}: {found['objects']} objects, {found['predictions']} "
        f"predictions (after a box or click, and after {LATE} more clicks); voxels within {NEAR_MM:g} mm of the "
        "object; every source counts the same.",
        "",
        "| expected calibration error | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in found["calibration_error"].items()),
        "",
        "![Reliability](reliability.png)",
        *(["![Decoders and voters](reliability_heads.png)"] if len(found["calibration_error"]) > len(arms) + 1 else []),
        "",
        "| which voxels are wrong: area under the ROC curve | |",
        "|---|---|",
        f"| disagreement of the experts | {_cell(errors['disagreement'])} |",
        f"| the mask's own doubt, min(p, 1 - p) | {_cell(errors['doubt'])} |",
        "",
        "| predicted quality beside real Dice | |",
        "|---|---|",
        f"| Spearman, all predictions | {_cell(quality['spearman'])} |",
        f"| Spearman, after the first prompt | {_cell(quality['spearman_first_prompt'])} |",
        f"| Spearman, after more clicks | {_cell(quality['spearman_after_clicks'])} |",
        f"| mean error (predicted - real) | {_cell(quality['mean_error'])} |",
        f"| mean absolute error | {_cell(quality['mean_absolute_error'])} |",
        "",
        "| mean weight inside the object | images | own expert | " + " | ".join(arms) + " |",
        "|---|---|---|" + "---|" * len(arms),
    ]
    for source, row in routing["sources"].items():
        weights = " | ".join(_cell(row["weights"].get(arm)) for arm in arms)
        lines.append(f"| {source} | {row['images']} | {row['own']} | {weights} |")
    lines += _weights_table(routing["sources"], "gate", "mean weight of the gate")
    lines += _weights_table(routing["sources"], "votes", "mean weight in the vote inside the object")
    lines += [
        "",
        f"On images of an expert's own task it has the largest weight of all experts in "
        f"{_percent(routing['own_is_first_expert'])} of predictions, and of all arms in "
        f"{_percent(routing['own_is_first_arm'])}.",
        "",
        *_clicks_table(found["clicks"]),
        "",
        "![What each expert says](experts.png)",
        "",
        f"Where a session with a box ended worst after {LATE} more clicks:",
        "",
        "![Failures](failures.png)",
        "",
    ]
    return "\n".join(lines)


def _weights_table(sources: Mapping[str, Any], kind: str, title: str) -> list[str]:
    """Mean weights per source; nothing where the bundle has no such system."""
    names = list(next(iter(sources.values()))[kind])
    if not names:
        return []
    heard = ["a specialist is heard in"] if kind == "gate" else []
    lines = ["", f"| {' | '.join([title, *names, *heard])} |", "|---|" + "---|" * len([*names, *heard])]
    for source, row in sources.items():
        cells = [_cell(row[kind].get(name)) for name in names] + [_percent(row["specialist_heard"]) for _ in heard]
        lines.append(f"| {source} | {' | '.join(cells)} |")
    return lines


def _clicks_table(clicks: Mapping[str, Any]) -> list[str]:
    ways = {
        "suggested": "where the session suggests",
        "random": "at random in the error",
        "protocol": "in the middle of the largest error",
    }
    lines = [
        f"| clicks to Dice {GOAL:g}, at most {MOST_CLICKS} (reached; Dice at the end) | after a box | without a box |",
        "|---|---|---|",
    ]
    for policy, name in ways.items():
        cells = [clicks[kind][policy] for kind in ("box", "clicks")]
        texts = (f"{_cell(c['clicks'], 1)} ({_percent(c['reached'])}; {_cell(c['dice'])})" for c in cells)
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def write_report(assessment: Assessment, folder: Path) -> dict[str, Any]:
    """Write `assessment.json`, `assessment.md` and pictures of the reliability; returns the summary.

    `reliability.png` has the mask and the arms, `reliability_heads.png` the mask, decoders and voters if there are any.
    """
    found = summary(assessment)
    (folder / "assessment.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (folder / "assessment.md").write_text(markdown(found), encoding="utf-8")
    curves = reliability(assessment.objects)
    arms = {name for _, look in _looks(assessment.objects) for name in look.weights}
    encoders = {name: curve for name, curve in curves.items() if name == MASK or name in arms}
    heads = {name: curve for name, curve in curves.items() if name not in arms}
    chart_of_reliability(folder / "reliability.png", encoders)
    if len(heads) > 1:
        chart_of_reliability(folder / "reliability_heads.png", heads, "Reliability of decoders and voters")
    return found


def cases_to_show(targets: Sequence[Target], session: Session, most: int = 3) -> list[Target]:
    """For each expert an object on an image of its own task, then objects of other sources."""
    owners = {target: own_expert(target.item, session.bundle.plans.experts) for target in targets}
    chosen: list[Target] = []
    for name in session.model.arms[1:]:
        chosen += [target for target, owner in owners.items() if owner == name][:1]
    for target in targets:
        if target.item.source not in {known.item.source for known in chosen}:
            chosen.append(target)
    return chosen[:most]


def failures_to_show(assessment: Assessment, targets: Sequence[Target], most: int = 3) -> list[Target]:
    """Where a session with a box ended worst, after its clicks; one object of a source."""
    ended = {(entry.item, entry.label): entry.trials[0].looks[-1].dice for entry in assessment.objects}
    worst: dict[str, Target] = {}
    for target in sorted(targets, key=lambda target: ended[target.item.id, target.label]):
        worst.setdefault(target.item.source, target)
    return list(worst.values())[:most]


def write_opinions(targets: Sequence[Target], session: Session, path: Path) -> None:
    """A picture of what each expert says after a box, and where they disagree."""
    cases = []
    for target in targets:
        prediction, truth = _after(target, session, clicks=0)
        opinions = [(arm, prediction.experts[arm]) for arm in prediction.arms]
        maps = {f"{arm}, weight {100 * opinion.mean_weight:.0f} %": opinion.probability for arm, opinion in opinions}
        name = f"{target.item.id}\n{target.name}"
        cases.append(Opinions(name, prediction.canonical, prediction.mask, truth, maps | _disagreement(prediction)))
    picture_of_opinions(path, cases)


def write_failures(targets: Sequence[Target], session: Session, path: Path) -> None:
    """A picture of masks after a box and clicks, with their probability and where the experts disagree."""
    cases = []
    for target in targets:
        prediction, truth = _after(target, session, clicks=LATE)
        name = f"{target.item.id}\n{target.name}, Dice {dice(prediction.mask, truth):.2f}"
        maps = {"probability of the mask": prediction.probability} | _disagreement(prediction)
        cases.append(Opinions(name, prediction.canonical, prediction.mask, truth, maps))
    picture_of_opinions(path, cases)


def _after(target: Target, session: Session, clicks: int) -> tuple[Prediction, BoolArray]:
    """The prediction after a box and some clicks in the largest errors, and the truth."""
    volume, labels = canonical_item(target.item)
    truth = labels == target.label
    session.set_volume(volume)
    rng = seed_of(target.item.id, str(target.label))
    session.add(first_prompt(volume, truth, True, rng))
    for _ in range(clicks):
        if not click_on(session, "protocol", truth, rng):
            break
    prediction = session.prediction
    assert prediction is not None, "there was a prompt"
    return prediction, truth


def _disagreement(prediction: Prediction) -> dict[str, FloatImage]:
    """The map under its title; often far below 1, so shown relative to its largest value."""
    apart = prediction.disagreement
    most = max(float(apart.max()), LEAST_SHOWN)
    return {f"disagreement, bright: {most:.2f}": apart / most}


def _cell(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "no" if value is None else f"{100 * value:.0f} %"
