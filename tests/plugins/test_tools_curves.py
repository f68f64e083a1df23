"""Curves: every point where its numbers say, and one line about what cannot be drawn."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lens_tools import curves
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from lens_core.cli.main import main
from lens_core.types import ConfigError


def write(run: Path, log: list[dict[str, Any]], evaluations: list[dict[str, Any]] | None = None) -> Path:
    run.mkdir(parents=True)
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    if evaluations is not None:
        (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    return run


def test_every_number_is_read_in_the_order_of_its_steps_and_nothing_else(tmp_path: Path) -> None:
    log = [
        {"step": 4, "seconds": 2.0, "b/loss": 0.5, "b/grad_norm": float("nan")},
        {"step": 2, "seconds": 1.0, "b/loss": 1},
    ]
    run = write(tmp_path / "a", log, [{"step": 0, "seconds": 9, "shapes": 0.25, "sha256": "x", "failed": {}}])
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "b/lo')
    assert curves.read(run) == {
        "seconds": [(2.0, 1.0), (4.0, 2.0)],
        "b/loss": [(2.0, 1.0), (4.0, 0.5)],
        "evaluation/seconds": [(0.0, 9.0)],
        "shapes": [(0.0, 0.25)],
    }


def test_losses_and_scores_are_shown_unless_others_are_named() -> None:
    names = [
        "seconds",
        "data_wait",
        "b/loss",
        "b/kl",
        "b/grad_norm",
        "shapes",
        "shapes/two",
        "validation/loss",
        "score",
    ]
    assert curves.chosen(names, ()) == ["b/loss", "b/grad_norm", "shapes", "validation/loss"]
    assert curves.chosen(names, ("b/*", "data_wait")) == ["data_wait", "b/loss", "b/kl", "b/grad_norm"]


def test_an_axis_is_never_empty() -> None:
    assert curves.axis_limits([3.0, 3.0], 0.05) == (1.5, 4.5) and curves.axis_limits([0.0]) == (-0.5, 0.5)
    assert curves.axis_limits([1.0, 3.0], 0.05) == pytest.approx((0.9, 3.1))


def rendered(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def centre(picture: Image.Image, colour: str, below: int) -> tuple[float, float]:
    """Where the pixels of about this colour lie, `below` so many px from the top: their mean x, and y from below."""
    pixels = np.asarray(picture).astype(int)[below:]
    y, x = np.nonzero(np.abs(pixels - ImageColor.getrgb(colour)).sum(-1) < 60)
    assert len(x), "the colour is there"
    return float(x.mean()), len(pixels) - float(y.mean())


LEGEND = round(2 * curves.LEGEND_LINE * curves.DPI)


def test_a_point_lies_where_its_numbers_say() -> None:
    # The axes go from the first run's least to its largest step and value; the second has one point inside.
    frame = [(0.0, 0.0), (100.0, 1.0)]
    figure = curves.draw({"a": [{"b/loss": frame}], "b": [{"b/loss": [(25.0, 0.75)]}]})
    picture = rendered(figure)
    assert picture.size == (460, 270 + LEGEND)
    (axes,) = figure.axes
    assert axes.get_xlim() == (0, 100) and axes.get_ylim() == pytest.approx((-0.05, 1.05))
    want = axes.transData.transform((25.0, 0.75))
    assert centre(picture, curves.COLOURS[1], LEGEND) == pytest.approx(want, abs=1.5)


def test_runs_of_one_recipe_share_a_colour_and_their_mean_is_marked() -> None:
    assert curves.mean([[(0.0, 1.0), (5.0, 2.0)], [(0.0, 2.0), (4.0, 9.0), (5.0, 4.0)]]) == [(0.0, 1.5), (5.0, 3.0)]
    frame = [(0.0, 0.0), (100.0, 1.0)]
    seeds = [{"b/loss": [(25.0, 0.6)]}, {"b/loss": [(25.0, 0.9)]}, {"c/loss": [(50.0, 0.5)]}]
    figure = curves.draw({"a": [{"b/loss": frame}], "b": seeds}, ("b/*",))
    picture = rendered(figure)
    want = figure.axes[0].transData.transform((25.0, 0.75))
    assert centre(picture, curves.COLOURS[1], LEGEND) == pytest.approx(want, abs=1.5)


def test_the_table_tells_means_and_the_spread_of_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, scores in {"a": [0.0, 0.25], "b": [0.0, 0.75], "c": [0.5]}.items():
        write(tmp_path / name, [{"step": 1, "b/loss": 1}], [{"step": n, "shapes": s} for n, s in enumerate(scores)])
    joined = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    arguments = [
        "curves",
        joined,
        str(tmp_path / "c"),
        "--show",
        "shapes",
        "--table",
        "--output",
        str(tmp_path / "c.png"),
    ]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[:6] == [
        "shapes",
        "",
        "| step | a, b | c |",
        "|---|---|---|",
        "| 0 | 0.000 (0.000 to 0.000) | 0.500 |",
        "| 1 | 0.500 (0.250 to 0.750) |  |",
    ]


def test_panels_share_their_steps() -> None:
    figure = curves.draw({"a": [{"b/loss": [(0.0, 0.0), (100.0, 1.0)]}], "b": [{"c/loss": [(75.0, 0.5)]}]})
    x, _ = centre(rendered(figure), curves.COLOURS[1], LEGEND)
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim() == (0, 100)
    assert x == pytest.approx(right.transData.transform((75.0, 0.5))[0], abs=1.5)


def test_without_matplotlib_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write(tmp_path / "a", [{"step": 1, "a/loss": 1.0}])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["curves", str(run), "--output", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err == (
        "lens: lens curves needs matplotlib, which is missing: pip install 'lens-t2i[plots]'\n"
    )
    assert not (tmp_path / "a.png").exists()


def test_runs_of_many_values_get_a_panel_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one" / "run", [{"step": n, "b/loss": 1 / n, "c/loss": n} for n in (1, 2, 3)])
    two = write(tmp_path / "two" / "run", [{"step": n, "b/loss": 2 / n} for n in (1, 2)], [{"step": 0, "shapes": 0.5}])
    out = tmp_path / "c.png"
    assert main(["curves", str(one), str(two), "--output", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with Image.open(out) as picture:
        assert picture.size == (2 * 460, 2 * 270 + LEGEND)
    assert main(["curves", f"{one},{two}", "--output", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size == (2 * 460, 2 * 270 + LEGEND // 2)  # one row of the legend
    assert main(["curves", str(one), "--show", "b/*", "--output", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size == (460, 270 + LEGEND // 2)


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"holds neither log\.jsonl nor evaluations\.jsonl; give the folder of a run"):
        curves.read(tmp_path)
    with pytest.raises(ConfigError, match="no value is called kl; there is b/loss, seconds"):
        curves.draw({"a": [{"b/loss": [(1.0, 1.0)], "seconds": [(1.0, 1.0)]}]}, ("kl",))
    for arguments, message in (
        (["curves"], "give the folder of a run, or of several"),
        (["curves", str(tmp_path), "--output", "c.jpg"], "c.jpg: pictures are written as .png; use c.png"),
    ):
        assert main(arguments) == 2 and capsys.readouterr().err == f"lens: {message}\n"


def test_numbers_beyond_any_axis_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "a", [{"step": 1, "a/loss": 1e308}, {"step": 2, "a/loss": -1e308}])
    assert main(["curves", str(run), "--output", str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert "a/loss is 1e+308 at step 1, which no axis can show" in said and said.count("\n") == 1


@pytest.mark.parametrize("pair", [(0.0, 5e-324), (1e16, 1e16 + 2), (-1e299, 1e299), (1.0, 1.0 + 2.3e-16), (-0.0, 0.0)])
def test_whatever_two_numbers_a_log_has_can_be_drawn(pair: tuple[float, float], tmp_path: Path) -> None:
    run = write(tmp_path / "a", [{"step": i, "a/loss": value} for i, value in enumerate(pair)])
    assert main(["curves", str(run), "--output", str(tmp_path / "a.png")]) == 0
