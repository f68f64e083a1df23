"""One LoRA in three key formats: the same numbers, whichever way it went; and what is no LoRA is told by name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lens_core import catalog as catalogs
from lens_core.catalog import Catalog
from lens_core.checkpoints.adapters import LoRA
from lens_core.checkpoints.lora_keys import KEY_FORMATS, read, write
from lens_core.checkpoints.tensor_files import read_header, read_tensors, save_tensors
from lens_core.cli.main import main
from lens_core.inference import lora
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import LoraSpec
from lens_core.types import CheckpointError, ConfigError

LAYERS = ("blocks.0.img_qkv", "blocks.0.to_out.0", "blocks.0.w_1")


def pairs(alphas: tuple[float, ...] = (0.1, 4.0, 4.0), ranks: tuple[int, ...] = (2, 2, 3)) -> dict[str, LoRA]:
    rng = torch.Generator().manual_seed(0)
    return {
        name: LoRA(torch.randn(rank, 6, generator=rng), torch.randn(8, rank, generator=rng).bfloat16(), alpha)
        for name, alpha, rank in zip(LAYERS, alphas, ranks, strict=True)
    }


def same(one: dict[str, LoRA], other: dict[str, LoRA]) -> None:
    assert one.keys() == other.keys()
    for name, pair in one.items():
        assert pair.alpha == other[name].alpha
        for a, b in ((pair.down, other[name].down), (pair.up, other[name].up)):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("way", list(itertools.product(KEY_FORMATS, repeat=2)), ids="-".join)
def test_a_round_through_any_two_key_formats_is_bit_exact(way: tuple[str, str], tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    write(files[0], pairs(), way[0])
    for number, key_format in enumerate((way[1], way[0])):
        write(files[number + 1], read(files[number]), key_format)
    same(read(files[1]), pairs())
    assert files[2].read_bytes() == files[0].read_bytes()


@pytest.mark.parametrize(
    ("key_format", "key", "alpha"),
    [
        ("diffusers", "transformer.blocks.0.to_out.0.lora_A.weight", None),
        ("comfy", "diffusion_model.blocks.0.to_out.0.lora_A.weight", "diffusion_model.blocks.0.to_out.0.alpha"),
        ("sd-scripts", "lora_unet_blocks_0_to_out_0.lora_down.weight", "lora_unet_blocks_0_to_out_0.alpha"),
    ],
)
def test_each_key_format_is_its_tools(key_format: str, key: str, alpha: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(path, pairs(), key_format)
    tensors = read_tensors(path)
    assert torch.equal(tensors[key], pairs()["blocks.0.to_out.0"].down)
    assert len(tensors) == (6 if alpha is None else 9)
    assert alpha is None or (float(tensors[alpha]) == 4.0 and tensors[alpha].ndim == 0)
    about = json.loads(read_header(path)["lora_adapter_metadata"])
    assert about["transformer.r"] == 2 and about["transformer.lora_alpha"] == 4.0
    assert about["transformer.alpha_pattern"] == {"blocks.0.img_qkv": 0.1}
    assert about["transformer.rank_pattern"] == {"blocks.0.w_1": 3}
    if key_format == "sd-scripts":
        header = read_header(path)
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "4.0")


def test_names_with_underscores_need_a_header_or_a_model(tmp_path: Path) -> None:
    path, bare = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write(path, pairs(), "sd-scripts")
    save_tensors(bare, read_tensors(path), {"ss_network_alpha": "7"})
    with pytest.raises(CheckpointError, match=r"9 of 9 tensors fit no layer .*; give the model that it is for"):
        read(bare)
    same(read(bare, LAYERS), pairs())


def test_a_name_that_could_be_two_layers_is_neither(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"lora_unet_a_b_c.lora_down.weight": torch.ones(1, 2)})
    with pytest.raises(CheckpointError, match="1 of 1 tensors fit no layer"):
        read(path, ("a.b_c", "a_b.c"))
    two = {name: LoRA(torch.ones(1, 2), torch.ones(2, 1), 1.0) for name in ("a.b_c", "a_b.c")}
    with pytest.raises(CheckpointError, match="two layers would have one name in the key format sd-scripts"):
        write(path, two, "sd-scripts")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("LoHa or LoKr in Tucker's form", "lora_unet_x.hada_t1"),
        ("LoHa or LoKr in Tucker's form", "diffusion_model.x.lokr_t2"),
        ("LoCon", "lora_unet_x.lora_mid.weight"),
        ("OFT", "lora_unet_x.oft_blocks"),
        ("whole difference of weights", "lora_unet_x.diff"),
        ("whole difference of weights", "diffusion_model.x.diff_b"),
    ],
)
def test_what_cannot_be_honoured_is_named(kind: str, key: str, tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {key: torch.ones(2, 2), "x.alpha": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: is a {kind}.*; LoRA, DoRA, LoHa and LoKr are read"):
        read(tmp_path / "a.safetensors", ("x",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a.lora_A.weight": torch.full((1, 2), torch.nan)}, "numbers that are not finite"),
        ({"a.alpha": torch.tensor(torch.inf)}, "numbers that are not finite"),
        ({"a.alpha": torch.ones(3)}, r"an alpha of \[3\] numbers, not one"),
        ({"a.lora_A.weight": torch.ones(1, 2).int()}, r"torch\.int32, which are no plain weights"),
        ({"a.lora_A.weight": torch.ones(0, 2), "a.lora_B.weight": torch.ones(2, 0)}, "which is no product"),
        ({"a.lora_A.weight": torch.ones(1, 2, 1, 1)}, "which is no product"),
        ({"diffusion_model.a.lora_A.weight": torch.ones(1, 2)}, "holds 'a' twice, in two key formats"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(change: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    plain = {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}
    save_tensors(tmp_path / "a.safetensors", plain | change)
    with pytest.raises(CheckpointError, match=words):
        read(tmp_path / "a.safetensors", ("a",))


def test_an_infix_of_an_adapters_name_is_read_over(tmp_path: Path) -> None:
    tensors = {"base_model.model.a.lora_A.default.weight": torch.ones(1, 2)}
    save_tensors(tmp_path / "a.safetensors", tensors | {"base_model.model.a.lora_B.style_1.weight": torch.ones(2, 1)})
    assert read(tmp_path / "a.safetensors", ("a",))["a"].alpha == 1.0


def test_a_control_character_in_a_name_does_not_reach_the_terminal(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", {"\x1b[2J\nevil": torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "a.safetensors", ("a",))
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key_format", KEY_FORMATS)
def test_a_trained_adapter_is_saved_in_any_key_format(key_format: str, pipeline: LensPipeline, tmp_path: Path) -> None:
    net, adapter = pipeline.backbone, LoraSpec(rank=2, scale=0.3)
    plain = {name: module.weight.clone() for name, module in net.named_modules() if hasattr(module, "weight")}
    lora.attach(net, adapter)
    for name, parameter in net.named_parameters():
        if lora.owned(name):
            torch.nn.init.normal_(parameter)
    lora.save(net, adapter, tmp_path / "a.safetensors", "transformer", key_format)
    lora.merge(net)
    for layer, change in lora.read(tmp_path / "a.safetensors", net).items():
        torch.testing.assert_close(net.get_submodule(layer).weight, plain[layer] + change.delta())
    with pytest.raises(ConfigError, match="no key format is called 'kohya'"):
        write(tmp_path / "b.safetensors", pairs(), "kohya")


def test_the_command_rewrites_a_lora(
    checkpoint: Path, catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(catalogs.Catalog, "installed", classmethod(lambda cls: catalog))
    wide, high = 5, 16  # of the toy's inner layer
    low = {"inner": LoRA(torch.ones(1, wide), torch.ones(high, 1), 0.5)}
    names = {key_format: str(tmp_path / f"{key_format}.safetensors") for key_format in KEY_FORMATS}
    write(Path(names["diffusers"]), low)
    assert main(["lora", "convert", names["diffusers"], names["comfy"], "--to", "comfy"]) == 0
    same(read(Path(names["comfy"])), low)
    bare = tmp_path / "bare.safetensors"
    assert main(["lora", "convert", names["comfy"], names["sd-scripts"], "--to", "sd-scripts"]) == 0
    save_tensors(bare, read_tensors(Path(names["sd-scripts"])))
    back = str(tmp_path / "back.safetensors")
    assert main(["lora", "convert", str(bare), back, "--to", "diffusers"]) == 2
    assert "give the model that it is for" in capsys.readouterr().err
    assert main(["lora", "convert", str(bare), back, "--to", "diffusers", "--model", str(checkpoint)]) == 0
    assert Path(back).read_bytes() == Path(names["diffusers"]).read_bytes()
    write(bare, {"outer": low["inner"]})
    over = ["lora", "convert", str(bare), back, "--to", "comfy", "--model", str(checkpoint)]
    assert main(over) == 2
    assert "back.safetensors: is there already; use --overwrite, or another output" in capsys.readouterr().err
    assert main([*over, "--overwrite"]) == 2
    assert "made for another model" in capsys.readouterr().err
    assert Path(back).read_bytes() == Path(names["diffusers"]).read_bytes()
    assert main(["lora", "convert", names["comfy"], back, "--to", "comfy", "--overwrite"]) == 0
    assert Path(back).read_bytes() == Path(names["comfy"]).read_bytes()
    assert main(["lora", "convert", names["comfy"], ".", "--to", "comfy"]) == 2
    assert ".: is a folder; name a .safetensors file in it" in capsys.readouterr().err
    assert (
        main(["lora", "convert", str(bare), "x.pt", "--to", "comfy"])
        == main(["lora", "convert", str(bare), back, "--to", "xl"])
        == 2
    )
