"""The file that describes a search."""
