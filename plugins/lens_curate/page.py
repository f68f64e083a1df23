"""The page of a report: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lens_curate.progress import duration

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.6em;margin:0}h2{font-size:1.2em;margin:2em 0 .5em;border-bottom:1px solid #ddd}
h3{font-size:1em;margin:1em 0 .3em}
table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;text-align:right;vertical-align:middle}
td:first-child,th:first-child{text-align:left}
.bar{display:inline-block;height:.8em;background:#4a7fb5;vertical-align:middle}.bar.out{background:#c8553d}
.plots{display:flex;flex-wrap:wrap;gap:1.2em}.plot{width:330px}
.sheet{display:flex;flex-wrap:wrap;gap:8px}.card{width:128px;font-size:11px;line-height:1.3;overflow-wrap:anywhere}
.card.pair{width:216px}
.card img{max-width:100px;max-height:100px;background:#eee;border:1px solid #ccc;margin-right:4px}
.none{display:inline-block;width:98px;height:64px;background:#eee;color:#888;text-align:center;padding-top:30px}
summary{cursor:pointer}small{color:#666}
"""


def page(data: Mapping[str, Any], pictures: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """report.json and its pictures as HTML. Everything from a source is escaped."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Curation report</title><style>{_STYLE}</style>",
        "<h1>Curation report</h1>",
        f"<p>{data['records']:,} records, <b>{data['kept']:,} kept</b> "
        f"({data['kept'] / max(1, data['records']):.1%}), in {duration(data['seconds'])}.</p>",
        _funnel(data["funnel"]),
        _scores(data["scores"]),
        _captions(data["captions"], data["cost"]),
        *(_sheet(title, cards) for title, cards in pictures.items()),
        "</html>\n",
    ]
    return "\n".join(parts)


def _funnel(rows: Sequence[Mapping[str, Any]]) -> str:
    most = max((row["entered"] for row in rows), default=1) or 1
    names = list(rows[0]["by_source"]) if rows else []
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for row in rows:
        left = row["entered"] - row["dropped"]
        bar = f"<span class=bar style='width:{320 * left / most:.0f}px'></span>"
        bar += f"<span class='bar out' style='width:{320 * row['dropped'] / most:.1f}px'></span>"
        cells = "".join(f"<td>{row['by_source'].get(name, 0):,}</td>" for name in names)
        lines.append(
            f"<tr><td>{escape(row['stage'])}</td><td>{row['entered']:,}</td><td>{row['dropped']:,}</td>"
            f"<td style='text-align:left'>{bar}</td>{cells}</tr>"
        )
    return (
        "<h2>Funnel</h2><table><tr><th>stage</th><th>entered</th><th>dropped</th><th></th>"
        f"{head}</tr>{''.join(lines)}</table><p><small>A record is dropped by the first stage that it fails. On the "
        "right: dropped by source; in the last line: kept.</small></p>"
    )


def _scores(scores: Mapping[str, Any]) -> str:
    if not scores:
        return ""
    plots = []
    for name, made in scores.items():
        for column, facts in made["columns"].items():
            if facts["count"]:
                outside = (
                    f", {facts['outside']:,} outside" if facts["min"] is not None or facts["max"] is not None else ""
                )
                title = f"{escape(name)}: {escape(column)} <small>median {facts['median']:.4g}{outside}</small>"
                plots.append(f"<div class=plot><h3>{title}</h3>{histogram(facts)}</div>")
        if made["failed"]:
            plots.append(f"<div class=plot><h3>{escape(name)}</h3>{made['failed']:,} could not be measured</div>")
    return f"<h2>Scores</h2><div class=plots>{''.join(plots)}</div>"


def histogram(facts: Mapping[str, Any]) -> str:
    """Bins as SVG, with lines at the thresholds; what lies beyond these is red."""
    bins, low, high = facts["bins"], facts["low"], facts["high"]
    most, width = max(bins) or 1, 320 / max(1, len(bins))
    step = (high - low) / max(1, len(bins))
    shapes = []
    for place, count in enumerate(bins):
        middle = low + (place + 0.5) * step
        out = (facts["min"] is not None and middle < facts["min"]) or (
            facts["max"] is not None and middle > facts["max"]
        )
        tall = 80 * count / most
        shapes.append(
            f"<rect x='{place * width:.1f}' y='{80 - tall:.1f}' width='{max(width - 0.5, 0.5):.1f}' "
            f"height='{tall:.1f}' fill='{'#c8553d' if out else '#4a7fb5'}'/>"
        )
    for limit in (facts["min"], facts["max"]):
        if limit is not None and high > low:
            x = 320 * (limit - low) / (high - low)
            shapes.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='80' stroke='#222' stroke-dasharray='3'/>")
            shapes.append(f"<text x='{min(x + 3, 270):.1f}' y='10' font-size='10'>{limit:g}</text>")
    ends = f"<text x='0' y='94' font-size='10'>{low:.4g}</text>"
    ends += f"<text x='320' y='94' font-size='10' text-anchor='end'>{high:.4g}</text>"
    return f"<svg viewBox='0 0 320 98' width='320' height='98'>{''.join(shapes)}{ends}</svg>"


def _captions(captions: Mapping[str, Any], cost: Mapping[str, Any]) -> str:
    plots = "".join(
        f"<div class=plot><h3>{escape(style)} <small>{facts['count']:,} captions, {facts['mean']:.0f} words in the "
        f"mean</small></h3>{histogram(facts)}</div>"
        for style, facts in captions.items()
    )
    spent = ""
    if cost.get("calls") or cost.get("cached"):
        spent = (
            f"<p>{cost['calls']:,.0f} calls, {cost['cached']:,.0f} answers from the cache, {cost['tokens_in']:,.0f} "
            f"tokens in, {cost['tokens_out']:,.0f} out, <b>${cost['usd']:.2f}</b>"
        )
        spent += f"; {cost['waiting']:,} captions were not made.</p>" if cost["waiting"] else ".</p>"
    return f"<h2>Captions</h2><div class=plots>{plots or 'none'}</div>{spent}"


def _sheet(title: str, cards: Sequence[Mapping[str, Any]]) -> str:
    shown = "".join(_card(card) for card in cards)
    head = f"<summary><h2 style='display:inline'>{escape(title)}</h2></summary>"
    return f"<details open>{head}<div class=sheet>{shown}</div></details>"


def _card(card: Mapping[str, Any]) -> str:
    def picture(url: str) -> str:
        return f"<img src='{escape(url)}' alt=''>" if url else "<span class=none>not read</span>"

    pair = f"{picture(card['other'])}" if card["other"] else ""
    scores = ", ".join(f"{name} {value:.4g}" for name, value in card["scores"].items() if value == value)
    words = f"<b>{escape(card['name'])}</b> {escape(card['size'])}<br>{escape(card['reason'])}"
    return (
        f"<div class='card{' pair' if pair else ''}' title='{escape(scores)}'>{picture(card['thumbnail'])}{pair}"
        f"<br>{words}</div>"
    )
