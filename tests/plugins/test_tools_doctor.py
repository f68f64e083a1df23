"""The doctor answers on any machine, and the published model's memory is what the page says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lens_gpt_oss import paths
from lens_tools import doctor

from lens_core.catalog import Catalog
from lens_core.cli.main import main
from lens_core.inference import offload_plans
from lens_core.inference.offload_plans import Workload
from lens_core.types import LensError

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


@pytest.fixture(scope="module")
def parts() -> Mapping[str, Any]:
    return doctor.published(Catalog.installed())


def test_the_page_has_the_tables_that_the_command_prints(
    parts: Mapping[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--table"]) == 0
    printed = capsys.readouterr().out
    assert printed == doctor.table(parts) + "\n"
    assert PAGE.read_text(encoding="utf-8").endswith(printed)


def test_the_published_sizes_are_the_known_ones(parts: Mapping[str, Any]) -> None:
    def gb(part: str, form: str) -> float:
        weigh = doctor.weigh(parts, form)
        return sum(weigh(t) for t in (*parts[part].parameters(), *parts[part].buffers())) / 1e9

    assert all(p.device.type == "meta" for net in parts.values() for p in net.parameters())
    assert gb("backbone", "bfloat16") == pytest.approx(8.208, abs=1e-3)
    assert gb("text_encoder", "mxfp4") == pytest.approx(13.8, abs=0.05), "as the published files"
    assert gb("text_encoder", "bfloat16") == pytest.approx(2 * 20.91, abs=0.02), "20.9 B parameters"
    assert gb("vae", "bfloat16") == pytest.approx(0.336 / 2, abs=2e-3)
    estimate = offload_plans.estimate_memory("modulation", parts, Workload())
    modulation = 48 * 2 * (6 * 1536 * 1536 + 6 * 1536) + 2 * 1536 * 1536 + 2 * 1536
    assert estimate.host["backbone"] == pytest.approx(2 * modulation, rel=1e-4)
    assert 8.208 - estimate.host["backbone"] / 1e9 == pytest.approx(5.47, abs=0.02)
    head = 2 * 201088 * 2880
    assert estimate.host["text_encoder"] == pytest.approx(head, rel=1e-3), "the head that predicts words stays away"
    work = estimate.work["denoise"]
    more = offload_plans.estimate_memory("modulation", parts, Workload(steps=40)).work["denoise"]
    assert (more - work) / 1e6 == pytest.approx(35.5, abs=0.1), "20 more steps are a table of 35 MB"


def test_a_larger_card_never_gets_a_slower_plan_and_what_is_chosen_fits(parts: Mapping[str, Any]) -> None:
    order = list(offload_plans.PLANS)
    for form, each in doctor.fits(parts).items():
        chosen = [order.index(each[card].plan) for card in doctor.CARDS]
        assert chosen == sorted(chosen, reverse=True), form
        assert chosen[0] == order.index("block") and chosen[-1] == order.index("none")
        for card, estimate in each.items():
            assert estimate.peak + offload_plans.RESERVE <= doctor.room(card) < card << 30


def test_larger_pictures_and_batches_take_more(parts: Mapping[str, Any]) -> None:
    small, large, many = (
        offload_plans.estimate_memory("block", parts, load).peaks
        for load in (Workload(), Workload((1440, 1440)), Workload(batch=4))
    )
    assert large["decode"] / small["decode"] == pytest.approx((1440 / 1024) ** 2, rel=0.1)
    assert many["denoise"] > small["denoise"] and many["decode"] > 3 * small["decode"]
    assert many["encode"] == large["encode"] == small["encode"], "prompts are encoded one by one"


def test_it_tells_this_machine_in_text_and_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == list(doctor.SECTIONS) and not any("error" in facts for facts in report.values())
    assert report["software"]["torch"] == torch.__version__ or report["software"]["torch"] in torch.__version__
    assert report["device"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert report["dtypes"]["bfloat16"] == "yes" and "overflow float16" in report["dtypes"]["float16"]
    assert report["plugins"]["lens_mmdit"]
    assert report["published model"]["backbone, bfloat16"] == "8.21 GB"
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{text}" for name in doctor.SECTIONS)
    assert "refused: the backbone's residual streams overflow float16" in text


def test_a_broken_section_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("the driver\nis gone")

    monkeypatch.setitem(doctor.SECTIONS, "device", broken)
    monkeypatch.setenv("LENS_PLUGINS", "shapes,tools")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == {"error": "RuntimeError: the driver is gone"}
    assert "no plugin here describes the published model" in report["published model"]["error"]
    assert report["software"]["python"] and report["attention"]
    with pytest.raises(LensError, match="set LENS_PLUGINS"):
        doctor.published(Catalog.installed())


@pytest.mark.parametrize(
    ("installed", "capability", "lacks"),
    [
        ({"triton": "3.5.1", "kernels": "0.18.4"}, (9, 0), []),
        ({"triton": "3.5.1", "kernels": "0.18.4"}, (7, 0), ["compute capability 7.5 (this is 7.0)"]),
        ({"triton": "3.4.0", "kernels": "0.17.2"}, (7, 5), ["kernels>=0.18.2,<0.19 (this is 0.17.2)"]),
        ({"triton": "3.3.1", "kernels": "0.18.2"}, (9, 0), ["triton>=3.4 (this is 3.3.1)"]),
        ({"triton": "3.4", "kernels": "0.19.0"}, (9, 0), ["kernels>=0.18.2,<0.19 (this is 0.19.0)"]),
        ({}, None, ["a CUDA device", "triton>=3.4", "kernels>=0.18.2,<0.19"]),
    ],
)  # fmt: skip
def test_what_transformers_kernels_lack_is_named(
    installed: dict[str, str], capability: Any, lacks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise paths.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(paths, "version", version)
    assert paths.missing(capability) == lacks
