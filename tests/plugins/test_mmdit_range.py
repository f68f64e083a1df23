"""Streams and features of 1e4 and more: bfloat16 holds them; float16 does not, and is refused before any is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lens_mmdit.blocks import Block
from lens_mmdit.rope import rotations
from test_mmdit_model import distance, inputs, model
from torch import Tensor

from lens_core.catalog import Catalog
from lens_core.checkpoints import tensor_files
from lens_core.cli.main import main
from lens_core.inference.pipeline import LensPipeline
from lens_core.types import ConfigError, TextFeatures

LARGE = 1e4


def through_blocks(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both residual streams, which enter as large as `LARGE`, after three blocks with gates of about 100."""
    torch.manual_seed(0)
    blocks = [Block(2, 16) for _ in range(3)]
    for block in blocks:
        for mod in (block.img_mod, block.txt_mod):
            torch.nn.init.normal_(mod[1].weight, std=0.1)
            torch.nn.init.normal_(mod[1].bias, std=100.0)
        block.to(dtype)
    img, txt, time = (torch.randn(1, n, 32) for n in (16, 5, 1))
    img, txt, time = (LARGE * img).to(dtype), (LARGE * txt).to(dtype), time[:, 0].to(dtype)
    by = rotations(4, 4, 5, (4, 6, 6), img.device, torch.complex64)
    with torch.no_grad():
        for block in blocks:
            img, txt = block(img, txt, time, by, None, True)
    return img, txt


def test_residual_streams_that_leave_float16_stay_finite_and_right_in_bfloat16() -> None:
    exact, rounded, short = (through_blocks(d) for d in (torch.float32, torch.bfloat16, torch.float16))
    for want, got, lost in zip(exact, rounded, short, strict=True):
        assert want.abs().max() > torch.finfo(torch.float16).max
        assert got.isfinite().all() and distance(got, want) < 0.05
        assert not lost.isfinite().all()


def test_text_features_beyond_float16_are_read_in_bfloat16() -> None:
    net, (x, t, text) = model(), inputs()
    features = text.features / 100 * LARGE
    features[:, :, 0, :2] = 7 * LARGE  # the first token of a language model's stream has such channels
    assert not features.to(torch.float16).isfinite().all()
    with torch.no_grad():
        want = net(x, t, TextFeatures(features, text.mask))
        got = net.to(torch.bfloat16)(x, t, TextFeatures(features.to(torch.bfloat16), text.mask))
    assert got.isfinite().all() and distance(got, want) < 0.05


@pytest.mark.parametrize("offload", ["auto", "block"])
def test_float16_is_refused_on_load_in_one_line(
    offload: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensor_files, "read_tensors", lambda path: pytest.fail(f"{path} is read"))
    assert main(["generate", "a red circle", "--dtype", "float16", "--device", "cpu", "--offload", offload]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "lens: the backbone's residual streams overflow float16; use bfloat16 or float32\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="overflow float16"):
        LensPipeline.from_pretrained("tiny:", catalog=Catalog.installed(), torch_dtype=torch.float16, device="cpu")
