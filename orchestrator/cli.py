"""What all commands share: their verbs, options and exit statuses, and how a mistake is told.

The module of a verb has a parser, made of the pieces here and of its own options, and a main:

    main(arguments) -> execute(parser(), run, arguments) -> run(options) -> exit status

`python -m orchestrator.VERB` and `python -m orchestrator VERB` both `call` that main.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator import interrupts, streams
from workers.code import CodeError, drop_digests
from workers.config import Mistake

# How a command ends, as a shell sees it. argparse itself ends by 2 where it does not know an option.
DONE = 0
SOME_FAILED = 1  # the rest is done
MISTAKE = Mistake.status  # 2: the user's, told before anything starts; or a full disk, told when it is
ALARM = 3  # a model became worse, numbers moved by themselves, or a canary is off
CLUSTER_LOST = 4  # Ray went away and did not come back
INTERRUPTED = interrupts.INTERRUPTED  # 130: ctrl-C, SIGTERM, SIGHUP

ENDINGS = {
    DONE: "done",
    SOME_FAILED: "something failed, and the rest is done",
    MISTAKE: "a mistake to mend, told before anything starts, or a full disk",
    ALARM: "an alarm",
    CLUSTER_LOST: "Ray was lost",
    INTERRUPTED: "interrupted (ctrl-C, SIGTERM, SIGHUP)",
}


@dataclass(frozen=True)
class Verb:
    """What a command does, in a line, and whether that is to print: then it fails where nothing can be written."""

    does: str
    prints: bool = False


VERBS = {
    "sweep": Verb("Train, measure and record every trial of an experiment file."),
    "status": Verb("Show how the sweeps of a storage stand, or the trials of one; it reads files alone.", prints=True),
    "report": Verb("Write the report of a sweep, during it or after: one page without network access.", prints=True),
    "evaluate": Verb("Measure a checkpoint, a trial or all trials of a sweep."),
    "compare": Verb("Print the difference of two measured checkpoints, with its confidence interval.", prints=True),
    "sample": Verb("Draw samples, interpolations and the progressive code of a checkpoint."),
    "nightly": Verb("Measure the models of a nightly file, and tell what became worse."),
    "canary": Verb("Measure what is known exactly, to see whether the numbers of this machine can be believed."),
    "conform": Verb("Look whether a network of one's own keeps what training and evaluation rely on."),
    "ui": Verb("Serve MLflow's UI on the database of a local storage, at 127.0.0.1 alone."),
    "schema": Verb("Print the JSON schema of a file that people write.", prints=True),
    "completion": Verb("Print the script that has bash or zsh complete these commands.", prints=True),
}

# ---- A parser and its shared options ---------------------------------------------------------------------------


def make_parser(
    verb: str, words: str, examples: Sequence[str], *, more: str = "", endings: Mapping[int, str] | None = None
) -> argparse.ArgumentParser:
    """The parser of a verb. `words` are its positional ones, and each of `examples` what may follow the command.

    Its help opens with what the command does and the examples, and ends with `more` and the exit statuses: those in
    `endings`, where an empty meaning stands for the usual one, DONE and MISTAKE.
    """
    command = f"python -m orchestrator.{verb}"
    opening = [VERBS[verb].does, "", "examples:", *(f"  {command} {example}".rstrip() for example in examples)]
    meanings = {DONE: "", MISTAKE: "", **(endings or {})}
    told = (f"  {status:<4} {meanings[status] or ENDINGS[status]}" for status in sorted(meanings))
    return argparse.ArgumentParser(
        command,
        usage=" ".join([command, *words.split(), "[options]"]),
        description="\n".join(opening),
        epilog="\n".join([*([more, ""] if more else []), "exit status:", *told]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_overrides(parser: argparse.ArgumentParser, of: str = "settings of evaluation, data and seed") -> None:
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help=of)


def add_storage(parser: argparse.ArgumentParser, of: str = "the folder or URI that keeps everything") -> None:
    parser.add_argument("--storage", default="runs", help=f"{of} (default: ./runs)")


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="run code of one's own that lies there and never ran on this machine",
    )


def add_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--code",
        action="append",
        default=[],
        metavar="FOLDER",
        help="where modules of one's own lie that settings name, as `code` in a file; can be repeated",
    )


def add_ray_address(
    parser: argparse.ArgumentParser, of: str = "a Ray cluster to attach to: auto or HOST:PORT on a node of it"
) -> None:
    """`options.ray_address`; on the command line it is --address, as Ray's own commands have it."""
    parser.add_argument("--address", dest="ray_address", metavar="RAY_ADDRESS", help=f"{of}; default: this machine")


def add_tracking_uri(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--tracking-uri", help=f"an MLflow server; default: {default}")


def add_profile(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    parser.add_argument("--profile", help=f"as a paper measured: {', '.join(names)}")


def add_verbosity(parser: argparse.ArgumentParser, more: str = "libraries' warnings") -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="print the result only")
    parser.add_argument("-v", "--verbose", action="store_true", help=f"also print {more}")


# ---- From the words to the exit status -------------------------------------------------------------------------


def execute(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None,
    *,
    interrupted: str = "The same command resumes.",
) -> int:
    """The exit status of `run` on the arguments (None: those of this process). A mistake and an interrupt are told."""
    options = parser.parse_intermixed_args(arguments)
    try:
        if getattr(options, "trust_code", False):
            from workers.consent import give_consent

            give_consent()
        return run(options)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return mistake.status
    except CodeError as error:  # of code that this command was asked to run; those of a trial are told as its failure
        print(drop_digests(str(error)), file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print(f"\nInterrupted. {interrupted}".rstrip(), file=sys.stderr)
        return INTERRUPTED


def tell(notes: Iterable[str], warnings: Iterable[str], *, quiet: bool = False) -> None:
    """Prints what a command has to say before its work, each line once, to stderr: stdout is for results."""
    for line in dict.fromkeys([*([] if quiet else notes), *(f"warning: {text}" for text in warnings)]):
        print(line, file=sys.stderr)


def call(verb: str, main: Callable[[], int]) -> int:
    """The exit status of a process that is a command: what `main` returns, 2 where its words are not text, 1 where
    what it prints is all that it does and could not be written. One that is no verb does nothing but print."""
    streams.open_streams()
    for word in sys.argv[1:]:
        if any("\ud800" <= character <= "\udfff" for character in word):
            print(f"{word}: not text in {sys.getfilesystemencoding().upper()}; rename it", file=sys.stderr)
            return MISTAKE
    status, written = main(), streams.is_written()
    return SOME_FAILED if status == DONE and not written and (verb not in VERBS or VERBS[verb].prints) else status
