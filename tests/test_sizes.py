"""Claims of size are checked before memory is asked for: a number in a file may not cost what it says."""

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator import evaluate, nightly, sample, sweep
from orchestrator.clusters.cluster import read_cluster
from orchestrator.clusters.cost import read_prices
from orchestrator.experiment.check import TRIAL_SETTINGS
from orchestrator.experiment.load import load
from orchestrator.experiment.settings import NotYAML, read_yaml
from workers.config import DataConfig, EvaluationConfig, FIDConfig, Measurement, Mistake, NLLConfig, ODENLLConfig
from workers.evaluation.blocks import Images, count_blocks, list_blocks

MOST_MEMORY = 100 * 2**20
SECTIONS = [path for path in TRIAL_SETTINGS if any(other.startswith(f"{path}.") for other in TRIAL_SETTINGS)]
FACTORS = ["seed", "model.norm_groups", "loss.gamma", "loss.p2_gamma", "loss.p2_k", "loss.vlb_weight", "training.lr",
           "training.grad_clip", "preflight.max_prior_bpd"]  # fmt: skip
MORE = ["search.samples", "search.batch", "search.max_concurrent", "search.max_failures", "search.scheduler.grace",
        "search.scheduler.reduction", "search.scheduler.others", "preflight.max_prior_bpd"]  # fmt: skip


@contextmanager
def little_memory() -> Iterator[None]:
    """Whoever asks for more within the block gets a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def dry(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Status and output of a dry run that took little memory."""
    with little_memory():
        status = sweep.main([*map(str, words), "--dry-run"])
    return status, "".join(capsys.readouterr())


@pytest.mark.parametrize("path", [*(path for path in TRIAL_SETTINGS if path not in SECTIONS), *MORE])
def test_no_number_of_an_experiment_takes_the_memory_that_it_names(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    """It is refused with its path, or it is a factor."""
    more = ["evaluation.ode_nll={images: 5}"] if path.startswith("evaluation.ode_nll.") else []
    of_teacher = path.startswith("loss.teacher.")  # which this objective has not, so that all of it is refused
    more += ["loss.teacher={source: base}"] if of_teacher else []
    for value in ("10000000000", "1" + "0" * 400):
        status, output = dry(capsys, tiny, *more, f"{path}={value}", "--storage", tmp_path / "runs")
        assert status == 0 or (status == 2 and ("loss.teacher" if of_teacher else path) in output), output
        assert status == 2 or path in FACTORS, f"{path} has no bound"


@pytest.mark.parametrize(
    "override",
    [
        "evaluation.fid.samples=10000000",  # what may be asked for is planned in no time
        "search.space.training.steps.grid=" + str(list(range(1, 500))),
        "search={algorithm: random, samples: 1000, space: {training.lr: {uniform: [1.0e-5, 1.0e-3]}}}",
        "training.steps=1000000000",
        "diffusion.T=100000",
    ],
)
@pytest.mark.faults  # most of a minute each
def test_the_largest_that_is_taken_is_planned_in_little_memory(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    status, output = dry(capsys, tiny, override, "--storage", tmp_path / "runs")
    assert status in (0, 2) and "Traceback" not in output


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("search.space.training.steps.int_uniform=[1, 1" + "0" * 400 + "]", "search.space.training.steps"),
        ("search={algorithm: random, samples: 100000, space: {seed: {int_uniform: [0, 9]}}}", "more than 10,000"),
        ("search.space.seed.grid=" + str(list(range(6000))), "more than 10,000"),
        ("training.averages=" + str([k / 100 for k in range(50)]), "at most 16 values"),
        ("model={channels: 8192, multipliers: [64, 64, 64], attention: []}", "weights, more than"),
    ],
)
def test_what_multiplies_is_counted_before_it_is_made(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, told: str
) -> None:
    status, output = dry(capsys, tiny, override, "--storage", tmp_path / "runs")
    assert status == 2 and told in output, output


def test_an_evaluation_of_too_many_blocks_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = Measurement(
        data=DataConfig(source="digits"),
        T=250,
        evaluation=EvaluationConfig(
            nll=NLLConfig(images=30), fid=FIDConfig(samples=1001), ode_nll=ODENLLConfig(images=26)
        ),
    )
    images = Images("x", 1497, 300, 17)
    assert count_blocks(m, images) == len(list_blocks(m, "c", images))
    sampled = m.model_copy(update={"evaluation": EvaluationConfig(nll=NLLConfig(timesteps=10), fid=None)})
    assert count_blocks(sampled, images) == len(list_blocks(sampled, "c", images))
    status, output = dry(capsys, tiny, "evaluation.fid.samples=10000000", "diffusion.T=50")
    assert status == 0, output
    from orchestrator.experiment.preflight import check_evaluation
    from workers.data.sources import describe

    source = describe(DataConfig(source="digits"))
    many = Measurement(data=m.data, T=100_000, evaluation=EvaluationConfig(nll=NLLConfig(images=10**6), fid=None))
    [*_, finding] = [f for f in check_evaluation(many, source.__class__(**{**vars(source), "held_out": 10**6}))]
    assert finding.refused and "40,000,000 blocks" in finding.text


# ---- Files -----------------------------------------------------------------------------------------------------


def bomb(levels: int) -> str:
    """A YAML text of a few lines that stands for 10^levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, levels)]
    return "\n".join(lines)


def test_a_file_that_multiplies_itself_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (bomb(12), "a: &a [*a]", "a: &a {b: *a}"):
        with pytest.raises(NotYAML, match=r"anchors|recursive"):
            read_yaml(text)
        (file := tmp_path / "bomb.yaml").write_text(text)
        status, output = dry(capsys, file)
        assert status == 2 and str(file) in output
        for read, word in ((read_cluster, "--cluster"), (read_prices, "--prices")):
            with pytest.raises(Mistake, match=f"{word} {file}"):
                read(file)
    assert read_yaml("a: &a [1, 2]\nb: *a")[0] == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("module", [sweep, nightly])
def test_an_endless_file_is_not_read_to_its_end(
    module: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with little_memory():
        assert module.main(["/dev/zero", "--storage", str(tmp_path)]) == 2  # type: ignore[attr-defined]
    assert "not a file of settings" in capsys.readouterr().err


def test_neither_prices_nor_clusters_are_read_without_end(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--prices", "/dev/zero"], ["--cluster", "/dev/zero"]):
        status, output = dry(capsys, tiny, *words)
        assert status == 2 and words[0] in output and "not a file of settings" in output


def test_a_cluster_of_a_billion_nodes_is_refused(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "cluster.yaml").read_text()
    (file := tmp_path / "cluster.yaml").write_text(text.replace("max_workers:", "max_workers: 1000000000  #"))
    with pytest.raises(Mistake, match="max_workers: 1000000000 is not a number of nodes"):
        read_cluster(file)


def test_numbers_on_the_command_line_are_bounded(own: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    trial = next((own[1] / "trials").iterdir()).name
    for main, words in ((sample.main, ["--n"]), (evaluate.main, ["--tasks"])):
        assert main([trial, "--storage", str(own[1]), *words, "1000000000"]) == 2
        assert f"{words[0]} 1000000000: 1 to " in capsys.readouterr().err


def test_the_experiments_here_are_within_the_bounds() -> None:
    files: Sequence[Path] = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
    assert [load(file, ["data.source=digits"]) for file in files if file.name != "nightly.yaml"]


def test_who_asks_for_more_than_little_memory_does_not_get_it() -> None:
    with little_memory(), pytest.raises(MemoryError):
        bytearray(2 * MOST_MEMORY)
