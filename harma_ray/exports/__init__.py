"""A run's model for other programs: graphs, folders of open_clip and of Hugging Face."""
