"""Which expert is heard where: shares of the arms inside objects, by the task that the image belongs to.

The weights of the amalgamation's last level are what a viewer shows as an expert's share. They mean something if, on
an image of expert k's task, expert k has the largest weight inside the object in most cases (KA2ER, arXiv 2410.21085;
the measure is this project's own). Of a bundle on volumes, `ka2ersegment assess` says the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_TASK = "none"
"""Row of the cases that belong to no expert's task."""


@dataclass(frozen=True, slots=True)
class ShareTable:
    """Shares of the arms inside objects, by the task that the image belongs to.

    Args:
        arms: "foundation", then the experts.
        cases: number of objects of each task; tasks without any are left out of all.
        shares: of each task the mean share of each arm inside the object; a row sums to 1.
        largest: of each task the part of its cases in which each arm has the largest share; a row sums to 1.
        largest_expert: of each task the part of its cases in which each expert has the largest share of all experts.
    """

    arms: tuple[str, ...]
    cases: dict[str, int]
    shares: dict[str, dict[str, float]]
    largest: dict[str, dict[str, float]]
    largest_expert: dict[str, dict[str, float]]

    def __str__(self) -> str:
        """As a table in Markdown: mean shares, and how often the own expert is the first of all experts."""
        lines = [f"| task | cases | {' | '.join(self.arms)} | own expert first |", "|---" * (len(self.arms) + 3) + "|"]
        for task, shares in self.shares.items():
            first = f"{self.largest_expert[task][task]:.0%}" if task in self.largest_expert[task] else ""
            cells = " | ".join(f"{share:.3f}" for share in shares.values())
            lines.append(f"| {task} | {self.cases[task]} | {cells} | {first} |")
        return "\n".join(lines)


def share_table(arms: Sequence[str], shares: Tensor, tasks: Sequence[str]) -> ShareTable:
    """The table of measured cases.

    Args:
        arms: names of the K+1 arms, the foundation first.
        shares: (N, K+1) from `losses.shares_inside`.
        tasks: for each case the name of the expert whose task it belongs to; none of the arms': `NO_TASK`.
    """
    tasks = [task if task in arms[1:] else NO_TASK for task in tasks]
    winners, first_experts = shares.argmax(1), shares[:, 1:].argmax(1) if len(arms) > 1 else None
    rows = {task: torch.tensor([own == task for own in tasks]) for task in (*arms[1:], NO_TASK) if task in tasks}

    def named(values: Tensor, names: Sequence[str]) -> dict[str, float]:
        return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}

    def frequency(chosen: Tensor, names: Sequence[str]) -> dict[str, float]:
        return named(chosen.bincount(minlength=len(names)) / len(chosen), names)

    return ShareTable(
        arms=tuple(arms),
        cases={task: int(row.sum()) for task, row in rows.items()},
        shares={task: named(shares[row].mean(0), arms) for task, row in rows.items()},
        largest={task: frequency(winners[row], arms) for task, row in rows.items()},
        largest_expert={
            task: frequency(first_experts[row], arms[1:]) if first_experts is not None else {}
            for task, row in rows.items()
        },
    )
