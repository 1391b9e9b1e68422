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
