"""Train models: the one loop, one optimizer step, several processes, checkpoints and evaluation during a run."""
