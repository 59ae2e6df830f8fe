"""The experiment file: its settings, their checks, and the trials that it means. No torch, no Ray."""
