"""`--help` of every verb says what it does and ends with an example that it understands."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

# A verb is a module that can be run.
VERBS = sorted(f.stem for f in (ROOT / "orchestrator").glob("*.py") if '__name__ == "__main__"' in f.read_text())


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


def test_there_are_verbs() -> None:
    assert {"sweep", "evaluate", "compare", "canary", "ui", "status", "report", "schema"} <= set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_description_and_examples(verb: str, helps: dict[str, str]) -> None:
    text = helps[verb]
    assert text.startswith(f"usage: python -m orchestrator.{verb}")
    examples = re.findall(rf"^  (python -m orchestrator\.{verb}\b.*)", text, re.MULTILINE)
    assert re.search(r"^examples?:$", text, re.MULTILINE) and examples
    assert all(shlex.split(example) for example in examples)
