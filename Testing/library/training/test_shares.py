"""The table of shares says of each task which arm is heard, and how often the own expert comes first."""

from __future__ import annotations

import torch

from KA2ERSegment.training.shares import NO_TASK, share_table

ARMS = ("foundation", "trunk", "brain")


def test_the_table_of_four_objects() -> None:
    shares = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3], [0.1, 0.3, 0.6], [0.8, 0.1, 0.1]])
    table = share_table(ARMS, shares, ["trunk", "trunk", "brain", NO_TASK])

    assert table.cases == {"trunk": 2, "brain": 1, NO_TASK: 1}
    assert table.shares["trunk"] == {"foundation": 0.35, "trunk": 0.45, "brain": 0.2}
    assert table.largest["trunk"] == {"foundation": 0.5, "trunk": 0.5, "brain": 0.0}
    assert table.largest_expert["trunk"] == {"trunk": 0.5, "brain": 0.5}
    assert table.largest_expert["brain"] == {"trunk": 0.0, "brain": 1.0}
    assert "| brain | 1 | 0.100 | 0.300 | 0.600 | 100% |" in str(table).splitlines()


def test_a_model_without_experts_has_one_arm() -> None:
    table = share_table(("foundation",), torch.ones(2, 1), [NO_TASK, NO_TASK])

    assert table.shares == {NO_TASK: {"foundation": 1.0}}
    assert table.largest_expert == {NO_TASK: {}}


def test_images_of_an_expert_that_the_model_has_not_belong_to_no_task() -> None:
    table = share_table(("foundation",), torch.ones(2, 1), ["trunk", NO_TASK])

    assert table.cases == {NO_TASK: 2}
