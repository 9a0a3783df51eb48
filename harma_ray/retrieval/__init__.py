"""What embeddings find: exact ranking, and the protocols that measure it."""
