"""A LoRA of PEFT is as strong here as in PEFT's own forward, as a folder and as a file; what cannot be is refused."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lens_core.checkpoints import lora_keys
from lens_core.checkpoints.adapters import LoRA
from lens_core.checkpoints.tensor_files import read_tensors, save_tensors
from lens_core.cli.main import main
from lens_core.inference import lora
from lens_core.types import CheckpointError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_qkv, self.to_out = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out(torch.tanh(self.img_qkv(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.to_out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.to_out(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
ALL = ["img_qkv", "to_out"]


def trained(net: Net, folder: Path, **options: Any) -> Tensor:
    """Save a PEFT model with random weights in its adapter; what the forward of PEFT gives when it reads that."""
    model = get_peft_model(
        copy.deepcopy(net), LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ALL} | options)
    )
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        output: Tensor = PeftModel.from_pretrained(copy.deepcopy(net), str(folder))(X.to(net.to_out.weight.dtype))
    return output


@torch.no_grad()
def ours(net: Net, path: Path) -> Tensor:
    mine = copy.deepcopy(net)
    lora.fold(mine, lora.read(path, mine), 1.0, {})
    output: Tensor = mine(X.to(mine.to_out.weight.dtype))
    return output


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")  # parts of a name match nothing
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 3, "target_modules": ["img_qkv"]},
        {"use_rslora": True},
        {"alpha_pattern": {"img_qkv": 2}},
        {"alpha_pattern": {"blocks.1.to_out": 2, "to_out": 5}},
        {"alpha_pattern": {"to_out": 5, "blocks.1.to_out": 2}},
        {"alpha_pattern": {r"blocks\.[01]\..*": 3}},
        {"alpha_pattern": {"^to_out": 5}},
        {"alpha_pattern": {"out": 5, "qkv": 7}},
        {"rank_pattern": {"img_qkv": 2, r"blocks.\d.to_out": 6}},
        {"rank_pattern": {"img_qkv": 2}, "alpha_pattern": {"blocks.2.img_qkv": 9}},
        {"rank_pattern": {"img_qkv": 2}, "alpha_pattern": {"blocks.2": 9, "0.to_out": 1}, "use_rslora": True},
        {"layers_to_transform": [1], "layers_pattern": "blocks", "target_modules": ["img_qkv"]},
        {"exclude_modules": ["blocks.0.to_out"]},
        {"target_modules": r"blocks\.\d\.img_qkv"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.0},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_a_lora_is_as_strong_as_in_pefts_own_forward(options: dict[str, Any], net: Net, tmp_path: Path) -> None:
    want = trained(net, tmp_path / "peft", **options)
    with torch.no_grad():
        assert float((want - net(X)).abs().max()) > 0.1
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"):
        torch.testing.assert_close(ours(net, path), want, atol=1e-9, rtol=0)


def test_linear_layers_have_no_fan_in_fan_out(net: Net, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        want = trained(net, tmp_path / "peft", fan_in_fan_out=True)
    change(tmp_path / "peft", fan_in_fan_out=True)
    torch.testing.assert_close(ours(net, tmp_path / "peft"), want, atol=1e-9, rtol=0)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_that_peft_made_plain_is_read_and_else_refused(net: Net, tmp_path: Path) -> None:
    net = net.float()
    model = get_peft_model(
        copy.deepcopy(net), LoraConfig(r=2, lora_alpha=6, target_modules=ALL, init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        want = model(X.float())
    model.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(CheckpointError, match="'init_lora_weights' is 'pissa', which changed the weights below"):
        ours(net, tmp_path / "raw")
    model.save_pretrained(str(tmp_path / "plain"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(ours(net, tmp_path / "plain"), want, atol=1e-5, rtol=0)  # float32


@pytest.mark.parametrize("way", ["comfy", "sd-scripts", "diffusers"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"alpha_pattern": {"blocks.1.to_out": 2, "to_out": 5}}], ids=str
)
def test_a_lora_in_another_key_format_is_as_strong(way: str, options: dict[str, Any], net: Net, tmp_path: Path) -> None:
    want = trained(net, tmp_path / "peft", **options)
    path = tmp_path / "out" / "a.safetensors"
    assert main(["lora", "convert", str(tmp_path / "peft"), str(path), "--to", way]) == 0
    torch.testing.assert_close(ours(net, path), want, atol=1e-9, rtol=0)
    if way == "comfy":  # which has the numbers alone: alpha / rank * up @ down, and no header
        tensors, mine = read_tensors(path), copy.deepcopy(net)
        with torch.no_grad():
            for name in sorted(k.removesuffix(".alpha") for k in tensors if k.endswith(".alpha")):
                down, up = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
                layer = mine.get_submodule(name.removeprefix("diffusion_model."))
                layer.weight += float(tensors[f"{name}.alpha"]) / len(down) * up @ down
            torch.testing.assert_close(mine(X), want, atol=1e-9, rtol=0)


def test_a_layer_whose_name_ends_anothers_keeps_its_own_strength(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    alphas = {"to_out": 3.0, "a.to_out": 7.0, "b.to_out": 7.0, "c.x": 7.0}
    made = {
        name: LoRA(torch.randn(2, 4, generator=rng), torch.randn(4, 2, generator=rng), alpha)
        for name, alpha in alphas.items()
    }
    lora_keys.write(tmp_path / "a.safetensors", made)
    assert {name: pair.alpha for name, pair in lora_keys.read(tmp_path / "a.safetensors").items()} == alphas


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bias": "all"}, "'bias' is 'all'"),
        ({"bias": "lora_only"}, "'bias' is 'lora_only'"),
        ({"modules_to_save": ["to_out"], "target_modules": ["img_qkv"]}, "'modules_to_save' is set"),
        ({"init_lora_weights": "olora"}, "'init_lora_weights' is 'olora'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'init_lora_weights' is 'pissa_niter_4'"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(
    options: dict[str, Any], words: str, net: Net, tmp_path: Path
) -> None:
    trained(net.float(), tmp_path / "peft", **options)
    with pytest.raises(CheckpointError, match=words) as error:
        ours(net, tmp_path / "peft")
    assert "\n" not in str(error.value)


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (config | fields).items() if v != "gone"}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "its config says that there is a magnitude, and no layer has one"),
        ({"lora_bias": True}, "its config says that there is a bias, and no layer has one"),
        ({"trainable_token_indices": [1]}, "'trainable_token_indices' is set"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication' is set"),
        ({"use_qalora": True}, "'use_qalora' is set"),
        ({"use_something_new": 3}, "'use_something_new' is set: which this Lens does not know"),
        ({"peft_type": "LOKR"}, "is a LoRA, and adapter_config.json beside it says LoKr"),
        ({"peft_type": "OFT"}, "is an adapter of the kind 'OFT'; LORA, LOHA, LOKR are read"),
        ({"peft_type": ["LORA"]}, "is an adapter of the kind"),
        ({"r": 8}, "has the rank 4, and adapter_config.json beside it says 8"),
        ({"rank_pattern": {"to_out": 5}}, "has the rank 4, and adapter_config.json beside it says 5"),
        ({"lora_alpha": "many"}, "cannot be read"),
        ({"lora_alpha": True}, "cannot be read"),
        ({"lora_alpha": "nan"}, "'nan' is not finite"),
        ({"lora_alpha": float("nan")}, "NaN is no number"),
        ({"alpha_pattern": [1]}, "cannot be read"),
        ({"alpha_pattern": {"[": 1}}, "is no regular expression"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "is too intricate"),
        ({"alpha_pattern": {"a" * 1000: 1}}, "is too intricate"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_meant_is_one_line(
    fields: dict[str, Any], words: str, net: Net, tmp_path: Path
) -> None:
    trained(net, tmp_path / "peft")
    change(tmp_path / "peft", **fields)
    with pytest.raises(CheckpointError, match=words) as error:
        ours(net, tmp_path / "peft")
    assert "\n" not in str(error.value)


def test_fields_that_are_left_out_have_pefts_defaults(net: Net, tmp_path: Path) -> None:
    want = trained(net, tmp_path / "peft", r=8, lora_alpha=8)
    change(tmp_path / "peft", r="gone", lora_alpha="gone", alpha_pattern="gone", rank_pattern=None)
    torch.testing.assert_close(ours(net, tmp_path / "peft"), want, atol=1e-9, rtol=0)


def test_the_hardest_pattern_that_is_read_takes_no_time(net: Net, tmp_path: Path) -> None:
    trained(net, tmp_path / "peft")
    change(tmp_path / "peft", alpha_pattern={f".*.*.*{n}x": 1 for n in range(50)})
    begun = time.perf_counter()
    lora.read(tmp_path / "peft", net)
    assert time.perf_counter() - begun < 5


def test_a_config_beside_a_file_that_says_its_own_alpha_is_another_files(net: Net, tmp_path: Path) -> None:
    want = trained(net, tmp_path / "peft")
    pairs = lora_keys.read(tmp_path / "peft")
    for way in lora_keys.KEY_FORMATS:
        lora_keys.write(tmp_path / "peft" / f"{way}.safetensors", pairs, way)
    change(tmp_path / "peft", lora_alpha=1000)
    for way in lora_keys.KEY_FORMATS:
        torch.testing.assert_close(ours(net, tmp_path / "peft" / f"{way}.safetensors"), want, atol=1e-9, rtol=0)


def test_diffusers_header_means_what_it_means_to_peft(net: Net, tmp_path: Path) -> None:
    want = trained(net, tmp_path / "peft", use_rslora=True, alpha_pattern={"to_out": 3})
    tensors = {
        f"transformer.{k.removeprefix('base_model.model.')}": v
        for k, v in read_tensors(tmp_path / "peft" / "adapter_model.safetensors").items()
    }
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    header = {f"transformer.{k}": v for k, v in config.items()} | {"text_encoder.lora_alpha": 1000}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_tensors(path, tensors, {"lora_adapter_metadata": json.dumps(header)})
    torch.testing.assert_close(ours(net, tmp_path), want, atol=1e-9, rtol=0)


def test_an_alpha_that_is_dynamic_is_each_layers_own(net: Net, tmp_path: Path) -> None:
    want = trained(net, tmp_path / "peft", alpha_pattern={"to_out": 3})
    path = tmp_path / "a.safetensors"
    lora_keys.write(path, lora_keys.read(tmp_path / "peft"), "sd-scripts")
    tensors = read_tensors(path)
    save_tensors(path, tensors, {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"})
    torch.testing.assert_close(ours(net, path), want, atol=1e-9, rtol=0)
    del tensors["lora_unet_to_out.alpha"]
    save_tensors(path, tensors, {"ss_network_alpha": "Dynamic"})
    with pytest.raises(CheckpointError, match="its alpha is 'Dynamic', which is no number, and 'to_out' has none"):
        ours(net, path)


def test_a_folder_without_a_lora_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither pytorch_lora_weights.* nor adapter_model\.safetensors"):
        lora_keys.read(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        lora_keys.read(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    (tmp_path / "style.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"name the file: style\.safetensors"):
        lora_keys.read(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(CheckpointError, match="name the file that is meant"):
        lora_keys.read(tmp_path)
