"""The errors that the library raises on purpose.

    KA2ERError                    everything below
    ├── GeometryError             an affine, a box or a grid that cannot be used
    ├── VolumeError               an image that cannot be read or segmented
    ├── PromptError               a prompt that does not fit its volume
    ├── BundleError               a bundle that is damaged, foreign or does not fit the code
    ├── SessionStateError         a verb called before what it needs, or on a locked object
    ├── DeviceError               a compute device that is asked for and not there
    └── CancelledError            work that was stopped because somebody asked for it

Every message says what must hold, what was given, in which object, and what to do. Each class is also
the built-in error that a caller would expect, so `except ValueError` works as well.
"""


class KA2ERError(Exception):
    """Base of every error that KA2ERSegment raises on purpose."""


class GeometryError(KA2ERError, ValueError):
    """An affine, box or grid that cannot be used."""


class VolumeError(KA2ERError, ValueError):
    """An image that cannot be read or segmented."""


class PromptError(KA2ERError, ValueError):
    """A prompt that does not fit its volume."""


class BundleError(KA2ERError, ValueError):
    """A bundle that is damaged, foreign, or does not fit this version of the code."""


class SessionStateError(KA2ERError, RuntimeError):
    """A session verb called before what it needs, or on a locked object."""


class DeviceError(KA2ERError, RuntimeError):
    """A compute device that was asked for and is not there."""


class CancelledError(KA2ERError, RuntimeError):
    """Work that was stopped because somebody asked for it; what it was to change is as it was."""
