"""Results in a model card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from KA2ERSegment.bundle import CARD, load_bundle
from KA2ERSegment.testing import tiny_bundle
from KA2ERSegment.training.card import RESULTS, add_results, with_section

if TYPE_CHECKING:
    from pathlib import Path


def a_summary(folder: Path, box_dice: float | None) -> Path:
    row = {"objects": 3, "box_dice": box_dice, "dsc1": 0.5, "dsc5": 0.75, "dsc_auc": 2.5, "nsd_auc": 2.0}
    settings = {"method": "ka2er x@1", "split": "val", "with_box": box_dice is not None, "max_objects_per_item": 6}
    folder.mkdir()
    sources = {"a/b": row, "c/d": row, "mean over sources": {**row, "objects": 6}}  # as `evaluate` writes it
    (folder / "summary.json").write_text(json.dumps({"settings": settings, "sources": sources}))
    return folder


def test_results_replace_former_ones_and_leave_the_weights_alone(tmp_path: Path) -> None:
    before = tiny_bundle(tmp_path / "bundle")
    for _ in range(2):
        add_results(before.folder, [a_summary(tmp_path / f"r{n}{_}", dice) for n, dice in enumerate((0.4, None))])
    after = load_bundle(before.folder)
    card = (after.folder / CARD).read_text()

    assert after.checksums["weights.safetensors"] == before.checksums["weights.safetensors"]
    assert card.count("mean over sources") == 2
    assert card.count("## What it reaches") == 1
    assert "| a/b | 3 | 0.400 | 0.500 | 0.750 | 2.500 | 2.000 |" in card
    assert "| mean over sources | 6 |  | 0.500 | 0.750 | 2.500 | 2.000 |" in card
    assert "box, then five clicks, at most 6 objects of one item" in card


def test_a_section_replaces_its_former_self_and_takes_results_of_the_former_bundle_away() -> None:
    card = f"# Model card\n\nText.\n\n## Kept\nas it is\n\n## Mine\nold\n\n{RESULTS}\n| a |\n"

    assert with_section(card, "## Mine", "new\n") == "# Model card\n\nText.\n\n## Kept\nas it is\n\n## Mine\nnew\n"
    assert with_section("# Model card\n", "## Mine", "new") == "# Model card\n\n## Mine\nnew\n"
