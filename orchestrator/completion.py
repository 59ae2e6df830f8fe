"""`python -m orchestrator.completion SHELL`: the script that has a shell complete `diffusion-orchestrator`.

The script asks this module, in a process of its own, what a line may go on with: verbs and options, the sweeps and
trials of the line's storage, experiment files, and settings, section by section. Where it has no answer the shell
completes the names of files. Neither torch nor Ray loads for it.

Not argcomplete: it completes by parse_known_args, which takes no positional word after an option. Our commands do take
them (`sweep FILE --storage S a.b=1`), and argcomplete 3.7 offers no setting there.
"""

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

from orchestrator import cli

EXAMPLES = ("bash > ~/.diffusion-orchestrator.bash", "zsh > ~/.diffusion-orchestrator.zsh")
MORE = """Have the shell read it: add to ~/.bashrc or ~/.zshrc (there, after compinit) the line

  source ~/.diffusion-orchestrator.bash"""

# What ends in one of these goes on, so no space follows it.
BASH = """_diffusion_orchestrator() {{
    mapfile -t COMPREPLY < <({command} complete "${{COMP_LINE:0:COMP_POINT}}" 2>/dev/null)
    [[ ${{COMPREPLY[0]}} ]] || COMPREPLY=()
    [[ ${{COMPREPLY[0]}} == *[=./] ]] && compopt -o nospace
}}
complete -o default -F _diffusion_orchestrator diffusion-orchestrator
"""
ZSH = """_diffusion_orchestrator() {{
    local -a found
    found=(${{(f)"$({command} complete "${{(j: :)words[1,CURRENT]}}" 2>/dev/null)"}})
    (( $#found )) || {{ _files; return }}
    compadd -S '' -- ${{(M)found:#*[=./]}}
    compadd -- ${{found:#*[=./]}}
}}
compdef _diffusion_orchestrator diffusion-orchestrator
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH}


def make_parser() -> argparse.ArgumentParser:
    result = cli.make_parser("completion", "bash|zsh", EXAMPLES, more=MORE)
    result.add_argument("shell", choices=SCRIPTS, help="which shell completes")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    return cli.execute(make_parser(), run, arguments, interrupted="")


def run(options: argparse.Namespace) -> int:
    command = shlex.join([sys.executable, "-m", "orchestrator"])
    print(SCRIPTS[options.shell].format(command=command), end="")
    return cli.DONE


# ---- What a line may go on with --------------------------------------------------------------------------------


def complete(line: str) -> list[str]:
    """What the last word of a command's line may become; empty where it is the name of a file, or anything."""
    words = split(line)
    if len(words) < 3:
        return [verb for verb in cli.VERBS if len(words) == 2 and verb.startswith(words[1])]
    _, verb, *given, word = words
    if verb not in cli.VERBS:
        return []
    parser = import_module(f"orchestrator.{verb}").make_parser()
    action = _find_action(parser, given)
    if word.startswith("-") and (action is None or not action.option_strings):
        found: Iterable[str] = (name for a in parser._actions for name in a.option_strings if name.startswith("--"))
    elif action is None:
        return []
    elif action.choices:
        found = map(str, action.choices)
    else:
        found = _list_values(action.dest, verb, _find_storage(given), word)
    return [text for text in dict.fromkeys(found) if text.startswith(word)]


def split(line: str) -> list[str]:
    """The words of a line as a shell reads them; the last is the one at the cursor, and may be empty or half quoted."""
    for end in ("", "'", '"'):
        try:
            return shlex.split(line + end) + ([""] if not end and line[-1:].isspace() else [])
        except ValueError:
            continue
    return []


def _find_action(parser: argparse.ArgumentParser, given: Sequence[str]) -> argparse.Action | None:
    """What the word after the given ones is for: the value of an option, or a positional word."""
    options = {name: action for action in parser._actions for name in action.option_strings}
    places = [action for action in parser._actions if not action.option_strings]
    values: list[argparse.Action] = []
    for word in given:
        if values:
            values.pop()
        elif word in options and options[word].nargs != 0:
            count = options[word].nargs
            values = [options[word]] * (count if isinstance(count, int) else int(count != "?"))
        elif not word.startswith("-") and places and places[0].nargs != "*":
            places.pop(0)
    return values[-1] if values else places[0] if places else None


def _find_storage(given: Sequence[str]) -> str:
    """The storage that the words name."""
    named = [value for option, value in pairwise(given) if option == "--storage"]
    named += [word.partition("=")[2] for word in given if word.startswith("--storage=")]
    return named[-1] if named else "runs"


def _list_values(dest: str, verb: str, storage: str, word: str) -> Iterator[str]:
    """What is known of what an argument of that name takes."""
    match dest:
        case "overrides":
            yield from _list_by_section(_list_settings(verb), word)
        case "file":
            yield from _list_files(word)
        case "sweep" | "target" | "a" | "b":
            from orchestrator.state.saved import list_sweeps
            from workers.layout import TRIALS
            from workers.storage import Storage

            place = Storage(storage)
            yield from list_sweeps(place) if dest in ("sweep", "target") else ()
            yield from place.list(TRIALS) if dest != "sweep" else ()
        case "profile":
            from orchestrator.experiment.profiles import PROFILES

            yield from PROFILES


def _list_settings(verb: str) -> list[str]:
    """The dotted paths that a verb's overrides may set, sections left out."""
    from orchestrator.experiment import load

    if verb == "nightly":
        from orchestrator.nights.suite import SETTINGS as paths
    elif verb == "sweep":
        from orchestrator.experiment.check import TRIAL_SETTINGS
        from orchestrator.experiment.records import Axis

        searched = [f"search.space.{path}.{form}" for path in TRIAL_SETTINGS for form in Axis.model_fields]
        paths = [*load.SETTINGS, *searched]
    else:
        paths = load.list_measurement_settings()
    sections = {path.rpartition(".")[0] for path in paths}
    return [path for path in paths if path not in sections]


def _list_by_section(paths: Iterable[str], word: str) -> Iterator[str]:
    """Each path that begins with the word, as far as its next dot."""
    for path in paths:
        if path.startswith(word):
            section, dot, _ = path[len(word) :].partition(".")
            yield f"{word}{section}{dot or '='}"


def _list_files(word: str) -> Iterator[str]:
    """The YAML files, and the folders that may hold some, whose names begin with the word."""
    above, slash, _ = word.rpartition("/")
    folder = Path(above + slash).expanduser()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith(".") or " " in path.name:
            continue
        if path.is_dir():
            yield f"{above}{slash}{path.name}/"
        elif path.suffix in (".yaml", ".yml"):
            yield f"{above}{slash}{path.name}"


if __name__ == "__main__":
    sys.exit(cli.call("completion", main))
