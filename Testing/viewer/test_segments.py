"""Segments in a real browser: locked, named, coloured, hidden and removed; by the mouse and by keys."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_locked_segment_refuses_prompts_brush_and_removal_until_it_is_unlocked(a_tab: Any) -> None:
    r, a, s = a_tab.BALL
    a_tab.click("Red", a_tab.BALL)
    before = a_tab.voxels("Segment_1")

    a_tab.page.locator(".lock-segment").click()
    a_tab.until(lambda: a_tab.state("segments")[0]["locked"])
    assert a_tab.page.get_by_label("Remove Segment_1").is_disabled()
    a_tab.page.mouse.click(*a_tab.at("Red", (r + 8, a, s)))

    a_tab.page.locator(".message.error").wait_for()
    assert "'Segment_1'" in a_tab.state("error")
    assert "Unlock it" in a_tab.state("error")
    a_tab.keep("locked")
    a_tab.page.keyboard.press("b")
    a_tab.until(lambda: a_tab.state("tool") == "point")
    assert a_tab.state("prompt_count") == 1
    assert (a_tab.voxels("Segment_1") == before).all()

    a_tab.page.keyboard.press("k")
    a_tab.until(lambda: not a_tab.state("segments")[0]["locked"])
    a_tab.click("Red", (r + 8, a, s))
    assert a_tab.state("prompt_count") == 2


def test_brush_over_a_locked_neighbour_leaves_it_as_it_is(a_tab: Any) -> None:
    r, a, s = a_tab.BALL
    a_tab.click("Red", a_tab.BALL)
    a_tab.press("k")
    alone = a_tab.voxels("Segment_1")
    a_tab.page.evaluate("window.trame.trigger('neighbours', ['compete'])")
    a_tab.press("e")

    a_tab.press("b")
    a_tab.drag("Red", [(r - 12, a, s), (r + 45, a, s)])

    a_tab.until(lambda: a_tab.voxels("Segment_2").any())
    assert (a_tab.voxels("Segment_1") == alone).all()
    assert not (a_tab.voxels("Segment_2") & alone).any()


def test_prompt_after_a_stroke_starts_from_what_was_painted(a_tab: Any) -> None:
    r, a, s = a_tab.BALL
    a_tab.click("Red", a_tab.BALL)
    corner = a_tab.kji((r + 20, a + 35, a_tab.state("slice_Red")))
    assert not a_tab.voxels("Segment_1")[corner]

    a_tab.press("b")
    a_tab.drag("Red", [(r + 16, a + 35, s), (r + 24, a + 35, s)])
    assert a_tab.voxels("Segment_1")[corner]
    a_tab.press("p")
    a_tab.click("Red", (r - 0.5 * a_tab.RADIUS, a, s))

    after = a_tab.voxels("Segment_1")
    assert after[corner], "what a hand painted far from the click stays"
    assert after[a_tab.kji((r, a, s))]


def test_name_of_a_structure_brings_its_code_and_colour_and_another_name_takes_the_code_away(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)
    color = a_tab.state("segments")[0]["color"]
    name = a_tab.page.locator(".segment-name")
    assert a_tab.page.locator("#structures option").count() > 200

    name.fill("Left kidney")
    name.press("Enter")
    a_tab.still()

    (row,) = a_tab.state("segments")
    assert row["name"] == "Left kidney"
    assert "Kidney" in row["structure"]
    assert "Left" in row["structure"]
    assert "SCT" in row["structure"]
    assert row["color"] != color
    assert name.get_attribute("title") == row["structure"]
    name.fill("What I found")
    name.press("Enter")
    a_tab.still()
    assert a_tab.state("segments")[0]["structure"] == ""


def test_segment_is_renamed_coloured_hidden_and_removed_by_keyboard(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)
    shown = a_tab.colored("Red").sum()
    keyboard = a_tab.page.keyboard

    a_tab.page.locator(".segment-name").focus()
    keyboard.press("Control+a")
    keyboard.type("Ball")
    keyboard.press("Enter")
    a_tab.until(lambda: a_tab.state("segments")[0]["name"] == "Ball")

    color = a_tab.page.locator(".segments input[type=color]")
    color.evaluate("(one) => { one.value = '#00ff00'; one.dispatchEvent(new Event('change')); }")
    a_tab.until(lambda: a_tab.state("segments")[0]["color"] == "#00ff00")

    a_tab.page.get_by_label("Hide Ball").focus()
    keyboard.press("Enter")
    a_tab.until(lambda: a_tab.colored("Red").sum() < shown / 2)
    a_tab.page.get_by_label("Show Ball").focus()
    keyboard.press("Space")
    a_tab.until(lambda: a_tab.colored("Red").sum() > shown / 2)

    a_tab.page.get_by_label("Remove Ball").focus()
    keyboard.press("Enter")
    a_tab.until(lambda: a_tab.state("segments") == [])
    assert a_tab.page.locator(".segments li").count() == 0
