"""The training loop and what it is made of; it knows neither Ray nor any recipe."""
