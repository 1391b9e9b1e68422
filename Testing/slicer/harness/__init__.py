"""A stand-in for Slicer's desktop: enough of qt, ctk and slicer's application to run the modules' real widgets.

`Desktop` puts it in place and takes it away again, so that other tests still prove that the logic needs no Qt. What
differs from Slicer's PythonQt, and what this therefore cannot show, is in README.md beside this file.
"""

from .desktop import Desktop

__all__ = ["Desktop"]
