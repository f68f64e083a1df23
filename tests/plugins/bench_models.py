"""Tiny random models on disk, of the classes that the perceivers of lens_bench read."""

from __future__ import annotations

from pathlib import Path

import torch


def mask2former(folder: Path, classes: int = 80, full: bool = False) -> Path:
    """`full`: of the size of the published model, Swin-S."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=stages
    )
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12,
        num_labels=classes,
    )  # fmt: skip
    if full:
        swin = SwinConfig(
            image_size=224, embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], out_features=stages
        )
        config = Mask2FormerConfig(backbone_config=swin, num_labels=classes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
        with torch.no_grad():
            # Random class logits are all alike; these tell classes apart, so that scores are not all about 1/81.
            model.class_predictor.weight.mul_(40)
        model.save_pretrained(folder)
    return folder


def clip(folder: Path, vision_only: bool = False, full: bool = False) -> Path:
    """`full`: of the size of ViT-L/14, but for its vocabulary."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

    characters = sorted(_byte_characters())
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = size | {"image_size": 32, "patch_size": 8, "projection_dim": 12}
    text = size | {
        "vocab_size": len(words), "max_position_embeddings": 77, "projection_dim": 12,
        "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1,
    }  # fmt: skip
    if full:
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        vision |= {"image_size": 224, "patch_size": 14, "projection_dim": 768}
        text |= {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if vision_only:
            CLIPVisionModelWithProjection(CLIPVisionConfig(**vision)).save_pretrained(folder)
            return folder
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=vision["projection_dim"]))
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(8)  # so that embeddings of different things differ
        model.save_pretrained(folder)
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    return folder


def _byte_characters() -> set[str]:
    """The characters that stand for bytes in CLIP's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(b) for b in plain} | {chr(256 + i) for i in range(256 - len(plain))}
