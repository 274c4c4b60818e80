"""Weights and training state on disk: Hugging Face folders, Orbax stages, and small backbones made from scratch."""
