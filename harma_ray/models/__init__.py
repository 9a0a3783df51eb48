"""Models: CLIP backbones, the adapters that are inserted into them, and what is built on top."""
