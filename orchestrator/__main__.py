"""`python -m orchestrator VERB ...`, or `diffusion-orchestrator VERB ...`: every command; without a verb, their list.

A verb's module loads when it is asked for, so that the list is there at once.
"""

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from orchestrator import cli, interrupts
from workers.config import Mistake

USAGE = """usage: python -m orchestrator VERB ...   (or diffusion-orchestrator VERB ...)

Train, measure and compare denoising diffusion models on Ray. The verbs:
"""


def main() -> int:
    """The exit status of this process."""
    interrupts.arm()
    words = sys.argv[1:]
    return cli.call(words[0] if words else "", partial(run, words))


def run(words: Sequence[str]) -> int:
    """The exit status of a command, given as its verb and what follows it."""
    match words:
        case [] | [("-h" | "--help" | "help")]:
            print(describe_verbs())
            return cli.DONE
        case ["help", verb, *_]:
            return run([verb, "--help"])
        case ["complete", *line]:  # what the scripts of `completion` ask
            from orchestrator.completion import complete

            print("\n".join(complete(" ".join(line))))
            return cli.DONE
        case [verb, *arguments] if verb in cli.VERBS:
            return int(import_module(f"orchestrator.{verb}").main(arguments))
    print(refuse_verb(words[0]), file=sys.stderr)
    return cli.MISTAKE


def describe_verbs() -> str:
    """What there is, a line per verb."""
    width = max(map(len, cli.VERBS))
    lines = [f"  {verb:<{width}}  {kind.does}" for verb, kind in cli.VERBS.items()]
    return "\n".join([USAGE, *lines, "", "python -m orchestrator VERB --help says more of one, with examples."])


def refuse_verb(verb: str) -> Mistake:
    """What to tell whoever asks for a verb that there is not."""
    from orchestrator.experiment.settings import (
        suggest_choice,
    )  # pydantic loads here: a verb that is known does without

    return Mistake(
        f"{verb!r} is no verb of orchestrator{suggest_choice(verb, cli.VERBS)}; valid: {', '.join(cli.VERBS)}. "
        "python -m orchestrator says what each does"
    )


if __name__ == "__main__":
    sys.exit(main())
