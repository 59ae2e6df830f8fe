"""Slurm without a Slurm: what its answers mean, what is refused beforehand, the script. Jobs that run:
cluster/test_slurm_cluster."""

import math
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestrator import interrupts
from orchestrator.clusters import slurm
from orchestrator.clusters.allocation import Allocation, find_allocation
from orchestrator.clusters.cost import estimate_checkpoint_s, estimate_longest_block_s
from orchestrator.clusters.slurm import Partition, Wish
from orchestrator.execution import halt as halts
from orchestrator.execution.halt import TO_END_S, Halt
from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import load
from orchestrator.planning.deadline import TO_BEGIN_S, compute_latest_begin, may_begin
from orchestrator.state.events import EventLog, was_begun_by
from orchestrator.state.saved import list_sweeps
from orchestrator.sweep import main
from workers.config import Mistake
from workers.data.sources import describe
from workers.layout import name_speed_file
from workers.speed import CORE, make_model_key, name_training_kind
from workers.storage import Storage

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "deploy").glob("slurm*"))


# ---- The script ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="Debian's shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    assert len(SCRIPTS) == 3
    result = subprocess.run(["shellcheck", "-x", *SCRIPTS], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout


def find_python(line: str, *words: str, **environment: str) -> str:
    """What `python WORDS` prints in the script, where the settings say `PYTHON=line`."""
    text = (ROOT / "deploy/slurm.sbatch").read_text().splitlines()
    parts = [each for each in text if each.startswith(("python() ", "case $PYTHON in"))]
    assert len(parts) == 2
    script = "\n".join(["set -euo pipefail", f"PYTHON='{line}'", *parts, 'python "$@"'])
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "PROJECT": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_virtual_environment_is_found_in_the_project_s_folder(tmp_path: Path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    text = (ROOT / "deploy/slurm.env").read_text()
    [line] = [each.partition("=")[2].strip("'") for each in text.splitlines() if each.startswith("PYTHON=")]
    message = find_python(line, "-c", "import sys; print(sys.argv[1:])", "a.b=[1, 2]", "it's", PROJECT=str(tmp_path))
    assert message == "['a.b=[1, 2]', \"it's\"]\n"


@pytest.mark.skipif(
    not Path("/etc/profile.d/modules.sh").exists(), reason="Debian's environment-modules is not installed"
)
def test_a_module_is_loaded_that_has_the_python(tmp_path: Path) -> None:
    """By the `module` of a real site, which the shell of a job may not know yet."""
    (tmp_path / "modules/python").mkdir(parents=True)
    (tmp_path / "modules/python/3.11").write_text(f"#%Module\nprepend-path PATH {tmp_path}/bin\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python-of-site").symlink_to(sys.executable)
    line = "module load python/3.11 && python-of-site"
    assert find_python(line, "-c", "print('here')", MODULEPATH=str(tmp_path / "modules")) == "here\n"


def test_an_image_is_run_by_apptainer(tmp_path: Path) -> None:
    """Apptainer itself is no package of Debian's: the words that it would be called with."""
    message = tmp_path / "apptainer"
    message.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    message.chmod(message.stat().st_mode | stat.S_IXUSR)
    line = "apptainer exec --nv --bind /shared /shared/orchestrator.sif python"
    words = find_python(line, "-m", "orchestrator.sweep", "a=[1, 2]", PATH=f"{tmp_path}:{os.environ['PATH']}")
    expected = "exec --nv --bind /shared /shared/orchestrator.sif python -m orchestrator.sweep".split()
    assert words.splitlines() == [*expected, "a=[1, 2]"]


def find_port(job: int) -> int:
    text = (ROOT / "deploy/slurm.sbatch").read_text()
    function = "find_port() {" + text.partition("find_port() {")[2].partition("\n}\n")[0] + "\n}"
    done = subprocess.run(["bash", "-c", f"SLURM_JOB_ID={job}\n{function}\nfind_port 127.0.0.1"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return int(done.stdout)


def test_jobs_have_ports_of_their_own_below_those_of_connections() -> None:
    found = [find_port(job) for job in (1, 2, 1099, 1100, 123_456_789)]
    assert found[0] + 20 == found[1] and len(set(found)) == len(found)
    assert all(10_000 <= port <= 32_768 - 20 for port in found)


# ---- What is asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("30:10", 1810), ("08:00:00", 28800), ("1-12", 129600), ("1-12:30", 131400),
        ("2-00:00:01", 172801), ("UNLIMITED", None), ("infinite", None), ("n/a", None), ("", None), ("1:2:3:4", None),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_writes_them(text: str, seconds: float | None) -> None:
    assert slurm.parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:4", 4), ("gpu:a100:4(S:0-1)", 4), ("gpu:a100:4(S:0-1),gpu:v100:2", 6), ("lscratch:100,gpu:8", 8),
        ("gpu", 1), ("(null)", 0), ("", 0), ("mps:100", 0),
    ],
)  # fmt: skip
def test_gpus_are_counted_among_the_resources_of_a_node(gres: str, gpus: int) -> None:
    assert slurm.count_gpus(gres) == gpus


def test_what_options_ask_for_is_read_however_they_are_written() -> None:
    wish = slurm.read_wish("-N 2 -p gpu --gpus-per-node=a100:4 -t 08:00:00")
    assert (wish.partition, wish.gpus, wish.time_s, wish.lead_s, wish.is_array) == ("gpu", 4, 28800, 120, False)
    wish = slurm.read_wish("--nodes=2 --partition gpu --gres=gpu:2 --time 10 --array=0-3 --signal=B:USR1@300 -pfast")
    assert (wish.partition, wish.gpus, wish.time_s, wish.lead_s, wish.is_array) == ("fast", 2, 600, 300, True)
    assert slurm.read_wish("") == Wish(()) and slurm.read_wish("--time=UNLIMITED").time_s == math.inf


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nodes=2", "is no option of sbatch"),
        ("--output=x", "--output is not yours"),
        ("-Jmine", "-J is not yours to give; the same command finds the job by it"),
        ("--export=NONE", "the job has this command's environment"),
        ("-e x", "-e is not yours"),
        ("-M other", "the job is followed where it was submitted"),
        ("--time=soon", "'soon' is no time"),
        ("--nodes='2", "No closing quotation"),
        ("--signal=TERM@60", "B:USR1@SECONDS"),
    ],
)
def test_options_that_cannot_be_are_told(text: str, expected: str) -> None:
    with pytest.raises(Mistake, match=expected):
        slurm.read_wish(text)


