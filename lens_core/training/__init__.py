"""The one training loop: trainer, evaluation during training, distribution, checkpoints, memory estimates."""
