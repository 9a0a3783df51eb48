"""ViTP: visual-instruction pretraining of a vision transformer, and retrieval of images by image."""
