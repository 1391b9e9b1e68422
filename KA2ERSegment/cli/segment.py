"""`ka2ersegment segment`: one object, here or by an engine that runs somewhere."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from KA2ERSegment.cli.common import BundleOption, Device, DeviceOption, JsonOption, KeyOption, Run, running
from KA2ERSegment.errors import KA2ERError

if TYPE_CHECKING:
    from KA2ERSegment.engine.client import EngineClient
    from KA2ERSegment.engine.wire import ObjectChange
    from KA2ERSegment.geometry import Box, FloatArray
    from KA2ERSegment.prompts import Prompt
    from KA2ERSegment.volume import Volume

FORMATS = (".nii.gz", ".nii", ".seg.nrrd", ".seg.dcm", ".nrrd", ".mha")


def segment(
    image: Annotated[Path, typer.Argument(help="NIfTI, NRRD or MHA file, or a folder with one DICOM series.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Mask file: .nii.gz, .nrrd, .mha, .seg.nrrd or .seg.dcm.")
    ],
    object_name: Annotated[
        str | None, typer.Option("--object", help="Name of the object that the box and points are for.")
    ] = None,
    box: Annotated[
        str | None,
        typer.Option("--box", help="I0,J0,K0,I1,J1,K1 in voxels, half-open; with --ras two opposite corners in mm."),
    ] = None,
    point: Annotated[list[str] | None, typer.Option("--point", help="I,J,K inside the object; repeat.")] = None,
    negative_point: Annotated[
        list[str] | None, typer.Option("--negative-point", help="I,J,K outside the object; repeat.")
    ] = None,
    *,
    ras: Annotated[bool, typer.Option("--ras", help="Points and box are in RAS mm, not in voxels.")] = False,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Prompts that a session saved; they come before the others.")
    ] = None,
    confidence: Annotated[
        Path | None, typer.Option("--confidence", help="Folder for each expert's probability and weight maps.")
    ] = None,
    bundle: BundleOption = None,
    device: DeviceOption = Device.AUTO,
    engine: Annotated[
        str | None, typer.Option("--engine", help="Address of a running engine that shall do it, http(s)://host:port.")
    ] = None,
    api_key: KeyOption = "",
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Segment one object in IMAGE from a box, points, or saved prompts."""
    if box is None and not point and not negative_point and prompts is None:
        message = "at least one prompt is needed: --box, --point, --negative-point or --prompts."
        raise typer.BadParameter(message)
    if engine is not None and (bundle is not None or device is not Device.AUTO):
        message = "an engine has its own bundle and device: leave out --bundle and --device, or --engine."
        raise typer.BadParameter(message)
    corners = None if box is None else _numbers(box, 6, "--box", whole=not ras)
    clicks = [(_numbers(text, 3, "--point", whole=not ras), True) for text in point or []]
    clicks += [(_numbers(text, 3, "--negative-point", whole=not ras), False) for text in negative_point or []]
    if not output.name.lower().endswith(FORMATS):
        message = f"--output must end in one of {', '.join(FORMATS)}, got {output.name!r}."
        raise typer.BadParameter(message)
    with running(as_json) as run:
        from KA2ERSegment.segmentation_files import check_output, write_confidence, write_segmentation

        check_output(output, force=force)
        if not os.access(output.parent, os.W_OK):
            message = f"the folder of output {str(output)!r} must be writable. Choose another one."
            raise KA2ERError(message)
        headers = _headers_for(output, image)
        if confidence is not None:
            _check_confidence_folder(confidence, force=force)
        with run.step("Starting"):
            from KA2ERSegment.volume import Volume
        with run.step("Reading the image"):
            volume = Volume.read(image)
        new = _prompts_of(corners, clicks, volume, ras=ras)
        begin = time.perf_counter()
        with contextlib.ExitStack() as until_written:
            if engine is None:
                done = _segment_here(run, volume, new, prompts, object_name, bundle, device)
            else:
                client = until_written.enter_context(contextlib.closing(_client(engine, api_key)))
                done = _segment_there(run, volume, new, prompts, object_name, client)
            seconds = time.perf_counter() - begin
            if confidence is not None:
                with run.step("Computing and writing confidence maps"):
                    write_confidence(confidence, done.maps, volume, force=force)
        with run.step("Writing"):
            write_segmentation(output, done.masks, volume, headers=headers, force=force)
        voxel_ml = float(volume.spacing[0] * volume.spacing[1] * volume.spacing[2]) / 1000
        counts = {name: int(mask.sum()) for name, mask in done.masks.items()}
        run.result(
            {
                "output": str(output),
                "confidence": None if confidence is None else str(confidence),
                "objects": {n: {"voxels": c, "millilitres": round(c * voxel_ml, 4)} for n, c in counts.items()},
                "quality": round(done.quality, 4),
                "expert_weights": {
                    name: round(float(weight), 4) for name, weight in done.weights.items() if confidence is not None
                },
                "device": done.device,
                "seconds": round(seconds, 3),
            }
        )
        for name, count in counts.items():
            run.say(f"{name}: {count} voxels, {count * voxel_ml:.2f} ml")
        run.say(f"expected quality (Dice) {done.quality:.2f}, {seconds:.1f} s, written to {output}")
        if not any(counts.values()):
            run.warn("the mask is empty: add a positive point inside the object.")


