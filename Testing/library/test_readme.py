"""README.md and CONTRIBUTING.md name only what exists."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from KA2ERSegment.cli import app

ROOT = Path(__file__).parents[2]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
README = TEXTS["README.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def shell_lines(text: str, program: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(f"{program} ")]


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_python_of_the_readme_parses_and_names_what_exists(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = {"session": "Session", "prediction": "Prediction"}.get(node.value.id, node.value.id)
            assert _has(getattr(importlib.import_module("KA2ERSegment"), owner), node.attr), f"{owner}.{node.attr}"


def test_python_of_the_readme_is_there() -> None:
    assert len(blocks(README, "python")) == 1


@pytest.mark.parametrize("name", TEXTS)
def test_make_targets_that_the_texts_name_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {line.split()[1] for line in shell_lines(TEXTS[name], "make")}
    named |= {code.split()[1] for code in re.findall(r"`(make [^`]+)`", TEXTS[name])}

    assert named
    assert named <= targets


@pytest.mark.parametrize("line", shell_lines(README, "ka2ersegment"))
def test_command_lines_of_the_readme_are_understood(line: str) -> None:
    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    context = click.Context(command, info_name="ka2ersegment")
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"{line}: there is no command {words[0]!r}"
        command = command.commands[words.pop(0)]
        context = type(context)(command, parent=context, info_name=command.name)

    command.parse_args(context, words)  # raises a usage error where an option or a value does not exist


def test_readme_shows_the_command_line() -> None:
    assert {line.split()[1] for line in shell_lines(README, "ka2ersegment")} == {
        "segment",
        "serve",
        "expert",
        "evaluate",
        "bundle",
        "doctor",
    }


@pytest.mark.parametrize("name", TEXTS)
def test_links_inside_the_repository_lead_somewhere(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXTS[name]) if "://" not in link]

    assert [link for link in links if not (ROOT / link).exists()] == []


def test_texts_have_no_placeholders() -> None:
    for name, text in TEXTS.items():
        assert not re.search(r"\b(TODO|TBD|FIXME|XXX)\b|lorem ipsum", text, re.I), name


def _has(owner: type, attribute: str) -> bool:
    """Whether a class has the attribute, as a method, a property or a field that only its annotations name."""
    return any(attribute in vars(each) or attribute in getattr(each, "__annotations__", {}) for each in owner.__mro__)
