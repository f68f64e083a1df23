"""Batches of mixed sizes that cost every rank the same: the plan of packed training.

A sample is a number of tokens, of picture and text together. In one variable-length attention call nothing is padded,
so what is lost is only what ranks wait for the slowest of them, and what a batch stays below its FLOP budget. Which
samples a step holds does not depend on the number of ranks; only who has which of them does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from lens_core.types import ConfigError

Work = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def block_flops(tokens: NDArray[np.float64], width: int = 1536, layers: int = 48) -> NDArray[np.float64]:
    """Estimate the FLOPs of the backbone's blocks in a forward pass over samples of so many tokens [n] -> [n].

    A token costs 12 width^2 multiply-adds a block (qkv 3, output 1, SwiGLU 8), a pair of tokens 2 width. Training
    costs three times as much. Modulation, embeddings and the output are left out: plans compare samples, and are made
    where no backbone is loaded. A backbone's own `flops` counts all.
    """
    return layers * (24.0 * width**2 * tokens + 4.0 * width * tokens**2)


def text_tokens(words: NDArray[np.float64]) -> NDArray[np.float64]:
    """About the tokens of captions of so many words: 22 of the published encoder's template, 1.3 a word."""
    return 22 + 1.3 * words


def words_of(text: str) -> float:
    """About the words of a caption, for `text_tokens`. Chinese, Japanese and Thai have no spaces: there, and in what is
    no prose, a word is 8 bytes of UTF-8."""
    return max(float(len(text.split())), len(text.encode()) / 8)


