"""A viewer that asks for a token, and the page that it begins with where no volume was named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow


def with_token(viewer: Any) -> str:
    return f"{viewer.url}?token={viewer.token.replace(' ', '+')}"


def enter(page: Any, token: str) -> None:
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Enter").click()


def test_token_lets_in_and_is_asked_for_once(a_guarded_viewer: Any, a_page: Any) -> None:
    a_page.goto(a_guarded_viewer.url)

    enter(a_page, "not the right one")
    a_page.get_by_text("That was not it.").wait_for()
    enter(a_page, a_guarded_viewer.token)
    a_page.wait_for_selector(".welcome h2")

    other = a_page.context.new_page()
    other.goto(a_guarded_viewer.url)
    other.wait_for_selector(".welcome h2")
    assert "token" not in other.url


def test_address_with_the_token_lets_in_and_the_token_leaves_the_address(a_guarded_viewer: Any, a_page: Any) -> None:
    a_page.goto(with_token(a_guarded_viewer))

    a_page.wait_for_selector(".welcome h2")
    assert "token" not in a_page.url


def test_folder_is_chosen_on_the_first_page(
    a_guarded_viewer: Any, a_page: Any, write_series: Callable[..., list[Path]], tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 300, (10, 40, 40)).astype(np.int16)
    write_series(tmp_path / "series", noise, np.diag([1.5, 1.5, 3.0, 1.0]))
    a_page.goto(with_token(a_guarded_viewer))

    with a_page.expect_file_chooser() as chooser:
        a_page.locator("[data-open=folder]").click()
    chooser.value.set_files(tmp_path / "series")

    a_page.wait_for_selector(".volume-name")
    assert "Slices" in a_page.locator(".volume-name").inner_text()
    assert a_page.evaluate("window.trame.state.get('error')") == ""
