"""Distributed training, evaluation and search for vision-language models on overhead imagery."""

__version__ = "0.1.0"
