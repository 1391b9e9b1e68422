"""`ka2ersegment expert`: which experts a bundle has, one more, one less."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from KA2ERSegment.cli.common import Device, DeviceOption, JsonOption, running, table_of

if TYPE_CHECKING:
    from KA2ERSegment.plans import ExpertPlans


app = typer.Typer(help="A bundle's experts: list, train, add and remove.", no_args_is_help=True)


@app.command("list")
def expert_list(
    folder: Annotated[Path | None, typer.Argument(help="Bundle folder; default: the one shipped.")] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Say which experts a bundle has, what they know, and under which licence."""
    with running(as_json) as run:
        from KA2ERSegment.bundle import look_into_bundle

        bundle = look_into_bundle(folder)
        run.result({"folder": str(bundle.folder), "experts": [_about_expert(e) for e in bundle.plans.experts]})
        table = table_of(str(bundle.folder), "expert", "task", "classes", "licence")
        for expert in bundle.plans.experts:
            table.add_row(expert.name, expert.task, ", ".join(expert.classes), expert.licence or "the bundle's")
        run.say(table)


@app.command("train")
def expert_train(
    task: Annotated[str, typer.Argument(help="Name of the task, as in --tasks.")],
    manifest: Annotated[Path, typer.Option("--manifest", help="manifest.csv; its split 'train' is used.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder, for data, plans and results.")],
    tasks: Annotated[
        Path | None, typer.Option("--tasks", help="JSON with tasks; default: trunk_ct, brain_mr and heart_mr.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="nnU-Net's own number is 1000.")] = 1000,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="Of an epoch.")] = 250,
    fold: Annotated[str, typer.Option("--fold", help="all, or 0 to 4 to hold subjects out.")] = "all",
    channels: Annotated[
        int, typer.Option("--channels", min=4, help="Of the first stage; 16 keeps a bundle small.")
    ] = 32,
    memory: Annotated[
        float | None, typer.Option("--gpu-memory", min=1.0, help="GB of GPU memory to plan for; default: nnU-Net's.")
    ] = None,
    device: DeviceOption = Device.AUTO,
    *,
    share_alike: Annotated[bool, typer.Option("--share-alike", help="Use items under such licences too.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --output.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train an nnU-Net v2 on a task's items; `expert add` takes what comes out."""
    with running(as_json) as run, run.report() as progress:
        progress("starting", 0.0)
        from KA2ERSegment.session import find_device
        from KA2ERSegment.training.nnunet import read_task, train_nnunet
        from KA2ERSegment.training.nnunet_process import Options

        where = find_device(device.value).type
        options = Options(epochs, iterations, fold, where, channels, memory, resume)
        done = train_nnunet(read_task(task, tasks), manifest, output, options, progress, share_alike)
        run.result(
            {
                "results": str(done.folder),
                "images": str(done.raw),
                "cases": done.cases,
                "classes": list(done.classes),
                "licences": list(done.licences),
            }
        )
        run.say(f"{done.cases} cases, classes {', '.join(done.classes)}; licences {', '.join(done.licences)}")
        run.say(f"add it: ka2ersegment expert add {done.folder} --images {done.raw} --name {task} --license ...")


@app.command("add")
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
    with running(as_json) as run, run.report() as progress:
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
        if dataset is not None:
            found = found.stored_along(dataset.canonical_axes())
        target = output or user_bundles_folder() / f"{bundle.folder.name}-{found.plans.name}"
        before = Content.of(bundle)
        before.check_target(target, force)
        content = with_expert(before, found.plans, found.tensors)
        arm = None
        if dataset is not None:
            where = str(find_device(device.value))
            arm = train_arm(content, found.plans.name, dataset, minutes, progress, device=where)
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


@app.command("remove")
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
    with running(as_json) as run, run.report() as progress:
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


def _about_expert(expert: ExpertPlans) -> dict[str, Any]:
    keys = ("name", "task", "licence", "origin", "sha256", "note")
    return {key: getattr(expert, key) for key in keys} | {"classes": list(expert.classes)}
