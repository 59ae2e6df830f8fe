"""What is measured of a checkpoint: blocks, their making, and what they add up to."""
