"""First-party parts together: a checkpoint is the published folder layout, read with or without `lens.json`."""

from __future__ import annotations

from pathlib import Path

import torch
from lens_gpt_oss.template import train_tokenizer

from lens_core.catalog import Catalog
from lens_core.inference.pipeline import LensPipeline
from lens_core.recipe import ComponentSpec, PipelineSpec

VAE = {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
ENCODER = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "selected_layers": (5, 11, 17, 23),  # the published ones: without lens.json nothing else says them
}
BACKBONE = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "enc_hidden_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "selected_layer_index": (5, 11, 17, 23),
}


def test_a_checkpoint_without_lens_json_is_read_by_its_layout(tmp_path: Path) -> None:
    catalog = Catalog.installed()
    torch.manual_seed(0)
    parts = PipelineSpec(
        vae=ComponentSpec("flux2", VAE),
        text_encoder=ComponentSpec("gpt_oss", ENCODER),
        backbone=ComponentSpec("mmdit", BACKBONE),
        sampler=ComponentSpec("euler"),
    )
    pipeline = LensPipeline.from_parts(parts, catalog).to("cpu")
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.backbone):
        part.eval()
    pipeline.text_encoder.tokenizer = train_tokenizer(["A red circle stands left of a blue square."] * 3, 400)
    for parameter in pipeline.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(tmp_path)
    folders = {p.name for p in tmp_path.iterdir()}
    assert folders >= {"vae", "text_encoder", "tokenizer", "transformer", "model_index.json", "lens.json"}

    def draw(model: LensPipeline) -> torch.Tensor:
        drawn: torch.Tensor = model(
            "a red circle", height=32, width=48, seed=0, output_type="latent", num_inference_steps=3, guidance_scale=5.0
        ).images
        return drawn

    expected = draw(pipeline)
    assert torch.equal(draw(LensPipeline.from_pretrained(tmp_path, catalog=catalog, device="cpu")), expected)
    (tmp_path / "lens.json").unlink()
    bare = LensPipeline.from_pretrained(tmp_path, catalog=catalog, device="cpu")
    assert torch.equal(draw(bare), expected)
    assert (bare.presets["steps"], bare.specs["backbone"].use) == (20, "lens_mmdit:mmdit")
