"""What a search has found, as figures and a page."""
