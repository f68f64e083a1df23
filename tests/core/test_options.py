"""The options that several commands share mean the same model, and reach it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import attrs
import pytest

from lens_core.catalog import Catalog
from lens_core.cli.bench import bench
from lens_core.cli.generate import generate
from lens_core.cli.options import ModelOptions
from lens_core.evaluation.bench import generator_spec, make_generator
from lens_core.evaluation.pipeline_generator import PipelineGenerator
from lens_core.inference.requests import ModelRequest

OPTIONS = {
    "model": "tiny:",
    "backbone": Path("b.safetensors"),
    "text_encoder": Path("t.safetensors"),
    "vae": Path("v.safetensors"),
    "lora": ["a.safetensors:0.5"],
    "sampler": "heun",
    "device": "cpu",
    "dtype": "float32",
    "offload": "none",
    "prompt_cache": Path("kept"),
    "lossy_vae_tile": 64,
}
"""Every option but the reasoner, with another value than its default."""


def names(cls: type[Any]) -> set[str]:
    return {attribute.name for attribute in attrs.fields(cls)}


@pytest.mark.parametrize("command", [generate, bench])
def test_commands_that_draw_have_all_options_of_a_model(command: Any) -> None:
    assert "ModelGroup" in str(inspect.signature(command).parameters["model"].annotation)


def test_every_field_of_a_model_request_is_an_option_and_one_of_the_generator() -> None:
    options = {"loras" if name == "lora" else name for name in names(ModelOptions)}
    assert options == names(ModelRequest)
    assert options <= names(PipelineGenerator.Config)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.safetensors").touch()
    monkeypatch.chdir(tmp_path)


def test_every_option_reaches_the_request() -> None:
    request, plain = ModelOptions(**OPTIONS).request(), ModelOptions().request()
    same = {name for name in names(ModelRequest) if getattr(request, name) == getattr(plain, name)}
    assert same == {"model", "reasoner"}, "all others differ from their defaults"


def test_every_option_reaches_the_generator() -> None:
    spec = generator_spec("", ModelOptions(**OPTIONS).generator_options())
    generator = make_generator(spec, Catalog.installed())
    plain = PipelineGenerator.Config()
    same = {name for name in names(type(plain)) if getattr(generator.config, name) == getattr(plain, name)}
    assert same & {"loras" if name == "lora" else name for name in OPTIONS} == {"model"}
    assert (generator.config.sampler.use, generator.config.loras) == ("heun", ("a.safetensors:0.5",))


def test_a_sampler_of_the_command_line_draws_and_is_part_of_the_systems_description() -> None:
    spec = generator_spec("", ModelOptions(model="tiny:", sampler="heun", offload="none").generator_options())
    settings = make_generator(spec, Catalog.installed()).describe().settings
    assert settings["sampler"]["use"] == "lens_flow:heun"
