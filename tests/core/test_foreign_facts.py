"""What `--reproduce` takes from the pictures of ComfyUI and of A1111's web UI, and what it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lens_core.cli.main import main
from lens_core.inference import comfy_graph, foreign_facts
from lens_core.types import ConfigError

GRAPH: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286, "steps": 7, "cfg": 2.5, "sampler_name": "euler", "scheduler": "karras",
            "denoise": 1, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle", "clip": ["10", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "a blue star", "clip": ["10", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}, "is_changed": [1]},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "moon.safetensors", "strength_model": 0.8,
                                                  "model": ["4", 0], "clip": ["4", 1]}},
}  # fmt: skip
WORKFLOW: dict[str, Any] = {
    "nodes": [
        {"id": 3, "type": "KSampler", "widgets_values": [5, "randomize", 7, 2.5, "dpmpp_2m", "normal", 1],
         "inputs": [{"name": "positive", "link": 1}, {"name": "negative", "link": 2},
                    {"name": "latent_image", "link": 3}]},
        {"id": 6, "type": "CLIPTextEncode", "widgets_values": ["a red circle"], "inputs": []},
        {"id": 7, "type": "CLIPTextEncode", "widgets_values": ["a blue star"]},
        {"id": 5, "type": "EmptySD3LatentImage", "widgets_values": [96, 64, 1]},
    ],
    "links": [[1, 6, 0, 3, 1, "CONDITIONING"], [2, 7, 0, 3, 2, "CONDITIONING"], [3, 5, 0, 3, 3, "LATENT"]],
}  # fmt: skip
A1111 = """a red circle, (large:1.2) <lora:moon:0.8>
on white
Negative prompt: a blue star
blurry
Steps: 7, Sampler: DPM++ 2M Karras, CFG scale: 2.5, Seed: 156680208700286, Size: 96x64, Model hash: abcdef, \
Model: "a, b", Clip skip: 2"""


def png(path: Path, **chunks: Any) -> Path:
    info = PngInfo()
    for name, value in chunks.items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    Image.new("RGB", (96, 64)).save(path, pnginfo=info)
    return path


def read(tmp_path: Path, **chunks: Any) -> foreign_facts.ForeignFacts:
    facts = foreign_facts.read(png(tmp_path / "a.png", **chunks))
    assert facts is not None
    return facts


def test_a_graph_of_comfyui_names_all_that_draws(tmp_path: Path) -> None:
    facts = read(tmp_path, prompt=GRAPH, workflow=WORKFLOW)
    assert facts.tool == "ComfyUI"
    assert facts.taken == {
        "prompt": "a red circle", "negative_prompt": "a blue star", "seed": 156680208700286, "steps": 7,
        "guidance_scale": 2.5, "sampler": "euler", "height": 64, "width": 96,
    }  # fmt: skip
    assert any("scheduler: 'karras'" in line for line in facts.left)
    assert any("LoraLoader, lora_name='moon.safetensors', strength_model=0.8" in line for line in facts.left)
    assert any("CheckpointLoaderSimple, ckpt_name='sd15.safetensors'" in line for line in facts.left)


def test_a_workflow_alone_is_read_by_its_places(tmp_path: Path) -> None:
    facts = read(tmp_path, workflow=WORKFLOW)
    assert facts.taken == {
        "prompt": "a red circle", "negative_prompt": "a blue star", "seed": 5, "steps": 7, "guidance_scale": 2.5,
        "sampler": "dpmpp", "height": 64, "width": 96,
    }  # fmt: skip


def test_a_graph_of_separate_nodes_is_followed(tmp_path: Path) -> None:
    graph = {
        "1": {"class_type": "SamplerCustomAdvanced", "inputs": {
            "noise": ["2", 0], "guider": ["3", 0], "sampler": ["4", 0], "sigmas": ["5", 0], "latent_image": ["6", 0]}},
        "2": {"class_type": "RandomNoise", "inputs": {"noise_seed": 11}},
        "3": {"class_type": "CFGGuider", "inputs": {"cfg": 3, "positive": ["7", 0], "negative": ["8", 0]}},
        "4": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "heun"}},
        "5": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 9, "denoise": 1}},
        "6": {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 32, "height": 48}},
        "7": {"class_type": "FluxGuidance", "inputs": {"guidance": 4, "conditioning": ["9", 0]}},
        "8": {"class_type": "CLIPTextEncode", "inputs": {"text": ""}},
        "9": {"class_type": "CLIPTextEncode", "inputs": {"text": ["10", 0], "clip": ["99", 0]}},
        "10": {"class_type": "PrimitiveString", "inputs": {"value": "a green square"}},
    }  # fmt: skip
    assert read(tmp_path, prompt=graph).taken == {
        "prompt": "a green square", "negative_prompt": "", "seed": 11, "steps": 9, "guidance_scale": 3.0,
        "sampler": "heun", "height": 48, "width": 32,
    }  # fmt: skip


def with_nodes(changes: dict[str, dict[str, Any]], **nodes: Any) -> dict[str, Any]:
    """GRAPH with other inputs of some nodes, and with more nodes, `n50` for the node 50."""
    graph = {**GRAPH, **{name.removeprefix("n"): node for name, node in nodes.items()}}
    changed = {name: {**graph[name], "inputs": {**graph[name]["inputs"], **more}} for name, more in changes.items()}
    return {**graph, **changed}


def test_a_conditioning_of_zeros_is_no_negative_prompt(tmp_path: Path) -> None:
    zeros = {"class_type": "ConditioningZeroOut", "inputs": {"conditioning": ["6", 0]}}
    facts = read(tmp_path, prompt=with_nodes({"3": {"negative": ["50", 0]}}, n50=zeros))
    assert facts.taken["prompt"] == "a red circle" and "negative_prompt" not in facts.taken


def test_a_guider_without_a_negative_has_none(tmp_path: Path) -> None:
    graph = {
        "1": {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["2", 0]}},
        "2": {"class_type": "BasicGuider", "inputs": {"conditioning": ["3", 0]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red circle"}},
    }
    assert read(tmp_path, prompt=graph).taken == {"prompt": "a red circle"}


def test_all_that_other_nodes_say_is_listed(tmp_path: Path) -> None:
    graph = with_nodes(
        {"3": {"positive": ["50", 0], "model": ["51", 0]}, "5": {"batch_size": 4}},
        n50={"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": ["6", 0]}},
        n51={"class_type": "ModelSamplingAuraFlow", "inputs": {"shift": 3.1, "model": ["10", 0]}},
        n9={"class_type": "SaveImage", "inputs": {"filename_prefix": "a", "images": ["8", 0]}},
    )
    facts = read(tmp_path, prompt=graph)
    assert {
        "node 50: FluxGuidance, guidance=3.5", "node 51: ModelSamplingAuraFlow, shift=3.1",
        "node 5: EmptyLatentImage, batch_size=4",
    } <= set(facts.left)  # fmt: skip
    assert facts.taken["prompt"] == "a red circle"
    assert not any("SaveImage" in line or "CLIPTextEncode" in line for line in facts.left)


def test_a_seed_is_followed_to_the_node_that_holds_it_or_listed(tmp_path: Path) -> None:
    number = {"class_type": "PrimitiveInt", "inputs": {"value": 77}}
    graph = with_nodes({"3": {"seed": ["50", 0]}}, n50=number)
    facts = read(tmp_path, prompt=graph)
    assert facts.taken["seed"] == 77 and not any("PrimitiveInt" in line for line in facts.left)
    graph = with_nodes({"3": {"seed": ["50", 0]}}, n50={"class_type": "RandomInt", "inputs": {"low": 1}})
    facts = read(tmp_path, prompt=graph)
    assert "seed" not in facts.taken and "seed: that of node 50, RandomInt, which names no value" in facts.left


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("ConditioningCombine", "conditioning_1", "conditioning_2"),
        ("ConditioningConcat", "conditioning_to", "conditioning_from"),
    ],
)
def test_of_two_conditionings_the_first_is_taken_and_the_second_listed(
    tmp_path: Path, kind: str, first: str, second: str
) -> None:
    both = {"class_type": kind, "inputs": {second: ["51", 0], first: ["6", 0]}}
    more = {"class_type": "CLIPTextEncode", "inputs": {"text": "on white", "clip": ["10", 1]}}
    facts = read(tmp_path, prompt=with_nodes({"3": {"positive": ["50", 0]}}, n50=both, n51=more))
    assert facts.taken["prompt"] == "a red circle"
    assert f"node 50: {kind}, whose {second} is CLIPTextEncode 'on white'" in facts.left


def test_of_two_samplers_the_one_at_an_empty_latent_draws(tmp_path: Path) -> None:
    again = {**GRAPH["3"]["inputs"], "steps": 3, "latent_image": ["20", 0]}
    refined = {
        "1": {"class_type": "KSampler", "inputs": again},
        "20": {"class_type": "LatentUpscale", "inputs": {"samples": ["3", 0], "width": 999, "height": 999}},
    }
    facts = read(tmp_path, prompt={**GRAPH, **refined})
    assert facts.taken["steps"] == 7 and (facts.taken["width"], facts.taken["height"]) == (96, 64)
    assert "node 1: KSampler, another sampler" in facts.left


def test_the_text_of_a1111_is_read(tmp_path: Path) -> None:
    facts = read(tmp_path, parameters=A1111)
    assert facts.tool == "A1111"
    assert facts.taken == {
        "prompt": "a red circle, (large:1.2) \non white", "negative_prompt": "a blue star\nblurry", "steps": 7,
        "sampler": "dpmpp", "guidance_scale": 2.5, "seed": 156680208700286, "width": 96, "height": 64,
    }  # fmt: skip
    assert set(facts.left) == {
        "<lora:moon:0.8>: give the file with --lora",
        "sampler 'DPM++ 2M Karras': its schedule is the model's here",
        "Model hash: abcdef", 'Model: "a, b"', "Clip skip: 2",
    }  # fmt: skip


def test_a_prompt_of_a1111_without_settings_is_a_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, parameters="Steps of stone, a temple").taken == {"prompt": "Steps of stone, a temple"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"seed": 2**64 - 1}, "seed 18446744073709551615: is out of the range"),
        ({"seed": -1}, "seed -1: is out"),
        ({"seed": True}, "seed True: is out"),
        ({"steps": 10**9}, "steps 1000000000: is out"),
        ({"steps": "7"}, "steps '7': is out"),
        ({"cfg": "NaN"}, "guidance_scale 'NaN': is out"),
        ({"sampler_name": "uni_pc"}, "sampler 'uni_pc': Lens has no such sampler"),
        ({"sampler_name": 3}, "sampler 3: is out"),
    ],
)
def test_a_value_that_cannot_be_drawn_with_is_listed_and_left_out(
    change: dict[str, Any], line: str, tmp_path: Path
) -> None:
    graph = {**GRAPH, "3": {"class_type": "KSampler", "inputs": {**GRAPH["3"]["inputs"], **change}}}
    facts = read(tmp_path, prompt=graph)
    assert any(left.startswith(line) for left in facts.left), facts.left
    assert len(facts.taken) == 7


def circle(count: int) -> dict[str, Any]:
    nodes = {
        str(n): {"class_type": "Reroute", "inputs": {"conditioning": [str((n + 1) % count), 0]}} for n in range(count)
    }
    return {**nodes, "s": {"class_type": "KSampler", "inputs": {"positive": ["0", 0]}}}


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ({"prompt": "["}, "cannot be read"),
        ({"prompt": "[" * 100_000}, "is nested deeper than 64 levels"),
        ({"prompt": '{"a":' * 100 + "1" + "}" * 100}, "is nested deeper than 64 levels"),
        ({"prompt": "[]"}, "must be an object"),
        ({"prompt": "{}"}, "no sampler that is known"),
        ({"prompt": {"1": {"class_type": ["KSampler"], "inputs": {}}}}, "no sampler"),
        ({"prompt": {str(n): {} for n in range(10_001)}}, "has 10001 nodes; at most 10000"),
        ({"prompt": circle(500)}, "names no prompt"),
        ({"prompt": {"1": {"class_type": "KSampler", "inputs": {"positive": ["1", 0]}}}}, "names no prompt"),
        ({"prompt": '{"a": "' + "x" * 2**20 + '"}'}, "at most 1048576 are read"),
        ({"workflow": "{}"}, "has no lists of nodes and links"),
        ({"workflow": {"nodes": [1, {"id": []}, {"id": 1, "type": "KSampler", "inputs": 3}], "links": [[], 1]}},
         "names no prompt"),
        ({"parameters": ""}, "names no prompt"),
        ({"parameters": "Negative prompt: a\nSteps: 1, Seed: 2, Size: 8x8"}, "names no prompt"),
    ],
)  # fmt: skip
def test_a_hostile_chunk_is_refused_in_one_line(
    chunks: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = png(tmp_path / "bad.png", **chunks)
    start = time.monotonic()
    assert main(["generate", "--reproduce", str(path), "--model", "tiny:turbo"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert time.monotonic() - start < 5


def test_a_chunk_that_unpacks_to_100_mb_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = PngInfo()
    info.add_text("prompt", "[" + " " * 100_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    assert main(["generate", "--reproduce", str(tmp_path / "bomb.png")]) == 2
    error = capsys.readouterr().err
    assert "bomb.png" in error and error.count("\n") == 1 and len(error) < 400


def test_a_line_of_a_million_colons_takes_no_time(tmp_path: Path) -> None:
    start = time.monotonic()
    facts = read(tmp_path, parameters="a cat\n" + 'a: "' * 200_000)
    assert facts.taken["prompt"].startswith("a cat") and time.monotonic() - start < 5


def test_every_walk_along_links_ends() -> None:
    graph = comfy_graph.read_prompt(circle(5000))
    start = time.monotonic()
    assert comfy_graph.facts(graph)[0] == {}
    assert time.monotonic() - start < 5


def test_a_picture_of_lens_and_a_plain_one_have_no_foreign_facts(tmp_path: Path) -> None:
    assert foreign_facts.read(png(tmp_path / "a.png")) is None
    assert foreign_facts.read(png(tmp_path / "a.png", lens="{}", prompt=GRAPH)) is None
    with pytest.raises(ConfigError, match="no such picture"):
        foreign_facts.read(tmp_path / "gone.png")


def test_reproduce_draws_what_the_facts_name_and_lists_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    png(Path("comfy.png"), prompt=GRAPH)
    model = ("--model", "tiny:turbo", "--device", "cpu")
    assert main(["generate", "--reproduce", "comfy.png", *model, "-o", "a.png"]) == 0
    out = capsys.readouterr().out
    assert 'taken from ComfyUI: prompt "a red circle"' in out and "not taken: scheduler: 'karras'" in out
    asked = ("--seed", "156680208700286", "--steps", "7", "--guidance-scale", "2.5", "--size", "64x96")
    same = ("--sampler", "euler", "--negative-prompt", "a blue star", "-o", "b.png")
    assert main(["generate", "a red circle", *model, *asked, *same]) == 0
    with Image.open("a.png") as a, Image.open("b.png") as b:
        assert a.tobytes() == b.tobytes()
        facts = [json.loads(picture.info["lens"]) for picture in (a, b)]
    assert facts[0] == facts[1]
    assert main(["generate", "--reproduce", "comfy.png", *model, "-o", "a.png"]) == 2
    assert "a.png: is there already" in capsys.readouterr().err
    other = ("--seed", "3", "--size", "32x48", "--steps", "1", "--sampler", "heun", "--num-images", "2", "-o", "a.png")
    assert main(["generate", "--reproduce", "comfy.png", *model, *other, "--overwrite", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (
        "not taken: seed 156680208700286: another is given" in err and "taken from ComfyUI: guidance_scale 2.5" in err
    )
    drawn = [json.loads(line) for line in out.splitlines()]
    assert [(facts["seed"], facts["file"]) for facts in drawn] == [(3, "a-0000.png"), (4, "a-0001.png")]
    names = ("height", "width", "steps", "sampler", "negative_prompt", "prompt")
    wanted = [32, 48, 1, {"use": "lens_flow:heun", "mu": 1.0}, "a blue star", "a red circle"]
    assert [drawn[0][name] for name in names] == wanted


def test_what_a_file_of_others_says_does_not_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "a \x1b]0;owned\x07 \x9b2J cat <lora:\x1b[2J:1>"
    path = png(
        tmp_path / "evil.png", parameters=f"{evil}\nSteps: 1, Sampler: Euler, Size: 32x32, Odd\x1b: \x1b[2J, A: \x9b"
    )
    flags = ("--model", "tiny:turbo", "--device", "cpu", "-o", str(tmp_path / "a.png"))
    assert main(["generate", "--reproduce", str(path), *flags]) == 0
    out, err = capsys.readouterr()
    assert "owned" in out and all(c.isprintable() or c == "\n" for c in out + err)
