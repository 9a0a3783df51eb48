"""CLIP4Cir: composed image retrieval with CLIP."""
