"""Promptable 3D segmentation of CT and MR volumes. Read `Session` first.

Every public name is looked up when it is first used, so that `import KA2ERSegment` costs nothing: prompts and volumes
never load torch, and Slicer starts without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from KA2ERSegment.bundle import load_bundle
    from KA2ERSegment.errors import (
        BundleError,
        CancelledError,
        DeviceError,
        GeometryError,
        KA2ERError,
        PromptError,
        SessionStateError,
        VolumeError,
    )
    from KA2ERSegment.prediction import Prediction
    from KA2ERSegment.prompts import (
        BoxPrompt,
        LassoPrompt,
        MaskPrompt,
        PointPrompt,
        Polarity,
        ScribblePrompt,
        Suggestion,
    )
    from KA2ERSegment.session import Session
    from KA2ERSegment.steps import Neighbours, Step
    from KA2ERSegment.volume import Volume

__version__ = "0.1.0"

__all__ = [
    "BoxPrompt",
    "BundleError",
    "CancelledError",
    "DeviceError",
    "GeometryError",
    "KA2ERError",
    "LassoPrompt",
    "MaskPrompt",
    "Neighbours",
    "PointPrompt",
    "Polarity",
    "Prediction",
    "PromptError",
    "ScribblePrompt",
    "Session",
    "SessionStateError",
    "Step",
    "Suggestion",
    "Volume",
    "VolumeError",
    "__version__",
    "load_bundle",
]

_NAMES_OF_MODULE = {
    "bundle": ("load_bundle",),
    "errors": (
        "BundleError",
        "CancelledError",
        "DeviceError",
        "GeometryError",
        "KA2ERError",
        "PromptError",
        "SessionStateError",
        "VolumeError",
    ),
    "prediction": ("Prediction",),
    "prompts": ("BoxPrompt", "LassoPrompt", "MaskPrompt", "PointPrompt", "Polarity", "ScribblePrompt", "Suggestion"),
    "session": ("Session",),
    "steps": ("Neighbours", "Step"),
    "volume": ("Volume",),
}
_MODULE_OF_NAME = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}

if not TYPE_CHECKING:  # a type checker that saw this function would take any name for a public one

    def __getattr__(name: str) -> object:
        """Import the module that defines a public name, and keep the name for next time."""
        if name not in _MODULE_OF_NAME:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        value = getattr(import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """Public names, also before they were used."""
        return sorted({*globals(), *__all__})
