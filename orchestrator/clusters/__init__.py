"""Clusters that are not this machine's own: their files, what they cost, sending work to them."""
