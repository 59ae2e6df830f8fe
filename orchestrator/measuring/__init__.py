"""What a measurement is of, and what differences between measurements are worth."""
