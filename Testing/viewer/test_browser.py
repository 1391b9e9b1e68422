"""What users do, in a real browser: clicks go in, pixels come out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def test_click_colours_what_was_clicked_and_nothing_else(a_tab: Any) -> None:
    before = a_tab.colored("Red")

    a_tab.click("Red", a_tab.BALL)

    new = a_tab.colored("Red") & ~before
    a_tab.keep("mask")
    assert a_tab.page.locator(".segments li").count() == 1
    assert np.allclose(a_tab.middle_of("Red", new), a_tab.at("Red", a_tab.BALL), atol=12)
    box = a_tab.page.locator(".view-Red").bounding_box()
    assert new.sum() < 0.5 * box["width"] * box["height"]
    for view in ("Green", "Yellow", "ThreeD"):
        assert a_tab.colored(view).sum() > 200


def test_undo_takes_the_pixels_away_and_redo_brings_them_back(a_tab: Any) -> None:
    empty = a_tab.colored("Green").sum()
    a_tab.click("Red", a_tab.BALL)
    full = a_tab.colored("Green").sum()

    a_tab.press("Control+z")
    undone = a_tab.colored("Green").sum()
    a_tab.press("Control+y")

    assert full > undone + 200
    assert undone <= empty + 50
    assert a_tab.colored("Green").sum() > 0.9 * full


def test_negative_click_takes_pixels_away_and_undo_brings_them_back(a_tab: Any) -> None:
    r, a, s = a_tab.BALL
    a_tab.click("Red", a_tab.BALL)
    marked = a_tab.colored("Green").sum()

    a_tab.press("n")
    assert a_tab.page.locator(".negative.chosen").count() == 1
    a_tab.click("Red", (r + 0.5 * a_tab.RADIUS, a, s))
    less = a_tab.colored("Green").sum()
    a_tab.press("Control+z")

    assert less < marked
    assert a_tab.colored("Green").sum() > less


def test_box_and_lasso_each_make_a_segment(a_tab: Any) -> None:
    r, a, s = a_tab.BALL
    half = 0.8 * a_tab.RADIUS
    corners = [(r - half, a - half, s), (r + half, a - half, s), (r + half, a + half, s), (r - half, a + half, s)]

    a_tab.press("x")
    a_tab.drag("Red", [corners[0], corners[2]])
    a_tab.still()
    assert a_tab.state("prompt_count") == 1
    assert a_tab.colored("Green").sum() > 200
    a_tab.press("e")
    a_tab.press("l")
    a_tab.drag("Red", [*corners, corners[0]])
    a_tab.still()
    assert a_tab.state("prompt_count") == 1

    assert a_tab.page.locator(".segments li").count() == 2
    assert a_tab.page.locator(".message.error").count() == 0


def test_scribble_with_the_pen_marks_what_it_is_drawn_along_and_alt_what_it_is_not(a_tab: Any) -> None:
    r, a, s = a_tab.BALL
    half = 0.5 * a_tab.RADIUS

    a_tab.press("s")
    assert a_tab.page.get_by_text("Pen", exact=True).is_visible()
    a_tab.drag("Red", [(r - half, a, s), (r, a + 3, s), (r + half, a, s)])
    first = a_tab.voxels("Segment_1")
    a_tab.page.keyboard.down("Alt")
    a_tab.drag("Red", [(r + half, a - half, s), (r + half, a + half, s)])
    a_tab.page.keyboard.up("Alt")

    assert [(one["kind"], one["positive"]) for one in a_tab.state("prompts")] == [
        ("scribble", True),
        ("scribble", False),
    ]
    k, j, i = a_tab.kji((r, a, s))
    assert first[k, j, i]
    assert 200 < first.sum() < 0.5 * first.size
    assert a_tab.voxels("Segment_1").sum() < first.sum()


def test_overlay_of_an_expert_changes_the_view_and_off_is_as_before(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)
    off = a_tab.picture("Red")
    button = a_tab.page.locator(".show-expert").nth(1)

    button.click()
    a_tab.until(lambda: np.abs(a_tab.picture("Red") - off).mean() > 1)
    a_tab.keep("overlay")
    button.click()

    a_tab.until(lambda: np.abs(a_tab.picture("Red") - off).mean() < 0.1)


def test_shares_of_experts_and_expected_dice_are_shown_after_a_prompt(a_tab: Any) -> None:
    assert a_tab.page.locator(".badge").count() == 0

    a_tab.click("Red", a_tab.BALL)

    for mode in ("amalgamation", "decoders", "head"):
        shares = a_tab.page.locator(f"[data-mode={mode}] .number").all_text_contents()
        assert len(shares) > 2
        assert 95 <= sum(int(share.rstrip(" %")) for share in shares) <= 105
    assert a_tab.page.locator(".badge").inner_text().startswith("Dice to expect")


def test_a_voter_is_shown_over_the_slices(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)
    off = a_tab.picture("Red")
    votes = a_tab.page.locator("[data-mode=head]")
    voter = votes.locator("[data-expert='head basic'] .show-expert")
    assert not voter.is_visible()

    votes.locator("summary").click()
    voter.click()

    a_tab.until(lambda: np.abs(a_tab.picture("Red") - off).mean() > 0.3)
    assert votes.locator("input[type=checkbox]").count() == 0


def test_disagreement_and_where_to_click_next_are_shown_and_explained(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)
    plain = a_tab.picture("Red")

    a_tab.page.locator(".action-disagreement").click()
    a_tab.until(lambda: np.abs(a_tab.picture("Red") - plain).mean() > 1)
    a_tab.page.locator(".action-disagreement").click()
    a_tab.until(lambda: np.abs(a_tab.picture("Red") - plain).mean() < 0.5)
    before = [a_tab.state(f"slice_{view}") for view in ("Red", "Green", "Yellow")]
    a_tab.page.locator(".action-suggest").click()

    a_tab.page.locator(".suggestion").wait_for()
    assert "structure at" in a_tab.page.locator(".suggestion").inner_text()
    assert [a_tab.state(f"slice_{view}") for view in ("Red", "Green", "Yellow")] != before
    a_tab.page.get_by_text("What does this say?").click()
    explained = a_tab.page.locator(".explained dt").all_inner_texts()
    assert {"Percent", "Eye", "Dice to expect", "Disagreement", "Where next?"} <= set(explained)


def test_saved_files_read_back_with_the_segment_where_the_ball_is(a_tab: Any, tmp_path: Path) -> None:
    import nibabel
    import slicerio

    a_tab.click("Red", a_tab.BALL)
    labels, segmentation, prompts, scene = (
        a_tab.save(kind, tmp_path) for kind in ("nii.gz", "seg.nrrd", "json", "mrb")
    )

    image = nibabel.load(labels)
    inside = np.argwhere(np.asarray(image.dataobj) == 1)
    middle = nibabel.affines.apply_affine(image.affine, inside).mean(axis=0)
    assert np.linalg.norm(middle - a_tab.BALL) < 6
    read = slicerio.read_segmentation(str(segmentation))
    assert [segment["name"] for segment in read["segments"]] == ["Segment_1"]
    assert abs((read["voxels"] > 0).sum() - len(inside)) == 0
    (step,) = json.loads(prompts.read_text())["steps"]
    assert step["object"] == "Segment_1"
    assert scene.read_bytes()[:2] == b"PK"


def test_reload_brings_everything_back(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)
    shown = a_tab.colored("Green").sum()

    a_tab.page.reload()
    a_tab.wait_until_ready()

    assert a_tab.page.locator(".segments li").count() == 1
    assert a_tab.colored("Green").sum() == pytest.approx(shown, rel=0.1)


def test_two_tabs_do_not_see_each_other(a_tab: Any, open_tab: Callable[..., Any]) -> None:
    a_tab.click("Red", a_tab.BALL)

    other = open_tab()

    assert other.page.url != a_tab.page.url
    assert other.page.locator(".segments li").count() == 0


def test_session_that_is_opened_elsewhere_says_so(a_tab: Any, open_tab: Callable[..., Any]) -> None:
    open_tab(a_tab.page.url)

    a_tab.page.wait_for_selector("#lost")
    assert "another tab" in a_tab.page.locator("#lost").inner_text()


def test_file_that_is_no_volume_gets_a_readable_message(a_tab: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "letter.nii.gz"
    wrong.write_text("Dear doctor")

    a_tab.open(wrong)

    text = a_tab.page.locator(".message.error").inner_text()
    assert "'letter.nii.gz'" in text
    assert "DICOM" in text
    assert a_tab.page.locator(".volume-name").inner_text() == "ball"


def test_volume_can_be_opened_in_the_page(a_tab: Any, a_phantom: Path, tmp_path: Path) -> None:
    path = tmp_path / "another one.nii.gz"
    path.write_bytes(a_phantom.read_bytes())
    a_tab.click("Red", a_tab.BALL)

    a_tab.open(path)
    a_tab.page.wait_for_function("document.querySelector('.volume-name').innerText === 'another one'")
    a_tab.still()

    assert a_tab.page.locator(".segments li").count() == 0
    a_tab.click("Red", a_tab.BALL)
    assert a_tab.page.locator(".segments li").count() == 1


def test_brush_paints_undo_takes_it_back_and_the_eraser_removes(a_tab: Any) -> None:
    r, a, s = a_tab.BALL
    stroke = [(r - 12, a + 30, s), (r + 12, a + 30, s)]
    before = a_tab.colored("Red").sum()

    a_tab.press("b")
    a_tab.drag("Red", stroke)
    a_tab.until(lambda: a_tab.colored("Red").sum() > before + 300)
    a_tab.press("Control+z")
    a_tab.until(lambda: a_tab.colored("Red").sum() < before + 150)
    a_tab.press("Control+y")
    a_tab.until(lambda: a_tab.colored("Red").sum() > before + 300)
    painted = a_tab.colored("Red").sum()
    a_tab.press("d")
    a_tab.drag("Red", stroke)
    a_tab.until(lambda: a_tab.colored("Red").sum() < painted - 300)


def test_cancelled_prediction_leaves_nothing_and_the_page_goes_on(a_tab: Any) -> None:
    a_tab.page.mouse.move(*a_tab.at("Red", a_tab.BALL))
    a_tab.page.mouse.down()
    a_tab.page.mouse.up()

    a_tab.page.locator(".action-cancel").click()
    a_tab.until(lambda: a_tab.state("prompt_count") == 0 and not a_tab.state("busy"))

    assert a_tab.state("error") == ""
    a_tab.click("Red", a_tab.BALL)
    assert a_tab.page.locator(".badge").count() == 1


def test_no_request_leaves_the_machine(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)
    a_tab.page.locator(".views-button").click()
    a_tab.page.locator("[data-layout=Row]").wait_for()

    assert a_tab.foreign == []


def test_keyboard_reaches_tools_lists_and_sliders(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)
    name = "document.activeElement.className.split(' ').filter(part => part.includes('-')).pop()"
    reached = []
    for _ in range(60):
        a_tab.page.keyboard.press("Tab")
        reached.append(a_tab.page.evaluate(f"{name} || document.activeElement.className"))

    for part in ("tool", "action-undo", "segment-name", "show-expert", "action-suggest", "slice-slider"):
        assert any(part in each for each in reached), f"Tab never came to {part}: {reached}"
