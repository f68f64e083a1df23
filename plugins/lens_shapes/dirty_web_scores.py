"""The verdicts of a curation against the truth about a dirty web: precision and recall of each stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lens_core.evaluation.statistics import wilson_interval
from lens_core.types import ConfigError
from lens_shapes.dirty_web import COPIES, DAMAGES, Truth

STAGES: Mapping[str, tuple[str, str]] = {
    "blur": ("clarity", "acuity"),
    "dark": ("luminance", "mean"),
    "overexposed": ("luminance", "light"),
    "noise": ("clarity", "noise"),
    "tiny": ("resolution", "short_side"),
    "extreme ratio": ("resolution", "aspect_ratio"),
    "truncated": ("decode", ""),
    "wrong extension": ("file", "wrong_extension"),
    "watermark": ("shapes_caption", "unnamed"),
    "border": ("borders", "frame"),
    "wrong caption": ("shapes_caption", "match"),
}
"""The stage, and the column of it, that should drop a picture with a damage. Copies are a matter of their group."""


def figures(truths: Sequence[Truth], verdicts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Precision and recall by damage, and what became of all. Raises ConfigError where a file has no verdict.

    precision: of what the stage dropped, the share that has the damage; recall: of what has the damage, the share
    that the stage dropped. Of a picture and its copy either may be kept, and one should be: a copy counts as found
    where the stage `near` (of mirrored ones `mirrored`) dropped one of the two for the other; `near` is wrong where it
    drops a picture for one that is not of its group, or of a group that is mirrored.
    """
    rows = {row["name"]: row for row in verdicts}
    if lost := [truth.file for truth in truths if truth.file not in rows]:
        raise ConfigError(f"{lost[0]} and {len(lost) - 1} more files have no verdict; curate the whole folder first")
    dropped = {
        truth.file: (row["stage"], row["reason"].partition(" is ")[0] if row["stage"] != "decode" else "")
        for truth in truths
        if not (row := rows[truth.file])["kept"]
    }
    stages = {
        damage: _counts(
            {t.file for t in truths if t.damage == damage}, {f for f, where in dropped.items() if where == stage}
        )
        for damage, stage in STAGES.items()
    }
    stages |= _of_copies(truths, rows)
    spare, kept, lost_groups = _kept(truths, rows)
    clean = [t for t in truths if not t.damage]
    return {
        "pictures": len(truths),
        "clean": len(clean),
        "stages": stages,
        "kept": len(rows.keys() - dropped.keys()),
        "kept_spoiled": spare,
        "kept_clean": kept,
        "lost": lost_groups,
        "lost_clean": _share(lost_groups, len({_group(t) for t in clean})),
    }


def _group(truth: Truth) -> str:
    return truth.of or truth.file


def _kept(truths: Sequence[Truth], rows: Mapping[str, Mapping[str, Any]]) -> tuple[int, int, int]:
    """Pictures that are kept and should not be (damaged, or a second one of a group), groups of clean pictures of
    which one is kept, and those of which none is."""
    kept = [t for t in truths if rows[t.file]["kept"]]
    good = {_group(t) for t in kept if not t.damage or t.damage in COPIES}
    clean = {_group(t) for t in truths if not t.damage}
    return len(kept) - len(good), len(good), len(clean - good)


def _of_copies(truths: Sequence[Truth], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    ids: dict[str, set[str]] = {}
    for truth in truths:
        ids.setdefault(rows[truth.file]["id"], set()).add(_group(truth))
    kinds = {_group(t): t.damage for t in truths if t.damage in COPIES}
    right: dict[str, set[str]] = {"near": set(), "mirrored": set()}
    wrong = {"near": 0, "mirrored": 0}
    distances: dict[str, list[int]] = {"near": [], "mirrored": []}
    for truth in truths:
        row, group = rows[truth.file], _group(truth)
        if row["kept"] or row["stage"] not in right:
            continue
        is_mirrored = row["stage"] == "mirrored"
        if group in ids.get(row["of"], ()) and group in kinds and (kinds[group] == "mirrored") == is_mirrored:
            right[row["stage"]].add(group)
            distances[row["stage"]].append(int(row["distance"]))
        else:
            wrong[row["stage"]] += 1
    made: dict[str, dict[str, Any]] = {}
    for kind in COPIES:
        stage = "mirrored" if kind == "mirrored" else "near"
        groups = {group for group, damage in kinds.items() if damage == kind}
        made[kind] = {"hits": len(groups & right[stage]), "spoiled": len(groups)}
        made[kind]["recall"] = _share(made[kind]["hits"], len(groups))
    for stage in right:
        groups = {group for group, damage in kinds.items() if (damage == "mirrored") == (stage == "mirrored")}
        count = len(right[stage])
        made[stage] = {
            "hits": count, "spoiled": len(groups), "dropped": count + wrong[stage],
            "precision": _share(count, count + wrong[stage]), "recall": _share(count, len(groups)),
            "bits_apart": np.quantile(distances[stage], [0.5, 0.95]).round(1).tolist() if count else None,
        }  # fmt: skip
    return made


def _counts(spoiled: set[str], dropped: set[str]) -> dict[str, Any]:
    hits = len(spoiled & dropped)
    return {
        "hits": hits, "spoiled": len(spoiled), "dropped": len(dropped),
        "precision": _share(hits, len(dropped)), "recall": _share(hits, len(spoiled)),
    }  # fmt: skip


def _share(part: int, whole: int) -> list[float] | None:
    """A share with its 95 % interval (Wilson); None of nothing."""
    return [part / whole, *wilson_interval(part / whole, whole)] if whole else None


def table(made: Mapping[str, Any]) -> str:
    """The figures as a Markdown table and a sentence."""
    lines = ["| damage | stage | spoiled | dropped | precision | recall |", "|---|---|---|---|---|---|"]
    names = [*(d for d in DAMAGES if d in STAGES), "near", *(k for k in COPIES if k != "mirrored"), "mirrored"]
    for name in names:
        row = made["stages"][name]
        stage = " ".join(
            f"`{word}`" for word in STAGES.get(name, ("mirrored" if name == "mirrored" else "near",)) if word
        )
        title = {"near": "near duplicates, all", "mirrored": "mirrored duplicates"}.get(name, name)
        title = f"of them {title}" if name in COPIES and name != "mirrored" else title
        dropped, precision = row.get("dropped", ""), shown(row["precision"]) if "precision" in row else ""
        lines.append(f"| {title} | {stage} | {row['spoiled']} | {dropped} | {precision} | {shown(row['recall'])} |")
    lost = shown(made["lost_clean"])
    tail = f"Of {made['pictures']:,} pictures {made['kept']:,} are kept, {made['kept_spoiled']:,} of them spoiled."
    return "\n".join([*lines, "", f"{tail} Clean pictures lost: {made['lost']:,} ({lost})."])


def shown(share: Sequence[float] | None) -> str:
    """0.987 (0.974 to 0.993)"""
    return "none" if share is None else f"{share[0]:.3f} ({share[1]:.3f} to {share[2]:.3f})"
