"""The backbones, in Flax NNX, over explicit spans."""
