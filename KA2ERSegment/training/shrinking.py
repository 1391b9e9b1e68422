"""`python -m KA2ERSegment.training.shrinking BUNDLE`: how much of the learnt part of the logits answers best.

The logits of the mask decoder are the geodesic prior and what was learnt (`MaskDecoder.shrink`). A decoder that was
trained for minutes may answer better with less of itself. Which share does is measured here, on items of split `train`
of subjects that the config holds out; where it holds nobody out, of some that were seen in training, and it is said.
Every share has the same patches and first prompts, then clicks in its own error, and is measured by the mean Dice over
all of them. The gate and the voting head are left out: they are trained around a decoder as it is, so the share is
chosen before them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import BundleError, VolumeError
from KA2ERSegment.experts import Content
from KA2ERSegment.model import PatchFeatures, PromptableModel
from KA2ERSegment.plans import Plans
from KA2ERSegment.prompt_encoder import PRIOR, PatchPrompts
from KA2ERSegment.training import losses
from KA2ERSegment.training.calibrate import uncalibrated
from KA2ERSegment.training.card import with_section
from KA2ERSegment.training.config import read_config
from KA2ERSegment.training.held_out import SEED, cases_in_turn
from KA2ERSegment.training.items import TrainingItem, load_items, split_held_out
from KA2ERSegment.training.sampling import ClassMap, SamplingOptions, encoded
from KA2ERSegment.training.simulation import first_prompts, next_prompts
from KA2ERSegment.training.synthesis import make_image

logger = logging.getLogger("KA2ERSegment")

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Those that are tried."""
LEARNT = "seen in training: the bundle has learnt from them, which speaks for what it learnt"
SECTION = "## Share of the learnt part"
"""Of the model card."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Dice of each share on the same cases.

    Args:
        shares: that were tried.
        dice: (shares, cases, prompts).
        subjects: how many the cases are of.
    """

    shares: tuple[float, ...]
    dice: Tensor
    subjects: int

    @property
    def means(self) -> dict[float, float]:
        """Mean Dice over cases and prompts by share."""
        return dict(zip(self.shares, self.dice.mean((1, 2)).tolist(), strict=True))

    @property
    def best(self) -> float:
        """The share with the best mean; of equals the largest."""
        return max(self.shares, key=lambda share: (round(self.means[share], 6), share))

    def gain(self, share: float, other: float) -> tuple[float, float]:
        """Mean Dice of one share less that of another, and its standard error over cases."""
        own, theirs = (self.dice[self.shares.index(each)].mean(1) for each in (share, other))
        difference = own - theirs
        return float(difference.mean()), float(difference.std() / len(difference) ** 0.5)

    @property
    def table(self) -> str:
        """Markdown."""
        titles = ["first prompt", *(f"click {n}" for n in range(1, self.dice.shape[2])), "mean"]
        lines = [f"| share | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for share, dice in zip(self.shares, self.dice.mean(1).tolist(), strict=True):
            cells = [f"{value:.3f}" for value in (*dice, self.means[share])]
            lines.append(f"| {share:g} | {' | '.join(cells)} |")
        return "\n".join(lines)


@torch.no_grad()
def measure(
    model: PromptableModel,
    now: float,
    items: Sequence[TrainingItem],
    options: SamplingOptions,
    tasks: Sequence[ClassMap],
    patches: int,
    clicks: int,
    shares: Sequence[float] = SHARES,
) -> Measured:
    """Every share on the same patches with the same first prompt; the same cases at each call.

    Args:
        model: on its device.
        now: the share that its weights hold.
        items: to draw from, one of each source in turn; of subjects that were not learnt from.
        options: how patches are drawn.
        tasks: of the experts.
        patches: how many.
        clicks: after the first prompt.
        shares: to try.

    Raises:
        VolumeError: no item has an object to draw a patch around.
    """
    if not any(item.boxes for item in items):
        message = f"shares are measured on items with labels of subjects held out, got {len(items)} items without."
        raise VolumeError(message)
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(SEED)
    rows, subjects = [], set()
    for item, drawn in islice(cases_in_turn(items, options, tasks), patches):
        batch = {key: value[None].to(device) for key, value in drawn.items()}
        target, image = batch["target"], batch["image"]
        if not bool(drawn["real"]):
            image = make_image(batch["labels"], target, generator)
        features, state = encoded(model, batch, image), generator.get_state()
        row = []
        for share in shares:
            generator.set_state(state)
            prompts = first_prompts(target, batch["box"], batch["outside"], generator)
            for click in range(clicks + 1):
                logits = answered(model, features, prompts, share / now)
                row.append(losses.dice(logits > 0, target))
                if click < clicks:
                    prompts = next_prompts(prompts, logits, target, generator)
        rows.append(torch.cat(row).view(len(shares), clicks + 1).cpu())
        subjects.add((item.source, item.subject or item.name))
    return Measured(tuple(shares), torch.stack(rows, dim=1), len(subjects))


def answered(model: PromptableModel, features: PatchFeatures, prompts: PatchPrompts, factor: float) -> Tensor:
    """Logits (B, S, S, S) of the general decoder with its learnt part times a factor."""
    inputs = model.decoder_inputs(features, prompts)
    prior = model.mask_decoder.prior_gain * inputs[-1][:, PRIOR]
    return prior + factor * (model.run_decoder(model.mask_decoder, inputs).logits - prior)


def share_of(bundle: Bundle, given: float | None) -> float:
    """The share that a bundle's weights hold: as its plans say, or as given where they say nothing.

    Raises:
        BundleError: nobody says it, or both do, and something else.
    """
    noted = bundle.plans.shrink
    if noted is None and given is None:
        message = f"the plans of bundle {bundle.identity} must say which share it holds. Say it with --now."
        raise BundleError(message)
    if noted is not None and given not in (None, noted):
        message = f"the plans of bundle {bundle.identity} say that it holds the share {noted:g}, got --now {given:g}."
        raise BundleError(message)
    return float(noted if given is None else given)  # type: ignore[arg-type]


def _check_alone(plans: Plans) -> None:
    if plans.gate is not None or plans.voting is not None:
        message = (
            "the share is chosen before gate and voting head are trained, and this bundle has them. "
            "Choose it on a bundle from before these stages, or leave out --output to measure alone."
        )
        raise BundleError(message)


def measured_on(settings: Mapping[str, Any], given: int | None) -> tuple[int, bool]:
    """One in how many subjects is measured on, and whether the bundle may have learnt from these.

    Args:
        settings: the config of the training; what it holds out no stage has learnt from.
        given: by `--held-out`.

    Raises:
        BundleError: both say it, and not the same.
    """
    apart = int(settings.get("held_out", 0))
    if apart and given not in (None, apart):
        message = f"the config holds out one in {apart} subjects, got --held-out {given}. Leave it out."
        raise BundleError(message)
    return apart or given or 8, not apart


def with_share(content: Content, now: float, measured: Measured, learnt: bool) -> Content:
    """The content with the best share in weights, plans and card; temperatures are to be fitted again.

    Args:
        content: of the bundle that was measured.
        now: the share that its weights hold.
        measured: on training subjects.
        learnt: whether the bundle may have learnt from these.

    Raises:
        BundleError: it has a gate or a voting head, which were trained around the decoder as it is.
    """
    plans = content.plans
    _check_alone(plans)
    model = build_model(plans, dict(content.tensors))
    model.mask_decoder.shrink(measured.best / now)
    gain, error = measured.gain(measured.best, measured.shares[-1])
    text = (
        f"The learnt part of the logits is scaled by {measured.best:g} against the geodesic prior (before: {now:g}). "
        f"Chosen by the mean Dice on {measured.dice.shape[1]} patches of {measured.subjects} subjects "
        f"{LEARNT if learnt else 'held out of training'}; {gain:+.4f} (standard error {error:.4f}) against "
        f"{measured.shares[-1]:g}.\n\n{measured.table}"
    )
    card = with_section(content.card, SECTION, text)
    tensors = {name: tensor.detach() for name, tensor in tensors_by_name(model).items()}
    return uncalibrated(replace(content, plans=replace(plans, shrink=measured.best), tensors=tensors, card=card))


def main(
    bundle: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Bundle to measure.")],
    config: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Of the training: tasks and sampling.")],
    output: Annotated[Path | None, typer.Option(help="Folder of a new bundle with the best share.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder of packed items of split `train`.")] = Path("cache/train"),
    held_out: Annotated[
        int | None, typer.Option(min=1, help="One in so many subjects, where the config holds none out; 8 by default.")
    ] = None,
    now: Annotated[float | None, typer.Option(help="Share that it holds, where its plans do not say.")] = None,
    patches: Annotated[int, typer.Option(min=2, help="How many.")] = 64,
    clicks: Annotated[int, typer.Option(min=0, help="After the first prompt.")] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Say which share of the learnt logits answers best on subjects of split `train`, and write a bundle with it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    opened, settings = load_bundle(bundle), read_config(config)
    plans, share, content = opened.plans, share_of(opened, now), Content.of(opened)
    one_in, learnt = measured_on(settings, held_out)
    if output is not None:
        _check_alone(plans)
        content.check_target(output)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    model = build_model(plans, opened.weights()).to("cuda" if on_gpu else "cpu").requires_grad_(False)
    tasks = [ClassMap(name, task["items"], task["classes"]) for name, task in settings["tasks"].items()]
    options = SamplingOptions(**{"patch_size": plans.patch_size, "margin": plans.margin, **settings["sampling"]})
    if learnt:
        typer.echo(f"The config holds nobody out: measured on one in {one_in} subjects {LEARNT}.")
    items = split_held_out(load_items(cache), one_in)[1]
    measured = measure(model, share, items, options, tasks, patches, clicks)
    typer.echo(measured.table)
    for each in measured.shares:
        if each != share and share in measured.shares:
            gain, error = measured.gain(each, share)
            typer.echo(f"{each:g} less {share:g}: {gain:+.4f}, standard error {error:.4f}")
    typer.echo(f"best: {measured.best:g}, of {np.prod(measured.dice.shape[1:])} answers each")
    if output is not None:
        with_share(content, share, measured, learnt).save(output)


if __name__ == "__main__":
    typer.run(main)
