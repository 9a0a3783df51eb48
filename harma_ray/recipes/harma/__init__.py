"""HarMA: image-text retrieval with adapters in a frozen CLIP."""
