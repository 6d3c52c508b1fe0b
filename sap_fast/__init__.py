"""Safety-Aware Probing (arXiv:2505.16737) as a PyTorch optimizer."""
