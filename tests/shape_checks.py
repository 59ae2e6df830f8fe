"""The type checker that pytest's option --jaxtyping-packages names (pyproject.toml)."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int passes for a float, as with mypy
