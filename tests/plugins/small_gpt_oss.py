"""A GPT-OSS encoder small enough for a test, with weights large enough for a wrong wiring to show."""

from __future__ import annotations

import torch
from lens_gpt_oss.encoder import GptOssEncoder
from lens_gpt_oss.template import train_tokenizer

CAPTIONS = [f"A {c} {s} stands left of a small green star." for c in ("red", "blue") for s in ("circle", "square")]
PROMPTS = ["A red circle.", "A blue square stands left of a small green star, and a red circle."]
TINY = GptOssEncoder.Config(
    vocab_size=400,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=16,
    selected_layers=(0, 2),
    max_length=256,
)


def build(config: GptOssEncoder.Config = TINY) -> GptOssEncoder:
    """The same weights every time."""
    torch.manual_seed(0)
    encoder = GptOssEncoder(config).eval()
    encoder.tokenizer = train_tokenizer(CAPTIONS, config.vocab_size)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder
