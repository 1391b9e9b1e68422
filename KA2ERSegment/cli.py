"""The command line `ka2ersegment`. Imports that take time are inside the commands, so that help is quick.

Exit codes: 0 done, 1 the run failed (one line says why), 2 wrong usage. With `--json` there is exactly one JSON
document on stdout; messages and progress always go to stderr. Neither holds voxels or anything of a DICOM
header; an error names the file that was given.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console

from KA2ERSegment.errors import KA2ERError

if TYPE_CHECKING:
    from rich.table import Table

    from KA2ERSegment.bundle import Bundle
    from KA2ERSegment.engine.wire import ObjectChange
    from KA2ERSegment.geometry import FloatArray
    from KA2ERSegment.plans import ExpertPlans
    from KA2ERSegment.prompts import Prompt
    from KA2ERSegment.volume import Volume

FORMATS = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha")

app = typer.Typer(
    help="Segment 3D medical images from a few prompts: boxes and clicks in, masks out.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # locals may hold file names of patients
    context_settings={"help_option_names": ["-h", "--help"]},
)
bundle_app = typer.Typer(help="Look at a trained bundle, or verify its files.", no_args_is_help=True)
app.add_typer(bundle_app, name="bundle")
expert_app = typer.Typer(help="List a bundle's experts, add a lab's own nnU-Net, take one out.", no_args_is_help=True)
app.add_typer(expert_app, name="expert")


class Device(str, Enum):
    """Where the network runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Method(str, Enum):
    """What is evaluated."""

    KA2ER = "ka2er"
    GROWCUT = "growcut"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
BundleOption = Annotated[Path | None, typer.Option("--bundle", help="Bundle folder; default: the one shipped.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the network runs.")]
KeyOption = Annotated[
    str,
    typer.Option(
        "--api-key", envvar="KA2ERSEGMENT_API_KEY", show_envvar=True, help="The engine's key; other users can see it."
    ),
]


@app.command()
def segment(
    image: Annotated[Path, typer.Argument(help="NIfTI, NRRD or MHA file, or a folder with one DICOM series.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Mask file: .nii.gz, .nrrd, .mha or .seg.nrrd.")],
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
    with _run(as_json) as run:
        from KA2ERSegment.segmentation_files import check_output, write_confidence, write_segmentation

        check_output(output, force=force)
        if not os.access(output.parent, os.W_OK):
            message = f"the folder of output {str(output)!r} must be writable. Choose another one."
            raise KA2ERError(message)
        if confidence is not None:
            _check_confidence_folder(confidence, force=force)
        with run.step("Starting"):
            from KA2ERSegment.volume import Volume
        with run.step("Reading the image"):
            volume = Volume.read(image)
        new = _prompts_of(corners, clicks, volume, ras=ras)
        begin = time.perf_counter()
        if engine is None:
            done = _segment_here(
                run, volume, new, prompts, object_name, bundle, device, opinions=confidence is not None
            )
        else:
            done = _segment_there(
                run, volume, new, prompts, object_name, engine, api_key, opinions=confidence is not None
            )
        seconds = time.perf_counter() - begin
        with run.step("Writing"):
            if confidence is not None:
                write_confidence(confidence, done.maps, volume, force=force)
            write_segmentation(output, done.masks, volume, force=force)
        voxel_ml = float(volume.spacing[0] * volume.spacing[1] * volume.spacing[2]) / 1000
        counts = {name: int(mask.sum()) for name, mask in done.masks.items()}
        run.result(
            {
                "output": str(output),
                "confidence": None if confidence is None else str(confidence),
                "objects": {n: {"voxels": c, "millilitres": round(c * voxel_ml, 4)} for n, c in counts.items()},
                "quality": round(done.quality, 4),
                "expert_weights": {name: round(float(weight), 4) for name, weight in done.weights.items()},
                "device": done.device,
                "seconds": round(seconds, 3),
            }
        )
        for name, count in counts.items():
            run.say(f"{name}: {count} voxels, {count * voxel_ml:.2f} ml")
        run.say(f"expected quality (Dice) {done.quality:.2f}, {seconds:.1f} s, written to {output}")
        if not any(counts.values()):
            run.warn("the mask is empty: add a positive point inside the object.")


@app.command()
def serve(
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than this machine's need a key.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 1527,
    api_key: KeyOption = "",
    *,
    bundle: BundleOption = None,
    device: DeviceOption = Device.AUTO,
    max_sessions: Annotated[int, typer.Option("--max-sessions", min=1, help="Users at a time.")] = 4,
    idle_timeout: Annotated[
        float, typer.Option("--idle-timeout", min=0, help="Seconds after which an idle user's session ends; 0: never.")
    ] = 1800.0,
    liveness_timeout: Annotated[
        float, typer.Option("--liveness-timeout", min=1, help="Seconds after which a silent client's session ends.")
    ] = 60.0,
    max_voxels: Annotated[int, typer.Option("--max-voxels", min=1, help="Of one volume.")] = 1 << 30,
    exchange: Annotated[
        Path | None, typer.Option("--exchange", help="Private folder through which a local viewer hands volumes over.")
    ] = None,
    parent: Annotated[int | None, typer.Option("--parent", help="Process with which the engine ends.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: as many as PyTorch takes.")] = 0,
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="Name under which a proxy addresses this machine; repeat.")
    ] = None,
) -> None:
    """Keep a model loaded and segment for viewers: ours, and all that speak nnInteractive's protocol.

    Without a key a new one is made; the first line on stdout is JSON with the port and that key.
    """
    with _run(as_json=False):
        from KA2ERSegment.engine import serve as engine

        hosts = tuple(allow_host or ())
        limits = (max_sessions, idle_timeout, liveness_timeout, max_voxels)
        engine.serve(
            engine.Options(host, port, api_key, bundle, device.value, *limits, exchange, parent, threads, hosts)
        )


