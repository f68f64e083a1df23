"""The functions behind the page, and the page's HTTP side: what it reads, what it refuses, what it never serves."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lens_flow
import pytest
import torch
import toy
from attrs import evolve
from PIL import Image

pytest.importorskip("gradio", reason="the extra ui is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

from lens_serve.engine import Engine
from lens_serve.jobs import Limits
from lens_serve.outputs import Outputs
from lens_serve.pages import Drawing, PageSettings, mount_page
from lens_studio import runs
from lens_studio.compare import Comparer, grid
from lens_studio.draw import Drawer
from lens_studio.folders import Shown
from lens_studio.forms import Form, editor_pictures, parse_size, read_again
from lens_studio.results import MARKS
from lens_studio.results import read as read_result
from serving import WAIT, Gate, Running, running

from lens_core.catalog import Catalog
from lens_core.checkpoints import lora_keys
from lens_core.checkpoints.adapters import LoRA
from lens_core.inference import png_metadata
from lens_core.inference.pipeline import LensPipeline
from lens_core.inference.requests import ModelRequest
from lens_core.types import ConfigError, LensError, Refinement

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture
def drawer(quick: LensPipeline, tmp_path: Path) -> Iterator[Drawer]:
    (tmp_path / "scratch").mkdir()
    engine = Engine(quick, name="toy", loras={})
    yield Drawer(Drawing(engine, Outputs(tmp_path / "outputs")), tmp_path / "scratch")
    assert engine.close(WAIT)


# ---- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("preset", {}), ("", {}), (None, {}), ("128x160", {"height": 128, "width": 160}),
        ("128 x 160", {"height": 128, "width": 160}), ("3:2", {"aspect_ratio": "3:2"}),
        ("2.39:1", {"aspect_ratio": "2.39:1"}),
    ],
)  # fmt: skip
def test_a_size_is_px_or_a_ratio(text: str | None, expected: dict[str, Any]) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": "wide"}, "size 'wide' must be HEIGHTxWIDTH"),
        ({"size": "1x2x3"}, "must be HEIGHTxWIDTH"),
        ({"steps": "many"}, "steps must be a whole number"),
        ({"steps": 4.5}, "steps must be a whole number, not 4.5"),
        ({"seed": "1e9"}, "seed must be a whole number"),
        ({"seed": "9" * 40}, "seed must be a whole number"),
        ({"num_images": True}, "number must be a whole number"),
        ({"guidance_scale": "nan"}, "guidance must be a finite number"),
        ({"guidance_scale": "x"}, "guidance must be a number"),
        ({"loras": [["a", "b"]]}, "the weight of the LoRA 'a' must be a number"),
        ({"loras": [["a"]]}, "a LoRA is a name and a weight"),
        ({"loras": [["a", 1]] * 17}, "at most 16 LoRAs"),
    ],
)
def test_a_value_that_cannot_be_meant_is_one_clear_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")) as error:
        Form(prompt="a", **values).fields(16)
    assert "\n" not in str(error.value)


def test_empty_fields_are_the_checkpoints_presets() -> None:
    fields = Form(prompt="a", steps="", guidance_scale=" ", seed="", num_images="").fields(16)
    settings = fields.pop("settings")
    assert fields == {"prompt": "a", "num_images": 1, "seed": None, "sampler": None, "loras": ()}
    assert (settings.steps, settings.guidance_scale, settings.height, settings.image) == (None, None, None, None)
    large = Form(prompt="a", seed=str(2**62 + 1), loras=[["a", 0.5], ["b", 0], ["", 1]]).fields(16)
    assert large["seed"] == 2**62 + 1 and large["loras"] == (("a", 0.5),)


def test_what_is_painted_in_the_editor_is_the_mask() -> None:
    background = Image.new("RGBA", (40, 24), (200, 10, 10, 255))
    layer = Image.new("RGBA", (40, 24), (0, 0, 0, 0))
    assert editor_pictures(None) == editor_pictures({"background": None}) == (None, None)
    assert editor_pictures({"background": Image.new("RGBA", (8, 8), 0), "layers": []}) == (None, None)
    image, mask = editor_pictures({"background": background, "layers": [layer]})
    assert image is not None and image.getpixel((0, 0)) == (200, 10, 10) and mask is None
    layer.paste((255, 255, 255, 255), (8, 0, 16, 24))
    _, mask = editor_pictures({"background": background, "layers": [None, layer]})
    assert mask is not None and mask.getbbox() == (8, 0, 16, 24) and mask.getpixel((8, 0)) == 255
    settings = Form(prompt="a", edit={"background": background, "layers": [layer]}).fields(16)["settings"]
    assert (settings.height, settings.width) == (32, 32) and settings.mask is not None and settings.strength is None


def test_a_dropped_picture_fills_the_form_and_draws_the_same_again(drawer: Drawer, tmp_path: Path) -> None:
    values = {"prompt": "red", "negative_prompt": "blue", "size": "32x48", "steps": "2", "guidance_scale": "3",
              "sampler": "even", "seed": "9"}  # fmt: skip
    *_, last = drawer.draw(Form(**values), "a")
    (first,) = last["pictures"]
    again = read_again(Path(first["path"]), drawer.drawing.model_hash, {})
    assert again.notes == () and {name: again.values[name] for name in values} == values
    *_, last = drawer.draw(Form(**again.values), "a")
    assert Path(last["pictures"][0]["path"]).read_bytes() == Path(first["path"]).read_bytes()
    other = read_again(Path(first["path"]), "0123456789abcdef", {})
    assert "not by this model" in other.notes[0]
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ConfigError, match="carries no facts"):
        read_again(tmp_path / "plain.png", "", {})


def test_loras_of_a_picture_are_found_among_those_offered(tmp_path: Path) -> None:
    facts = {"prompt": "a", "negative_prompt": "", "model": "m", "model_hash": "h", "seed": 1, "height": 16,
             "width": 16, "steps": 1, "guidance_scale": 1.0, "loras": ["moon.safetensors:0.8", "sun.safetensors:1"],
             "requested_prompt": "b", "reasoner": {"use": "x"}}  # fmt: skip
    png_metadata.save(Image.new("RGB", (16, 16)), tmp_path / "a.png", facts)
    again = read_again(tmp_path / "a.png", "h", {"night": Path("x/moon.safetensors"), "noon": Path("noon.safetensors")})
    assert again.values["loras"] == [["night", 0.8], ["noon", 0.0]] and again.values["prompt"] == "b"
    assert any("sun.safetensors:1' is not offered" in note for note in again.notes)


def dropped(path: Path, **more: Any) -> Path:
    """A picture with facts of Lens."""
    facts = {"prompt": "a", "negative_prompt": "", "model": "m", "model_hash": "h", "seed": 1, "height": 16,
             "width": 16, "steps": 1, "guidance_scale": 3.0, **more}  # fmt: skip
    png_metadata.save(Image.new("RGB", (16, 16)), path, facts)
    return path


def test_what_the_form_cannot_set_is_noted(quick: LensPipeline, tmp_path: Path) -> None:
    quick.catalog = Catalog.of(toy, lens_flow)
    quick.use_sampler("euler", mu=0.7)
    engine = Engine(quick, name="toy")
    drawing = Drawing(engine, None)
    served = {"sampler_facts": drawing.sampler_facts, "lossy_vae_tile": drawing.lossy_vae_tile}
    here = drawing.sampler_facts("euler")
    heun = drawing.sampler_facts("heun")
    assert here["mu"] == heun["mu"] == 0.7 and heun["use"] == "lens_flow:heun"  # the checkpoint's shift is kept

    def notes(**facts: Any) -> tuple[str, ...]:
        return read_again(dropped(tmp_path / "a.png", **facts), "h", {}, **served).notes  # type: ignore[arg-type]

    assert notes() == notes(sampler=here) == notes(sampler=heun) == ()
    assert notes(guidance_interval=[0.2, 0.9]) == (
        "was guided at times from 0.2 to 0.9 alone; this page guides at all times",
    )
    assert notes(guidance_interval=[0.2, 0.9], guidance_scale=1.0) == ()  # of no effect
    assert notes(sampler={**here, "mu": 2.5}) == ("its sampler euler had mu 2.5; here it has mu 0.7",)
    assert notes(sampler={"use": "lens_other:euler"}) == (
        "its sampler was 'lens_other:euler'; euler is lens_flow:euler here",
    )
    assert notes(sampler={"use": "lens_other:gone"}) == (
        "its sampler 'lens_other:gone' is not offered here; choose another",
    )
    assert notes(lossy_vae_tile=32) == ("was decoded in tiles of 32 px; this server decodes whole",)
    served["lossy_vae_tile"] = 32
    assert notes(lossy_vae_tile=32) == ()
    assert notes() == ("was decoded whole; this server decodes in tiles of 32 px",)
    assert notes(lossy_vae_tile=32, image_hash="i", mask_hash="m", strength=0.75) == (
        "was drawn from an init image: give it and its mask too",
    )
    assert engine.close(WAIT)


@pytest.mark.parametrize(
    ("guidance", "text"), [(3.0, "3"), (1.23456789, "1.23456789"), (0.1, "0.1"), (1 / 3, repr(1 / 3))]
)
def test_a_number_keeps_all_its_digits(guidance: float, text: str, tmp_path: Path) -> None:
    values = read_again(dropped(tmp_path / "a.png", guidance_scale=guidance, strength=guidance), "h", {}).values
    assert values["guidance_scale"] == values["strength"] == text
    assert Form(**values).fields(16)["settings"].guidance_scale == guidance


def test_another_dtype_and_another_content_of_a_lora_are_noted(quick: LensPipeline, tmp_path: Path) -> None:
    offered = {"night": tmp_path / "x" / "moon.safetensors", "dusk": tmp_path / "y" / "moon.safetensors"}
    for value, path in enumerate(offered.values(), 1):
        path.parent.mkdir()
        down, up = torch.full((1, 5), float(value)), torch.ones(quick.backbone.inner.out_features, 1)
        lora_keys.write(path, {"inner": LoRA(down, up, 1.0)})
    engine = Engine(quick, name="toy", loras=offered)
    drawing = Drawing(engine, None)
    served = {"dtype": drawing.dtype, "lora_hash": drawing.lora_hash}
    (drawn,) = drawing.start(prompt="red", loras=(("dusk", 0.5),)).result()
    png_metadata.save(drawn.image, tmp_path / "a.png", dict(drawn.facts))
    again = read_again(tmp_path / "a.png", "", offered, **served)
    assert dict(again.values["loras"]) == {"night": 0.0, "dusk": 0.5} and again.notes == ()
    offered["dusk"].write_bytes(offered["night"].read_bytes())
    (note,) = read_again(tmp_path / "a.png", "", {"dusk": offered["dusk"]}, **served).notes
    assert note == f"its LoRA 'moon.safetensors' had other content, of hash {drawn.facts['lora_hashes'][0]!r}"
    for break_it in (lambda path: path.write_bytes(b"broken"), lambda path: path.unlink()):
        break_it(offered["night"])
        again = read_again(tmp_path / "a.png", "", {"night": offered["night"]}, **served)
        assert [note.partition(" cannot be read: ")[0] for note in again.notes] == ["the LoRA 'night'"]
        assert dict(again.values["loras"]) == {"night": 0.0}, "nothing could be drawn with it"
        again = read_again(tmp_path / "a.png", "", offered, **served)
        assert [note.partition(" cannot be read: ")[0] for note in again.notes] == ["the LoRA 'night'", note]
        assert dict(again.values["loras"]) == {"night": 0.0, "dusk": 0.5}, "that of other content can be drawn with"
    assert read_again(dropped(tmp_path / "b.png", dtype="bfloat16"), "h", {}, **served).notes == (
        "was drawn in 'bfloat16'; this server draws in float32",
    )
    assert engine.close(WAIT)


def test_loras_whose_files_have_one_name_are_noted(tmp_path: Path) -> None:
    offered = {"night": Path("x/moon.safetensors"), "dusk": Path("y/moon.safetensors"), "moon": Path("z/sun.pt")}
    one = read_again(dropped(tmp_path / "a.png", loras=["moon.safetensors:0.8"]), "h", offered)
    assert dict(one.values["loras"]) == {"night": 0.8, "dusk": 0.0, "moon": 0.0}
    assert one.notes == (
        "its LoRA 'moon.safetensors' may be any of night, dusk, whose files have one name; night is set",
    )
    both = read_again(dropped(tmp_path / "a.png", loras=["moon.safetensors:0.8", "moon.safetensors:0.5"]), "h", offered)
    assert dict(both.values["loras"]) == {"night": 0.8, "dusk": 0.5, "moon": 0.0} and len(both.notes) == 2


@pytest.mark.parametrize("entry", ["moon.safetensors:abc", "moon.safetensors:nan", "moon.safetensors", "", ":1"])
def test_an_entry_that_names_no_lora_and_weight_is_one_clear_line(entry: str, tmp_path: Path) -> None:
    path = dropped(tmp_path / "a.png", loras=[entry])
    with pytest.raises(ConfigError, match="is not FILE:WEIGHT") as fault:
        read_again(path, "h", {"moon": Path("moon.safetensors")})
    assert "\n" not in str(fault.value)


# ---- drawing ------------------------------------------------------------------------------------------------------


def test_a_window_follows_its_request_and_keeps_the_picture_with_its_facts(drawer: Drawer, tmp_path: Path) -> None:
    updates = list(drawer.draw(Form(prompt="red", seed="7", num_images="2", steps="3"), "a"))
    assert [update["status"] for update in updates] == [
        "begins",
        "step 1 of 3",
        "step 2 of 3",
        "step 3 of 3",
        "2 drawn",
    ]
    assert updates[1]["preview"].height >= 256
    shown = updates[-1]["pictures"]
    assert [one["facts"]["seed"] for one in shown] == [7, 8]
    assert len(list((tmp_path / "outputs").glob("*.png"))) == 2
    assert png_metadata.facts(Path(shown[0]["path"]))[1]["prompt"] == "red"


def test_a_window_is_stopped_within_a_step_and_another_goes_on(quick: LensPipeline, tmp_path: Path) -> None:
    import threading

    gate = Gate(quick)
    engine = Engine(quick, name="toy", limits=Limits(max_batch=1))
    drawer = Drawer(Drawing(engine, None), tmp_path)
    ends: dict[str, list[str]] = {"a": [], "b": []}

    def follow(window: str) -> None:
        ends[window] += [update["status"] for update in drawer.draw(Form(prompt=window, seed="1", steps="3"), window)]

    threads = [threading.Thread(target=follow, args=(window,)) for window in ends]
    threads[0].start()
    gate.arrived()
    threads[1].start()
    while not engine.waiting:
        pass
    assert drawer.stop("a") and not drawer.stop("c")
    gate.open()
    for thread in threads:
        thread.join(WAIT)
    assert ends["a"][-1] == "stopped" and ends["b"] == ["waits for 1 requests", *ends["b"][1:]]
    assert ends["b"][-1] == "drawn"
    assert engine.close(WAIT)


def test_a_window_that_is_closed_cancels_its_request(quick: LensPipeline, tmp_path: Path) -> None:
    gate = Gate(quick)
    engine = Engine(quick, name="toy")
    updates = Drawer(Drawing(engine, None), tmp_path).draw(Form(prompt="a"), "a")
    assert next(updates)["status"] == "begins"
    gate.arrived()
    updates.close()  # what gradio does to a generator that nobody reads
    gate.open()
    assert engine.close(WAIT) and engine.counters.cancelled == 1


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (Form(prompt=" "), "the prompt is empty"),
        (Form(prompt="a", size="33x33"), "is not a multiple of 16"),
        (Form(prompt="a", num_images="11"), "num_images must be at most 10"),
        (Form(prompt="a", sampler="evn"), "Did you mean 'even'"),
        (Form(prompt="a" * 40_000), "at most 32000 are read"),
        (Form(prompt="a", size="4096x4096"), "pixels"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_one_clear_line(form: Form, words: str, drawer: Drawer) -> None:
    with pytest.raises(LensError) as error:
        list(drawer.draw(form, "a"))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_prompt_that_a_reasoner_wrote_is_in_the_facts(quick: LensPipeline, tmp_path: Path) -> None:
    class Longer:
        def refine(self, prompts: list[str]) -> list[str]:
            return [f"{prompt}, drawn large" for prompt in prompts]

    quick.use_reasoner(Longer())
    engine = Engine(quick, name="toy")
    *_, last = Drawer(Drawing(engine, None), tmp_path).draw(Form(prompt="red"), "a")
    facts = last["pictures"][0]["facts"]
    assert (facts["requested_prompt"], facts["prompt"]) == ("red", "red, drawn large")
    assert engine.close(WAIT)


def test_a_preview_of_the_map_costs_no_pass_of_the_vae(quick: LensPipeline, tmp_path: Path) -> None:
    from lens_core.checkpoints.latent_preview import LatentPreview

    decoded = []
    original = quick.decode
    quick.decode = lambda z: decoded.append(1) or original(z)  # type: ignore[method-assign,func-returns-value,assignment]
    quick.latent_preview = LatentPreview(torch.zeros(3, 4), torch.tensor([1.0, -1.0, -1.0]), 1, 0.0, 1)
    engine = Engine(quick, name="toy")
    updates = list(Drawer(Drawing(engine, None), tmp_path).draw(Form(prompt="a", steps="3"), "a"))
    assert updates[1]["preview"].getpixel((5, 5)) == (255, 0, 0) and len(decoded) == 1
    assert engine.close(WAIT)


# ---- compare ------------------------------------------------------------------------------------------------------


def test_a_comparison_has_one_seed_and_other_steps(drawer: Drawer) -> None:
    comparer = Comparer(drawer.drawing, ["tiny:turbo"])
    cells = list(comparer.cells(Form(prompt="red"), "steps", comparer.values("steps", "1, 3 1", [], [])))
    assert [label for label, _ in cells] == ["1 step", "3 steps", "1 step"]
    assert cells[0][1].tobytes() == cells[2][1].tobytes() != cells[1][1].tobytes()
    whole = grid(cells)
    assert whole.width == 3 * 256 + 8 and whole.height == 256 + 22


def test_a_comparison_over_checkpoints_loads_those_that_are_allowed_alone(
    drawer: Drawer, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    other = LensPipeline.from_parts(evolve(toy.PARTS, steps=3), catalog)
    loaded = []
    monkeypatch.setattr(ModelRequest, "load", lambda self, **_: loaded.append(self.model) or other)
    comparer = Comparer(drawer.drawing, ["tiny:turbo"])
    values = comparer.values("checkpoints", "", [], ["toy", "tiny:turbo"])
    cells = dict(comparer.cells(Form(prompt="a", seed="3", steps="2", size="32x32"), "checkpoints", values))
    alone = other("a", seed=3, num_inference_steps=2, height=32, width=32).images[0]
    assert cells["tiny:turbo"].tobytes() == alone.tobytes() != cells["toy"].tobytes()
    assert loaded == ["tiny:turbo"]
    for arguments, words in (
        (("checkpoints", "", [], ["/etc"]), "no checkpoint that this page may load"),
        (("checkpoints", "", [], []), "choose 1 to 16 checkpoints"),
        (("steps", "1, x", [], []), "must be whole numbers"),
        (("steps", " ".join(["1"] * 17), [], []), "choose 1 to 16 steps"),
        (("seeds", "", [], []), "is none of steps, samplers, checkpoints"),
    ):
        with pytest.raises(ConfigError, match=words):
            comparer.values(*arguments)


def test_checkpoints_are_compared_on_the_prompt_that_the_reasoner_wrote(
    drawer: Drawer, quick: LensPipeline, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer:
        def refine(self, prompts: list[str]) -> list[Refinement]:
            return [Refinement(prompt, f"{prompt}, in detail") for prompt in prompts]

    quick.use_reasoner(Longer())
    other = LensPipeline.from_parts(evolve(toy.PARTS, steps=3), catalog)
    monkeypatch.setattr(ModelRequest, "load", lambda self, **_: other)
    form = Form(prompt="a", seed="3", size="32x32")
    cells = list(Comparer(drawer.drawing, ["other"]).cells(form, "checkpoints", ["other", "toy"]))
    alone = other("a, in detail", seed=3, height=32, width=32).images[0]
    assert [name for name, _ in cells] == ["toy", "other"] and cells[1][1].tobytes() == alone.tobytes()


def test_another_checkpoint_is_drawn_within_the_servers_limits_and_as_the_server_holds_its_own(
    quick: LensPipeline, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = LensPipeline.from_parts(evolve(toy.PARTS, steps=3), catalog)
    loaded = []

    def load(request: ModelRequest, **_: Any) -> LensPipeline:
        loaded.append(request)
        return quick if request.model == "toy" else other

    monkeypatch.setattr(ModelRequest, "load", load)
    served = ModelRequest("toy", device="cpu", dtype="float32", offload=None, loras=((Path("base"), 1.0),))
    engine = Engine.load(served, limits=Limits(max_pixels=32 * 32, max_steps=4))
    comparer = Comparer(Drawing(engine, None), ["other"])
    for form, words in (
        (Form(prompt="a", size="64x32"), "this server draws at most 1024"),
        (Form(prompt="a", size="32x32", steps="5"), "steps must be at most 4 on this server"),
        (Form(prompt=" ", size="32x32"), "the prompt is empty"),
    ):
        for model in ("toy + base:1", "other"):
            with pytest.raises(ConfigError, match=words):
                list(comparer.cells(form, "checkpoints", [model]))
    ((_, drawn),) = comparer.cells(Form(prompt="a", size="32x32", seed="3"), "checkpoints", ["other"])
    assert drawn.tobytes() == other("a", seed=3, height=32, width=32).images[0].tobytes()
    assert loaded[1:] == [ModelRequest("other", device="cpu", dtype="float32", offload=None)] * 4
    assert engine.close(WAIT)


# ---- runs and results ---------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder of runs, with one that is sound, one empty, and links that lead out of it."""
    root, outside = tmp_path / "runs", tmp_path / "outside"
    (root / "a" / "samples").mkdir(parents=True)
    (root / "empty").mkdir()
    outside.mkdir()
    lines = [{"step": n, "loss": 1 / n, "lr": float("nan")} for n in range(1, 4001)]
    (root / "a" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    (root / "a" / "evaluations.jsonl").write_text(
        '{"step": 10, "score": 0.5, "seconds": 3}\n{"step": 20, "score": 0.75}\n'
    )
    Image.new("RGB", (8, 8), "red").save(root / "a" / "samples" / "step-0000010.png")
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    (root / "a" / "samples" / "step-0000099.png").symlink_to(outside / "secret.png")
    (outside / "log.jsonl").write_text('{"step": 1, "secret": 1}\n')
    (root / "link").symlink_to(outside)
    (root / "half").mkdir()
    (root / "half" / "log.jsonl").symlink_to(outside / "log.jsonl")
    return root


def test_a_run_is_read_as_far_as_it_is_written(shelf: Path) -> None:
    folder = Shown(shelf, runs.MARKS)
    assert folder.names() == ["a"]
    series = runs.curves(folder, "a")
    assert series["loss"][0] == (1.0, 1.0) and len(series["loss"]) == 2000 and "lr" not in series
    assert series["score"] == [(10.0, 0.5), (20.0, 0.75)]
    assert runs.scores(folder, "a") == [[20, "score", 0.75], [10, "score", 0.5]]
    assert [caption for _, caption in runs.samples(folder, "a")] == ["step-0000010"]


@pytest.mark.parametrize(
    "name", ["..", "../outside", "link", "half", "a/../../outside", "/etc", "", "empty", "\0", "a/.."]
)
def test_no_name_leads_out_of_the_folder(name: str, shelf: Path) -> None:
    folder = Shown(shelf, runs.MARKS)
    for read in (runs.curves, runs.samples, runs.scores):
        with pytest.raises(ConfigError, match="is no entry of"):
            read(folder, name)


def test_a_result_is_its_table_and_its_sheet(tmp_path: Path) -> None:
    place = tmp_path / "results" / "shapes" / "one"
    place.mkdir(parents=True)
    (place / "result.json").write_text("{}")
    (place / "table.md").write_text("| a |\n|---|\n| 1 |\n")
    Image.new("RGB", (8, 4)).save(place / "sheet.png")
    folder = Shown(tmp_path / "results", MARKS)
    assert folder.names() == ["shapes/one"]
    table, sheet = read_result(folder, "shapes/one")
    assert table.startswith("| a |") and sheet.size == (8, 4)
    assert Shown(tmp_path / "nowhere", MARKS).names() == []


# ---- the page over HTTP -------------------------------------------------------------------------------------------


@pytest.fixture
def page(quick: LensPipeline, tmp_path: Path) -> Iterator[Running]:
    outputs = Outputs(tmp_path / "outputs")
    (tmp_path / "outputs" / "scratch").mkdir()
    settings = PageSettings(runs=tmp_path, results=tmp_path, scratch=(tmp_path / "outputs" / "scratch").resolve())

    def mount(app: Any, engine: Engine) -> None:
        assert mount_page(app, Drawing(engine, outputs), settings, Catalog.of(__import__("lens_studio"))) == "/studio"

    with running(quick, mount=mount, outputs=outputs) as one:
        yield one


def ask(page: Running, path: str, method: str = "GET", body: Any = None, headers: Any = None) -> tuple[int, bytes]:
    status, _, content = page.ask(method, path, body, headers)
    return status, content


def test_the_page_is_served_and_counts_nobody(page: Running) -> None:
    status, content = ask(page, "/studio/")
    config = json.loads(ask(page, "/studio/config")[1])
    assert status == 200 and b"gradio" in content
    assert config["analytics_enabled"] is False and not config.get("is_space") and not config.get("share_url")
    assert b"googletagmanager" not in content and b"fonts.googleapis.com" not in content
    assert all(
        not named for named in [d.get("api_name") for d in config["dependencies"] if d["api_visibility"] == "public"]
    )
    assert ask(page, "/v1/models")[0] == 200  # the API is beside it
    status, content = ask(page, "/")
    assert status == 404 and b"/studio" in content, "a 404 lists the page too"


def test_no_file_outside_of_the_pages_folder_is_served(page: Running, tmp_path: Path) -> None:
    secret, scratch = tmp_path / "secret.txt", tmp_path / "outputs" / "scratch"
    secret.write_text("hush-hush")
    (tmp_path / "outputs" / "link.png").symlink_to(secret)
    paths = [str(secret), "/etc/passwd", f"{scratch}/../../secret.txt", f"{scratch}/%2e%2e/%2e%2e/secret.txt",
             "../secret.txt", str(tmp_path / "outputs" / "link.png"), "pyproject.toml", "C:\\secret", "//etc/passwd",
             "file:///etc/passwd", "/proc/self/environ"]  # fmt: skip
    for path in paths:
        status, content = ask(page, f"/studio/gradio_api/file={path}")
        assert status in (403, 404) and b"hush" not in content and b"root:" not in content, path
    for path in (
        "/studio/gradio_api/file=",
        "/studio/static/..%2f..%2froutes.py",
        "/studio/assets/..%2f..%2f..%2froutes.py",
    ):
        assert ask(page, path)[0] in (403, 404, 405), path


def test_the_name_of_an_upload_names_no_place(page: Running, tmp_path: Path) -> None:
    lines = ["--b", 'Content-Disposition: form-data; name="files"; filename="../../../evil.png"', "", "x", "--b--", ""]
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    status, content = ask(page, "/studio/gradio_api/upload", "POST", "\r\n".join(lines).encode(), headers)
    if status == 200:
        (place,) = json.loads(content)
        assert Path(place).resolve().is_relative_to((tmp_path / "outputs" / "scratch").resolve())
    assert not list(tmp_path.glob("evil*")) and not list(tmp_path.parent.glob("evil*"))


def call(page: Running, index: int, data: list[Any]) -> str:
    """What an event of the page answers to a program that speaks gradio's protocol."""
    body = {"data": data, "fn_index": index, "session_hash": "abc"}
    ask(page, "/studio/gradio_api/queue/join", "POST", body)
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=WAIT)
    connection.request("GET", "/studio/gradio_api/queue/data?session_hash=abc")
    answer, text = connection.getresponse(), b""
    while b"process_completed" not in text and (line := answer.readline()):
        text += line
    connection.close()
    return text.decode()


