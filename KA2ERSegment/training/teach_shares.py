"""`python -m KA2ERSegment.training.teach_shares BUNDLE OUTPUT`: an expert's share says whose image it is.

The share of each expert inside an object is what a viewer shows of level 3 of the amalgamation (KA2ER, arXiv
2410.21085). It means something if on an image of an expert's task that expert has the largest one, and on all others
the foundation. Trained only along with the masks, shares do not come to that in a short training: which expert is heard
makes no difference to the mask yet. So here level 3 alone is asked for it, on patches that were encoded once, while
the embedding that the decoders read is held where it was. All other tensors stay as they are.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from KA2ERSegment.amalgamation import STRIDES
from KA2ERSegment.build import build_model, tensors_by_name
from KA2ERSegment.bundle import Bundle, load_bundle
from KA2ERSegment.errors import BundleError
from KA2ERSegment.experts import Content
from KA2ERSegment.model import PromptableModel
from KA2ERSegment.training.ablation import held_out_dice
from KA2ERSegment.training.calibrate import uncalibrated
from KA2ERSegment.training.card import with_section
from KA2ERSegment.training.config import read_config
from KA2ERSegment.training.encoded import EncodedCase, amalgamation_alone, encode_divided, tasks_in_order, together
from KA2ERSegment.training.items import pack_where_missing
from KA2ERSegment.training.losses import shares_inside
from KA2ERSegment.training.shares import NO_TASK, ShareTable, share_table

logger = logging.getLogger("KA2ERSegment")

SECTION = "## Shares of the experts"
"""Of the model card."""
LEVEL_3 = ("norm_a.", "norm_b.", "a.", "b.", "bias")
"""Parameters of one `Amalgamation` that decide on shares and on nothing else."""
HOLD = 4.0
"""Weight of the embedding's change, relative to its size, beside the cross-entropy of the shares."""


@dataclass(frozen=True, slots=True)
class Taught:
    """What teaching brought, on patches of other subjects.

    Args:
        before: shares before it.
        after: shares after it.
        dice_before: mean Dice after a first prompt and after one click.
        dice_after: the same after it.
        embedding: change of the embedding, relative to its size (root mean square).
    """

    before: ShareTable
    after: ShareTable
    dice_before: tuple[float, float]
    dice_after: tuple[float, float]
    embedding: float


def level_3(model: PromptableModel) -> list[nn.Parameter]:
    """The parameters that decide on the shares that are shown, those of the finest stride."""
    level = model.amalgamation[str(STRIDES[0])]
    return [parameter for name, parameter in level.named_parameters() if name.startswith(LEVEL_3)]


