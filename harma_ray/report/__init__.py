"""How evaluations and runs are shown: pictures, figures, pages."""
