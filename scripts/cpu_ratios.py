"""A guided step on a CPU, at full width and reduced depth: the plain port, Lens, and diffusers' QwenImage.

    python scripts/cpu_ratios.py --output docs/results/cpu/ratios.json

All three run in one process, in turn, in bfloat16, each in its own way: the port pads the empty negative and masks it,
Lens attends to no padding, and QwenImage's transformer, of the same width, heads and number of blocks, is called once
for each branch as its pipeline calls it, with one token for an empty negative.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cyclopts
import torch
from diffusers import QwenImageTransformer2DModel
from lens_gpt_oss.encoder import GptOssEncoder
from lens_shapes.benchmark import ShapesBenchmark
from lens_tools.gpu_latency import random_backbone, random_text, randomise
from lens_tools.plain_port import PlainPort, guided_batch
from lens_tools.timing import distance, figures, in_turn, ratio
from torch import Tensor
from transformers import DynamicCache

from lens_core import Catalog, LensPipeline, flow
from lens_core.inference.guidance import guided_velocity

SCALE = 4.0


@torch.no_grad()
def main(
    *,
    sizes: tuple[int, ...] = (256, 512),
    blocks: int = 2,
    tokens: int = 60,
    repeats: int = 5,
    threads: int = 1,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Parameters

    sizes: pixels of the sides. tokens: of the prompt. repeats: rounds after the warm-up; medians are of these.
    """
    torch.set_num_threads(threads)
    cpu, rng = torch.device("cpu"), torch.Generator().manual_seed(seed)
    net: Any = random_backbone(Catalog.installed(), cpu, False, rng, num_layers=blocks)
    net = net.eval().requires_grad_(False)
    channels, layers, width = net.takes()
    heads, head = net.config.num_attention_heads, net.config.attention_head_dim
    rival = QwenImageTransformer2DModel(
        in_channels=channels, out_channels=channels, patch_size=1, num_layers=blocks, num_attention_heads=heads,
        attention_head_dim=head, joint_attention_dim=width, axes_dims_rope=tuple(net.config.axes_dims_rope),
    )  # fmt: skip
    randomise(rival, rng)
    rival = rival.to(torch.bfloat16).eval()
    text = random_text(1, layers, tokens, width, cpu, rng)
    exact = ways_of(net, rival, torch.randn(1, channels, 8, 8, generator=rng), text)
    agreement = distance(exact["lens"](), exact["port"]())
    assert agreement < 1e-5, f"in float32 the port and Lens differ by {agreement} of the velocity"
    net = net.to(torch.bfloat16)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {threads} threads",
        "torch": torch.__version__,
        "blocks": blocks,
        "tokens": tokens,
        "parameters": {"lens": count(net), "qwenimage": count(rival)},
        "lens_from_port_in_float32": agreement,
        "sizes": {},
    }
    for size in sizes:
        x = torch.randn(1, channels, size // 16, size // 16, generator=rng).to(torch.bfloat16)
        ways = ways_of(net, rival, x, text)
        rounds = in_turn(ways, cpu, repeats)
        record = {
            "seconds": {name: figures(values) for name, values in rounds.items()},
            "port_over_lens": ratio(rounds["port"], rounds["lens"]),
            "qwenimage_over_lens": ratio(rounds["qwenimage"], rounds["lens"]),
        }
        result["sizes"][f"{size}x{size}"] = record
        print(size, json.dumps({key: record[key] for key in ("port_over_lens", "qwenimage_over_lens")}))
    result["encoder"] = prefix_ratios(repeats, seed)
    for kind, record in result["encoder"].items():
        print(f"encoder, {kind} prompts:", json.dumps(record["plain_over_lens"]))
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")


def ways_of(net: Any, rival: Any, x: Tensor, text: Any) -> Mapping[str, Callable[[], Tensor]]:
    """One guided step each -> the velocity."""
    t = flow.at(0.7, x)
    h, w = x.shape[-2:]
    sequence = x.flatten(2).transpose(1, 2)

    def port() -> Tensor:
        uncond, cond = PlainPort(net)(*guided_batch(x, t, text)).chunk(2)
        return flow.guide(cond, uncond, SCALE)

    def lens() -> Tensor:
        with net.precomputed(torch.tensor([0.7])):
            return guided_velocity(net, text, None, SCALE)(x, t)

    def qwenimage() -> Tensor:
        features = text.features[:, 0].to(x.dtype)
        cond, uncond = (
            rival(
                sequence, words, words.new_ones(words.shape[:2], dtype=torch.bool), t, [[(1, h, w)]], return_dict=False
            )[0]
            for words in (features, features[:, :1])
        )
        return flow.guide(cond, uncond, SCALE)

    return {"port": port, "lens": lens, "qwenimage": qwenimage}


def prefix_ratios(repeats: int, seed: int) -> dict[str, Any]:
    """How much faster prompts are encoded where the conversation before them is computed once: 16 of each kind, with a
    GPT-OSS of four layers, an eighth of the published width and as many experts a token."""
    torch.manual_seed(seed)
    encoder: Any = GptOssEncoder(
        GptOssEncoder.Config(
            vocab_size=1024, hidden_size=384, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, head_dim=48, num_local_experts=8, num_experts_per_tok=4, selected_layers=(3,),
            max_length=512,
        )
    )  # fmt: skip
    encoder.tokenizer = LensPipeline.from_pretrained("tiny:", parts=("text_encoder",)).text_encoder.tokenizer
    encoder.eval().requires_grad_(False)
    head, records = encoder.head_length, {}
    for kind, dense_prompts in (("brief", False), ("dense", True)):
        questions = ShapesBenchmark(ShapesBenchmark.Config(prompts=16, dense_prompts=dense_prompts, largest=True))
        ids, mask = encoder.rendered([prompt.text for prompt in questions.prompts()])
        valid = mask[:, head:, None]

        def plain(ids: Tensor = ids, valid: Tensor = valid) -> Tensor:
            features: Tensor = encoder._run_layers(ids, DynamicCache())[0]
            return features[:, head:] * valid

        def lens(ids: Tensor = ids, mask: Tensor = mask) -> Tensor:
            features: Tensor = encoder.encode_ids(ids[:, head:], mask[:, head:]).features
            return features[:, 0]

        assert distance(lens(), plain()) < 1e-4
        rounds = in_turn({"plain": plain, "lens": lens}, torch.device("cpu"), repeats)
        records[kind] = {
            "tokens": {"before": head, "prompt": ids.shape[1] - head},
            "seconds": {name: figures(values) for name, values in rounds.items()},
            "plain_over_lens": ratio(rounds["plain"], rounds["lens"]),
        }
    return records


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


if __name__ == "__main__":
    cyclopts.run(main)