def teach(
    model: PromptableModel,
    cases: Sequence[EncodedCase],
    steps: int,
    batch: int,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> None:
    """Train level 3 of a model in place.

    Args:
        model: with a hierarchical amalgamation, on its device.
        cases: to learn from; each task is drawn equally often, that of no expert too.
        steps: of the optimizer.
        batch: cases of one step.
        learning_rate: at the start; it falls to zero.
        seed: of what is drawn.
    """
    device, rng = next(model.parameters()).device, np.random.default_rng(seed)
    former = copy.deepcopy(model).requires_grad_(False)
    model.requires_grad_(False)
    taught = level_3(model)
    for parameter in taught:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(taught, lr=learning_rate, weight_decay=0.0)
    tasks = np.array([case.task for case in cases])
    members = [np.flatnonzero(tasks == task) for task in np.unique(tasks)]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        drawn = [int(rng.choice(members[rng.integers(len(members))])) for _ in range(batch)]
        some = together(model, [cases[n] for n in drawn], device)
        present = torch.ones(batch, len(model.arms), dtype=torch.bool, device=device)
        with torch.no_grad():
            known = some.amalgamated(former, present).embedding
        features = some.amalgamated(model, present)
        loss = shares_loss(features.weights, some.task, some.target) + HOLD * _changed(features.embedding, known).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            logger.info("step %d of %d, loss %.3f", step + 1, steps, float(loss.detach()))
    model.requires_grad_(False)


def shares_loss(weights: Tensor, task: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of the mean shares inside the object with the arm of the image's task; arm 0 where it is nobody's.

    Args:
        weights: (B, K+1, n, n, n), summing to 1 over the arms.
        task: (B,) int64, arm of the case's own expert, 0 for none.
        target: (B, S, S, S) bool.
    """
    return F.nll_loss(shares_inside(weights, target).clamp_min(1e-6).log(), task)


def _changed(embedding: Tensor, known: Tensor) -> Tensor:
    """(B,) squared change, relative to the size."""
    return (embedding - known).square().flatten(1).sum(1) / known.square().flatten(1).sum(1)


@torch.no_grad()
def embedding_change(model: PromptableModel, former: PromptableModel, cases: Sequence[EncodedCase]) -> float:
    """Root mean square change of the embedding between two models, relative to its size."""
    device = next(model.parameters()).device
    present = torch.ones(1, len(model.arms), dtype=torch.bool, device=device)
    found = []
    for case in cases:
        one = together(model, [case], device)
        found.append(_changed(one.amalgamated(model, present).embedding, one.amalgamated(former, present).embedding))
    return float(torch.cat(found).mean().sqrt())


def teach_bundle(
    bundle: Bundle,
    learning: Sequence[EncodedCase],
    apart: Sequence[EncodedCase],
    tasks: Sequence[str],
    steps: int,
    batch: int,
    device: str = "cpu",
) -> tuple[Content, Taught]:
    """The bundle with taught shares, and what that brought.

    Args:
        bundle: with a hierarchical amalgamation and experts.
        learning: encoded with it, to learn from.
        apart: of other subjects.
        tasks: names of the experts in the order of the cases' tasks.
        steps: of the optimizer.
        batch: cases of one step.
        device: cpu or cuda.

    Raises:
        BundleError: the bundle has no level 3.
    """
    content = uncalibrated(Content.of(bundle))
    if content.plans.amalgamation.kind != "hierarchical" or not content.plans.experts:
        message = "shares are taught to a hierarchical amalgamation of experts, and the bundle has none."
        raise BundleError(message)
    former = build_model(amalgamation_alone(content.plans), bundle.weights()).to(device).eval()
    model = copy.deepcopy(former)
    teach(model, learning, steps, batch)
    named = [tasks[case.task - 1] if case.task else NO_TASK for case in apart]
    measured = [held_out_dice(each, apart, clicks=1) for each in (former, model)]
    (dice, shares), (dice_after, shares_after) = measured
    taught = Taught(
        before=share_table(model.arms, shares, named),
        after=share_table(model.arms, shares_after, named),
        dice_before=(float(dice[:, 0].mean()), float(dice[:, 1].mean())),
        dice_after=(float(dice_after[:, 0].mean()), float(dice_after[:, 1].mean())),
        embedding=embedding_change(model, former, apart),
    )
    own = {name: value for name, value in tensors_by_name(model).items() if name.startswith("amalgamation.")}
    card = with_section(content.card, SECTION, _words(taught, len(learning), len(apart)))
    return replace(content, tensors={**content.tensors, **own}, card=card), taught


def _words(taught: Taught, learnt: int, apart: int) -> str:
    """What was found, for the model card."""
    return (
        f"Level 3 of the amalgamation was asked on {learnt} encoded patches to give the largest share to the expert "
        "whose task the image is, and to the foundation where it is nobody's; all else stayed as it was. On "
        f"{apart} patches of other training subjects (Dice after a first prompt {taught.dice_before[0]:.3f} before and "
        f"{taught.dice_after[0]:.3f} after, after a click {taught.dice_before[1]:.3f} and {taught.dice_after[1]:.3f}), "
        f"mean shares inside the object:\n\n{taught.after}"
    )


def main(
    bundle: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Bundle to begin from.")],
    output: Annotated[Path, typer.Argument(help="Folder of the new bundle.")],
    config: Annotated[Path, typer.Option(help="With the experts' tasks.")] = Path(__file__).parent / "configs/cpu.json",
    data: Annotated[Path, typer.Option(help="Folder that holds the manifests' folders.")] = Path("../shared/data"),
    cache: Annotated[Path, typer.Option(help="Folder of packed items; made where missing.")] = Path("cache/train"),
    cases: Annotated[int, typer.Option(help="Training patches, encoded once.")] = 256,
    held_out: Annotated[int, typer.Option(help="Patches of other subjects.")] = 66,
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 300,
    batch: Annotated[int, typer.Option(help="Patches of one step.")] = 8,
    gigabytes: Annotated[float, typer.Option(help="Memory for encoded patches.")] = 2.5,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Teach level 3 of a bundle's amalgamation whose image it sees."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    opened, settings = load_bundle(bundle), read_config(config)
    tasks = tasks_in_order(opened.plans, settings["tasks"])
    pack_where_missing(cache, data, settings)
    learning, apart = encode_divided(opened, cache, tasks, settings, cases, held_out, gigabytes, seed, device)
    content, taught = teach_bundle(opened, learning, apart, [task.name for task in tasks], steps, batch, device)
    content.save(output, force=True)
    typer.echo(f"before:\n{taught.before}\n\nafter:\n{taught.after}\n")
    typer.echo(f"Dice after a prompt and a click: {taught.dice_before} before, {taught.dice_after} after")
    typer.echo(f"the embedding changed by {taught.embedding:.1%}")


if __name__ == "__main__":
    typer.run(main)
