"""Checkpoints on disk and on the Hub: tensors, `lens.json`, quantised layouts, LoRA key formats, model cards."""
