"""`python -m orchestrator.conform NETWORK`: whether a network of one's own keeps the contract of docs/extending.md."""

import argparse
import re
import sys
from collections.abc import Sequence

from orchestrator import cli
from orchestrator.experiment.load import open_folders, parse_assignment
from orchestrator.experiment.settings import find_invalid
from workers.config import Mistake, ModelConfig
from workers.network.unet_config import UNET

EXAMPLES = (
    "my_networks:DIT width=64 --code examples/dit",
    "unet channels=16 multipliers=[1,2] --shape 28x28x1",
    "my_networks:WAVE --shape 1024x2 --code .",
)
MORE = """It builds the network twice, trains it on Gaussian pixels for some seconds, and holds it against what training
and evaluation rely on: shapes, weights by the seed, noise from handed generators, a gradient everywhere, a state that
is the network, images that do not depend on each other, and that it learns."""


def make_parser() -> argparse.ArgumentParser:
    endings = {cli.DONE: "the network keeps all of it", cli.ALARM: "the network breaks some of it"}
    result = cli.make_parser("conform", "NETWORK [a.b=value ...]", EXAMPLES, more=MORE, endings=endings)
    result.add_argument("network", metavar="NETWORK", help="its kind, as model.kind names it")
    cli.add_overrides(result, "its settings, as they stand beside model.kind")
    cli.add_code(result)
    result.add_argument("--shape", default="8x8x1", metavar="HxWxC", help="of images, or LENGTHxC of signals or "
                        "DxHxWxC of volumes; default: 8x8x1")  # fmt: skip
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments, interrupted="")


def run(options: argparse.Namespace) -> int:
    """Raises Mistake."""
    open_folders(options.code, options.network)
    model, (sides, channels) = _read_model(options.network, options.overrides), _read_shape(options.shape)
    if model.kind == UNET and len(sides) != 2:
        raise Mistake(f"--shape {options.shape}: the U-Net is of images; give HxWxC, or a network of your own")
    from workers.conformity import check_network  # torch loads here

    laws = []
    for law in check_network(model, sides, channels):
        print(law, flush=True)
        laws.append(law)
    return cli.ALARM if any(law.broken for law in laws) else cli.DONE


def _read_model(kind: str, settings: Sequence[str]) -> ModelConfig:
    try:
        content = {"kind": kind, **dict(map(parse_assignment, settings))}
    except ValueError as error:
        raise Mistake(str(error)) from None
    if mistakes := [f"{path}: {text}" for path, text in find_invalid(ModelConfig, content)]:
        raise Mistake("\n".join(mistakes))
    return ModelConfig.model_validate(content)


def _read_shape(text: str) -> tuple[tuple[int, ...], int]:
    """The sides, and the channels."""
    if not re.fullmatch(r"([1-9]\d{0,3}x){1,3}[1-9]\d?", text):
        raise Mistake(
            f"--shape {text[:40]}: write height, width and channels as 32x32x3; of signals length and channels as "
            "1024x2, of volumes depth, height, width and channels as 16x16x16x1"
        )
    *sides, channels = map(int, text.split("x"))
    return tuple(sides), channels


if __name__ == "__main__":
    sys.exit(cli.call("conform", main))
