"""InternVL: a vision transformer that is trained through a language model, around transformers' native classes."""
