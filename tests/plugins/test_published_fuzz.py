"""The config files of a published folder with anything in them: each part is read, or refused in one line.

`LENS_FUZZ=10000 make test` tries that many cases.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import TEXTS, changed, fuzz, little_memory, read
from hypothesis import given
from hypothesis import strategies as st
from lens_mmdit.published import describe

from lens_core.catalog import Catalog
from lens_core.checkpoints.tensor_files import read_tensors, save_tensors
from lens_core.io.atomic_files import read_json
from lens_core.recipe import ComponentSpec, build

FILES = {
    "model_index.json": "backbone",
    "transformer/config.json": "backbone",
    "vae/config.json": "vae",
    "text_encoder/config.json": "text_encoder",
    "tokenizer/tokenizer.json": "text_encoder",
    "tokenizer/tokenizer_config.json": "text_encoder",
}


@pytest.fixture(autouse=True, scope="module")
def _little_memory() -> Iterator[None]:
    yield from little_memory()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny:` as it would have been published, without a lens.json."""
    from lens_core.checkpoints.manifest import resolve_uri

    place = tmp_path_factory.mktemp("fuzz") / "lens"
    shutil.copytree(resolve_uri("tiny:", Catalog.installed()), place)
    (place / "lens.json").unlink()
    return place


@pytest.fixture(scope="module")
def installed() -> Catalog:
    return Catalog.installed()


def load(folder: Path, part: str, catalog: Catalog) -> Any:
    """One part of the folder, as the pipeline reads it."""
    described = describe(folder)
    if described is None:
        return None
    use = described["components"][part]
    _, cls, config = build(
        catalog, part, ComponentSpec(use["use"], use["config"]), f"{folder}/lens.json: components.{part}"
    )
    return cls.load(folder, config, dtype=torch.float32)


@fuzz
@given(drawn=st.data())
def test_any_config_file_is_a_part_or_a_refusal(drawn: st.DataObject, folder: Path, installed: Catalog) -> None:
    name = drawn.draw(st.sampled_from(sorted(FILES)))
    path = folder / name
    sound = path.read_text()
    try:
        path.write_text(drawn.draw(st.one_of(changed(json.loads(sound)).map(json.dumps), TEXTS.filter(str.isascii))))
        read(lambda: load(folder, FILES[name], installed))
    finally:
        path.write_text(sound)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": "1.0"}', '{"model": {"type": "BPE"}}', "\x00"])
def test_a_tokenizer_that_is_none_is_refused(text: str, folder: Path, installed: Catalog) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    sound = path.read_text()
    try:
        path.write_text(text)
        assert read(lambda: load(folder, "text_encoder", installed)) is None
    finally:
        path.write_text(sound)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("transformer/config.json", "num_layers"),
        ("transformer/config.json", "enc_hidden_dim"),
        ("transformer/config.json", "out_channels"),
        ("vae/config.json", "layers_per_block"),
        ("vae/config.json", "latent_channels"),
        ("text_encoder/config.json", "num_hidden_layers"),
        ("text_encoder/config.json", "vocab_size"),
        ("text_encoder/config.json", "num_local_experts"),
        ("text_encoder/config.json", "hidden_size"),
    ],
)
@pytest.mark.parametrize("size", [10**5, 10**9, 2**62, 10**30])
def test_a_size_beyond_all_bounds_is_refused_before_it_is_built(
    name: str, field: str, size: int, folder: Path, installed: Catalog
) -> None:
    sound = (folder / name).read_text()
    try:
        (folder / name).write_text(json.dumps({**read_json(folder / name), field: size}))
        assert read(lambda: load(folder, FILES[name], installed)) is None
    finally:
        (folder / name).write_text(sound)


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (torch.zeros(2, 3, 1, 16), torch.zeros(2, 3, 1, dtype=torch.uint8)),
        (torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 3, 1, dtype=torch.uint8)),
        (torch.zeros(2, 3, 1, 7, dtype=torch.uint8), torch.zeros(2, 3, 1, dtype=torch.uint8)),
        (torch.zeros(2, 3, 1, 16, dtype=torch.uint8), torch.zeros(2, 3, 9, dtype=torch.uint8)),
        (torch.zeros(2, 3, 1, 16, dtype=torch.uint8), torch.zeros(1, 3, 1, dtype=torch.uint8)),
    ],
)
def test_four_bit_weights_of_another_shape_are_refused(
    blocks: torch.Tensor, scales: torch.Tensor, folder: Path, installed: Catalog
) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    sound = path.read_bytes()
    name = "model.layers.0.mlp.experts.down_proj"
    try:
        tensors = {key: value.clone() for key, value in read_tensors(path).items()}
        del tensors[name]
        save_tensors(path, tensors | {f"{name}_blocks": blocks, f"{name}_scales": scales})
        assert read(lambda: load(folder, "text_encoder", installed)) is None
    finally:
        path.write_bytes(sound)
