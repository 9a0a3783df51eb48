"""Searching for better settings: Ray Tune runs the trials, Optuna proposes them."""
