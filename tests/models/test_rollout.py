"""Attention rollout against a case worked out by hand and against brute force."""

from __future__ import annotations

import torch

from models.rollout import mixing, own_places, ranks, rollout


def test_two_layers_worked_out_by_hand() -> None:
    first = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]]])[None]  # two heads that agree
    second = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])[None]  # two that do not: 1/2 each
    torch.testing.assert_close(mixing(first)[0], torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    torch.testing.assert_close(mixing(second)[0], torch.tensor([[0.75, 0.25], [0.25, 0.75]]))
    found = rollout([first, second], own_places(1, 2, torch.device("cpu")))[0]
    # row 0: 3/4 (1, 0) + 1/4 (1/4, 3/4); row 1: 1/4 (1, 0) + 3/4 (1/4, 3/4)
    torch.testing.assert_close(found, torch.tensor([[0.8125, 0.1875], [0.4375, 0.5625]]))


def test_rows_add_up_to_one_through_any_number_of_layers() -> None:
    layers = [torch.randn(3, 4, 6, 6).softmax(-1) for _ in range(5)]
    found = rollout(iter(layers), own_places(3, 6, torch.device("cpu")))
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 6))


def test_ranks_are_the_places_in_the_order_of_relevance() -> None:
    assert ranks(torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.3, 0.4]])).tolist() == [[2, 0, 1], [1, 2, 0]]
