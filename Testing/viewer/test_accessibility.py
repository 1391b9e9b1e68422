"""Contrast, focus, names, motion and room, measured in a real browser; the measures are in looks.js."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
LOOKS = (Path(__file__).parent / "looks.js").read_text(encoding="utf-8")
SIZES = {"small": (1280, 720), "4k": (3840, 2160)}


@pytest.fixture(scope="module")
def a_used_tab(open_shared_tab: Callable[..., Any]) -> Any:
    """One with a segment, shares and an overlay, and `looks` in it."""
    return used(open_shared_tab())


def used(tab: Any) -> Any:
    tab.page.evaluate(LOOKS)
    tab.click("Red", tab.BALL)
    tab.page.locator(".show-expert").nth(1).click()
    tab.until(lambda: tab.state("experts")[1]["shown"])
    tab.still()
    return tab


def sized(tab: Any, size: str) -> Any:
    """The same in a window of another size."""
    width, height = SIZES[size]
    tab.page.set_viewport_size({"width": width, "height": height})
    tab.still()
    for view in ("Red", "Green", "Yellow"):
        tab.tell("fit", view)
    tab.still()
    return tab


def contrasts(tab: Any, root: str = "document.body") -> dict[str, Any]:
    return dict(tab.page.evaluate(f"looks.contrasts({root})"))


def test_measure_of_contrast_is_that_of_wcag(a_used_tab: Any) -> None:
    page = a_used_tab.page
    assert page.evaluate("looks.ratio('#000', '#fff')") == pytest.approx(21)
    assert page.evaluate("looks.ratio('#777', '#fff')") == pytest.approx(4.48, abs=0.01)

    page.locator(".brand").evaluate("(one) => { one.style.color = '#333' }")
    found = contrasts(a_used_tab)["wrong"]
    page.locator(".brand").evaluate("(one) => { one.style.color = '' }")

    assert any("KA2ER Segment" in each for each in found)


def settled(tab: Any) -> None:
    """Nothing fades in any more."""
    tab.until(lambda: tab.page.evaluate("document.getAnimations().every((one) => one.playState !== 'running')"))


def test_tab_goes_through_everything_in_order_and_shows_where_it_is(a_used_tab: Any) -> None:
    page = a_used_tab.page
    stops = []
    page.locator(".skip").focus()
    for _ in range(120):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            page.keyboard.press("Tab")  # after the last one comes the first
        stops.append(page.evaluate("looks.focus()"))
        if "Go to the views" in stops[-1]["name"]:
            break

    hidden = [stop["name"] for stop in stops if not stop["shown"] or not stop["inside"]]
    assert hidden == []
    assert [(stop["name"], stop["contrast"]) for stop in stops if stop["contrast"] < 3] == []
    assert "Go to the views" in stops[-1]["name"]
    parts = [stop["part"] for stop in stops if stop["part"] >= 0]
    assert parts == sorted(parts), "header, panel, views and footer must come in this order"
    names = " ".join(stop["name"] for stop in stops)
    for part in (
        "Open",
        "Point",
        "Not structure",
        "Undo",
        "Lock Segment_1",
        "Remove Segment_1",
        "Opacity of",
        "Where next",
    ):
        assert part in names, f"Tab never came to {part!r}"
    for view in ("Axial view", "Coronal view", "Sagittal view", "3D view", "Axial slice"):
        assert view in names, f"Tab never came to {view!r}"


def test_every_control_has_a_name_for_screen_readers(a_used_tab: Any) -> None:
    assert a_used_tab.page.evaluate("looks.unnamed()") == []
    assert a_used_tab.page.locator("h1").count() == 1
    for role in ("banner", "main", "complementary", "contentinfo"):
        assert a_used_tab.page.get_by_role(role).count() == 1
    assert a_used_tab.page.locator("[aria-live=polite]").count() > 0


def test_text_and_icons_stand_out_in_every_state(a_used_tab: Any) -> None:
    page = a_used_tab.page
    for details in page.locator("details > summary").all():
        details.click()
    found = contrasts(a_used_tab)
    assert found["wrong"] == []
    assert found["texts"] > 60
    assert found["icons"] > 20

    page.keyboard.press("k")
    a_used_tab.until(lambda: a_used_tab.state("segments")[0]["locked"])
    page.keyboard.press("Shift+R")  # refused: a message is shown
    page.locator(".message.error").wait_for()
    assert contrasts(a_used_tab)["wrong"] == []

    for opener, content in (
        (".window-button", ".window-menu"),
        (".views-button", ".v-list"),
        (".save-button", ".v-list"),
    ):
        page.locator(opener).click()
        page.locator(f".v-overlay--active {content}").wait_for()
        settled(a_used_tab)
        opened = contrasts(a_used_tab, "document.querySelector('.v-overlay--active')")
        assert opened["wrong"] == []
        assert opened["texts"] > 4
        page.keyboard.press("Escape")
        page.locator(".v-overlay--active").wait_for(state="detached")
    page.get_by_label("Keyboard shortcuts").click()
    page.locator(".v-overlay--active .keys").first.wait_for()
    settled(a_used_tab)
    a_used_tab.keep("keys")
    assert contrasts(a_used_tab, "document.querySelector('.v-overlay--active')")["wrong"] == []
    page.keyboard.press("Escape")
    page.locator(".v-overlay--active").wait_for(state="detached")


def test_nothing_moves_for_those_who_asked_for_less_motion(a_tab: Any) -> None:
    tab = a_tab
    tab.page.emulate_media(reduced_motion="reduce")
    tab.page.evaluate(LOOKS)

    assert tab.page.evaluate("matchMedia('(prefers-reduced-motion: reduce)').matches")
    assert tab.page.evaluate("looks.moving()") == []
    tab.page.locator(".views-button").click()
    tab.page.locator("[data-layout=Row]").wait_for()
    assert tab.page.evaluate("looks.moving()") == []


@pytest.mark.parametrize("size", sorted(SIZES))
def test_all_has_its_room_on_a_small_and_on_a_large_screen(a_tab: Any, size: str) -> None:
    tab = used(sized(a_tab, size))
    tab.keep(size)

    for layout in ("Four", "Large", "Row", "Red"):
        tab.page.evaluate(f"window.trame.state.set('layout', '{layout}')")
        tab.until(lambda layout=layout: tab.page.locator(f".views-{layout}").count() == 1)
        assert tab.page.evaluate("looks.overlaps()") == []


def test_letters_grow_with_the_screen(a_tab: Any) -> None:
    heights = {}
    for size in SIZES:
        page = sized(a_tab, size).page
        heights[size] = page.locator(".brand").evaluate("(one) => parseFloat(getComputedStyle(one).fontSize)")

    assert heights["4k"] > 1.5 * heights["small"]
