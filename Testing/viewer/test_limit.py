"""That no test can wait for ever, and that the next ones have a browser then."""

from __future__ import annotations

import signal
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such alarm"),
]


def test_question_that_the_page_never_answers_is_interrupted_and_the_page_can_be_asked_again(a_page: Any) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.2, 30.0)

    with pytest.raises(TimeoutError, match="did not end"):
        a_page.evaluate("new Promise(() => {})")

    assert a_page.evaluate("6 * 7") == 42
