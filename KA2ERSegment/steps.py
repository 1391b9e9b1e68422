"""What a session writes down: one step after the other, as plain data in RAS mm."""

from __future__ import annotations

import json
import math
import reprlib
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from KA2ERSegment.errors import PromptError
from KA2ERSegment.prompts import MaskPrompt, Polarity, Prompt, prompt_from_json

FORMAT = 1
MAX_SMOOTHING_MM = 50.0


class Neighbours(str, Enum):
    """What happens where an object grows into others that are not locked."""

    KEEP = "keep"
    """They lose nothing; the object goes around them."""
    COMPETE = "compete"
    """Each voxel goes to the more probable one."""
    OVERLAP = "overlap"
    """Nobody loses anything; objects may overlap, locked ones too."""


@dataclass(frozen=True, slots=True)
class Edit:
    """An object's mask as a hand left it. Make one with `of`.

    Args:
        text: the JSON of its mask. Compressed, a mask is a thousandth of its voxels, and a session keeps every edit.
    """

    text: str

    @classmethod
    def of(cls, mask: MaskPrompt) -> Edit:
        """Raises PromptError for anything but a positive mask."""
        if not isinstance(mask, MaskPrompt) or mask.polarity is not Polarity.POSITIVE:
            what = "a negative MaskPrompt" if isinstance(mask, MaskPrompt) else type(mask).__name__
            message = f"an edit must be a positive MaskPrompt, got {what}. Use MaskPrompt.from_array(mask, volume)."
            raise PromptError(message)
        return cls(json.dumps(mask.to_json()))

    @property
    def mask(self) -> MaskPrompt:
        """What `of` was given."""
        mask = prompt_from_json(json.loads(self.text))
        assert isinstance(mask, MaskPrompt), "made by `of`"
        return mask


@dataclass(frozen=True, slots=True)
class Finish:
    """How an object's mask is made from its probability; nothing of it needs the network.

    Args:
        smoothing_mm: standard deviation of the Gaussian that smooths the logits; 0 leaves them.
        islands: False drops the parts that no positive prompt touches.
    """

    smoothing_mm: float = 0.0
    islands: bool = True

    def __post_init__(self) -> None:
        number = isinstance(self.smoothing_mm, (int, float)) and not isinstance(self.smoothing_mm, bool)
        if not number or not math.isfinite(self.smoothing_mm) or not 0 <= self.smoothing_mm <= MAX_SMOOTHING_MM:
            message = f"smoothing_mm must be a number from 0 to {MAX_SMOOTHING_MM:g}, got {_short(self.smoothing_mm)}."
            raise PromptError(message)
        if not isinstance(self.islands, bool):
            message = f"islands must be True or False, got {_short(self.islands)}."
            raise PromptError(message)
        object.__setattr__(self, "smoothing_mm", float(self.smoothing_mm))


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done to an object. The steps so far are what `Session.save` writes and `Session.replay` does again.

    Args:
        name: of the object.
        done: the prompt or edit that it was given, or what else happened to it.
        neighbours: of a prompt or an edit.
        experts: that took part in a prompt; None for all.
        amend: whether an edit shares its place in the history with the step before.
    """

    name: str
    done: Prompt | Edit | Finish | Literal["lock", "unlock", "reset", "remove"]
    neighbours: Neighbours = Neighbours.COMPETE
    experts: tuple[str, ...] | None = None
    amend: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data for `from_json`. What has its default is left out, so that older versions read what they can."""
        data: dict[str, Any] = {"object": self.name}
        if isinstance(self.done, str):
            return {**data, "do": self.done}
        if isinstance(self.done, Finish):
            return {**data, "finish": {"smoothing_mm": self.done.smoothing_mm, "islands": self.done.islands}}
        if isinstance(self.done, Edit):
            data["edit"] = json.loads(self.done.text)
        else:
            data["prompt"] = self.done.to_json()
        if self.neighbours is not Neighbours.COMPETE:
            data["neighbours"] = self.neighbours.value
        if self.experts is not None:
            data["experts"] = list(self.experts)
        if self.amend:
            data["amend"] = True
        return data

    @classmethod
    def from_json(cls, entry: object) -> Step:
        """The step that `to_json` described; PromptError for anything else."""
        match entry:
            case {"object": str(name), "prompt": prompt, **more} if name and more.keys() <= {"neighbours", "experts"}:
                return cls(name, prompt_from_json(prompt), _neighbours(more), experts_from_json(more.get("experts")))
            case {"object": str(name), "edit": mask, **more} if name and more.keys() <= {"neighbours", "amend"}:
                amend = more.get("amend", False)
                if isinstance(amend, bool):
                    return cls(name, Edit.of(_mask(mask)), _neighbours(more), amend=amend)
            case {"object": str(name), "finish": {"smoothing_mm": mm, "islands": islands, **rest}, **more} if (
                name and not rest and not more
            ):
                return cls(name, Finish(mm, islands))
            case {"object": str(name), "do": "lock" | "unlock" | "reset" | "remove" as done, **more} if (
                name and not more
            ):
                return cls(name, done)
        message = (
            'a step in JSON must have an "object" and either a "prompt", an "edit", a "finish" or, under "do", one of '
            f"lock, unlock, reset and remove; got {_short(entry)}. Save prompts with Session.save."
        )
        raise PromptError(message)


