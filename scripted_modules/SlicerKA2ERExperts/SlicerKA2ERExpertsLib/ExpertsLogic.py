"""The experts of a bundle: look, verify, switch, add, remove. No Qt, no torch; Slicer's main thread is never held up.

Looking reads small files. Verifying reads the weights a piece at each `poll`. Adding and removing is done by the
command line in another process, which writes a new bundle; the one that is shown stays as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from KA2ERSegment.bundle import Bundle, default_bundle_folder, look_into_bundle, user_bundles_folder
from KA2ERSegment.errors import BundleError
from SlicerKA2ERLib import ExpertSwitches

from .Protocols import AddRequest, ExpertRow, RunnerProtocol, SettingsProtocol

try:
    from slicer.i18n import tr as _
except ImportError:  # outside the application nothing is translated

    def _(text: str) -> str:
        return text


BUNDLE_KEY = "KA2ERSegment/bundle"
"""The main module's setting: which bundle its engine loads; "" is the shipped one."""
PIECE = 1 << 22
"""Bytes that one poll verifies: some milliseconds."""


class ExpertsLogic:
    """One bundle at a time, that of the main module at first.

    Args:
        settings: of the application.
        runner: for commands.
    """

    def __init__(self, settings: SettingsProtocol, runner: RunnerProtocol) -> None:
        self.observers: list[Callable[[str], None]] = []
        self.busy = ""
        """What is being done, for people; "" where nothing is."""
        self.progress: tuple[str, float | None] = ("", None)
        self.message = ""
        """Of the latest event "done" or "error"."""
        self.written: Path | None = None
        """The bundle that the latest command wrote."""
        self._settings, self._runner = settings, runner
        self._bundle: Bundle | None = None
        self._verifying: Iterator[float] | None = None
        self._running = False
        self._target: Path | None = None
        self._lines: list[str] = []

    # -- looking -----------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path | None:
        """Of the bundle that is shown; None where it cannot be read."""
        return None if self._bundle is None else self._bundle.folder

    def load(self, folder: str | Path | None = None) -> None:
        """Show a bundle; without a folder the one that the main module uses."""
        path = str(folder or self._settings.value(BUNDLE_KEY) or "")
        try:
            self._bundle = look_into_bundle(path or None)
        except (BundleError, OSError) as error:
            self._bundle = None
            self._tell("bundle")
            self._fail(str(error))
            return
        self._tell("bundle")

    def folders(self) -> list[Path]:
        """Bundles to choose from: the shipped one, the user's own, the one that the main module uses, the shown one."""
        found: list[Path] = []
        with contextlib.suppress(BundleError):  # a package may come without one
            found.append(default_bundle_folder())
        own = user_bundles_folder()
        if own.is_dir():
            found += sorted(path for path in own.iterdir() if path.is_dir() and not path.name.startswith("."))
        used = str(self._settings.value(BUNDLE_KEY) or "")
        found += [Path(used)] if used else []
        found += [self.folder] if self.folder is not None else []
        return list(dict.fromkeys(path.absolute() for path in found))

    def isUsed(self) -> bool:
        """Whether the main module works with the bundle that is shown."""
        used = str(self._settings.value(BUNDLE_KEY) or "")
        try:
            path = Path(used) if used else default_bundle_folder()
        except BundleError:
            return False
        return self.folder is not None and path.absolute() == self.folder.absolute()

    def isShipped(self) -> bool:
        try:
            return self.folder is not None and self.folder.absolute() == default_bundle_folder().absolute()
        except BundleError:
            return False

    def use(self) -> None:
        """Let the main module work with the bundle that is shown, from its next engine start on."""
        if self.folder is not None:
            self._settings.setValue(BUNDLE_KEY, "" if self.isShipped() else str(self.folder.absolute()))
            self._tell("bundle")

    def rows(self) -> list[ExpertRow]:
        if self._bundle is None:
            return []
        off = self._switchedOff()
        return [
            ExpertRow(e.name, e.task, tuple(e.classes), e.licence, e.origin, e.sha256, e.note, e.name not in off)
            for e in self._bundle.plans.experts
        ]

    def identity(self) -> str:
        """As prompts files and the main module name the bundle; "" without one."""
        return "" if self._bundle is None else self._bundle.identity

    def megabytes(self) -> float:
        return 0.0 if self._bundle is None else self._bundle.nbytes / 1e6

    def card(self) -> str:
        """The model card, Markdown."""
        return self._text("model_card.md")

    def licences(self) -> dict[str, str]:
        """Text of each licence file by its name."""
        if self._bundle is None:
            return {}
        names = sorted(name for name in self._bundle.checksums if name.startswith("LICENSE"))
        return {name: self._text(name) for name in names}

    def _text(self, name: str) -> str:
        try:
            return "" if self._bundle is None else (self._bundle.folder / name).read_text(encoding="utf-8")
        except OSError:
            return ""

    # -- switching ---------------------------------------------------------------------------------------------------

    def setExpertEnabled(self, name: str, enabled: bool) -> None:
        """Whether an expert takes part from the next prompt on, in this bundle."""
        names = {row.name for row in self.rows()}
        if name not in names:
            message = f"The expert must be one of {sorted(names)}, got {name!r}."
            raise BundleError(message)
        off = {other for other in self._switchedOff() if other in names} - {name}
        self._settings.setValue(
            ExpertSwitches.PREFIX + self.identity(), ExpertSwitches.toStored(off if enabled else off | {name})
        )
        self._tell("bundle")

    def _switchedOff(self) -> tuple[str, ...]:
        return ExpertSwitches.switchedOff(self._settings.value(ExpertSwitches.PREFIX + self.identity()))

    # -- long work ---------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Compare every file with its SHA-256, a piece at each poll."""
        if self._bundle is None or self.busy:
            return
        self._verifying = _verification(self._bundle)
        self._begin(_("Verifying the bundle"))

    def add(self, request: AddRequest) -> None:
        """Add the encoder of an nnU-Net; the result is a new bundle among the user's own."""
        if self._bundle is None or self.busy:
            return
        if not request.results:
            self._fail(_("Choose the results folder of an nnU-Net first."))
            return
        if not request.licence.strip():
            self._fail(_("Say under which licence the weights may be used; 'not stated' is an answer too."))
            return
        target = self._newFolder(request.name or Path(request.results).resolve().parent.name)
        arguments = ["expert", "add", request.results, "--to", str(self._bundle.folder), "--output", str(target)]
        arguments += ["--license", request.licence.strip()]
        for option, value in (("--name", request.name), ("--fold", request.fold), ("--images", request.images)):
            arguments += [option, value] if value else []
        if request.images:
            arguments += ["--minutes", f"{request.minutes:g}"]
        self._run(arguments, target, _("Adding the expert"))

    def remove(self, name: str) -> None:
        """Take an expert out; the result is a new bundle among the user's own."""
        if self._bundle is None or self.busy:
            return
        target = self._newFolder(f"without-{name}")
        arguments = ["expert", "remove", name, "--from", str(self._bundle.folder), "--output", str(target)]
        self._run(arguments, target, _("Removing the expert"))

    def cancel(self) -> None:
        """Stop what is under way; what it had written so far is no bundle and goes."""
        if self._running:
            self._runner.cancel()
            if self._target is not None:
                for scratch in self._target.parent.glob(f".{self._target.name}-*"):
                    shutil.rmtree(scratch, ignore_errors=True)
        if self.busy:
            self._end()
            self.message = _("Cancelled. Nothing was changed.")
            self._tell("done")

    def poll(self) -> None:
        """Move on, and deliver what came; call it every 30 ms or so."""
        if self._verifying is not None:
            self._verifyAPiece(self._verifying)
        elif self._running:
            self._readTheRunner()

    def close(self) -> None:
        """Stop what is under way without a word."""
        self.observers.clear()
        self.cancel()

    def _verifyAPiece(self, verifying: Iterator[float]) -> None:
        try:
            share = next(verifying)
        except StopIteration:
            self._end()
            self.message = _("All files are as their SHA-256 says.")
            self._tell("done")
        except (BundleError, OSError) as error:
            self._end()
            self._fail(str(error))
        else:
            self.progress = (self.busy, share)
            self._tell("busy")

    def _run(self, arguments: Sequence[str], target: Path, text: str) -> None:
        self._lines, self._target = [], target
        try:
            self._runner.start([*arguments, "--json"])
        except OSError as error:
            self._fail(_("The other Python could not be started: {reason}").format(reason=error))
            return
        self._running = True
        self._begin(text)

    def _readTheRunner(self) -> None:
        lines, code = self._runner.poll()
        self._lines += lines
        told = [line.split(" ", 2) for line in lines if line.startswith("progress ")]
        if told and len(told[-1]) == 3:
            self.progress = (told[-1][2], float(told[-1][1]))
            self._tell("busy")
        if code is None:
            return
        self._end()
        try:
            result = json.loads(self._runner.output())
        except ValueError:
            result = {}
        if code == 0 and "output" in result:
            self._written(result)
        else:
            last = [line for line in self._lines if line.strip() and not line.startswith("progress ")]
            reason = result.get("error") or "\n".join(last[-3:]) or _("exit code {code}").format(code=code)
            self._fail(str(reason))

    def _written(self, result: dict[str, Any]) -> None:
        self.written = Path(result["output"])
        self.load(self.written)
        text = _("Written to {folder}, {size} MB.").format(folder=self.written, size=result.get("megabytes"))
        if result.get("trained") is False:
            text += " " + _("The new expert does not count until it is added with images to train on.")
        elif result.get("trained"):
            text += " " + _("Dice on held-out patches: {with_it} with it, {without} without it.").format(
                with_it=result["dice_with"], without=result["dice_without"]
            )
        self.message = text
        self._tell("done")

    def _newFolder(self, suffix: str) -> Path:
        """A folder among the user's own that does not exist yet."""
        assert self._bundle is not None
        words = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in suffix)
        name = f"{self._bundle.folder.name}-{words}"[:80]
        target, number = user_bundles_folder() / name, 2
        while target.exists():
            target, number = user_bundles_folder() / f"{name}-{number}", number + 1
        return target

    def _begin(self, text: str) -> None:
        self.busy, self.progress = text, (text, None)
        self._tell("busy")

    def _end(self) -> None:
        self._verifying, self._running = None, False
        self.busy, self.progress = "", ("", None)
        self._tell("busy")

    def _fail(self, message: str) -> None:
        self.message = message
        self._tell("error")

    def _tell(self, event: str) -> None:
        for observer in list(self.observers):
            observer(event)


def _verification(bundle: Bundle) -> Iterator[float]:
    """Shares of the bytes that were read; BundleError at the first file that differs."""
    look_into_bundle(bundle.folder)  # small files, and that none is foreign
    total, done = bundle.nbytes, 0
    for name, expected in bundle.checksums.items():
        digest = hashlib.sha256()
        with (bundle.folder / name).open("rb") as stream:
            while piece := stream.read(PIECE):
                digest.update(piece)
                done += len(piece)
                yield done / total
        if digest.hexdigest() != expected:
            message = f"bundle {bundle.folder.name!r}: {name} is damaged or was changed: its SHA-256 differs."
            raise BundleError(message)
