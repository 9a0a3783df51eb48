"""Everything that starts, divides and uses a Ray cluster."""
