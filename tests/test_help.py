"""Every verb is listed and found, its `--help` opens with what it does and examples, and it ends by a known status."""

import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, environment

from orchestrator import __main__ as entry
from orchestrator import cli
from orchestrator.execution.loss import ClusterLost
from workers.config import Mistake

# A verb is a module that can be run.
VERBS = sorted(
    f.stem
    for f in (ROOT / "orchestrator").glob("*.py")
    if '__name__ == "__main__"' in f.read_text() and f.stem != "__main__"
)


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each verb prints, from one process: most of the time is Python's start."""
    code = (
        "import importlib, contextlib, io, json\n"
        "found = {}\n"
        f"for verb in {VERBS!r}:\n"
        "    text = io.StringIO()\n"
        "    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):\n"
        "        importlib.import_module('orchestrator.' + verb).main(['--help'])\n"
        "    found[verb] = text.getvalue()\n"
        "import sys\n"
        "assert not {'torch', 'ray', 'mlflow'} & set(sys.modules), 'help has to be quick'\n"
        "print(json.dumps(found))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_every_module_that_runs_is_a_verb() -> None:
    assert sorted(cli.VERBS) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_opens_with_what_it_does_and_two_examples_that_are_understood(verb: str, helps: dict[str, str]) -> None:
    usage, does, opening, *_ = helps[verb].split("\n\n")
    assert usage.startswith(f"usage: python -m orchestrator.{verb} ") and usage.endswith(" [options]")
    assert does == cli.VERBS[verb].does
    first, *examples = opening.splitlines()
    assert first == "examples:" and len(examples) >= 2
    parser = importlib.import_module(f"orchestrator.{verb}").make_parser()
    for example in re.findall(rf"^  python -m orchestrator\.{verb}\b(.*)", helps[verb], re.MULTILINE):
        parser.parse_intermixed_args(shlex.split(example.partition(">")[0]))


@pytest.mark.parametrize("verb", VERBS)
def test_usage_names_the_words_of_the_parser(verb: str, helps: dict[str, str]) -> None:
    parser = importlib.import_module(f"orchestrator.{verb}").make_parser()
    usage = helps[verb].partition("\n")[0]
    for action in (a for a in parser._actions if not a.option_strings):
        words = [str(action.metavar)] if action.choices is None else list(action.choices)
        assert all(word in usage for word in words), (usage, words)


@pytest.mark.parametrize("verb", VERBS)
def test_help_tells_the_exit_statuses(verb: str, helps: dict[str, str]) -> None:
    told = [int(status) for status in re.findall(r"^  (\d+) +\S", helps[verb].partition("exit status:")[2], re.M)]
    assert {cli.DONE, cli.MISTAKE} <= set(told) <= set(cli.ENDINGS) and told == sorted(told)


def test_statuses_are_those_that_scripts_and_clusters_know() -> None:
    statuses = cli.DONE, cli.SOME_FAILED, cli.MISTAKE, cli.ALARM, cli.CLUSTER_LOST, cli.INTERRUPTED
    assert statuses == (0, 1, 2, 3, 4, 130)
    assert (Mistake.status, ClusterLost.status) == (cli.MISTAKE, cli.CLUSTER_LOST)


def test_without_a_verb_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["help"]):
        assert entry.run(words) == cli.DONE
        lines = capsys.readouterr().out.splitlines()
        for verb, kind in cli.VERBS.items():
            assert any(line.split(maxsplit=1) == [verb, kind.does] for line in lines), verb


def test_a_verb_gets_what_follows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["schema", "nightly"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["title"].startswith("A nightly evaluation")
    assert entry.run(["status", "--storage", "/nothing/here"]) == cli.MISTAKE
    assert "no sweep yet" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        entry.run(["help", "sweep"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: python -m orchestrator.sweep ")


def test_an_unknown_verb_is_a_mistake_with_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.run(["swep", "experiments/beta_schedule.yaml"]) == cli.MISTAKE
    told = capsys.readouterr().err
    assert "'swep' is no verb" in told and "did you mean 'sweep'?" in told and "canary" in told


@pytest.mark.parametrize("words", [[], ["schema"], ["schem"]])
def test_the_package_and_the_console_script_are_that_command(words: list[str]) -> None:
    """The script is what pyproject.toml names, called as an installed one calls it."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert named == {"diffusion-orchestrator": "orchestrator.__main__:main"}
    script = "import sys; from orchestrator.__main__ import main; sys.argv[0] = 'x'; sys.exit(main())"
    package, installed = (
        subprocess.run(
            [sys.executable, *how, *words], cwd=ROOT, env=environment(""), capture_output=True, text=True, check=False
        )
        for how in (["-m", "orchestrator"], ["-c", script])
    )
    assert package.returncode == installed.returncode == (cli.MISTAKE if words == ["schem"] else cli.DONE)
    assert (package.stdout, package.stderr) == (installed.stdout, installed.stderr)
    assert "Traceback" not in package.stderr


def test_an_interrupt_of_any_verb_ends_it_by_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    def mistaken(options: object) -> int:
        raise ClusterLost("Ray is gone")

    parser = cli.make_parser("ui", "", ("",))
    assert cli.execute(parser, interrupted, []) == cli.INTERRUPTED
    assert capsys.readouterr().err == "\nInterrupted. The same command resumes.\n"
    assert cli.execute(parser, mistaken, []) == cli.CLUSTER_LOST
    assert capsys.readouterr().err == "Ray is gone\n"
