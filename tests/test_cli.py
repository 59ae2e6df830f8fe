"""What a terminal does to a command: it may lack signs, its reader may leave, its streams may be closed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment
from PIL import Image

PLAIN_ENVIRONMENT = {**environment(""), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
FULL = "/dev/full"


def run(*words: object, shell: str = "", **options: object) -> subprocess.CompletedProcess[bytes]:
    """`python -m orchestrator.<words>` in an ASCII terminal, with redirections as a shell writes them."""
    command = ["/bin/bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, "-m"]
    words = (f"orchestrator.{words[0]}", *words[1:])
    return subprocess.run(
        [*command, *map(str, words)], capture_output=True, env=PLAIN_ENVIRONMENT, cwd=ROOT, timeout=300, check=False
    )


def left_by_its_reader(*words: object) -> tuple[int, str]:
    """(status, stderr) of a command whose stdout nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", f"orchestrator.{words[0]}", *map(str, words[1:])]
    try:
        done = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, env=PLAIN_ENVIRONMENT, cwd=ROOT, timeout=300, check=False
        )
    finally:
        os.close(write)
    return done.returncode, done.stderr.decode("ascii")


def commands(file: Path, storage: Path) -> list[tuple[object, ...]]:
    one, two = sorted(folder.name for folder in (storage / "trials").iterdir())
    at = ("--storage", storage)
    return [
        ("status", *at), ("status", "tiny", "--json", *at), ("status", "--watch", *at),
        ("report", "tiny", *at), ("report", "tiny", "--markdown", *at),
        ("compare", one, two, *at), ("evaluate", "tiny", *at), ("sample", one, "--n", 4, *at),
        ("sweep", file, *at), ("sweep", file, "--dry-run", *at), ("sweep", "--help"), ("schema",),
        ("nightly", "experiments/nightly.yaml", "hooks.webhook=null", "--install-cron", *at),
        ("ui", "--storage", file.parent),
    ]  # fmt: skip


@pytest.mark.faults
def test_no_command_minds_that_its_reader_leaves(own: tuple[Path, Path]) -> None:
    """As behind `| head`: none tells of it, and each does what it is there for, with the status of that."""
    for words in commands(*own):
        status, errors = left_by_its_reader(*words)
        nothing_to_show = words[0] == "ui"
        assert (status, "Traceback" in errors, "Broken" in errors) == (2 * nothing_to_show, False, False), (
            words,
            errors,
        )
    assert list(own[1].glob("pictures/*/samples.png"))


def test_comparing_tells_of_data_that_both_share_once(own: tuple[Path, Path]) -> None:
    one, two = sorted(folder.name for folder in (own[1] / "trials").iterdir())
    done = run("compare", one, two, "--storage", own[1])
    assert done.returncode == 0 and done.stdout.startswith(b"nll_bpd "), done.stderr
    assert done.stderr.count(b"data  ") == 1 == done.stderr.count(b"\n"), done.stderr


def test_signs_that_a_terminal_lacks_are_written_otherwise(own: tuple[Path, Path], tmp_path: Path) -> None:
    storage = own[1].rename(tmp_path / "rüns ≈")
    output = run("sweep", own[0], "--storage", storage)
    assert output.returncode == 0 and b" +- 0." in output.stdout, output.stderr
    assert rf"{tmp_path}/r\xfcns ~/sweeps/tiny/results.parquet".encode() in output.stdout
    markdown = run("report", "tiny", "--markdown", "--storage", storage)
    assert markdown.returncode == 0 and b" +- 0." in markdown.stdout, markdown.stderr
    assert json.loads(run("schema").stdout) == json.loads((ROOT / "experiments/schema.json").read_text("utf-8"))
    missing = run("status", "nö", "--storage", storage)
    assert missing.returncode == 2 and rb"'n\xf6' is no sweep" in missing.stderr, missing.stderr


def test_words_that_are_no_text_are_a_mistake() -> None:
    command = [sys.executable.encode(), b"-m", b"orchestrator.status", b"--storage", b"/tmp/\xff"]
    done = subprocess.run(command, capture_output=True, env=PLAIN_ENVIRONMENT, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stderr == b"/tmp/\xff: not text in UTF-8; rename it\n"


@pytest.mark.faults
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_taken_for_files(own: tuple[Path, Path], closed: str) -> None:
    """The next file that is opened would get the number of a closed stream, and what is printed would go into it."""
    results = [own[1] / "sweeps/tiny" / name for name in ("results.parquet", "report.html", "experiment.yaml")]
    before = {path: path.read_bytes() for path in results}
    for path in (*results, own[1] / "sweeps/tiny/published.json"):
        path.unlink()
    done = run("sweep", own[0], "--storage", own[1], shell=closed)
    assert done.returncode == 0, done.stderr
    assert results[0].read_bytes() == before[results[0]] and results[2].read_bytes() == before[results[2]]
    assert results[1].read_bytes().startswith(b"<!doctype html>")


@pytest.mark.skipif(not Path(FULL).exists(), reason="this system has no device that is always full")
def test_a_command_that_only_prints_fails_where_nothing_can_be_written(own: tuple[Path, Path]) -> None:
    for words in (("schema",), ("report", "tiny", "--markdown", "--storage", own[1])):
        done = run(*words, shell=f"> {FULL}")
        assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr, done.stderr
    assert run("sweep", own[0], "--storage", own[1], shell=f"> {FULL}").returncode == 0  # its work is done


@pytest.mark.faults
def test_a_sweep_does_its_work_whatever_its_terminal_does(tmp_path: Path) -> None:
    data, storage, file = tmp_path / "dätä ≈", tmp_path / "rüns", tmp_path / "tïny.yaml"
    for name in ("ä", "b"):
        (data / name).mkdir(parents=True)
        for number in range(40):
            Image.new("L", (8, 8), number).save(data / name / f"ö{number}.png")
    file.write_text(TINY, encoding="utf-8")
    small = ["training.steps=2", "training.batch_size=16", "evaluation.nll.images=4", "evaluation.fid.sampler.steps=1"]
    small += ["diffusion.schedule={kind: cosine}", "search.space={diffusion.T: {grid: [1, 2]}}"]  # as short as can be
    status, errors = left_by_its_reader("sweep", file, f"data.source={data}", *small, "--storage", storage)
    assert status == 0 and "Traceback" not in errors, errors
    assert {path.name for path in (storage / "sweeps/tiny").iterdir()} > {"results.parquet", "report.html"}
    assert (storage / "mlflow.db").exists()