def mixture(count: int, sizes: Sequence[tuple[int, int]], seed: int = 0, cell: int = 16) -> list[int]:
    """Tokens of samples drawn uniformly from `sizes` px, with captions of about 109 words, as Lens was trained on."""
    rng = np.random.default_rng(seed)
    cells = np.array([h * w // cell**2 for h, w in sizes])[rng.integers(len(sizes), size=count)]
    tokens: list[int] = (cells + text_tokens(rng.normal(109, 30, count).clip(20, 300))).astype(int).tolist()
    return tokens


def batch_costs(groups: Sequence[Sequence[tuple[int, int]]], batch_sizes: Sequence[int], words: float = 109) -> str:
    """What a batch of each group of sizes (height, width) px costs the published backbone, as a table.

    Captions have `words` words, as many as Lens was trained on in the mean. The last line is what ranks that draw
    groups of their own, each as often as the others, lose by waiting for the slowest of many.
    """
    lines = [f"{'group of sizes':20}{'samples':>9}{'tokens':>10}{'TFLOP forward':>15}{'of the mean':>13}"]
    rows = []
    for sizes, samples in zip(groups, batch_sizes, strict=True):
        tokens = np.array([h * w / 256 for h, w in sizes]) + float(text_tokens(np.array([words]))[0])
        side = round(float(np.mean([h * w for h, w in sizes])) ** 0.5)
        rows.append((side, samples, samples * float(tokens.mean()), samples * float(block_flops(tokens).mean())))
    mean = float(np.mean([row[3] for row in rows]))
    for side, samples, count, work in rows:
        lines.append(f"{f'about {side}^2 px':20}{samples:9}{count:10,.0f}{work / 1e12:15.1f}{work / mean:13.2f}")
    lines.append(f"the slowest group takes {max(row[3] for row in rows) / mean - 1:.1%} more than the mean")
    return "\n".join(lines)


@frozen
class Packs:
    """`steps[s][r]` are the samples of rank r in step s. `rest` did not fill a step: they come first the next time."""

    steps: tuple[tuple[tuple[int, ...], ...], ...]
    rest: tuple[int, ...]


def pack(lengths: Sequence[int], budget: float, ranks: int, work: Work = block_flops) -> Packs:
    """Split samples of `lengths` tokens into steps, in their order, of at most `budget` FLOPs a rank in the mean.

    A step takes as many of the next samples as fit, so no sample is dropped and none skips a step. A pure
    function, so every rank computes the same plan for itself. Raises ConfigError where a sample exceeds the budget.
    """
    costs = work(np.asarray(lengths, np.float64))
    if ranks < 1:
        raise ConfigError(f"packing needs at least 1 rank, not {ranks}")
    if len(costs) and costs.max() > budget:
        longest = int(costs.argmax())
        raise ConfigError(
            f"a sample of {lengths[longest]} tokens costs {costs[longest]:.3g} FLOPs, more than the budget of "
            f"{budget:.3g}; raise the budget"
        )
    until = np.concatenate([[0.0], np.cumsum(costs)])
    steps: list[tuple[tuple[int, ...], ...]] = []
    start = 0
    while until[-1] - until[start] > ranks * budget:
        stop = fill(until, start, ranks * budget)
        shares = share(costs[start:stop], ranks)
        steps.append(tuple(tuple(start + i for i in mine) for mine in shares))
        start = stop
    return Packs(tuple(steps), tuple(range(start, len(costs))))


def fill(until: NDArray[np.float64], start: int, budget: float) -> int:
    """The end of the step that begins at sample `start`, where `until[i]` is the cost of the first i samples."""
    return int(np.searchsorted(until, until[start] + budget, "right")) - 1


def share(costs: NDArray[np.float64], ranks: int) -> list[list[int]]:
    """Indices for each rank, ascending, with nearly equal sums: the dearest first to whoever has least, then swaps."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for index in np.argsort(-costs, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + float(costs[index]), rank))
    sums = np.array([costs[mine].sum() for mine in shares])
    for _ in range(4 * ranks):
        if not _level(costs, shares, sums):
            break
    return [sorted(mine) for mine in shares]


def _level(costs: NDArray[np.float64], shares: list[list[int]], sums: NDArray[np.float64]) -> bool:
    """Swap one sample of the most loaded rank for one of another, so that the larger of the two falls most."""
    high = int(sums.argmax())
    best, move = sums[high] * (1 - 1e-6), None
    for low in np.argsort(sums, kind="stable").tolist()[:8]:  # those with most room
        if low == high:
            continue
        gain = costs[shares[high]][:, None] - np.append(costs[shares[low]], 0.0)  # the last: nothing comes back
        after = np.maximum(sums[high] - gain, sums[low] + gain)
        place = np.unravel_index(int(after.argmin()), after.shape)
        if after[place] < best:
            best, move = after[place], (low, *map(int, place))
    if move is None:
        return False
    low, give, take = move
    moved = shares[high].pop(give)
    taken = [shares[low].pop(take)] if take < len(shares[low]) else []
    shares[low].append(moved)
    shares[high] += taken
    for rank in (low, high):
        sums[rank] = costs[shares[rank]].sum()
    return True


@frozen
class Balance:
    """How well a plan uses the ranks. All are shares; a plan of equal loads that fill the budget has 1, 0, 0 and 1."""

    useful: float  # work done, of what all ranks could have done while waiting for the slowest in each step
    imbalance: float  # mean over steps of (slowest - mean) / mean
    worst: float  # the same for the worst step
    filled: float  # of the budget


def balance(loads: NDArray[np.float64], budget: float) -> Balance:
    """Of `loads` [steps, ranks], the FLOPs of each rank in each step."""
    slowest, mean = loads.max(1), loads.mean(1)
    excess = slowest / mean - 1
    return Balance(
        float(loads.sum() / (slowest.sum() * loads.shape[1])),
        float(excess.mean()),
        float(excess.max()),
        float(loads.mean() / budget),
    )


def compare(lengths: Sequence[int], budget: float, ranks: int, work: Work = block_flops) -> dict[str, Balance]:
    """`packed` by FLOPs against ranks that fill up by `tokens`, and against `independent` buckets.

    An independent rank draws a bucket (here: a length) and as many samples of it as every other rank: what the budget
    holds of the longest. By tokens, a rank takes the next samples up to the tokens that the budget pays for at the
    longest length.
    """
    tokens = np.asarray(lengths, np.float64)
    costs = work(tokens)
    plan = pack(lengths, budget, ranks, work)
    packed = np.array([[costs[list(mine)].sum() for mine in step] for step in plan.steps])
    each = max(1, int(budget // costs.max()))
    same = costs[: len(costs) // ranks * ranks].reshape(-1, ranks) * each
    limit = tokens.max() * each
    loads, held, load = [], 0.0, 0.0
    for n, cost in zip(tokens.tolist(), costs.tolist(), strict=True):
        if held + n > limit:
            loads.append(load)
            held, load = 0.0, 0.0
        held, load = held + n, load + cost
    by_tokens = np.array(loads[: len(loads) // ranks * ranks]).reshape(-1, ranks)
    plans = {"independent": same, "tokens": by_tokens, "packed": packed}
    return {name: balance(loads, budget) for name, loads in plans.items()}


def comparison_table(lengths: Sequence[int], budget: float, ranks: int, work: Work = block_flops) -> str:
    """The comparison as a table. Raises ConfigError where there are too few samples for one step."""
    plan = pack(lengths, budget, ranks, work)
    if not plan.steps or not all(map(all, plan.steps)):
        raise ConfigError(
            f"{len(lengths)} samples at a budget of {budget:.3g} FLOPs fill no step of {ranks} ranks; take more "
            "samples, a larger budget or fewer ranks"
        )
    balances = compare(lengths, budget, ranks, work)
    head = f"{'':12}{'useful':>9}{'imbalance':>11}{'worst':>9}{'filled':>9}"
    rows = [f"{name:12}{b.useful:9.3%}{b.imbalance:11.3%}{b.worst:9.3%}{b.filled:9.3%}" for name, b in balances.items()]
    return "\n".join([f"{len(lengths)} samples, {len(plan.steps)} packed steps of {ranks} ranks", head, *rows])