def experts_from_json(data: object) -> tuple[str, ...] | None:
    """Names of experts, None for all; PromptError for anything else."""
    if data is None:
        return None
    if isinstance(data, list) and all(isinstance(name, str) for name in data):
        return tuple(data)
    message = f'"experts" in JSON must be a list of names, got {_short(data)}. Save prompts with Session.save.'
    raise PromptError(message)


def _neighbours(data: Mapping[Any, Any]) -> Neighbours:
    value = data.get("neighbours", Neighbours.COMPETE.value)
    try:
        return Neighbours(value)
    except ValueError:
        message = f'"neighbours" in JSON must be one of {[n.value for n in Neighbours]}, got {_short(value)}.'
        raise PromptError(message) from None


def _mask(data: object) -> MaskPrompt:
    mask = prompt_from_json(data)
    if isinstance(mask, MaskPrompt):
        return mask
    message = f"an edit in JSON must be a mask prompt, got {_short(data)}. Save prompts with Session.save."
    raise PromptError(message)


def parse_steps(saved: object) -> tuple[tuple[str, ...], str, tuple[Step, ...]]:
    """Names, selection and steps of `Session.to_json`; PromptError where it is something else."""
    match saved:
        case {"format": format_, "objects": [*names], "selected": str(selected), "steps": [*steps]} if (
            format_ == FORMAT and selected and all(isinstance(name, str) and name for name in names)
        ):
            return tuple(names), selected, tuple(Step.from_json(step) for step in steps)
        case {"format": format_} if format_ != FORMAT:
            message = (
                f"prompts must be saved in format {FORMAT}, got format {_short(format_)}. Use the version it is of."
            )
        case _:
            message = (
                'prompts must be saved as an object with "format", "objects", "selected" and "steps", got '
                f"{_short(saved)}. Save them with Session.save."
            )
    raise PromptError(message)


def read_steps_file(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path.name!r} must be a prompts file that Session.save wrote: {error}."
        raise PromptError(message) from error


def write_steps_file(path: Path, saved: dict[str, Any]) -> None:
    """Write what `Session.to_json` gives; the file appears whole or not at all.

    Raises:
        PromptError: the folder is missing, the disk full, or the path no plain file; nothing was changed.
    """
    text = json.dumps(saved, indent=1) + "\n"
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        if path.exists() and not path.is_file():
            message = f"prompts must be saved to a plain file; {str(path)!r} is something else. Choose another name."
            raise PromptError(message)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        message = f"prompts could not be saved to {str(path)!r}: {error.strerror}. Nothing was changed there."
        raise PromptError(message) from error
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def _short(value: object) -> str:
    return reprlib.repr(value)  # a damaged file may hold megabytes
