"""`python -m KA2ERSegment.training.ablation`: what each part of KA2ER's amalgamation brings, at small compute.

All variants have the same frozen encoders, whose features are computed once, the same first mask decoder, the same
cases, prompts and steps in the same order, and where they have the same layer the same first weights of it. The
amalgamation begins anew. Each leaves a bundle and a line in `ablation.json`; one that is there is not trained again.

The encoders and the decoder of the bundle to begin from may have seen the held-out subjects; all variants share
that. What counts for `docs/results.md` is `ka2ersegment evaluate` of the bundles on split `val`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from KA2ERSegment.build import tensors_by_name
from KA2ERSegment.bundle import load_bundle
from KA2ERSegment.experts import Content
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.training.config import read_config
from KA2ERSegment.training.encoded import EncodedCase, encode_divided, tasks_in_order, together
from KA2ERSegment.training.items import pack_where_missing
from KA2ERSegment.training.losses import dice, shares_inside
from KA2ERSegment.training.run import describe
from KA2ERSegment.training.shares import NO_TASK, share_table
from KA2ERSegment.training.simulation import first_prompts, next_prompts
from KA2ERSegment.training.variants import VARIANTS, Budget, Variant, train_variant, variant_model, variant_plans

CLICKS = 5
"""After the first prompt, on held-out cases."""


@torch.no_grad()
def held_out_dice(
    model: PromptableModel, cases: Sequence[EncodedCase], experts: bool = True, clicks: int = CLICKS
) -> tuple[Tensor, Tensor]:
    """Dice of each case after each prompt, and the arms' shares inside its object.

    Args:
        model: on its device.
        cases: N held out.
        experts: off: as if there were none.
        clicks: after the first prompt.

    Returns:
        dice: (N, 1 + clicks).
        shares: (N, K+1).
    """
    device = next(model.parameters()).device
    found, shares = [], []
    for first in range(0, len(cases), 4):
        batch = together(model, cases[first : first + 4], device)
        generator = torch.Generator(device)
        generator.manual_seed(first)  # the same prompts for all variants, as long as their masks are
        present = torch.ones(len(batch.target), len(model.arms), dtype=torch.bool, device=device)
        present[:, 1:] = experts
        features = batch.amalgamated(model, present)
        prompts = first_prompts(batch.target, batch.box, batch.outside, generator)
        steps = []
        for click in range(1 + clicks):
            logits = model.decode(features, prompts).logits
            steps.append(dice(logits > 0, batch.target))
            if click < clicks:
                prompts = next_prompts(prompts, logits, batch.target, generator)
        found.append(torch.stack(steps, dim=1).cpu())
        shares.append(shares_inside(features.weights, batch.target).cpu())
    return torch.cat(found), torch.cat(shares)


def measure(model: PromptableModel, cases: Sequence[EncodedCase], tasks: Sequence[str]) -> dict[str, Any]:
    """A variant's line: parameters, seconds, Dice per prompt on held-out cases, routing.

    Args:
        model: trained.
        cases: held out.
        tasks: names of the experts, in the order of the cases' `task`.
    """
    scores, shares = held_out_dice(model, cases)
    alone, _ = held_out_dice(model, cases, experts=False, clicks=1)
    boxed = torch.tensor([bool(case.box.any()) for case in cases])
    real = torch.tensor([case.real for case in cases])
    named = [tasks[case.task - 1] if case.task else NO_TASK for case in cases]

    def means(values: Tensor) -> list[float]:
        return [round(float(value), 4) for value in values.mean(0)] if len(values) else []

    encode, click = _seconds(model, cases[0])
    return {
        "parameters": sum(tensor.numel() for tensor in tensors_by_name(model).values()),
        "seconds_per_patch": round(encode, 4),
        "seconds_per_click": round(click, 4),
        "dice": means(scores),
        "dice_with_box": means(scores[boxed]),
        "dice_clicks_only": means(scores[~boxed]),
        "dice_real_images": means(scores[real]),
        "dice_made_images": means(scores[~real]),
        "dice_without_experts": means(alone),
        "shares": asdict(share_table(model.arms, shares, named)),
        "cases": [
            {"item": case.item.name, "source": case.item.source, "subject": case.item.subject}
            | {"box": bool(box), "real": case.real, "dice": [round(float(value), 4) for value in row]}
            for case, box, row in zip(cases, boxed, scores, strict=True)
        ],
    }


@torch.inference_mode()
def _seconds(model: PromptableModel, case: EncodedCase, repeats: int = 5) -> tuple[float, float]:
    """Median time to encode one patch and to decode one prompt on it."""
    device = next(model.parameters()).device
    batch = together(model, [case], device)
    generator = torch.Generator(device)
    generator.manual_seed(0)
    features = batch.amalgamated(model, torch.ones(1, len(model.arms), dtype=torch.bool, device=device))
    prompts = first_prompts(batch.target, batch.box, batch.outside, generator)

    def timed(work: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats + 1):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    return timed(lambda: model.encode(batch.features.image)), timed(lambda: model.decode(features, prompts))


def ablate(
    start: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Bundle: encoders and first decoder.")],
    output: Annotated[Path, typer.Option(help="Folder for the variants' bundles and ablation.json.")],
    config: Annotated[Path, typer.Option(help="With the experts' tasks.")] = Path(__file__).parent / "configs/cpu.json",
    data: Annotated[Path, typer.Option(help="Folder that holds the manifests' folders.")] = Path("../shared/data"),
    cache: Annotated[Path, typer.Option(help="Folder of packed items; made where missing.")] = Path("cache/train"),
    cases: Annotated[int, typer.Option(help="Training patches, encoded once.")] = 256,
    held_out: Annotated[int, typer.Option(help="Patches of other subjects.")] = 66,
    steps: Annotated[int, typer.Option(help="Of each variant.")] = 300,
    batch: Annotated[int, typer.Option(help="Patches of one step.")] = 2,
    minutes: Annotated[float, typer.Option(help="Of each variant's training, at most; 0: no limit.")] = 0.0,
    gigabytes: Annotated[float, typer.Option(help="Memory for encoded patches.")] = 2.5,
    seed: Annotated[int, typer.Option(help="Of first weights, cases and prompts.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[str, typer.Option(help="One variant.")] = "",
) -> None:
    """Train and measure every variant of the amalgamation."""
    if only not in ("", *VARIANTS):
        message = f"--only must be one of {tuple(VARIANTS)}, got {only!r}."
        raise typer.BadParameter(message)
    table_path = output / "ablation.json"
    about: dict[str, Any] = {
        "cases": cases,
        "held_out": held_out,
        "steps": steps,
        "batch": batch,
        "minutes": minutes,
        "seed": seed,
    }
    bundle = load_bundle(start)
    if bundle.plans.amalgamation.kind != "hierarchical" or not bundle.plans.experts:
        message = (
            f"--start must be a bundle with experts and a hierarchical amalgamation; that in {str(start)!r} is none."
        )
        raise typer.BadParameter(message)
    about |= {"start": bundle.identity}
    table = json.loads(table_path.read_text(encoding="utf-8")) if table_path.exists() else {"about": about}
    if {key: table["about"][key] for key in about} != about:
        message = f"{str(output)!r} holds variants of other settings, {table['about']}. Choose another folder."
        raise typer.BadParameter(message)
    missing = [name for name in VARIANTS if name not in table and only in ("", name)]
    if not missing:
        typer.echo("all variants are there")
        return
    settings = read_config(config)
    tasks = tasks_in_order(bundle.plans, settings["tasks"])
    pack_where_missing(cache, data, settings)
    learning, apart = encode_divided(bundle, cache, tasks, settings, cases, held_out, gigabytes, seed, device)
    table["about"] |= {"cases_found": len(learning), "held_out_found": len(apart)}
    table["about"] |= {"subjects_held_out": len({(case.item.source, case.item.subject) for case in apart})}
    table["about"] |= {"hardware": describe(torch.device(device), 1)}
    content = Content.of(bundle)
    for name in missing:
        variant, budget = VARIANTS[name], Budget(steps, batch, minutes, seed)
        model = variant_model(content, variant, seed).to(device)
        begin = time.monotonic()
        model, made = train_variant(model, variant, learning, budget, _shown(name, steps))
        spent = (time.monotonic() - begin) / 60
        line = {"steps": made, "minutes": round(spent, 2), **measure(model, apart, [task.name for task in tasks])}
        _write(output / name, content, variant, model, f"{made} steps of {batch} encoded patches, {spent:.0f} minutes")
        table[name] = line
        output.mkdir(parents=True, exist_ok=True)
        table_path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        typer.echo(f"{name}: {made} steps, {spent:.1f} minutes, Dice {line['dice']}")
    typer.echo(as_markdown(table))


def as_markdown(table: Mapping[str, Any]) -> str:
    """The lines of `ablation.json` as a table."""
    titles = ("variant", "million parameters", "s per patch", "s per click", "Dice, prompt", "1 click", "5 clicks")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, line in table.items():
        if name != "about":
            dice = " | ".join(f"{line['dice'][step]:.3f}" for step in (0, 1, CLICKS))
            size, patch, click = line["parameters"] / 1e6, line["seconds_per_patch"], line["seconds_per_click"]
            lines.append(f"| {name} | {size:.2f} | {patch:.3f} | {click:.3f} | {dice} |")
    return "\n".join(lines)


def _shown(name: str, steps: int) -> Callable[[int, float], None]:
    def on_step(step: int, loss: float) -> None:
        if step % 20 == 0 or step == steps:
            typer.echo(f"{name}: step {step} of {steps}, loss {loss:.3f}")

    return on_step


def _write(folder: Path, start: Content, variant: Variant, model: PromptableModel, how: str) -> None:
    """The variant as a bundle; what the card of the bundle it began from says of results is not its own."""
    plans = variant_plans(start.plans, variant)
    card = (
        f"{start.card.split('## What it reaches')[0].rstrip()}\n\n## A variant, to compare\n"
        f"Amalgamation {variant.plans.kind!r}, no-expert arm {variant.plans.no_expert}, weight of feature distillation "
        f"{variant.features:g}: begun anew and trained with prompt encoder and mask decoder for {how}; encoders as in "
        "the bundle above.\n"
    )
    Content(plans, tensors_by_name(model), card, start.licences).save(folder, force=True)


if __name__ == "__main__":
    typer.run(ablate)
