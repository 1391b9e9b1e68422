"""How the library's tests draw their examples."""

from __future__ import annotations

import os

from hypothesis import settings

# New examples are for whoever can look at what they found: CI draws the same ones every time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
