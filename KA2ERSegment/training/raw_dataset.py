"""nnU-Net's raw data sets as training items: `dataset.json`, `imagesTr` and `labelsTr`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from KA2ERSegment.errors import VolumeError
from KA2ERSegment.geometry import ras_axes
from KA2ERSegment.training.items import TrainingItem, boxes_of
from KA2ERSegment.volume import Volume


@dataclass(frozen=True, slots=True)
class RawDataset:
    """The training cases of a raw data set, not read yet.

    Args:
        folder: of the data set.
        cases: for each case its name, image file and label file.
        names: of each label value but the background.
        ignored: label value that says nothing, or None.
    """

    folder: Path
    cases: tuple[tuple[str, Path, Path], ...]
    names: dict[int, str]
    ignored: int | None

    @classmethod
    def open(cls, folder: Path) -> RawDataset:
        """Look into `nnUNet_raw/DATASET`.

        Raises:
            VolumeError: it is something else, or has no cases with one image and one label map each.
        """
        path = folder / "dataset.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            message = (
                f"the images' folder must be a raw data set of nnU-Net with dataset.json, {str(folder)!r} has none "
                f"that can be read ({error}). Give nnUNet_raw/DATASET."
            )
            raise VolumeError(message) from error
        if not isinstance(about, dict) or not isinstance(about.get("labels"), dict):
            message = f"{str(path)!r} must name the labels as nnU-Net v2 writes them. Repair it."
            raise VolumeError(message)
        values = {name: value for name, value in about["labels"].items() if isinstance(value, int)}
        names = {value: str(name) for name, value in values.items() if value > 0 and name != "ignore"}
        cases = _listed(folder, about) if isinstance(about.get("dataset"), dict) else _found(folder, about)
        there = tuple(case for case in cases if case[1].is_file() and case[2].is_file())
        if not there:
            prepared = (folder / "dataset_fingerprint.json").exists() or any(folder.glob("nnUNetPlans*.json"))
            hint = " It is a preprocessed one: give the raw one." if prepared else ""
            message = (
                f"data set {str(folder)!r} must have cases with an image in imagesTr (CASE_0000) and a label map in "
                f"labelsTr (CASE), got none.{hint}"
            )
            raise VolumeError(message)
        return cls(folder, there, names, values.get("ignore"))

    def canonical_axes(self) -> tuple[int, int, int]:
        """Canonical axis, 0 (K, superior) to 2 (I, right), along which K, J and I of the first image's file lie."""
        axes, _ = ras_axes(Volume.read(self.cases[0][1]).ijk_to_ras)  # the files' I, J, K by R, A and S
        k, j, i = (2 - axes.index(axis) for axis in (2, 1, 0))
        return k, j, i

    def read(self, case: int) -> TrainingItem:
        """One case, on canonical axes.

        Raises:
            VolumeError: image and label map are damaged, or not on one grid.
        """
        name, image_file, label_file = self.cases[case]
        labels, image = Volume.read(label_file).canonical(), Volume.read(image_file).canonical()
        if not labels.same_grid(image.shape_kji, image.ijk_to_ras):
            message = f"case {name!r}: image and label map must lie on one grid, got {image} and {labels}."
            raise VolumeError(message)
        values = labels.array_kji
        if values.min() < 0 or values.max() > 50000 or (values != values.astype(np.uint16)).any():
            message = f"case {name!r}: labels must be whole numbers from 0 to 50000, got {values.dtype} values."
            raise VolumeError(message)
        array = np.ascontiguousarray(values, dtype=np.uint16)
        if self.ignored is not None:
            array[array == self.ignored] = 0
        return TrainingItem(
            name=name, source=self.folder.name, labels=array, images=(_grey_values(image.array_kji),),
            spacing=labels.spacing, names=self.names, boxes=boxes_of(array), licence="", modality="", region="",
        )  # fmt: skip


def _found(folder: Path, about: dict[str, Any]) -> list[tuple[str, Path, Path]]:
    """Cases as nnU-Net looks for them."""
    ending = str(about.get("file_ending", ".nii.gz"))
    images = sorted((folder / "imagesTr").glob(f"*_0000{ending}"))
    names = [path.name[: -len(f"_0000{ending}")] for path in images]
    return [(n, path, folder / "labelsTr" / f"{n}{ending}") for n, path in zip(names, images, strict=True)]


def _listed(folder: Path, about: dict[str, Any]) -> list[tuple[str, Path, Path]]:
    """Cases that dataset.json lists by itself; paths may be relative to it."""
    cases = []
    for name, files in sorted(about["dataset"].items()):
        images: Sequence[str] = files.get("images", ()) if isinstance(files, dict) else ()
        if len(images) == 1 and isinstance(files.get("label"), str):
            cases.append((str(name), folder / images[0], folder / files["label"]))
    return cases


def _grey_values(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The image in its own unit: int16 where that holds it, else float32."""
    whole = np.issubdtype(array.dtype, np.integer) and array.min() >= -32768 and array.max() <= 32767
    return array.astype(np.int16 if whole else np.float32)