@app.command()
def evaluate(
    manifest: Annotated[list[Path], typer.Argument(help="Manifest CSV; several are evaluated as one.")],
    split: Annotated[str, typer.Option("--split", help="Split of the manifest.")] = "val",
    method: Annotated[Method, typer.Option("--method", help="growcut: Slicer's Grow from seeds.")] = Method.KA2ER,
    *,
    no_box: Annotated[bool, typer.Option("--no-box", help="Clicks only.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for results; default output/evaluate-METHOD-PROMPTS.")
    ] = None,
    max_objects_per_item: Annotated[
        int | None,
        typer.Option("--max-objects-per-item", min=1, help="Objects of one item, chosen by a fixed seed; default all."),
    ] = None,
    min_voxels: Annotated[int, typer.Option("--min-voxels", min=1, help="Smaller objects are left out.")] = 20,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    bundle: BundleOption = None,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Score a method under the challenge protocol: a drawn box, then five clicks in the largest error."""
    if output is None:
        output = Path("output") / f"evaluate-{method.value}-{'clicks' if no_box else 'box'}"
    with _run(as_json) as run:
        with run.step("Starting"):
            from KA2ERSegment import evaluation

            segmenter = _segmenter(method, bundle, device)
        with run.bar("Evaluating") as on_progress:
            done = evaluation.evaluate(
                manifest,
                segmenter,
                output,
                split=split,
                with_box=not no_box,
                max_objects_per_item=max_objects_per_item,
                min_voxels=min_voxels,
                resume=resume,
                on_progress=lambda count, total, _: on_progress(count, total),
            )
        run.result({"output": str(output), **done.to_json()})
        run.say(_table_of_sources(f"{method.value}, {'clicks only' if no_box else 'box and clicks'}", done.sources))
        maps = sum(1 for entry in done.left_out if not entry.name)
        objects = len(done.left_out) - maps
        run.say(f"left out: {maps} label maps without an image, {objects} objects (see summary.json)")
        run.say(f"written to {output}")


@bundle_app.command("info")
def bundle_info(
    folder: Annotated[Path | None, typer.Argument(help="Bundle folder; default: the one shipped.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Say what a bundle is: experts, sizes, files."""
    with _run(as_json) as run:
        with run.step("Verifying the bundle"):
            from KA2ERSegment.bundle import load_bundle

            bundle = load_bundle(folder)
        about = _about_bundle(bundle)
        run.result(about)
        table = _table(about["folder"], "", "")
        for key in ("patch_size", "megabytes"):
            table.add_row(key.replace("_", " "), str(about[key]))
        for expert in about["experts"]:
            table.add_row(f"expert {expert['name']}", expert["task"])
        table.add_row("files", ", ".join(about["files"]))
        run.say(table)


@bundle_app.command("verify")
def bundle_verify(
    folder: Annotated[Path | None, typer.Argument(help="Bundle folder; default: the one shipped.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Check every file of a bundle against its SHA-256; exit code 1 where one differs."""
    with _run(as_json) as run:
        with run.step("Verifying the bundle"):
            from KA2ERSegment.bundle import load_bundle

            bundle = load_bundle(folder)
        files = dict(bundle.checksums)
        run.result({"folder": str(bundle.folder), "verified": True, "files": files})
        run.say(f"{bundle.folder}: {len(files)} files, all as their SHA-256 says")


@expert_app.command("list")
def expert_list(
    folder: Annotated[Path | None, typer.Argument(help="Bundle folder; default: the one shipped.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Say which experts a bundle has, what they know, and under which licence."""
    with _run(as_json) as run:
        from KA2ERSegment.bundle import look_into_bundle

        bundle = look_into_bundle(folder)
        run.result({"folder": str(bundle.folder), "experts": [_about_expert(e) for e in bundle.plans.experts]})
        table = _table(str(bundle.folder), "expert", "task", "classes", "licence")
        for expert in bundle.plans.experts:
            table.add_row(expert.name, expert.task, ", ".join(expert.classes), expert.licence or "the bundle's")
        run.say(table)


@expert_app.command("add")
def expert_add(
    results: Annotated[Path, typer.Argument(help="nnU-Net v2 results folder: TRAINER__PLANS__CONFIGURATION.")],
    to: Annotated[Path | None, typer.Option("--to", help="Bundle that is copied; default: the one shipped.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New bundle; default: in the user's data folder.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Of the expert; default: made from the data set's.")] = "",
    fold: Annotated[str, typer.Option("--fold", help="0 to 4, or all; default: all, else the lowest.")] = "",
    task: Annotated[str, typer.Option("--task", help="What it was trained for, in words.")] = "",
    licence: Annotated[str, typer.Option("--license", help="Of its weights, in words.")] = "not stated",
    images: Annotated[
        Path | None, typer.Option("--images", help="nnU-Net raw data set (imagesTr, labelsTr) to train its arm on.")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", min=0.0, max=600.0, help="For training the arm.")] = 5.0,
    device: DeviceOption = Device.AUTO,
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at --output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a bundle and add the encoder of a lab's own nnU-Net to the copy as one more expert."""
    with _run(as_json) as run, run.report() as progress:
        progress("starting", 0.0)
        from KA2ERSegment.bundle import load_bundle, user_bundles_folder
        from KA2ERSegment.encoders.nnunet import read_results
        from KA2ERSegment.experts import Content, with_arm, with_expert
        from KA2ERSegment.session import find_device
        from KA2ERSegment.training.arm import train_arm
        from KA2ERSegment.training.raw_dataset import RawDataset

        bundle = load_bundle(to)
        dataset = None if images is None else RawDataset.open(images)
        progress("reading the nnU-Net", 0.0)
        found = read_results(results, name, fold, task, licence)
        target = output or user_bundles_folder() / f"{bundle.folder.name}-{found.plans.name}"
        before = Content.of(bundle)
        before.check_target(target, force)
        content = with_expert(before, found.plans, found.tensors)
        arm = None
        if dataset is not None:
            where = str(find_device(device.value))
            arm = train_arm(content, found.plans.name, dataset, found.spacing, minutes, progress, device=where)
            content = with_arm(content, found.plans.name, arm.tensors, arm.note)
        progress("writing the bundle", 1.0)
        written = content.save(target, force)
        size, added = written.nbytes / 1e6, (written.nbytes - bundle.nbytes) / 1e6
        run.result(
            {
                "output": str(written.folder),
                "bundle": written.identity,
                "expert": _about_expert(written.plans.experts[-1]),
                "trained": arm is not None,
                "steps": 0 if arm is None else arm.steps,
                "images": 0 if arm is None else arm.images,
                "dice_with": None if arm is None else round(arm.dice_with, 4),
                "dice_without": None if arm is None else round(arm.dice_without, 4),
                "share": 0.0 if arm is None else round(arm.share, 4),
                "megabytes": round(size, 2),
                "megabytes_added": round(added, 2),
            }
        )
        run.say(f"{found.plans.name} added ({found.plans.origin}); {size:.1f} MB in all, {added:.1f} MB more")
        if arm is None:
            run.warn("the new expert does not count until its arm is trained: add it again with --images.")
        else:
            run.say(arm.note)
            if arm.dice_with < arm.dice_without:
                run.warn("on held-out patches the new expert does not help. More --minutes, or leave it out.")
        run.say(f"written to {written.folder}; use it with --bundle")


@expert_app.command("remove")
def expert_remove(
    name: Annotated[str, typer.Argument(help="Of the expert.")],
    from_bundle: Annotated[
        Path | None, typer.Option("--from", help="Bundle that is copied; default: the one shipped.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New bundle; default: in the user's data folder.")
    ] = None,
    *,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at --output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a bundle without one of its experts."""
    with _run(as_json) as run, run.report() as progress:
        progress("starting", 0.0)
        from KA2ERSegment.bundle import load_bundle, user_bundles_folder
        from KA2ERSegment.experts import Content, without_expert

        bundle = load_bundle(from_bundle)
        content = without_expert(Content.of(bundle), name)
        progress("writing the bundle", 0.5)
        target = output or user_bundles_folder() / f"{bundle.folder.name}-without-{name}"
        written = content.save(target, force)
        names = [expert.name for expert in written.plans.experts]
        megabytes = round(written.nbytes / 1e6, 2)
        run.result(
            {"output": str(written.folder), "bundle": written.identity, "experts": names, "megabytes": megabytes}
        )
        run.say(f"written to {written.folder}, {megabytes:.1f} MB, with {', '.join(names) or 'no experts'}")


@app.command()
def doctor(
    *,
    as_json: JsonOption = False,
) -> None:
    """Check that this machine has what is needed; exit code 1 where something needed is missing."""
    with _run(as_json) as run:
        with run.step("Looking around"):
            checks = _checks()
        healthy = all(check["ok"] for check in checks if check["needed"])
        run.result({"ok": healthy, "checks": checks})
        table = _table("", "", "what", "found")
        for check in checks:
            mark = "[green]ok[/]" if check["ok"] else "[red]missing[/]" if check["needed"] else "[yellow]absent[/]"
            table.add_row(mark, check["name"], check["found"])
        run.say(table)
        if not healthy:
            raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the mask and the picture.")] = Path(
        "output"
    ),
    *,
    bundle: BundleOption = None,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Segment a structure of a real brain MR from a box and a point, with the bundle that is shipped."""
    with _run(as_json) as run:
        with run.step("Starting"):
            from KA2ERSegment.demo import run_demo
        with run.step("Segmenting the sample"):
            done = run_demo(output, bundle=bundle, device=device.value)
        run.result(done.to_json())
        table = _table("Dice against the sample's own label", "after", "Dice", "seconds")
        for step in done.steps:
            table.add_row(step.after, f"{step.dice:.3f}", f"{step.seconds:.2f}")
        run.say(table)
        for path in done.files:
            run.say(f"written to {path}")
        run.say(f"\nOn your own file:\n  {done.own_file_command}")


def main() -> None:
    """Entry point of the console script."""
    app()


class _Run:
    """Where one command's words go: text or JSON on stdout, everything else on stderr."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._out = Console(highlight=False, soft_wrap=True)
        if not self._out.is_terminal:
            self._out.width = 140  # tables in files need not fit a screen
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """A spinner while the block runs."""
        with self._err.status(text):
            yield

    @contextlib.contextmanager
    def bar(self, text: str) -> Iterator[Any]:
        """A progress bar; the block calls what it gets with (done, total)."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._err, transient=True) as progress:
            task = progress.add_task(text, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def report(self) -> Iterator[Callable[[str, float], None]]:
        """A bar for work of several parts: the block calls what it gets with (text, share done).

        Where stderr is no terminal, lines such as `progress 0.25 reading image 2 of 9`, at most two a second: another
        program may read them.
        """
        if not self._err.is_terminal:
            told: dict[str, float] = {}

            def tell(text: str, share: float) -> None:
                now, part = time.monotonic(), text.split(",")[0]
                if now - told.get(part, float("-inf")) > 0.5:
                    told[part] = now
                    typer.echo(f"progress {share:.2f} {text}", err=True)

            yield tell
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._err, transient=True) as bars:
            task = bars.add_task("", total=1.0)
            yield lambda text, share: bars.update(task, description=text, completed=share)

    def say(self, text: str | Table) -> None:
        """To people; silent where the output is JSON."""
        if not self.as_json:
            self._out.print(text, markup=False) if isinstance(text, str) else self._out.print(text)

    def warn(self, text: str) -> None:
        """To people, on stderr."""
        self._err.print(f"[yellow]warning:[/] {_plain(text)}")

    def result(self, value: dict[str, Any]) -> None:
        """To machines."""
        if self.as_json:
            typer.echo(json.dumps(value, indent=2))

    def fail(self, text: str, kind: str) -> None:
        """One clear line, and the same for machines."""
        self._err.print(f"[red]error:[/] {_plain(text)}")
        self.result({"error": text, "kind": kind})


@contextlib.contextmanager
def _run(as_json: bool) -> Iterator[_Run]:
    """Turn expected failures into one line and exit code 1."""
    run = _Run(as_json)
    try:
        yield run
    except KA2ERError as error:
        run.fail(str(error), type(error).__name__)
        raise typer.Exit(1) from error
    except OSError as error:
        run.fail(f"a file could not be read or written: {error}.", type(error).__name__)
        raise typer.Exit(1) from error
    except MemoryError as error:
        run.fail("there is not enough memory: use a smaller volume or crop it.", "MemoryError")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        run.fail("interrupted, nothing more was written.", "KeyboardInterrupt")
        raise typer.Exit(1) from error


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column)
    return table


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
        weights: mean share of each arm in that object.
        maps: file name to confidence map.
        device: of the network.
    """

    masks: dict[str, Any]
    quality: float
    weights: dict[str, float]
    maps: dict[str, Any]
    device: str


def _segment_here(
    run: _Run,
    volume: Volume,
    new: list[Prompt],
    saved: Path | None,
    name: str | None,
    bundle: Path | None,
    device: Device,
    *,
    opinions: bool,
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
    weights: dict[str, float] = {}
    maps: dict[str, Any] = {}
    if opinions:
        with run.step("Computing confidence maps"):
            weights = {arm: opinion.mean_weight for arm, opinion in prediction.experts.items()}
            for arm, opinion in prediction.experts.items():
                maps |= _maps_of(arm, opinion.probability, opinion.weight)
    labels, names = session.label_map()
    masks = {each: labels == value for value, each in enumerate(names, 1)}
    return _Segmented(masks, float(prediction.quality), weights, maps, device.value)


def _segment_there(
    run: _Run,
    volume: Volume,
    new: list[Prompt],
    saved: Path | None,
    name: str | None,
    url: str,
    api_key: str,
    *,
    opinions: bool,
) -> _Segmented:
    """Segment in an engine that runs somewhere; nothing of torch is loaded here."""
    import numpy as np

    from KA2ERSegment.engine.client import EngineClient
    from KA2ERSegment.steps import read_steps_file

    client = EngineClient(url, api_key)
    with contextlib.closing(client):
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
        maps: dict[str, Any] = {}
        if opinions:
            with run.step("Computing confidence maps"):
                for arm in mine.shares:
                    opinion = session.opinion(session.selected, arm)
                    maps |= _maps_of(
                        arm,
                        _on_grid(opinion.ijk_to_ras, opinion.probability, volume),
                        _on_grid(opinion.ijk_to_ras, opinion.weight, volume),
                    )
        labels = np.zeros(volume.shape_kji, dtype=np.uint16)
        for value, each in enumerate(session.names, 1):
            box, mask = session.mask(each)
            labels[box.slices][mask] = value
        masks = {each: labels == value for value, each in enumerate(session.names, 1)}
    return _Segmented(masks, mine.quality, dict(mine.shares) if opinions else {}, maps, str(info["device"]))


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


def _maps_of(arm: str, probability: Any, weight: Any) -> dict[str, Any]:
    """File name to map: probability and weight of one arm."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", arm)
    return {f"{stem}_probability": probability, f"{stem}_weight": weight}


def _segmenter(method: Method, bundle: Path | None, device: Device) -> Any:
    if method is Method.GROWCUT:
        from KA2ERSegment.growcut import GrowCut

        return GrowCut()
    from KA2ERSegment.bundle import load_bundle
    from KA2ERSegment.evaluation import SessionSegmenter
    from KA2ERSegment.session import Session

    loaded = load_bundle(bundle)
    return SessionSegmenter(Session(loaded, device=device.value), f"ka2er {loaded.identity}")


def _about_bundle(bundle: Bundle) -> dict[str, Any]:
    files = dict(bundle.checksums)
    plans = bundle.plans
    return {
        "folder": str(bundle.folder),
        "patch_size": plans.patch_size,
        "experts": [{"name": e.name, "task": e.task, "classes": list(e.classes)} for e in plans.experts],
        "megabytes": round(bundle.nbytes / 1e6, 2),
        "files": files,
    }


def _about_expert(expert: ExpertPlans) -> dict[str, Any]:
    keys = ("name", "task", "licence", "origin", "sha256", "note")
    return {key: getattr(expert, key) for key in keys} | {"classes": list(expert.classes)}


def _table_of_sources(title: str, sources: dict[str, dict[str, float | None]]) -> Table:
    columns = ("box_dice", "dsc1", "dsc_final", "dsc_auc", "nsd_final", "nsd_auc", "seconds_per_click")
    heads = ("box", "1 click", "5 clicks", "DSC AUC", "NSD 5", "NSD AUC", "s/click")
    table = _table(title, "source", "items", "objects", *heads)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for source, means in sources.items():
        if source == "mean over sources":
            table.add_section()
        cells = ["" if means[c] is None else f"{means[c]:.3f}" for c in columns]
        table.add_row(source, f"{means['items']:.0f}", f"{means['objects']:.0f}", *cells)
    return table


_NEEDED = {
    "torch": "torch",
    "numpy": "numpy",
    "scipy": "scipy",
    "monai": "monai",
    "einops": "einops",
    "nibabel": "nibabel",
    "SimpleITK": "SimpleITK",
    "slicerio": "slicerio",
    "safetensors": "safetensors",
    "dynamic_network_architectures": "dynamic-network-architectures",
}
_OPTIONAL = {
    "slicer": ("slicer-core", "slicer"),
    "matplotlib": ("matplotlib", "pictures"),
    "nilearn": ("nilearn", "demo"),
    "lightning": ("lightning", "training"),
}


def _checks() -> list[dict[str, Any]]:
    """What `doctor` looks at, each with `name`, `ok`, `needed` and `found`."""
    version = platform.python_version()
    supported = (3, 10) <= tuple(int(n) for n in platform.python_version_tuple()[:2]) <= (3, 13)
    checks = [_check("python 3.10 to 3.13", ok=supported, found=version)]
    checks += [_module_check(name, package, needed=True) for name, package in _NEEDED.items()]
    if importlib.util.find_spec("torch") is not None:
        import torch

        cuda = torch.cuda.is_available()
        checks.append(_check("device", ok=True, found=torch.cuda.get_device_name() if cuda else "cpu (no CUDA)"))
        checks.append(_check("threads", ok=True, found=f"{torch.get_num_threads()} of {os.cpu_count()} processors"))
        checks.append(_bundle_check())
    checks.append(_memory_check())
    checks += [_module_check(name, pkg, needed=False, extra=extra) for name, (pkg, extra) in _OPTIONAL.items()]
    return checks


def _check(name: str, *, ok: bool, found: str, needed: bool = True) -> dict[str, Any]:
    return {"name": name, "ok": ok, "needed": needed, "found": found}


def _module_check(name: str, package: str, *, needed: bool, extra: str = "") -> dict[str, Any]:
    from importlib import metadata

    there = importlib.util.find_spec(name) is not None
    found = f"pip install ka2ersegment[{extra}]" if extra else f"pip install {package}"
    if there:
        found = "version unknown"
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.version(package)
    return _check(package, ok=there, found=found, needed=needed)


def _bundle_check() -> dict[str, Any]:
    from KA2ERSegment.bundle import load_bundle

    try:
        bundle = load_bundle()
    except (KA2ERError, OSError) as error:
        return _check("shipped bundle", ok=False, found=str(error))
    return _check("shipped bundle", ok=True, found=f"verified, {len(bundle.checksums)} files in {bundle.folder}")


def _memory_check() -> dict[str, Any]:
    """At least 2 GB free; machines that do not say pass."""
    free = None
    with contextlib.suppress(ValueError, OSError, AttributeError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # counts what caches can give back
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"))
        free = int(match[1]) / 1e6 if match else free
    disk = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free is None:
        return _check("free memory", ok=True, found="unknown on this system", needed=False)
    return _check("free memory, 2 GB", ok=free >= 2, found=f"{free:.1f} GB, and {disk:.0f} GB of temporary disk")


if __name__ == "__main__":
    main()
