"""The bundle that a training run leaves, with a model card made from what was really used.

`python -m KA2ERSegment.training.card BUNDLE --results FOLDER...` writes what `ka2ersegment evaluate` measured into it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from KA2ERSegment.bundle import CARD, CHECKSUMS, PLANS, WEIGHTS, Bundle, load_bundle, save_bundle
from KA2ERSegment.plans import Plans
from KA2ERSegment.training.items import TrainingItem


def write_bundle(
    folder: Path,
    plans: Plans,
    tensors: dict[str, Tensor],
    items: Sequence[TrainingItem],
    about: str,
    share_alike: bool = False,
) -> Bundle:
    """Save weights with plans, card and licences.

    Args:
        folder: of the bundle.
        plans: of the model.
        tensors: by parameter name.
        items: everything the weights were trained on.
        about: one paragraph on the training: steps, time, hardware.
        share_alike: whether items under a share-alike licence were among them.
    """
    licence = files("KA2ERSegment.training").joinpath("WEIGHTS_LICENSE.txt").read_text(encoding="utf-8")
    card = model_card(plans, tensors, items, about, share_alike)
    return save_bundle(folder, plans, tensors, card, {"LICENSE": licence})


def model_card(
    plans: Plans, tensors: dict[str, Tensor], items: Sequence[TrainingItem], about: str, share_alike: bool = False
) -> str:
    """The card's text (Markdown)."""
    count = sum(tensor.numel() for tensor in tensors.values()) / 1e6
    experts = "\n".join(
        f"- **{expert.name}**: {expert.task}; classes {', '.join(expert.classes)}." for expert in plans.experts
    )
    rows = Counter((item.source, item.licence, "image" if item.images else "label map") for item in items)
    sources = "\n".join(f"| {source} | {terms} | {kind} | {n} |" for (source, terms, kind), n in sorted(rows.items()))
    terms = (
        "some under share-alike licences, which may bind these weights too: for experiments, not to be shipped."
        if share_alike
        else "all under permissive licences; nothing share-alike, nothing non-commercial."
    )
    return f"""# Model card

Promptable 3D segmentation: points, boxes, scribbles, lassos or a mask in, a mask out, with each expert's opinion.
Research use. Not a medical device; nothing it draws may be used for diagnosis or treatment without a reader.

## What is inside
{count:.2f} million parameters, stored as float16: a SwinUNETR encoder (MONAI) as foundation, {len(plans.experts)}
nnU-Net encoders as frozen experts, their hierarchical amalgamation (after KA2ER, arXiv 2410.21085), a prompt encoder
and a mask decoder. One patch is {plans.patch_size}^3 samples, scaled to what is prompted.

{experts}

## How it was trained
{about}

Images are real ones, disturbed, and ones made from label maps (random intensities, textures, partial volume, bias
field, slice thickness, noise). Targets are labels, unions and parts of labels, and made-up lesions. Prompts are
simulated: a 3D box, a box drawn on a slice, or a click; then clicks in the error.

## What it was trained on
Items of split `train` alone, {terms}

| source | licence | kind | items |
|---|---|---|---|
{sources}

## What it was not trained on
Ultrasound, PET, microscopy; tumours of liver and kidney; knee and female pelvis in MR (only made-up images of label
maps). Expect the least there.

## Known limits
- The patch has {plans.patch_size} samples along each side: the border of a large object is coarser than the voxels.
- The confidence maps are not calibrated.
"""


RESULTS = "## What it reaches"


def with_results(card: str, summaries: Sequence[Path]) -> str:
    """The card with a section on the results of `ka2ersegment evaluate`, one table for each `summary.json`.

    A former section of that name is replaced.
    """
    tables = []
    for path in summaries:
        summary = json.loads(path.read_text(encoding="utf-8"))
        settings, sources = summary["settings"], summary["sources"]
        prompts = "box, then five clicks" if settings["with_box"] else "five clicks, no box"
        most = settings["max_objects_per_item"]
        header = (
            f"{settings['method'].split(' ')[0]}, split {settings['split']}, {prompts}"
            f"{f', at most {most} objects of one item' if most else ''}:"
        )
        keys = ("box_dice", "dsc1", "dsc5", "dsc_auc", "nsd_auc")
        rows = [(name, row["objects"], *(row[key] for key in keys)) for name, row in sources.items()]
        lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
        titles = "| source | objects | Dice, box | Dice, 1 click | Dice, 5 clicks | DSC AUC (of 4) | NSD AUC (of 4) |"
        tables.append("\n".join([header, "", titles, "|---|---|---|---|---|---|---|", *lines]))
    return card.split(RESULTS)[0].rstrip() + f"\n\n{RESULTS}\n" + "\n\n".join(tables) + "\n"


def with_section(card: str, title: str, text: str) -> str:
    """The card with a section of that title (Markdown, "## ..."), a former one replaced.

    Results are left out: they were those of the bundle before.
    """
    parts = re.split(r"(?m)^(?=## )", card)
    kept = [part.strip() for part in parts if part.strip() and not part.startswith((title, RESULTS))]
    return "\n\n".join([*kept, f"{title}\n{text.strip()}"]) + "\n"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def add_results(
    bundle: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The bundle's folder.")],
    results: Annotated[list[Path], typer.Option(help="Folders that `ka2ersegment evaluate` wrote.")],
) -> None:
    """Write evaluation results into a bundle's model card; the weights stay the same."""
    opened = load_bundle(bundle)
    card = (bundle / CARD).read_text(encoding="utf-8")
    others = [name for name in opened.checksums if name not in (CARD, CHECKSUMS, PLANS, WEIGHTS)]
    licences = {name: (bundle / name).read_text(encoding="utf-8") for name in others}
    text = with_results(card, [folder / "summary.json" for folder in results])
    save_bundle(bundle, opened.plans, opened.weights(), text, licences)


if __name__ == "__main__":
    typer.run(add_results)
