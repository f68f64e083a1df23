"""OneIG's decisions beside text (Chang et al., 2025, arXiv:2506.07977): alignment, diversity, style, reasoning.

The rules are those of scripts/ at github.com/OneIG-Bench/OneIG-Benchmark, revision 41b4983. Every dimension is a mean
over prompts of a mean over a prompt's pictures, or over pairs of them; it is not a mean over categories. Rules that
surprise:
- Alignment: only the exact answer `Yes` is a yes. A question counts as no if one of its parents was answered no; what
  counts is the parent's own answer, not whether it was zeroed in turn, so this reaches one step. Parent 0 is the root;
  a parent that is no question of the prompt is ignored.
- Diversity: a prompt with fewer than two pictures has none and is left out.
- Style: each of two similarities counts at least 0; the score is their mean.
- Pictures that are missing or purely black are left out of every mean, so that refusals can raise a score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

YES = "Yes"


@frozen
class Alignment:
    """`yes`: per question whether the answer was yes; `zeroed`: those that were, and do not count for a parent's sake;
    `score`: the share of questions that count."""

    yes: dict[str, bool]
    zeroed: list[str]
    score: float


def alignment(
    questions: Sequence[str], dependencies: Mapping[str, Sequence[str | int]], answers: Mapping[str, str]
) -> Alignment:
    """The verdict on one picture: `questions` are ids, `dependencies` the parents of each, `answers` as they came."""
    yes = {name: answers[name] == YES for name in questions}
    zeroed = [
        name for name in questions if yes[name] and not all(yes.get(str(p), True) for p in dependencies.get(name, ()))
    ]
    score = (sum(yes.values()) - len(zeroed)) / len(yes) if yes else 0.0
    return Alignment(yes, zeroed, score)


@frozen
class Diversity:
    """The distances of one picture to those before it, of the same prompt."""

    distance_sum: float
    pairs: int


def diversity(distances: Sequence[float]) -> Diversity:
    return Diversity(float(sum(distances)), len(distances))


@frozen
class Style:
    """Two similarities of a picture to the references of its style, at least 0, and their mean."""

    csd: float
    encoder: float
    score: float


def style(csd: float, encoder: float) -> Style:
    csd, encoder = max(csd, 0.0), max(encoder, 0.0)
    return Style(csd, encoder, (csd + encoder) / 2)
