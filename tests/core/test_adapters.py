"""LoHa, LoKr, DoRA and LoRA with a bias: as strong as in LyCORIS and PEFT, taken out bit for bit, refused by name."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import CASES
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lens_core.checkpoints import lora_keys
from lens_core.checkpoints.adapters import Adapter, LoHa, LoKr, LoRA
from lens_core.checkpoints.tensor_files import read_tensors, save_tensors
from lens_core.cli.main import main
from lens_core.inference import lora
from lens_core.inference.lora import LoRAStack
from lens_core.types import CheckpointError, LensError

X = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"img_qkv": nn.Linear(12, 18), "to_out": nn.Linear(18, 12)})])
        self.last = nn.Linear(12, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["to_out"](torch.tanh(block["img_qkv"](x)))
        return self.last(x)


NAMES = ("blocks.0.img_qkv", "blocks.0.to_out", "last")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double().requires_grad_(False)


@torch.no_grad()
def ours(net: Net, path: Path, weight: float = 1.0) -> Tensor:
    mine = copy.deepcopy(net)
    lora.fold(mine, lora.read(path, mine), weight, {})
    return mine(X.to(mine.last.weight.dtype))


def randomised(module: nn.Module) -> None:
    """Random values in all that learns, far from where an adapter begins; lengths stay near those of rows."""
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if any(mark in name for mark in ("lora_magnitude", "dora_scale")):
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            nn.init.normal_(parameter, std=0.4)


# ---- LyCORIS ------------------------------------------------------------------------------------------------------

ALGORITHMS: dict[str, dict[str, Any]] = {
    "lokr": {"algo": "lokr", "factor": 3},
    "lokr, both in two": {"algo": "lokr", "factor": 6, "decompose_both": True, "linear_dim": 1},
    "lokr, both whole": {"algo": "lokr", "factor": 3, "linear_dim": 100000},
    "lokr, the larger first": {"algo": "lokr", "factor": 3, "unbalanced_factorization": True},
    "lokr, root of the rank": {"algo": "lokr", "factor": 3, "rs_lora": True},
    "loha": {"algo": "loha"},
    "loha, root of the rank": {"algo": "loha", "rs_lora": True},
    "lora": {"algo": "lora"},
    "lora, dora": {"algo": "lora", "dora_wd": True},
    "lora, dora of columns": {"algo": "lora", "dora_wd": True, "wd_on_out": False},
    "loha, dora": {"algo": "loha", "dora_wd": True},
    "lokr, dora": {"algo": "lokr", "factor": 3, "dora_wd": True},
}


def lycoris(net: Net, path: Path, options: dict[str, Any], dots: bool = False) -> Tensor:
    """Save a network of LyCORIS with random weights; what its own forward gives."""
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset({"target_module": ["Net"], "target_name": []})
    theirs = copy.deepcopy(net)
    made = create_lycoris(theirs, 1.0, **({"linear_dim": 2, "linear_alpha": 3.0} | options))
    made.apply_to()
    made.double()
    assert len(made.loras) == 3
    randomised(made)
    state = {key: value.detach().contiguous() for key, value in made.state_dict().items()}
    if dots:  # as Comfy and ai-toolkit name layers
        flat = {f"lycoris_{name.replace('.', '_')}": f"diffusion_model.{name}" for name in NAMES}
        state = {flat[key.partition(".")[0]] + "." + key.partition(".")[2]: v for key, v in state.items()}
    save_tensors(path, state)
    with torch.no_grad():
        return theirs(X)


@pytest.mark.parametrize("options", ALGORITHMS.values(), ids=list(ALGORITHMS))
def test_it_is_as_strong_as_in_lycoris(options: dict[str, Any], net: Net, tmp_path: Path) -> None:
    want = lycoris(net, tmp_path / "a.safetensors", options)
    assert float((want - net(X)).abs().max()) > 0.05
    # LyCORIS adds 1e-16 to a norm, and keeps DoRA's lengths in float32.
    tolerance = 1e-5 if "dora_wd" in options else 1e-9
    torch.testing.assert_close(ours(net, tmp_path / "a.safetensors"), want, atol=tolerance, rtol=0)
    lycoris(net, tmp_path / "b.safetensors", options, dots=True)
    assert torch.equal(ours(net, tmp_path / "b.safetensors"), ours(net, tmp_path / "a.safetensors"))


# ---- PEFT ---------------------------------------------------------------------------------------------------------

TARGETS = {"target_modules": ["img_qkv", "to_out"]}
CONFIGS: dict[str, Any] = {
    "loha": LoHaConfig(r=3, alpha=5, **TARGETS),
    "loha of several ranks": LoHaConfig(
        r=3, alpha=5, rank_pattern={"to_out": 2}, alpha_pattern={"img_qkv": 9}, **TARGETS
    ),
    "lokr": LoKrConfig(r=2, alpha=5, decompose_factor=3, **TARGETS),
    "lokr, both whole": LoKrConfig(r=16, alpha=5, **TARGETS),
    "lokr, both in two": LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=6, **TARGETS),
    "dora": LoraConfig(r=3, lora_alpha=5, use_dora=True, **TARGETS),
    "dora, root of the rank": LoraConfig(r=3, lora_alpha=5, use_dora=True, use_rslora=True, **TARGETS),
    "bias": LoraConfig(r=3, lora_alpha=5, lora_bias=True, **TARGETS),
}  # fmt: skip


def peft(net: Net, folder: Path, config: Any) -> Tensor:
    """Save a PEFT model with random weights; what its forward gives when PEFT reads that again."""
    model = get_peft_model(copy.deepcopy(net), copy.deepcopy(config))
    randomised(model)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        output: Tensor = PeftModel.from_pretrained(copy.deepcopy(net), str(folder)).merge_and_unload()(X)
    return output


@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor")  # of a bias, which PEFT takes for half a pair
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_it_is_as_strong_as_in_peft(config: Any, net: Net, tmp_path: Path) -> None:
    want = peft(net, tmp_path, config)
    assert float((want - net(X)).abs().max()) > 0.05
    # PEFT holds LoHa's scale in float32.
    tolerance = 1e-7 if isinstance(config, LoHaConfig) else 1e-9
    torch.testing.assert_close(ours(net, tmp_path), want, atol=tolerance, rtol=0)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("way", lora_keys.KEY_FORMATS)
def test_in_another_key_format_it_is_as_strong_or_refused(way: str, config: Any, net: Net, tmp_path: Path) -> None:
    peft(net, tmp_path / "peft", config)
    out = tmp_path / "out.safetensors"
    code = main(["lora", "convert", str(tmp_path / "peft"), str(out), "--to", way])
    unread = way == "diffusers" and not isinstance(config, LoraConfig)
    no_key = way != "diffusers" and getattr(config, "lora_bias", False)
    whole = way != "diffusers" and getattr(config, "r", 0) == 16
    assert code == (2 if unread or no_key or whole else 0)
    if code == 0:
        assert torch.equal(ours(net, out), ours(net, tmp_path / "peft"))


# ---- folding ------------------------------------------------------------------------------------------------------


def made(kind: str, name: str = "blocks.0.img_qkv", seed: int = 0) -> dict[str, Adapter]:
    out, inner = {"blocks.0.img_qkv": (18, 12), "blocks.0.to_out": (12, 18), "last": (6, 12)}[name]
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=rng)

    more: dict[str, Any] = {"magnitude": 1 + draw(out)} if "DoRA" in kind else {}
    more |= {"magnitude": 1 + draw(1, inner)} if "columns" in kind else {}
    more |= {"bias": draw(out)} if "bias" in kind else {}
    if "LoHa" in kind:
        return {name: LoHa((draw(out, 2), draw(2, inner)), (draw(out, 2), draw(2, inner)), 3.0, **more)}
    if "LoKr" in kind:
        return {name: LoKr((draw(3, 2),), (draw(out // 3, 2), draw(2, inner // 2)), 3.0, 2, **more)}
    return {name: LoRA(draw(2, inner), draw(out, 2), 3.0, **more)}


KINDS = ["LoRA", "LoHa", "LoKr", "LoRA DoRA", "LoRA columns", "LoKr DoRA", "LoRA bias", "LoRA DoRA bias"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_taken_out_bit_for_bit(kind: str, dtype: torch.dtype, net: Net, tmp_path: Path) -> None:
    net = net.to(dtype)
    before = copy.deepcopy(net.state_dict())
    file = tmp_path / "a.safetensors"
    lora_keys.write(file, made(kind), "diffusers" if "bias" in kind else "comfy")
    stack = LoRAStack()
    stack.add(net, file, 0.7, "one")
    stack.add(net, file, -0.4, "two")
    assert not torch.equal(net.state_dict()["blocks.0.img_qkv.weight"], before["blocks.0.img_qkv.weight"])
    stack.reweight(net, {"two": 0.5})
    stack.remove(net)
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("change", ["add", "reweight", "remove"])
def test_an_interrupted_change_leaves_the_loras_that_were_in(
    change: str, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, stack, layers = tmp_path / "a.safetensors", LoRAStack(), []
    lora_keys.write(file, made("LoRA") | made("LoRA", "last"), "comfy")
    stack.add(net, file, 0.7, "one")
    before, names = copy.deepcopy(net.state_dict()), stack.names
    owner, name = (lora.Original, "restore") if change == "remove" else (lora, "_add")
    step = getattr(owner, name)

    def interrupted(*arguments: Any) -> None:
        layers.append(arguments)
        if len(layers) == 2:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        {"add": lambda: stack.add(net, file, 0.2), "reweight": lambda: stack.reweight(net, {"one": 0.1})}.get(
            change, lambda: stack.remove(net)
        )()
    assert stack.names == names and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    stack.remove(net)
    assert stack.names == [] and not torch.equal(net.last.weight, before["last.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_scale_a_change_and_changes_add_up_in_any_order(kind: str, net: Net) -> None:
    one, two = made(kind), made("LoRA DoRA", seed=5)

    @torch.no_grad()
    def folded(*parts: tuple[dict[str, Adapter], float]) -> Tensor:
        mine, originals = copy.deepcopy(net), {}
        for changes, weight in parts:
            lora.fold(mine, changes, weight, originals)
        return torch.cat([mine.blocks[0]["img_qkv"].weight, mine.blocks[0]["img_qkv"].bias[:, None]], dim=1)

    plain = folded()
    full, other = folded((one, 1.0)) - plain, folded((two, 1.0)) - plain
    torch.testing.assert_close(folded((one, 0.5)), plain + 0.5 * full)
    torch.testing.assert_close(folded((one, 0.5), (two, 2.0)), plain + 0.5 * full + 2 * other)
    torch.testing.assert_close(folded((two, 2.0), (one, 0.5)), folded((one, 0.5), (two, 2.0)))


def test_dora_gives_rows_or_columns_the_stored_lengths(net: Net) -> None:
    for kind, dim in (("LoRA DoRA", 1), ("LoRA columns", 0)):
        mine, changes = copy.deepcopy(net), made(kind)
        lora.fold(mine, changes, 1.0, {})
        lengths = mine.blocks[0]["img_qkv"].weight.norm(dim=dim)
        magnitude = changes["blocks.0.img_qkv"].magnitude
        assert magnitude is not None
        torch.testing.assert_close(lengths, magnitude.flatten().double().abs())


def test_a_row_of_zeros_stays_one() -> None:
    zero = LoRA(torch.zeros(1, 3), torch.zeros(2, 1), 1.0, magnitude=torch.ones(2))
    weight = torch.tensor([[0.0, 0, 0], [3, 0, 4]])
    torch.testing.assert_close(weight + zero.delta(weight), torch.tensor([[0.0, 0, 0], [0.6, 0, 0.8]]))


@pytest.mark.parametrize("way", ["comfy", "sd-scripts"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "bias" not in kind])
def test_a_round_through_a_file_is_bit_exact(kind: str, way: str, tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in range(2)]
    lora_keys.write(files[0], made(kind), way)
    again = lora_keys.read(files[0])
    lora_keys.write(files[1], again, way)
    (one,), (two,) = made(kind).values(), again.values()
    assert files[0].read_bytes() == files[1].read_bytes() and one.alpha == two.alpha and one.scale == two.scale
    assert torch.equal(one.delta(torch.ones(18, 12)), two.delta(torch.ones(18, 12)))


# ---- what cannot be meant -----------------------------------------------------------------------------------------

LOKR = {"x.lokr_w1": torch.ones(2, 3), "x.lokr_w2": torch.ones(3, 2)}
LOHA = {f"x.hada_w{n}_{side}": torch.ones((6, 2) if side == "a" else (2, 6)) for n in (1, 2) for side in "ab"}
PLAIN = {"x.lora_A.weight": torch.ones(2, 6), "x.lora_B.weight": torch.ones(6, 2)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({**LOKR, "x.lokr_w2": torch.ones(2, 2)}, r"x is \[6, 6\] here, but \[2, 2\] x \[2, 3\] in the file"),
        ({**LOKR, "x.lokr_w1": torch.ones(2, 3, 1, 1)}, r"is \[2, 3, 1, 1\], which is no product"),
        ({"x.lokr_w1": torch.ones(2, 3)}, "has lokr_w1, of which no lokr_w2 can be made"),
        ({**LOKR, "x.lokr_w2_a": torch.ones(3, 1)}, "of which no lokr_w2 can be made"),
        ({"x.lokr_w1": torch.ones(2, 3), "x.lokr_w2_a": torch.ones(3, 1)}, "of which no lokr_w2 can be made"),
        (
            {"x.lokr_w1": torch.ones(2, 3), "x.lokr_w2_a": torch.ones(3, 1), "x.lokr_w2_b": torch.ones(2, 2)},
            r"is \[3, 1\] x \[2, 2\], which is no product",
        ),
        (
            {
                "x.lokr_w1_a": torch.ones(2, 1),
                "x.lokr_w1_b": torch.ones(1, 3),
                "x.lokr_w2_a": torch.ones(3, 2),
                "x.lokr_w2_b": torch.ones(2, 2),
            },
            "has factors of the ranks 1 and 2",
        ),
        ({**LOKR, "x.lokr_t2": torch.ones(2, 2, 3, 3)}, "Tucker's form, which linear layers do not have"),
        ({**LOHA, "x.hada_t1": torch.ones(2, 2, 3, 3)}, "Tucker's form"),
        ({k: v for k, v in LOHA.items() if "w2_b" not in k}, "has only its hada_w1_a, hada_w1_b, hada_w2_a"),
        ({**LOHA, "x.hada_w2_a": torch.ones(5, 2)}, "times .* which do not fit"),
        ({**LOHA, "x.hada_w2_a": torch.ones(6, 3), "x.hada_w2_b": torch.ones(3, 6)}, "which do not fit"),
        ({**LOHA, **PLAIN}, "which are not one adapter's"),
        ({**LOHA, "x.hada_w1_a": torch.ones(6, 2).int()}, r"torch\.int32.* which are no plain weights"),
        ({**LOKR, "x.lokr_w1": torch.full((2, 3), torch.nan)}, "numbers that are not finite"),
        ({"x.dora_scale": torch.ones(6, 1)}, "has magnitude, which are not one adapter's"),
        ({**PLAIN, "x.dora_scale": torch.ones(6, 1), "x.lora_magnitude_vector": torch.ones(6)}, "'x' twice"),
        ({**PLAIN, "x.dora_scale": torch.ones(1, 1, 6)}, r"DoRA lengths of the shape \[1, 1, 6\]"),
        (
            {**PLAIN, "x.lora_magnitude_vector.weight": torch.ones(7)},
            r"lengths of the shape \[7\]; a layer of \[6, 6\]",
        ),
        ({**PLAIN, "x.dora_scale": torch.full((6, 1), torch.inf)}, "numbers that are not finite"),
        ({**PLAIN, "x.lora_B.bias": torch.ones(5)}, r"a bias of the shape \[5\] for 6 outputs"),
        ({**PLAIN, "x.lora_A.bias": torch.ones(2)}, "1 of 3 tensors fit no layer"),
        ({**PLAIN, "x.lora_B.bias": torch.ones(6)}, "x has no bias here, and one in the file"),
    ],
)
def test_parts_that_do_not_fit_are_named(tensors: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    save_tensors(tmp_path / "a.safetensors", tensors)
    net = nn.ModuleDict({"x": nn.Linear(6, 6, bias=False)})
    with pytest.raises(CheckpointError, match=words) as caught:
        lora.read(tmp_path / "a.safetensors", net)
    assert "\n" not in str(caught.value)


def test_lengths_of_the_wrong_axis_are_refused(tmp_path: Path) -> None:
    tensors = {"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(6, 2)}
    net = nn.ModuleDict({"x": nn.Linear(4, 6)})
    for shape in ((1, 6), (4, 1), (4,)):
        save_tensors(tmp_path / "a.safetensors", tensors | {"x.dora_scale": torch.ones(shape)})
        with pytest.raises(CheckpointError, match=r"a layer of \[6, 4\] has 6 of its rows, or \[1, 4\] of its columns"):
            lora.read(tmp_path / "a.safetensors", net)


def test_factors_of_another_layer_cost_no_memory(tmp_path: Path) -> None:
    tensors = {"x.lokr_w1": torch.ones(4000, 100), "x.lokr_w2": torch.ones(4000, 100)}  # a product of 640 GB
    save_tensors(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"x is \[6, 6\] here"):
        lora.read(tmp_path / "a.safetensors", nn.ModuleDict({"x": nn.Linear(6, 6)}))


def test_broken_files_are_folded_or_refused(tmp_path: Path) -> None:
    rng, path, ended = random.Random(0), tmp_path / "a.safetensors", {"folded": 0, "refused": 0}
    torch.manual_seed(0)
    net = Net()
    for case in range(CASES or 150):
        kind = rng.choice(KINDS)
        way = "diffusers" if "bias" in kind else rng.choice(["comfy", "sd-scripts"])
        lora_keys.write(path, made(kind, rng.choice(NAMES[:2]), case), way)
        if rng.random() < 0.5:  # tensors that are cut, of another type, or missing
            tensors = read_tensors(path)
            name = rng.choice(sorted(tensors))
            value = tensors.pop(name)
            change = rng.choice(["gone", "cut", "flat", "type", "name", "none"])
            if change != "gone":
                value = (
                    {"cut": value[:1], "flat": value.flatten(), "type": value.int(), "none": value[:0]}.get(
                        change, value
                    )
                    if value.ndim
                    else value
                )
                tensors[name.replace("w1", "w2") if change == "name" else name] = value.contiguous()
            save_tensors(path, tensors)
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice((0, 0, 1, 3))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        try:
            lora.fold(net, lora.read(path, net), 1.0, kept := {})
            lora.unfold(net, kept)
            ended["folded"] += 1
        except LensError as error:
            ended["refused"] += 1
            message = str(error)
            if "\n" in message:
                pytest.fail(message)
    assert min(ended.values()) > (CASES or 150) / 10, ended
