"""Window and level, layouts, 3D boxes, the list of prompts, and prompts by keyboard alone, in a real browser."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from KA2ERViewer.shared import use_shared_code

pytestmark = pytest.mark.slow
STEP = 1.4
"""Millimetres of the crosshair with one key: a voxel of the phantom."""


def focus(tab: Any, view: str) -> None:
    """Give the keyboard to a view, as Tab does."""
    tab.page.locator(f".view-{view} .remote-controlled-area").focus()


def go(tab: Any, view: str, ras: tuple[float, float, float]) -> None:
    """Move the crosshair to a point of the slice that is shown, by arrow keys alone."""
    axes = {"Red": (0, 1), "Green": (0, 2), "Yellow": (1, 2)}[view]
    keys = (("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown"))
    focus(tab, view)
    tab.press("ArrowRight")
    assert tab.cursor() is not None
    for axis, (more, less) in zip(axes, keys, strict=True):
        steps = round((ras[axis] - tab.cursor()[axis]) / STEP)
        far, near = divmod(abs(steps), 10)
        for key in far * ["Shift+"] + near * [""]:
            tab.page.keyboard.press(key + (more if steps > 0 else less))
        tab.still()
        assert abs(ras[axis] - tab.cursor()[axis]) < STEP


def test_tools_and_keys_are_those_of_the_slicer_module_and_more(a_tab: Any) -> None:
    use_shared_code()
    from SlicerKA2ERLib.Protocols import TOOLS
    from SlicerKA2ERLib.Shortcuts import DEFAULT_KEYS

    keys, tools = a_tab.state("keys"), {one["name"] for one in a_tab.state("tools")}

    assert DEFAULT_KEYS.items() <= keys.items()
    assert len({key.lower() for key in keys.values()}) == len(keys)
    assert tools == {*TOOLS, "brush", "eraser", "window"} - {"none"}
    assert tools <= set(keys)


def test_dragging_with_the_window_tool_changes_window_and_level_and_no_prompt(a_tab: Any) -> None:
    before = a_tab.picture("Green").mean()
    window, level = a_tab.state("window"), a_tab.state("level")
    x, y = a_tab.at("Red", (0, 0, 8))

    a_tab.page.keyboard.press("w")
    a_tab.until(lambda: a_tab.state("tool") == "window")
    a_tab.page.mouse.move(x, y)
    a_tab.page.mouse.down()
    a_tab.page.mouse.move(x + 60, y, steps=4)
    a_tab.page.mouse.move(x + 60, y + 50, steps=4)
    a_tab.page.mouse.up()

    a_tab.until(lambda: a_tab.state("window") > window and a_tab.state("level") < level)
    a_tab.until(lambda: abs(a_tab.picture("Green").mean() - before) > 2)
    assert a_tab.state("prompt_count") == 0
    a_tab.press("p")
    a_tab.click("Red", a_tab.BALL)
    assert a_tab.state("prompt_count") == 1


def test_window_presets_and_numbers_are_in_the_menu_and_escape_closes_it(a_tab: Any) -> None:
    a_tab.page.locator(".window-button").click()
    a_tab.page.get_by_role("button", name="CT abdomen").click()
    a_tab.until(lambda: (a_tab.state("window"), a_tab.state("level")) == (350, 40))

    a_tab.page.locator(".level-value").click()
    a_tab.page.keyboard.press("Control+a")
    a_tab.page.keyboard.type("100", delay=20)
    a_tab.page.keyboard.press("Enter")
    a_tab.until(lambda: (a_tab.state("window"), a_tab.state("level")) == (350, 100))
    a_tab.page.get_by_role("button", name="MR", exact=True).click()
    a_tab.until(lambda: a_tab.state("window") < 250)
    tool = a_tab.state("tool")
    a_tab.page.keyboard.press("Escape")

    a_tab.page.locator(".window-menu").wait_for(state="hidden")
    assert a_tab.state("tool") == tool


def test_layouts_show_the_views_that_they_say(a_tab: Any) -> None:
    every = {"Red", "Green", "Yellow", "ThreeD"}
    for layout, shown in {
        "Large": every,
        "Row": every - {"ThreeD"},
        "ThreeD": {"ThreeD"},
        "Yellow": {"Yellow"},
        "Four": every,
    }.items():
        a_tab.page.locator(".views-button").click()
        a_tab.page.locator(f"[data-layout={layout}]").click()
        a_tab.until(lambda layout=layout: a_tab.state("layout") == layout)
        a_tab.until(
            lambda shown=shown: {name for name in every if a_tab.page.locator(f".view-{name}").is_visible()} == shown
        )
    a_tab.until(lambda: all(a_tab.picture(name).max() > 100 for name in ("Red", "Green", "Yellow")))


@pytest.mark.parametrize(("view", "inside", "outside"), [("Red", "S", "I"), ("Green", "P", "A"), ("Yellow", "R", "L")])
def test_words_over_a_slice_say_where_in_the_patient_it_is(a_tab: Any, view: str, inside: str, outside: str) -> None:
    seen = {}
    for offset in (-19, 19):
        a_tab.page.evaluate(f"window.trame.state.set('slice_{view}', {offset})")
        a_tab.still()
        text = a_tab.page.locator(f".view-{view} .view-where").inner_text()
        seen[text] = int((a_tab.picture(view)[40:-60].mean(axis=-1) > 150).sum())

    # the ball reaches 19 mm one way and not the other
    assert seen[f"{inside} 19.0 mm"] > 100
    assert seen[f"{outside} 19.0 mm"] < 100


def test_wheel_scrolls_and_the_zoom_keys_zoom(a_tab: Any) -> None:
    text = a_tab.state("slice_Red_text")
    a_tab.page.mouse.move(*a_tab.at("Red", (0, 0, 0)))
    a_tab.page.mouse.wheel(0, 200)
    a_tab.until(lambda: a_tab.state("slice_Red_text") != text)

    focus(a_tab, "Green")
    bright = (a_tab.picture("Green").mean(axis=-1) > 30).sum()
    a_tab.page.keyboard.press("-")
    a_tab.until(lambda: (a_tab.picture("Green").mean(axis=-1) > 30).sum() < 0.9 * bright)
    focus(a_tab, "Red")
    text = a_tab.state("slice_Red_text")
    a_tab.page.keyboard.press("PageUp")
    a_tab.until(lambda: a_tab.state("slice_Red_text") != text)


def test_right_button_zooms_the_middle_one_pans_and_fit_takes_both_back(a_tab: Any) -> None:
    def middle() -> np.ndarray:
        return np.argwhere(a_tab.picture("Green").mean(axis=-1) > 150).mean(axis=0)

    def size() -> int:
        return int((a_tab.picture("Green").mean(axis=-1) > 150).sum())

    def drag(button: str, across: float, down: float) -> None:
        x, y = a_tab.at("Green", (0, 0, 0))
        a_tab.page.mouse.move(x, y)
        a_tab.page.mouse.down(button=button)
        a_tab.page.mouse.move(x + across, y + down, steps=5)
        a_tab.page.mouse.up(button=button)
        a_tab.still()

    place, area = middle(), size()
    drag("middle", 40, 25)
    assert np.allclose(middle() - place, (25, 40), atol=4)
    drag("right", 0, 60)
    assert abs(size() - area) > 0.1 * area
    a_tab.page.get_by_label("Fit the volume into the Coronal view").click()
    a_tab.still()

    assert np.allclose(middle(), place, atol=2)
    assert abs(size() - area) < 0.02 * area
    assert a_tab.state("prompt_count") == 0


def test_3d_box_is_placed_by_two_clicks_and_has_handles_in_all_slices(a_tab: Any) -> None:
    r, a, s = a_tab.BALL
    half = 0.9 * a_tab.RADIUS
    a_tab.page.keyboard.press("c")
    a_tab.until(lambda: a_tab.state("tool") == "roi")

    for corner in ((r - half, a - half, s), (r + half, a + half, s)):
        a_tab.page.mouse.move(*a_tab.at("Red", corner))
        a_tab.still()
        a_tab.page.mouse.click(*a_tab.at("Red", corner))
        a_tab.still()
    a_tab.still()
    assert a_tab.state("prompt_count") == 1

    assert a_tab.state("prompts")[0]["kind"] == "roi"
    first = a_tab.voxels("Segment_1")
    assert first.any()
    x, y = a_tab.at("Red", (r + half, a, s))
    # Slicer takes the pixels on the line for the box itself and not for its handle
    a_tab.page.mouse.move(x + 3, y + 3)
    a_tab.still()
    a_tab.page.mouse.down()
    a_tab.page.mouse.move(x + 35, y + 3, steps=6)
    a_tab.page.mouse.up()
    a_tab.still()

    assert not np.array_equal(a_tab.voxels("Segment_1"), first)
    assert a_tab.state("prompt_count") == 1


def test_prompt_is_removed_from_the_list_and_undo_brings_it_back(a_tab: Any) -> None:
    a_tab.click("Red", a_tab.BALL)
    shown = a_tab.colored("Green").sum()
    a_tab.page.locator(".prompts-of summary").click()

    a_tab.page.get_by_label("Remove prompt 1").click()
    a_tab.until(lambda: a_tab.state("prompt_count") == 0)
    a_tab.until(lambda: a_tab.colored("Green").sum() < shown / 2)
    a_tab.press("Control+z")

    a_tab.until(lambda: a_tab.state("prompt_count") == 1)
    a_tab.until(lambda: a_tab.colored("Green").sum() > 0.9 * shown)


def test_point_is_placed_by_keyboard_alone(a_tab: Any) -> None:
    a_tab.page.locator(".skip").focus()
    a_tab.page.keyboard.press("Enter")
    a_tab.until(lambda: a_tab.page.evaluate("document.activeElement.getAttribute('role')") == "application")
    go(a_tab, "Red", a_tab.BALL)

    a_tab.page.keyboard.press("Enter")
    a_tab.still()
    assert a_tab.state("prompt_count") == 1
    a_tab.keep("keyboard")
    inside = a_tab.voxels("Segment_1")
    go(a_tab, "Red", (a_tab.BALL[0] + 0.6 * a_tab.RADIUS, *a_tab.BALL[1:]))
    a_tab.page.keyboard.press("Alt+Enter")
    a_tab.until(lambda: a_tab.state("prompt_count") == 2)

    assert inside.any()
    assert [one["positive"] for one in a_tab.state("prompts")] == [True, False]
    a_tab.page.mouse.click(*a_tab.at("Green", (0, 0, 0)))
    a_tab.until(lambda: a_tab.cursor() is None)


@pytest.mark.parametrize(("key", "kind"), [("x", "box"), ("l", "lasso")])
def test_what_is_drawn_with_the_mouse_is_drawn_by_keys(a_tab: Any, key: str, kind: str) -> None:
    r, a, s = a_tab.BALL
    half = 0.8 * a_tab.RADIUS
    a_tab.page.keyboard.press(key)
    a_tab.until(lambda: a_tab.state("tool") == kind)

    go(a_tab, "Red", (r - half, a - half, s))
    a_tab.page.keyboard.press("Enter")
    a_tab.until(lambda: "drawing" in a_tab.state("cursor_text"))
    go(a_tab, "Red", (r + half, a + half, s))
    a_tab.page.keyboard.press("Enter")

    a_tab.still()
    assert a_tab.state("prompt_count") == 1
    assert a_tab.state("prompts")[0]["kind"] == kind
    assert a_tab.state("error") == ""
