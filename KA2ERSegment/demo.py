"""`ka2ersegment demo`, what `make demo` calls: a structure of a real brain MR from a box and a few clicks.

The sample is the MNI152 T1 template with its grey- and white-matter labels, which come inside the package nilearn: a
real image (the average of 152 people), and nothing is fetched. It is in the training data of the shipped bundle, so
its Dice shows that everything works and not how well: `ka2ersegment evaluate` does that. The prompts are made from
the label, as a user who knows anatomy would give them, so that Dice can be printed after each of them.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from KA2ERSegment.errors import KA2ERError
from KA2ERSegment.evaluation import dice, drawn_box, next_click
from KA2ERSegment.geometry import BoolArray, Ijk
from KA2ERSegment.manifests import seed_of
from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity, Prompt
from KA2ERSegment.volume import Volume

if TYPE_CHECKING:
    from KA2ERSegment.prediction import Prediction

STRUCTURE = "brain"
CORRECTIONS = 1
"""Clicks in the largest error, after the box and the first point."""


@dataclass(frozen=True, slots=True)
class DemoStep:
    """What one prompt brought."""

    after: str
    dice: float
    seconds: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Steps, the files written, and the command line that does the same on one's own file."""

    steps: tuple[DemoStep, ...]
    files: tuple[Path, ...]
    own_file_command: str

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "structure": STRUCTURE,
            "steps": [asdict(step) for step in self.steps],
            "files": [str(path) for path in self.files],
            "own_file_command": self.own_file_command,
        }


def load_sample() -> tuple[Volume, BoolArray]:
    """The MNI152 T1 at 1 mm, and its brain (grey and white matter, largest connected part) as a (K, J, I) mask."""
    try:
        from nilearn.datasets import load_mni152_gm_mask, load_mni152_template, load_mni152_wm_mask
    except ImportError as error:
        message = "the demo needs the package `nilearn`, which ships its sample: pip install ka2ersegment[demo]."
        raise KA2ERError(message) from error
    image = load_mni152_template(resolution=1)
    labels = [load(resolution=1) for load in (load_mni152_gm_mask, load_mni152_wm_mask)]
    array = np.asarray(image.dataobj, dtype=np.float32).T
    parts, _ = ndimage.label(sum(np.asarray(label.dataobj).T > 0 for label in labels) > 0)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return Volume(array, image.affine, "MNI152 T1"), parts == sizes.argmax()


def run_demo(
    output: str | os.PathLike[str], bundle: str | os.PathLike[str] | None = None, device: str = "auto"
) -> DemoResult:
    """Segment the sample, and write its mask (twice: NIfTI and a Slicer segmentation), image and picture.

    Args:
        output: folder, made where it is not there; the demo's own files in it are replaced.
        bundle: folder; None: the one that is shipped.
        device: `auto`, `cpu` or `cuda`.
    """
    from KA2ERSegment.bundle import load_bundle
    from KA2ERSegment.pictures import picture_of_prediction
    from KA2ERSegment.segmentation_files import write_segmentation
    from KA2ERSegment.session import Session

    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    volume, truth = load_sample()
    session = Session(load_bundle(bundle), device=device)
    session.set_volume(volume)
    session.select(STRUCTURE)

    rng = seed_of("demo", STRUCTURE)
    box = drawn_box(truth, rng)
    inside = _inside(truth)
    prompts: list[Prompt] = []
    steps: list[DemoStep] = []

    def add(prompt: Prompt, text: str) -> Prediction:
        begin = time.perf_counter()
        prediction = session.add(prompt)
        seconds = time.perf_counter() - begin
        prompts.append(prompt)
        steps.append(DemoStep(text, round(dice(prediction.mask, truth), 4), round(seconds, 3)))
        return prediction

    prediction = add(BoxPrompt.from_ijk(box.start, box.stop, volume), f"box {_text(box.start)} to {_text(box.stop)}")
    prediction = add(PointPrompt.from_ijk(inside, volume), f"positive point {_text(inside)}")
    for _ in range(CORRECTIONS):
        click = next_click(prediction.mask, truth, rng)
        if click is not None:
            ijk, polarity = click
            kind = "positive" if polarity is Polarity.POSITIVE else "negative"
            prediction = add(PointPrompt.from_ijk(ijk, volume, polarity), f"{kind} point {_text(ijk)}")

    masks = {STRUCTURE: prediction.mask}
    files = [folder / "brain.nii.gz", folder / "brain.seg.nrrd", folder / "brain.png"]
    for path in files[:2]:
        write_segmentation(path, masks, volume, force=True)
    arms = {name: prediction.experts[name] for name in prediction.arms}
    picture_of_prediction(files[2], volume, prediction.mask, prompts, arms, truth)
    i, j, k = inside
    command = (
        f"{_program()} segment YOUR_IMAGE.nii.gz --output mask.nii.gz "
        f"--box {_text(box.start)},{_text(box.stop)} --point {i},{j},{k}"
    )
    return DemoResult(tuple(steps), tuple(files), command)


def _program() -> str:
    """How this program was called, where that was by the name `ka2ersegment`: it may not be on the PATH."""
    called = Path(sys.argv[0])
    return str(called) if called.stem == "ka2ersegment" else "ka2ersegment"


def _inside(truth: BoolArray) -> Ijk:
    """The voxel deepest inside the object, where a user would click."""
    click = next_click(np.zeros(truth.shape, dtype=bool), truth, seed_of("demo", "inside"))
    if click is None:
        message = "the sample's label must not be empty."
        raise KA2ERError(message)
    return click[0]


def _text(ijk: Ijk) -> str:
    return ",".join(str(x) for x in ijk)