def test_a_path_that_a_program_sends_as_its_upload_is_not_read(page: Running, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"")
    config = json.loads(ask(page, "/studio/config")[1])
    kinds = {component["id"]: component["type"] for component in config["components"]}
    (again,) = [d for d in config["dependencies"] if [kinds[i] for i in d["inputs"]] == ["file"]]
    for path in ("/etc/passwd", str(tmp_path / "secret.png")):
        text = call(page, again["id"], [{"path": path, "meta": {"_type": "gradio.FileData"}}])
        assert '"success":false' in text and "root:" not in text, text


def test_a_page_of_another_site_and_another_host_are_refused(page: Running) -> None:
    assert ask(page, "/studio/", headers={"Host": "evil.example"})[0] == 403
    headers = {"Origin": "http://evil.example", "Content-Type": "application/json"}
    assert ask(page, "/studio/gradio_api/queue/join", "POST", {"data": [], "fn_index": 0}, headers)[0] == 403


def test_an_open_window_does_not_hold_the_server_up(page: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=WAIT)
    connection.request("GET", "/studio/gradio_api/heartbeat/abc")
    answer = connection.getresponse()
    assert b"ALIVE" in answer.readline()
    for callback in page.on_exit:  # as the first SIGTERM does
        callback()
    start = time.monotonic()
    while answer.readline():
        pass
    connection.close()
    assert time.monotonic() - start < WAIT / 4  # the stream would go on for as long as the window is open


def test_without_a_page_or_gradio_ui_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from lens_serve import pages

    monkeypatch.setattr(pages, "find_spec", lambda name: None)
    monkeypatch.setattr(Catalog, "pages", lambda self: {"studio": "x:y"})
    with pytest.raises(ConfigError, match=r"pip install 'lens-t2i\[ui\]'"):
        pages.check_installed()
    monkeypatch.setattr(Catalog, "pages", lambda self: {})
    with pytest.raises(ConfigError, match="no plugin brings a page"):
        pages.check_installed()
