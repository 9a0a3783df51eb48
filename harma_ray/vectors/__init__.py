"""Vectors of whole data sets, computed with Ray Data."""
