"""Data: the shard schema, image transforms, streams, and converters from raw data sets."""
