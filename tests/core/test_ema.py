"""Moving averages: how they follow the weights, and that they swap places with them without a trace."""

from __future__ import annotations

import torch

from lens_core.training import ema


def test_a_young_average_decays_faster_and_never_slower_than_its_limit() -> None:
    assert [ema.decay_at(0.9, step) for step in (0, 9, 1000)] == [0.1, 10 / 19, 0.9]


def test_an_average_follows_floats_and_copies_counters() -> None:
    average = {"w": torch.tensor([1.0]), "count": torch.tensor(3)}
    ema.update(average, {"w": torch.tensor([3.0]), "count": torch.tensor(7)}, decay=0.75)
    assert average["w"].tolist() == [1.5] and average["count"].item() == 7


def test_an_exchange_undone_backwards_leaves_every_bit_even_where_a_tensor_is_shared() -> None:
    shared, a, b = torch.rand(3), torch.rand(3), torch.rand(3)
    before = [t.clone() for t in (shared, a, b)]
    pairs = [(shared, a), (shared, b)]
    ema.exchange(pairs)
    assert torch.equal(a, before[0]) and not torch.equal(shared, before[0])
    ema.exchange(pairs[::-1])
    assert all(torch.equal(t, kept) for t, kept in zip((shared, a, b), before, strict=True))
