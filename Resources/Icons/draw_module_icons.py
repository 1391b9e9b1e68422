"""Draw the SVG icons of the Slicer modules. Mid-tones only, legible in the light and in the dark theme."""

from __future__ import annotations

from pathlib import Path

MODULES = Path(__file__).parents[2] / "scripted_modules"
INK, BLUE, MASK, POSITIVE, NEGATIVE = "#7a8b99", "#3f8fd2", "#f2b134", "#2fa36b", "#e4572e"

ORGAN = "M12 3.2c4.6-.6 8.6 2.4 8.8 6.6.2 3.4-1.8 4-1.9 6.6-.2 3-3.2 4.8-6.6 4.4-4.8-.5-9-3-9-7.8 0-5 4-9.2 8.7-9.8z"


def line(path: str, color: str = INK, width: float = 2, more: str = "") -> str:
    style = 'stroke-linecap="round" stroke-linejoin="round"'
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width}" {style} {more}/>'


def disc(x: float, y: float, radius: float, color: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{color}"/>'


def rectangle(x: float, y: float, width: float, height: float, more: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" {more}/>'


def module(*extra: str) -> str:
    organ = f'<path d="{ORGAN}" fill="{MASK}" fill-opacity="0.45" stroke="{MASK}" stroke-width="1.8"/>'
    return organ + disc(11, 11.5, 2.6, POSITIVE) + disc(19.5, 19.5, 2.2, NEGATIVE) + "".join(extra)


ICONS = {
    "SlicerKA2ER": module(),
    "Point": line("M12 2.5v5M12 16.5v5M2.5 12h5M16.5 12h5") + disc(12, 12, 3.2, BLUE),
    "Box": rectangle(4, 6, 16, 12, f'fill="{BLUE}" fill-opacity="0.2" stroke="{BLUE}" stroke-width="2"')
    + disc(4, 6, 2.2, INK)
    + disc(20, 18, 2.2, INK),
    "Roi": line("M4 8.5l8-4.5 8 4.5v8l-8 4.5-8-4.5z", BLUE) + line("M4 8.5l8 4.5 8-4.5M12 13v8", INK, 1.6),
    "Scribble": line("M3.5 17c2.5-7 4.5-9 6-7.6 1.6 1.6-2.4 7.6-.4 8.4 2 .8 4-6 6-5.2 1.8.8-.2 4.4 1.4 4.6", BLUE, 2.6)
    + line("M16.5 17.2l4-12", INK, 2),
    "Lasso": line(
        "M8.5 16.5c-3.4-.8-5.5-2.8-5.5-5.4C3 7.3 7 4.5 12 4.5s9 2.8 9 6.6-4 6.6-9 6.6c-1 0-2-.1-2.8-.3",
        BLUE,
        2,
        'stroke-dasharray="3.4 2.6"',
    )
    + disc(8.4, 17, 2, INK)
    + line("M8 18.5c0 1.5-1 2.5-2.5 3", INK, 1.6),
    "Positive": disc(12, 12, 8.5, POSITIVE) + line("M12 7.5v9M7.5 12h9", "#ffffff", 2.4),
    "Negative": disc(12, 12, 8.5, NEGATIVE) + line("M7.5 12h9", "#ffffff", 2.4),
    "Undo": line("M8.5 5l-4.5 4.5 4.5 4.5") + line("M4.5 9.5h9a5.5 5.5 0 0 1 0 11h-4"),
    "Redo": line("M15.5 5l4.5 4.5-4.5 4.5") + line("M19.5 9.5h-9a5.5 5.5 0 0 0 0 11h4"),
    "Reset": line("M6 7l.9 13h10.2L18 7M4 7h16M9.5 7V4h5v3M10 11v5.5M14 11v5.5", INK, 1.8),
    "NextSegment": f'<path d="{ORGAN}" transform="scale(0.72)" fill="{MASK}" fill-opacity="0.45" stroke="{MASK}" '
    'stroke-width="2.4"/>' + line("M19 14v8M15 18h8", POSITIVE, 2.4),
    "Suggest": line("M12 3a9 9 0 1 0 9 9", INK, 2) + disc(12, 12, 3, BLUE) + line("M20.5 3.5l-6 6M14.5 5v4.5H19", BLUE),
    "NextFrame": line("M3.5 5h9v14h-9z", INK, 1.8) + line("M15 12h6.5M18.5 8.5L22 12l-3.5 3.5", BLUE, 2.2),
}
EFFECT = {"SegmentEditorKA2ER": module()}


def main() -> None:
    for folder, icons in (("SlicerKA2ER/Resources/Icons", ICONS), ("SegmentEditorKA2ER/Resources/Icons", EFFECT)):
        (MODULES / folder).mkdir(parents=True, exist_ok=True)
        for name, shapes in icons.items():
            text = (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24" viewBox="0 0 24 24">{shapes}</svg>\n'
            )
            (MODULES / folder / f"{name}.svg").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