SINFO = ["cpu|(null)|2-00:00:00|01:00:00", "gpu|gpu:a100:4(S:0-1)|1-00:00:00|n/a", "gpu|gpu:v100:8|1-00:00:00|n/a",
         "debug|gpu:1|5:00|5:00"]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "unit_s", "expected"),
    [
        ("-p gpu --gpus-per-node=8", None, []),
        ("-p gpu --gpus-per-node=9", None, ["9 GPUs on a node: no node of partition gpu has more than 8"]),
        ("--gpus-per-node=1", None, ["no node of partition cpu has more than 0; one of gpu has 8; one of debug has 1"]),
        ("-p night", None, ["partition night: there is none of that name; there are cpu, gpu, debug"]),
        ("-p gpu,night", None, ["partition night: there is none"]),
        ("-p debug", None, []),
        ("-t 2", None, ["a time of 120 s: the job takes about 60 s to start, begins no trial 60 s before the pause"]),
        ("-t 3", None, ["a time of 180 s"]),
        ("-t 2 --signal=B:USR1@30", None, ["pauses 30 s before its end"]),
        ("-t 3 --signal=B:USR1@30", None, []),
        ("-t 0", 3600, []),
        ("-t 30", 3600, ["from one checkpoint to the next takes 60 min"]),
        ("-t 90", 3600, []),
        ("", 3600, ["a time of 60 min"]),
        ("-p gpu", 3600, []),
    ],
)
def test_what_no_node_can_give_is_told_before_anything_is_sent(
    options: str, unit_s: float | None, expected: list[str]
) -> None:
    told = slurm.list_mistakes(slurm.read_wish(options), slurm.read_partitions(SINFO), "cpu", unit_s)
    assert len(told) == len(expected)
    assert all(text in message for text, message in zip(expected, told, strict=True)), told


def test_partitions_have_the_gpus_of_their_best_node() -> None:
    assert slurm.read_partitions(SINFO)["gpu"] == Partition("gpu", 8, 86400, None)


def test_jobs_are_read_from_the_queue_whatever_their_comments_hold() -> None:
    lines = ["7|RUNNING|1:02:03|None|sweep-a-1|/shared/runs/sweeps/a\n", "8_1|PENDING|2:00|Resources|x|a|b\n", "junk\n"]
    one, other = slurm.read_queue(lines)
    assert str(one) == "Slurm job 7 is RUNNING, with 1:02:03 left of its time" and one.of == "/shared/runs/sweeps/a"
    assert str(other) == "Slurm job 8_1 is PENDING (Resources)" and other.of == "a|b"


