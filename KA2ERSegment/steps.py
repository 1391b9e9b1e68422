"""What a session writes down: one step after the other, as plain data in RAS mm."""

from __future__ import annotations

import json
import reprlib
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from KA2ERSegment.errors import PromptError
from KA2ERSegment.prompts import Prompt, prompt_from_json

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Step:
    """One thing done to an object. The steps so far are what `Session.save` writes and `Session.replay` does again.

    Args:
        name: of the object.
        done: the prompt that it was given, or what else happened to it.
    """

    name: str
    done: Prompt | Literal["lock", "unlock", "reset"]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `from_json`."""
        what = {"do": self.done} if isinstance(self.done, str) else {"prompt": self.done.to_json()}
        return {"object": self.name, **what}

    @classmethod
    def from_json(cls, entry: object) -> Step:
        """The step that `to_json` described; PromptError for anything else."""
        match entry:
            case {"object": str(name), "prompt": prompt, **more} if name and not more:
                return cls(name, prompt_from_json(prompt))
            case {"object": str(name), "do": "lock" | "unlock" | "reset" as done, **more} if name and not more:
                return cls(name, done)
        message = (
            'a step in JSON must have an "object" and either a "prompt" or, under "do", one of lock, unlock and '
            f"reset; got {_short(entry)}. Save prompts with Session.save."
        )
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
