"""What `ka2ersegment view` can be told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from KA2ERSegment.errors import KA2ERError

TOKEN_VARIABLE = "KA2ERSEGMENT_VIEWER_TOKEN"
SECRET_HEADER = "X-KA2ER-Session"
"""With what the server shows a page's process that a request comes from it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST_TOKEN = 16


class ViewerError(KA2ERError):
    """The viewer cannot be started as it was asked for."""


@dataclass(frozen=True)
class Limits:
    """How much a page may be given.

    Args:
        upload_bytes: of all files that are sent together.
        unpacked_bytes: of what is in their archives.
        files: their number, and that of the files in archives.
        voxels: of one volume.
    """

    upload_bytes: int = 4 << 30
    unpacked_bytes: int = 8 << 30
    files: int = 20_000
    voxels: int = 1 << 30


@dataclass(frozen=True)
class ViewerOptions:
    """How the viewer runs.

    Args:
        volume: file or DICOM folder that every page begins with.
        host: address to listen on.
        port: 0 for a free one.
        device: "auto", "cpu" or "cuda", for an engine of its own.
        bundle: folder; the shipped one by default.
        engine: address of a running engine to use instead of an own one.
        engine_key: that engine's key.
        token: who opens the page must know it; needed where `host` is not this machine alone.
        allowed_hosts: names under which a proxy addresses this machine.
        sessions: pages at a time.
        idle_seconds: after which a page without a browser ends.
        limits: of what is sent.

    Raises:
        ViewerError: no token for a host that others can reach, or one that can be guessed.
    """

    volume: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    device: str = "auto"
    bundle: Path | None = None
    engine: str = ""
    engine_key: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    allowed_hosts: tuple[str, ...] = ()
    sessions: int = 8
    idle_seconds: float = 900.0
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if not self.is_local and not self.token:
            message = (
                f"others than this machine can reach host {self.host!r}: a token is needed. Set {TOKEN_VARIABLE} to a "
                "long random text, or leave --host out."
            )
            raise ViewerError(message)
        if self.token and len(self.token) < LEAST_TOKEN:
            message = (
                f"a token must have at least {LEAST_TOKEN} characters, it has {len(self.token)}. Take a longer one."
            )
            raise ViewerError(message)
        if self.volume is not None and not self.volume.exists():
            message = f"the volume must be a file or a folder, {str(self.volume)!r} is neither. Check the path."
            raise ViewerError(message)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK

    def limits_as_json(self) -> dict[str, Any]:
        """For a page's process."""
        return asdict(self.limits)
