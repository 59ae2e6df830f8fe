"""What a storage holds of sweeps, their rows and what happened: written and read here alone."""
