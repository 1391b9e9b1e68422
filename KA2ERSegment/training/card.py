"""The bundle that a training run leaves, with a model card made from what was really used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from torch import Tensor

from KA2ERSegment.bundle import Bundle, save_bundle
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
