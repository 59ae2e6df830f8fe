"""Kinds from outside of the packages, as a user's own package brings them: docs/extending.md shows this one."""