def _headers_for(output: Path, image: Path) -> list[Any]:
    """Of the slices that a DICOM SEG refers to; none for other outputs."""
    if not output.name.lower().endswith(".seg.dcm"):
        return []
    if not image.is_dir():
        message = f"a .seg.dcm belongs to a DICOM series: the image must be its folder, got {str(image)!r}."
        raise KA2ERError(message)
    from KA2ERSegment.dicom_segmentation import series_headers
    from KA2ERSegment.image_files import series_files

    return series_headers(series_files(image))


def _numbers(text: str, count: int, option: str, *, whole: bool) -> tuple[float, ...]:
    """Comma-separated numbers; typer.BadParameter (exit code 2) where they are not."""
    names = {3: "I,J,K", 6: "I0,J0,K0,I1,J1,K1"}[count]
    try:
        values = tuple((int if whole else float)(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        kind = "whole numbers (voxels)" if whole else "numbers (RAS mm)"
        message = f"must be {count} {kind} as {names}, got {text!r}."
        if whole:
            message += " Give --ras for coordinates in mm."
        raise typer.BadParameter(message, param_hint=option)
    return values


def _check_confidence_folder(folder: Path, *, force: bool) -> None:
    if folder.exists() and not folder.is_dir():
        message = f"--confidence {str(folder)!r} must be a folder, got a file."
        raise KA2ERError(message)
    if folder.is_dir() and any(folder.iterdir()) and not force:
        message = f"--confidence {str(folder)!r} must be an empty or new folder. Choose another one, or give --force."
        raise KA2ERError(message)
    if not folder.parent.is_dir():
        message = f"the folder that --confidence {str(folder)!r} goes into must exist. Make it first."
        raise KA2ERError(message)


def _prompts_of(
    corners: tuple[float, ...] | None, clicks: list[tuple[tuple[float, ...], bool]], volume: Volume, *, ras: bool
) -> list[Prompt]:
    """The box, then positive points, then negative ones."""
    from KA2ERSegment.prompts import BoxPrompt, PointPrompt, Polarity

    prompts: list[Prompt] = []
    if corners is not None:
        if ras:
            low, high = zip(*(sorted(pair) for pair in zip(corners[:3], corners[3:], strict=True)), strict=True)
            x, y, z = (b - a for a, b in zip(low, high, strict=True))
            prompts.append(BoxPrompt((low[0], low[1], low[2]), ((x, 0.0, 0.0), (0.0, y, 0.0), (0.0, 0.0, z))))
        else:
            i0, j0, k0, i1, j1, k1 = (int(c) for c in corners)
            prompts.append(BoxPrompt.from_ijk((i0, j0, k0), (i1, j1, k1), volume))
    for numbers, positive in clicks:
        polarity = Polarity.POSITIVE if positive else Polarity.NEGATIVE
        a, b, c = numbers
        if ras:
            prompts.append(PointPrompt((float(a), float(b), float(c)), polarity))
        else:
            prompts.append(PointPrompt.from_ijk((int(a), int(b), int(c)), volume, polarity))
    return prompts


class _Segmented(NamedTuple):
    """What `segment` writes, wherever it was done.

    Args:
        masks: of each object; where they overlap the newest shows.
        quality: Dice to expect of the object that prompts went to.
        weights: mean share of each expert in that object, by its name in `Prediction.experts`.
        maps: file name to confidence map, each computed when it is asked for.
        device: of the network.
    """

    masks: dict[str, Any]
    quality: float
    weights: dict[str, float]
    maps: Mapping[str, Any]
    device: str


class _Maps(Mapping[str, Any]):
    """Probability and weight of each expert on the whole grid, by file name, computed as they are asked for.

    What is kept is one expert's opinion on the patch alone: a whole grid for each of 16 experts would be gigabytes.

    Args:
        experts: their names.
        look: what one of them says: probability and weight, as they come.
        whole: takes either to the volume's grid.
    """

    def __init__(
        self, experts: Sequence[str], look: Callable[[str], tuple[Any, Any]], whole: Callable[[Any], Any]
    ) -> None:
        self._look, self._whole = look, whole
        stems = _file_stems(experts)
        self._places = {
            f"{stems[expert]}_{kind}": (expert, at)
            for expert in experts
            for at, kind in enumerate(("probability", "weight"))
        }
        self._last: tuple[str, tuple[Any, Any]] | None = None

    def __getitem__(self, name: str) -> Any:
        expert, at = self._places[name]
        if self._last is None or self._last[0] != expert:
            self._last = None  # lest two are held
            self._last = expert, self._look(expert)
        return self._whole(self._last[1][at])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _segment_here(
    run: Run,
    volume: Volume,
    new: list[Prompt],
    saved: Path | None,
    name: str | None,
    bundle: Path | None,
    device: Device,
) -> _Segmented:
    """Segment in this process."""
    with run.step("Starting"):
        from KA2ERSegment.bundle import load_bundle
        from KA2ERSegment.session import Session
    with run.step("Loading the bundle"):
        loaded = load_bundle(bundle)
    with run.step("Segmenting"):
        if saved is None:
            session = Session(loaded, device=device.value)
            session.set_volume(volume)
        else:
            session = Session.replay(saved, volume, loaded, device=device.value)
        session.select(name or (session.selected if saved else "object"))
        for prompt in new:
            session.add(prompt)
    prediction = session.prediction
    if prediction is None:
        raise _no_prompt(session.selected)
    labels, names = session.label_map()
    masks = {each: labels == value for value, each in enumerate(names, 1)}
    shown = prediction

    def opinion(expert: str) -> tuple[Any, Any]:
        box, probability, weight = shown.opinion_crop(expert)
        return (box, probability), (box, weight)

    maps = _Maps(list(shown.shares), opinion, lambda crop: _in_box(crop[0], crop[1], volume))
    return _Segmented(masks, float(shown.quality), dict(shown.shares), maps, device.value)


def _client(url: str, api_key: str) -> EngineClient:
    """Nothing of torch is loaded with it."""
    from KA2ERSegment.engine.client import EngineClient

    return EngineClient(url, api_key)


def _segment_there(
    run: Run,
    volume: Volume,
    new: list[Prompt],
    saved: Path | None,
    name: str | None,
    client: EngineClient,
) -> _Segmented:
    """Segment in an engine that runs somewhere; nothing of torch is loaded here."""
    import numpy as np

    from KA2ERSegment.steps import read_steps_file

    with run.step("Asking the engine"):
        info = client.info()
    with run.step("Sending the image"):
        session = client.open(volume.array_kji, volume.ijk_to_ras)
    found: dict[str, ObjectChange] = {}
    with run.step("Segmenting"):
        changes = [] if saved is None else [session.give(read_steps_file(saved))]
        changes += [session.select(name or (session.selected if saved else "object"))]
        changes += [session.add(prompt) for prompt in new]
    for change in changes:
        found |= {one.name: one for one in change.objects}
    mine = found.get(session.selected)
    if mine is None or mine.quality is None:
        raise _no_prompt(session.selected)
    labels = np.zeros(volume.shape_kji, dtype=np.uint16)
    for value, each in enumerate(session.names, 1):
        box, mask = session.mask(each)
        labels[box.slices][mask] = value
    masks = {each: labels == value for value, each in enumerate(session.names, 1)}

    def opinion(expert: str) -> tuple[Any, Any]:
        said = session.opinion(session.selected, expert)
        return (said.ijk_to_ras, said.probability), (said.ijk_to_ras, said.weight)

    maps = _Maps(list(mine.shares), opinion, lambda said: _on_grid(said[0], said[1], volume))
    return _Segmented(masks, mine.quality, dict(mine.shares), maps, str(info["device"]))


def _in_box(box: Box, values: Any, volume: Volume) -> Any:
    """Values in a box of a volume's own grid, on the whole of it."""
    import numpy as np

    out = np.zeros(volume.shape_kji, dtype=np.float32)
    if box.size:
        box.paste(values, out)
    return out


def _on_grid(ijk_to_ras: FloatArray, values: Any, volume: Volume) -> Any:
    """What an engine says on the network's grid (255 is 1), on a volume's: linear, 0 beyond the outermost samples.

    As `Prediction.opinion_crop`, without torch. The two grids have parallel axes once the volume's are canonical.
    """
    import numpy as np
    from scipy import ndimage

    canonical = volume.canonical()
    to_sample = np.linalg.inv(ijk_to_ras) @ canonical.ijk_to_ras
    steps, offsets = to_sample.diagonal()[2::-1], to_sample[2::-1, 3]  # KJI
    seen = []
    for step, offset, samples, voxels in zip(steps, offsets, values.shape, canonical.shape_kji, strict=True):
        at = offset + step * np.arange(voxels) + 1e-6  # a voxel on the very face: in at the start, out at the end
        inside = np.flatnonzero((at >= -0.5) & (at < samples - 0.5))
        seen.append(slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0))
    out = np.zeros(volume.shape_kji, dtype=np.float32)
    crop = volume.to_canonical(out)[tuple(seen)]
    if crop.size:
        first = offsets + steps * [part.start for part in seen]
        known = values / np.float32(255)
        crop[...] = ndimage.affine_transform(known, steps, first, crop.shape, order=1, mode="nearest")
    return out


def _no_prompt(name: str) -> KA2ERError:
    message = (
        f"object {name!r} must have at least one prompt, got none. Add one with --point, or name another --object."
    )
    return KA2ERError(message)


def _file_stems(experts: Sequence[str]) -> dict[str, str]:
    """What each expert's files begin with: its name as far as file names allow, with a number where that is taken."""
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for expert in experts:
        stem = first = re.sub(r"[^A-Za-z0-9_-]+", "_", expert)
        number = 1
        while stem.casefold() in taken:  # "a" and "A" are one file on Windows and macOS
            number += 1
            stem = f"{first}_{number}"
        taken.add(stem.casefold())
        stems[expert] = stem
    return stems
