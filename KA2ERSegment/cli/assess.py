"""`ka2ersegment assess`: can a bundle be believed, and are its suggestions worth following?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from KA2ERSegment.cli.common import BundleOption, Device, DeviceOption, JsonOption, running, table_of


def assess(
    manifest: Annotated[list[Path], typer.Argument(help="Manifest CSV; several are assessed as one.")],
    split: Annotated[str, typer.Option("--split", help="Split of the manifest.")] = "val",
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.")] = Path("output/assess"),
    max_objects_per_item: Annotated[int, typer.Option("--max-objects-per-item", min=1, help="Of one item.")] = 1,
    max_items_per_source: Annotated[int, typer.Option("--max-items-per-source", min=1, help="Of one source.")] = 4,
    calibrated: Annotated[
        bool, typer.Option("--calibrated/--uncalibrated", help="With the bundle's temperatures, or without.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    bundle: BundleOption = None,
    device: DeviceOption = Device.AUTO,
    as_json: JsonOption = False,
) -> None:
    """Measure calibration, disagreement, predicted quality, weights and suggested clicks of a bundle."""
    with running(as_json) as run:
        with run.step("Starting"):
            from KA2ERSegment import assessment, assessment_report
            from KA2ERSegment.bundle import load_bundle
            from KA2ERSegment.session import Session

            loaded = load_bundle(bundle)
            if not calibrated:
                loaded = replace(loaded, plans=loaded.plans.without("calibration"))
            session = Session(loaded, device=device.value)
        most = (max_objects_per_item, max_items_per_source)
        with run.bar("Assessing") as on_progress:
            done = assessment.assess(
                manifest,
                session,
                output,
                split=split,
                max_objects_per_item=max_objects_per_item,
                max_items_per_source=max_items_per_source,
                resume=resume,
                on_progress=on_progress,
            )
        with run.step("Drawing"):
            found = assessment_report.write_report(done, output)
            targets, _ = assessment.targets_to_assess(manifest, split, *most)
            cases = assessment_report.cases_to_show(targets, session)
            assessment_report.write_opinions(cases, session, output / "experts.png")
            worst = assessment_report.failures_to_show(done, targets)
            assessment_report.write_failures(worst, session, output / "failures.png")
        run.result({"output": str(output), **found})
        table = table_of(f"{loaded.identity}, {found['objects']} objects", "what", "value")
        for name, value in _shown(found).items():
            table.add_row(name, "" if value is None else f"{value:.3f}")
        run.say(table)
        run.say(f"written to {output}")


def _shown(found: dict[str, Any]) -> dict[str, float | None]:
    clicks = found["clicks"]
    return {
        "expected calibration error of the mask": found["calibration_error"]["mask"],
        "ROC area of disagreement for wrong voxels": found["errors_found"]["disagreement"],
        "ROC area of the mask's own doubt": found["errors_found"]["doubt"],
        "Spearman of predicted and real Dice": found["quality"]["spearman"],
        "own expert has the largest weight of all experts": found["routing"]["own_is_first_expert"],
        **{
            f"clicks to the goal, {way}, {kind}": clicks[kind][way]["clicks"] for kind in clicks for way in clicks[kind]
        },
    }