@pytest.mark.parametrize(
    ("text", "state", "status", "is_over"),
    [
        ("JobId=1 JobState=COMPLETED Reason=None ExitCode=0:0", "COMPLETED", 0, True),
        ("JobId=1 JobState=FAILED Reason=NonZeroExitCode ExitCode=2:0", "FAILED", 2, True),
        ("JobId=1 JobState=CANCELLED Reason=None ExitCode=0:15", "CANCELLED", 143, True),
        ("JobId=1 JobState=PENDING Reason=BeginTime ExitCode=0:0", "PENDING", 0, False),
        ("JobId=1 JobState=COMPLETING Reason=None ExitCode=0:0", "COMPLETING", 0, False),
    ],
)
def test_how_a_job_stands_is_read(text: str, state: str, status: int, is_over: bool) -> None:
    found = slurm.read_state(text)
    assert (found.state, found.exit_status, found.is_over) == (state, status, is_over)


def test_a_storage_in_this_machine_s_memory_is_refused_and_a_password_is_not_repeated(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("/dev/sda / ext4 rw 0 0\ntmpfs /dev/shm tmpfs rw 0 0\nhead:/home /home nfs4 rw 0 0\n")
    assert [slurm.find_file_system(Path(p), mounts) for p in ("/dev/shm/a", "/home/ann/runs", "/x")] == [
        "tmpfs", "nfs4", "ext4",
    ]  # fmt: skip
    monkeypatch.setattr(slurm, "find_file_system", lambda path: "tmpfs")
    with pytest.raises(Mistake) as told:
        slurm.make_batch(load(tiny), tiny, ["tracking.uri=http://ann:planted@host:5000"], "runs", [])
    assert "lies on a tmpfs" in str(told.value) and "tracking.uri" in str(told.value)
    assert "planted" not in str(told.value)


def test_a_batch_says_what_it_makes_by_its_name_and_where_by_its_comment(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = slurm.make_batch(load(tiny), tiny, ["seed=1"], str(tmp_path / "runs/"), ["--fresh"])
    assert sent.name.startswith("sweep-tiny-") and sent.of == f"{tmp_path}/runs/sweeps/tiny"
    assert sent.words == ("seed=1", "--storage", str(tmp_path / "runs"), "--fresh")
    assert sent.output == tmp_path / f"runs/slurm/{sent.name}.out"
    assert slurm.make_batch(load(tiny), tiny, [], f"{tmp_path}/runs", []).name == sent.name
    remote = slurm.make_batch(load(tiny), tiny, [], "s3://bucket/runs?region=eu-west-1", [])
    assert remote.name != sent.name and remote.folder.is_absolute()
    assert remote.of == "s3://bucket/runs/sweeps/tiny?region=eu-west-1"
    for same in (f"file://{tmp_path}/runs", f"{tmp_path}/./runs"):
        assert slurm.make_batch(load(tiny), tiny, [], same, []).name == sent.name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert slurm.make_batch(load(tiny), tiny, [], "~/runs", []).name == sent.name


def test_without_sbatch_nothing_is_done(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(slurm, "find_file_system", lambda path: "nfs4")
    assert main([str(tiny), "--storage", str(tmp_path / "runs"), "--slurm", "--nodes=2"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert main([str(tiny), "--slurm", "--nodes=2", "--address", "auto"]) == 2
    assert "a Ray of its own" in capsys.readouterr().err
    assert list_sweeps(Storage(tmp_path / "runs")) == []


# ---- In the job ------------------------------------------------------------------------------------------------


def test_a_job_is_told_by_its_environment() -> None:
    script = {"ORCHESTRATOR_JOB": "7", "ORCHESTRATOR_NODES": "2"}
    assert find_allocation({"SLURM_JOB_ID": "7"}) is None
    assert find_allocation({**script, "ORCHESTRATOR_PAUSES_AT": ""}) == Allocation("7", 2)
    assert find_allocation({**script, "ORCHESTRATOR_PAUSES_AT": "1000"}) == Allocation("7", 2, 1000.0)
    tasks = [{**script, "SLURM_ARRAY_TASK_ID": n, "SLURM_ARRAY_TASK_MIN": "3"} for n in ("3", "4")]
    assert [found.name("a") for task in tasks if (found := find_allocation(task))] == ["a", "a-4"]
    assert find_allocation({**script, "ORCHESTRATOR_LEAD": "300"}) == Allocation("7", 2, lead_s=300.0)


@pytest.mark.parametrize(
    ("rest_s", "planned_s", "can_resume", "begins"),
    [
        (TO_BEGIN_S, 9e9, True, True),  # a trial goes on in the next job
        (TO_BEGIN_S - 1, 1, True, False),  # but is not begun to come to nothing
        (300, 300, False, True),
        (300, 301, False, False),  # a block would be lost
        (1, 0.5, False, True),
        (TO_BEGIN_S - 1, None, False, False),
        (TO_BEGIN_S, None, False, True),
    ],
)
def test_what_would_not_be_done_in_the_rest_of_the_job_is_not_begun(
    rest_s: float, planned_s: float | None, can_resume: bool, begins: bool
) -> None:
    assert may_begin(1e9, 1e9 + rest_s, planned_s, can_resume=can_resume) is begins
    assert may_begin(1e9, None, planned_s, can_resume=can_resume)


def test_blocks_are_begun_as_long_as_they_can_end_and_always_where_no_job_is_long_enough() -> None:
    halt = Halt(pauses_at=5000.0, say=print, began=1000.0)
    assert halt.find_latest_block_begin(600) == compute_latest_begin(5000.0, 600, can_resume=False) == 4400
    assert halt.find_latest_block_begin(3900) is None  # a job is not up at once
    assert Halt(pauses_at=None, say=print).find_latest_block_begin(600) is None


def test_a_job_that_can_begin_nothing_is_a_mistake_and_one_that_has_begun_something_pauses() -> None:
    """The first would go into the queue again and again."""
    messages: list[str] = []
    halt = Halt(time.time() + TO_BEGIN_S / 2, messages.append)
    assert halt.is_near
    with pytest.raises(Mistake, match=r"the job's time is too short .* it pauses (29|30) s after"):
        halt.end(is_left=True)
    halt.end(is_left=False)
    halt.has_worked = True
    with interrupts.allow_interrupts():
        for leave in (lambda: halt.end(is_left=True), halt.leave):
            with pytest.raises(KeyboardInterrupt):
                leave()
        assert interrupts.is_asked_to_pause()
    assert len(messages) == 2 and "what is left is not begun" in messages[0]


def test_the_trials_have_the_lead_of_the_job_but_for_what_its_end_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(halts, "ask_to_pause", lambda: None)  # of the processes of a Ray
    with interrupts.allow_interrupts():
        interrupts.pause()
        halt = Halt(None, lambda text: None, lead_s=300)
        halt.tick()
        clock[0] += 300 - TO_END_S
        halt.tick()
        clock[0] += 1
        with pytest.raises(KeyboardInterrupt):
            halt.tick()


def test_a_job_that_is_put_into_the_queue_again_knows_that_it_has_begun_the_sweep(tmp_path: Path) -> None:
    """So that --fresh is done once."""
    storage = Storage(tmp_path / "runs")
    for job in ("7", "8_1"):
        assert not was_begun_by(storage, "tiny", job)
        events = EventLog(storage, "tiny")
        events.add("started", slurm_job=job)
        events.flush()
        assert was_begun_by(storage, "tiny", job)


def test_how_long_blocks_and_checkpoints_take_is_known_from_measured_speeds(tiny: Path, tmp_path: Path) -> None:
    experiment, storage = load(tiny), Storage(tmp_path / "runs")
    trial = next(iter(expand(experiment))).trial
    source = describe(trial.data)
    assert (
        estimate_longest_block_s(storage, trial, source, on_gpu=False) is None
        and estimate_checkpoint_s(storage, trial, source) is None
    )
    work = {
        name_training_kind(trial.training): [320.0, 32.0],
        "nll": [1.0, 0.01],
        "samples": [1.0, 0.001],
        "features-classifier": [1.0, 0.1],
    }
    key = make_model_key(trial.model, trial.training, source.shape, trial.evaluation.precision)
    storage.write_sealed(name_speed_file(key), {f"a{CORE}": {"work": work}})
    assert estimate_checkpoint_s(storage, trial, source) == pytest.approx(5 * 32 * 0.1)
    found = estimate_longest_block_s(storage, trial, source, on_gpu=False)
    assert found and found > 1 and estimate_longest_block_s(storage, trial, source, on_gpu=True) is None
