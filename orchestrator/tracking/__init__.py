"""MLflow: what a sweep, an evaluation and a night tell it, and what it shows."""
