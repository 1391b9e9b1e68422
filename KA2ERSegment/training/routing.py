"""`python -m KA2ERSegment.training.routing BUNDLE --config CONFIG`: whom the gate hears, and what nobody has forgotten.

The two tables that SAM-Med3D-MoE (arXiv 2407.04938) is about, on simulated prompts, each method with clicks in its own
error: which decoder is heard for which family of tasks, and the Dice on each family of the general decoder, of each
finetuned specialist alone, and of all of them behind the gate. Families are the experts' tasks of the config, and
"other" for items of none. The vote is left out, and so is the prior of domains, which sessions alone have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from KA2ERSegment.build import build_model
from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.charts import chart_of_tables
from KA2ERSegment.errors import BundleError
from KA2ERSegment.gate import GENERAL
from KA2ERSegment.manifests import seed_of
from KA2ERSegment.mask_decoder import Decoded
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.prompt_encoder import PatchPrompts
from KA2ERSegment.training import losses
from KA2ERSegment.training.config import read_config
from KA2ERSegment.training.items import TrainingItem, read_items
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions, draw_case, encoded, family_of
from KA2ERSegment.training.simulation import first_prompts, next_prompts
from KA2ERSegment.training.synthesis import make_image

GATED, OTHER = "gated", "other"
"""Name of the row with all decoders behind the gate, and of the family of items that no expert covers."""
DRAWS = 2000
"""Of the bootstrap."""

Table = dict[str, dict[str, float]]
Decoder = Callable[[PatchFeatures, PatchPrompts], Decoded]


@dataclass(frozen=True, slots=True)
class Case:
    """One patch.

    Args:
        item: it was drawn from.
        subject: whose that is.
        source: of the item.
        family: name of the task, or `OTHER`.
        real: whether the image is a real one, not made from the label map.
        dice: by method, after the first prompt and after each click.
        heard: name of the decoder that the gate heard at each of them; "general" for the general one alone.
    """

    item: str
    subject: str
    source: str
    family: str
    real: bool
    dice: dict[str, list[float]]
    heard: list[str]


@torch.no_grad()
def measure(
    model: PromptableModel,
    items: Sequence[TrainingItem],
    tasks: Sequence[ClassMap],
    options: SamplingOptions,
    patches: int,
    clicks: int,
) -> list[Case]:
    """Every method on the same patches with the same first prompt; the same cases at each call.

    Args:
        model: with specialists and a gate.
        items: to draw from.
        tasks: of the experts.
        options: how patches are drawn.
        patches: of each item.
        clicks: after the first prompt.

    Raises:
        BundleError: the model has no gate.
    """
    gate = model.gate
    if gate is None:
        message = "routing is that of a gate, and the bundle has none. Train the stages 'specialists' and 'gate' first."
        raise BundleError(message)
    device = next(model.parameters()).device
    methods: dict[str, Decoder] = {GENERAL: _alone(model, model.mask_decoder)}
    methods |= {name: _alone(model, decoder) for name, decoder in model.specialists.items()}
    methods[GATED] = lambda features, prompts: model.decode_base(features, prompts)[0]
    cases = []
    for item in items:
        family = family_of(item, tasks)
        for number in range(patches):
            rng = seed_of("routing", item.name, str(number))
            generator = torch.Generator(device)
            generator.manual_seed(int(rng.integers(2**31)))
            drawn = next((c for c in (draw_case(item, options, rng, tasks) for _ in range(20)) if c is not None), None)
            if drawn is None:
                continue
            batch = {key: value[None].to(device) for key, value in drawn.items()}
            real = bool(drawn["real"])
            image = batch["image"] if real else make_image(batch["labels"], batch["target"], generator)
            features, state = encoded(model, batch, image), generator.get_state()
            dice, heard = {}, []
            for name, decode in methods.items():
                generator.set_state(state)  # the same prompts, as far as the answers are the same
                dice[name], numbers = _session(decode, features, batch, clicks, generator)
                if name == GATED:
                    heard = [gate.decoders[at] for at in numbers]
            about = (item.name, item.subject or item.name, item.source, tasks[family - 1].name if family else OTHER)
            cases.append(Case(*about, real, dice, heard))
    return cases


def _alone(model: PromptableModel, decoder: torch.nn.Module) -> Decoder:
    return lambda features, prompts: model.run_decoder(decoder, model.decoder_inputs(features, prompts))


def _session(
    decode: Decoder, features: PatchFeatures, batch: Mapping[str, Tensor], clicks: int, generator: torch.Generator
) -> tuple[list[float], list[int]]:
    """Dice after each prompt, and which decoder was heard."""
    target = batch["target"]
    prompts = first_prompts(target, batch["box"], batch["outside"], generator)
    scores, heard = [], []
    for click in range(clicks + 1):
        decoded = decode(features, prompts)
        scores.append(float(losses.dice(decoded.logits > 0, target)))
        heard.append(0 if decoded.heard is None else int(decoded.heard[0]))
        if click < clicks:
            prompts = next_prompts(prompts, decoded.logits, target, generator)
    return scores, heard


def report(cases: Sequence[Case]) -> dict[str, Any]:
    """Plain data: counts, the routing matrix, the forgetting tables, what the gate brings, and the cases themselves."""
    families = sorted({case.family for case in cases}, key=lambda name: (name == OTHER, name))
    rows, decoders = list(cases[0].dice), [name for name in cases[0].dice if name != GATED]
    of = {family: [case for case in cases if case.family == family] for family in families}
    routing: Table = {}
    for family, own in of.items():
        heard = [name for case in own for name in case.heard]
        routing[family] = {name: heard.count(name) / len(heard) for name in decoders}
    tables: dict[str, Table] = {
        title: {row: {family: _mean(own, row, at) for family, own in of.items()} for row in rows}
        for title, at in (("first", 0), ("last", -1))
    }
    brings = {family: _interval(own) for family, own in of.items()}
    counts = {family: {"patches": len(own), "subjects": len({c.subject for c in own})} for family, own in of.items()}
    return {
        "families": counts,
        "routing": routing,
        "dice": tables,
        "gated_less_general": brings,
        "cases": [asdict(case) for case in cases],
    }


def _mean(cases: Sequence[Case], row: str, at: int) -> float:
    """Mean over sources of the mean Dice."""
    sources: dict[str, list[float]] = {}
    for case in cases:
        sources.setdefault(case.source, []).append(case.dice[row][at])
    return float(np.mean([np.mean(values) for values in sources.values()]))


def _interval(cases: Sequence[Case]) -> list[float]:
    """Last Dice behind the gate less the general decoder's, mean over subjects, and its 95 % bootstrap interval."""
    subjects: dict[str, list[float]] = {}
    for case in cases:
        subjects.setdefault(case.subject, []).append(case.dice[GATED][-1] - case.dice[GENERAL][-1])
    means = np.array([np.mean(values) for values in subjects.values()])
    draws = means[np.random.default_rng(0).integers(len(means), size=(DRAWS, len(means)))].mean(axis=1)
    return [float(means.mean()), *(float(end) for end in np.percentile(draws, (2.5, 97.5)))]


