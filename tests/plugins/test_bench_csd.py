"""CSD's weights, converted, give the style embedding of OpenAI's vision transformer written down anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lens_bench.commands import csd as command
from lens_bench.perceive import csd
from lens_bench.perceive.style import ClipStyle
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from lens_core.types import CheckpointError

WIDTH, LAYERS, PATCH, GRID, INNER = 128, 2, 8, 4, 96  # two heads


def weights() -> dict[str, Tensor]:
    """Random tensors by CSD's names."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    made = {
        "backbone.class_embedding": draw(WIDTH),
        "backbone.positional_embedding": draw(GRID**2 + 1, WIDTH),
        "backbone.conv1.weight": draw(WIDTH, 3, PATCH, PATCH),
        "last_layer_style": draw(WIDTH, 20),
        "last_layer_content": draw(WIDTH, 20),
    }
    for i in range(LAYERS):
        block = f"backbone.transformer.resblocks.{i}"
        shapes = {
            "attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,),
            "attn.out_proj.weight": (WIDTH, WIDTH), "attn.out_proj.bias": (WIDTH,),
            "mlp.c_fc.weight": (INNER, WIDTH), "mlp.c_fc.bias": (INNER,),
            "mlp.c_proj.weight": (WIDTH, INNER), "mlp.c_proj.bias": (WIDTH,),
        }  # fmt: skip
        made |= {f"{block}.{name}": draw(*shape) for name, shape in shapes.items()}
        made |= {f"{block}.{norm}.{part}": draw(WIDTH) + 1 for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    made |= {
        f"backbone.{norm}.{part}": draw(WIDTH) + 1 for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")
    }
    return {f"module.{name}": tensor for name, tensor in made.items()}


def style(tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """CSD's style embedding: OpenAI's ViT without its projection, times `last_layer_style`, in float64."""
    w = {name.removeprefix("module."): tensor.double() for name, tensor in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.conv2d(pixels.double(), w["backbone.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    first = w["backbone.class_embedding"].expand(len(x), 1, -1)
    x = norm(torch.cat([first, x], 1) + w["backbone.positional_embedding"], "backbone.ln_pre")
    for i in range(LAYERS):
        block = f"backbone.transformer.resblocks.{i}"
        attention = torch.nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True).double()
        attention.load_state_dict({k.split(".attn.")[1]: v for k, v in w.items() if k.startswith(f"{block}.attn.")})
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, need_weights=False)[0]
        y = norm(x, f"{block}.ln_2") @ w[f"{block}.mlp.c_fc.weight"].T + w[f"{block}.mlp.c_fc.bias"]
        x = x + (y * torch.sigmoid(1.702 * y)) @ w[f"{block}.mlp.c_proj.weight"].T + w[f"{block}.mlp.c_proj.bias"]
    return F.normalize(norm(x[:, 0], "backbone.ln_post") @ w["last_layer_style"], dim=-1)


def test_converted_weights_give_csds_style_embedding(tmp_path: Path) -> None:
    from lens_bench.perceive import clip

    tensors = weights()
    save_file(tensors, tmp_path / "csd.safetensors")
    assert command(tmp_path / "csd.safetensors", output=tmp_path / "csd") == 0
    save_file({"cubism": torch.ones(1, 20)}, tmp_path / "references.safetensors")
    perceiver = ClipStyle(
        ClipStyle.Config(str(tmp_path / "csd"), str(tmp_path / "references.safetensors"), device="cpu")
    )
    pictures = [Image.new("RGB", (40, 36), color) for color in ("red", "teal")]
    pixels = torch.stack([torch.from_numpy(clip.preprocess(p, GRID * PATCH).copy()) for p in pictures])
    torch.testing.assert_close(perceiver.embed(pictures).double(), style(tensors, pixels), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module.last_layer_style": None}, "is not the whole of CSD .*visual_projection"),
        ({"module.backbone.ln_post.bias": None}, "is not the whole of CSD .*post_layernorm"),
        ({"module.backbone.ln_post.bias": torch.ones(3)}, "is not the whole of CSD"),
        ({"module.head.weight": torch.ones(3)}, r"module\.head\.weight: is no tensor of CSD"),
    ],
)  # fmt: skip
def test_what_is_not_the_whole_of_csd_is_refused(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {name: tensor for name, tensor in {**weights(), **change}.items() if tensor is not None}
    save_file(tensors, tmp_path / "csd.safetensors")
    with pytest.raises(CheckpointError, match=message):
        csd.convert(tmp_path / "csd.safetensors", tmp_path / "csd")
    assert not (tmp_path / "csd").exists()


def test_the_published_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth").write_bytes(b"PK\x03\x04archive")
    with pytest.raises(CheckpointError, match="is a pickle, which can run code"):
        csd.convert(tmp_path / "checkpoint.pth", tmp_path / "csd")
