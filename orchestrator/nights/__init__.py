"""Nightly evaluations: the file, when, what a night decides, and a night in progress."""