def markdown(found: Mapping[str, Any], about: str) -> str:
    """The report as tables."""
    families = list(found["families"])
    counts = [f"{n['patches']} patches of {n['subjects']} subjects" for n in found["families"].values()]
    titles = {"first": "Dice after the first prompt", "last": "Dice after the last click"}
    parts = [f"{about}\n", "Decoder heard (share of prompts), by family of tasks:\n"]
    decoders = list(found["routing"][families[0]])
    parts.append(_table("family", decoders, {f: list(row.values()) for f, row in found["routing"].items()}))
    for key, title in titles.items():
        parts.append(f"\n{title}, mean over sources:\n")
        rows: dict[str, list[Any]] = {row: list(values.values()) for row, values in found["dice"][key].items()}
        if key == "last":
            gains = found["gated_less_general"].values()
            rows["gated less general, mean over subjects [95 %]"] = [
                f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in gains
            ]
        parts.append(_table("decoder", families, rows | {"": counts}))
    return "\n".join(parts) + "\n"


def _table(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> str:
    lines = [f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, values in rows.items():
        cells = [value if isinstance(value, str) else f"{value:.3f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    bundle: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="With specialists and a gate.")],
    config: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Of the training: names the tasks.")],
    output: Annotated[Path, typer.Option(help="Folder for routing.json, .md and .png.")] = Path("output/routing"),
    split: Annotated[str, typer.Option(help="Of the manifests' items.")] = "val",
    data: Annotated[Path, typer.Option(help="Folder that holds the manifests' folders.")] = Path("../shared/data"),
    patches: Annotated[int, typer.Option(help="Of each item.")] = 3,
    clicks: Annotated[int, typer.Option(help="After the first prompt.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Report routing and forgetting of a bundle's gate."""
    settings, opened = read_config(config), load_bundle(bundle)
    plans = opened.plans
    if plans.gate is not None:
        plans = replace(plans, gate=replace(plans.gate, enabled=True))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    model = build_model(plans, opened.weights()).to("cuda" if on_gpu else "cpu")
    manifests = [data / name for name in settings["manifests"]]
    items = read_items(manifests, split, settings["share_alike"])
    tasks = [ClassMap(name, task["items"], task["classes"]) for name, task in settings["tasks"].items()]
    given = {"patch_size": plans.patch_size, "margin": plans.margin, **settings["sampling"]}
    options = replace(SamplingOptions(**given), real_images=1.0, lesions=0.0, parts=0.0)
    found = report(measure(model, items, tasks, options, patches, clicks))
    gate = plans.gate
    assert gate is not None, "measured"
    about = (
        f"Bundle {opened.identity}, split {split}: {len(found['cases'])} patches of {len(items)} items, a first prompt "
        f"and {clicks} clicks in the error; tau {gate.threshold:g}, temperature {gate.temperature:.2f}. "
        "Without the vote and without the prior of domains, which sessions alone have."
    )
    output.mkdir(parents=True, exist_ok=True)
    (output / "routing.json").write_text(json.dumps({"about": about, **found}, indent=1) + "\n", encoding="utf-8")
    text = markdown(found, about)
    (output / "routing.md").write_text(text, encoding="utf-8")
    titles = {"decoder heard": found["routing"], "Dice after the last click": found["dice"]["last"]}
    chart_of_tables(output / "routing.png", titles)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
