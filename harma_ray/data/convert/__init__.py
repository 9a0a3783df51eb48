"""Converters from raw data sets to Parquet shards."""
