"""What is hooked into a model: the probe, activation checkpointing, a forward run once for two."""
