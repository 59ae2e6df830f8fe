"""Pure functions: what must run, where it fits, how long it takes, and what a search asks for next."""
