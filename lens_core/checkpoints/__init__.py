"""Read and write weights on disk and on the Hub: tensors, `lens.json`, quantised formats, LoRA keys, model cards."""
