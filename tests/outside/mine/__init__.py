"""Kinds from outside of the packages, as a user's own package brings them: docs/architecture.md shows this one."""
