"""Kinds of one's own: what of their code is in an id, how it travels, and what is refused. Sweeps with them run in
cluster/test_extending."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from orchestrator.clusters.sending import list_code, write_code
from orchestrator.clusters.submission import make_command_job
from orchestrator.experiment.expand import expand
from orchestrator.experiment.load import load, resolve
from orchestrator.experiment.preflight import check_trial
from orchestrator.experiment.records import Experiment, ExperimentError
from orchestrator.measuring.subjects import Update
from orchestrator.nights.suite import load as load_suite
from orchestrator.planning.changes import CodeChange, find_change
from orchestrator.sweep import main
from workers import code
from workers.bundles import check_code, keep_bundle
from workers.code import drop_digests
from workers.config import Measurement, Trial
from workers.data.sources import describe
from workers.evaluation.blocks import Images, list_blocks, make_protocol_key
from workers.identity import compute_trial_id
from workers.kinds import SAMPLERS
from workers.storage import Storage

LOSSES = '''"""Weightings."""
from workers.kinds import WeightingEntry
from helpers.powers import raise_to

def root(process, loss, own):
    """sqrt(SNR_t)."""
    half = 0.5
    return raise_to(process.snr, half)

ROOT = WeightingEntry(function=root, about="sqrt(SNR_t)")
'''
POWERS = "def raise_to(x, power):\n    return x**power\n"
REST = """
from pydantic import BaseModel, Field
from workers.kinds import MeasureEntry, SamplerEntry, ScheduleEntry, SpaceEntry, VarianceEntry, WeightingEntry

class Settings(BaseModel):
    power: float = Field(default=3.0, gt=0)

CUBIC = ScheduleEntry(function="heavy:cubic", about="a", reads=("beta_start",), settings=Settings)
ORDER = {"order": (int, Field(default=2, le=3))}
SLOW = SamplerEntry(function="heavy:slow", about="b", form="levels", reads=("steps",), settings=ORDER)
ENERGY = MeasureEntry(function="heavy:energy", about="c", lower=("energy",))
NUMBER = 3
TWICE = WeightingEntry(function="heavy:cubic", about="d", settings={"gamma": (int, 1)})
SHORT = ScheduleEntry(function="heavy:short", about="f")
FAILS = ScheduleEntry(function="heavy:fails", about="g")
LOST = WeightingEntry(function="heavy:absent", about="e")
OTHER = SamplerEntry(function="heavy:slow", about="h", form="levels", settings={"order": (int, Field(default=1, le=9))})
UNCOUNTED = SamplerEntry(function="heavy:slow", about="i", form="levels", evaluations=lambda config, steps: steps / 0)
UNCHECKED = ScheduleEntry(function="heavy:cubic", about="j", settings=Settings, check="heavy:find_mistakes")
MEANS = SpaceEntry(function="spaces:Means", about="k", dimensions=1)
WIDER = SpaceEntry(function="spaces:Means", about="l", dimensions=2)
HALF = VarianceEntry(function="spaces:half", about="m")
HEAD = VarianceEntry(function="spaces:half", about="n", learned=True)
"""
SPACES = """import torch

class Means(torch.nn.Module):
    def __init__(self, height, width, channels):
        super().__init__()

    def forward(self, x):
        return x.mean((2, 3))

def half(process, *more): return process.beta / 2
"""
HEAVY = """import numpy as np

def cubic(schedule, T):
    return np.linspace(schedule.beta_start ** (1 / schedule.power), 0.1, T) ** schedule.power

def fails(schedule, T): return T + "1"
def short(schedule, T): return np.linspace(0.1, 0.2, T - 1)
def slow(): return 2
def energy(): return 1
def find_mistakes(schedule, T): yield schedule.nothing
"""
FILES = {"losses.py": LOSSES, "helpers/powers.py": POWERS, "rest.py": REST, "heavy.py": HEAVY, "spaces.py": SPACES}
FILES |= {"other.py": "x = 1\n"}
ROOT_SNR, CUBIC = "loss.weighting=losses:ROOT", "diffusion.schedule={kind: rest:CUBIC, power: 2}"
IMAGES = Images("digest", 1000, 100, 17)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(text)
    (tmp_path / "tiny.yaml").write_text(TINY.partition("search:")[0] + "code: [lib]\n")
    return tmp_path / "tiny.yaml"


def edit(file: Path, name: str, old: str, new: str) -> None:
    path = file.parent / "lib" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def trial_id(experiment: Experiment) -> str:
    return compute_trial_id(experiment.trial, "data")


@pytest.mark.parametrize(
    ("name", "old", "new", "moves"),
    [
        ("losses.py", '"""Weightings."""', "# Weightings, and nothing else.\n\n", False),
        ("losses.py", '"""sqrt(SNR_t)."""', '"""The root."""', False),
        ("losses.py", "process, loss, own)", "process: 'Process', loss, own) -> float", False),
        ("losses.py", "half = 0.5", "half: float = 0.5", False),
        ("other.py", "x = 1", "x = 2", False),
        ("losses.py", "half = 0.5", "half = 0.4", True),
        ("helpers/powers.py", "x**power", "x**power + 0", True),
        ("losses.py", 'about="sqrt', 'about="the sqrt', True),
    ],
)
def test_an_id_counts_what_a_kind_computes(file: Path, name: str, old: str, new: str, moves: bool) -> None:
    plain, with_it = trial_id(load(file)), trial_id(load(file, [ROOT_SNR]))
    assert plain == "d81b4f3a81ddf141" and with_it != plain
    edit(file, name, old, new)
    assert trial_id(load(file)) == plain
    assert (trial_id(load(file, [ROOT_SNR])) != with_it) == moves


def test_a_version_stands_for_the_text_of_its_module_alone(file: Path) -> None:
    edit(file, "losses.py", "def root", "VERSION = 1\n\ndef root")
    before = trial_id(load(file, [ROOT_SNR]))
    edit(file, "losses.py", "0.5", "0.4")
    assert trial_id(load(file, [ROOT_SNR])) == before
    assert "0.4" in code.find_bundle(load(file, [ROOT_SNR]).loss.weighting.partition("@")[2]).modules["losses"].text
    edit(file, "helpers/powers.py", "x**power", "x**power + 0")
    moved = trial_id(load(file, [ROOT_SNR]))
    edit(file, "losses.py", "VERSION = 1", "VERSION = 2")
    assert len({before, moved, trial_id(load(file, [ROOT_SNR]))}) == 3


def test_samplers_spaces_variances_and_metrics_move_what_is_theirs(file: Path) -> None:
    def look(*overrides: str) -> tuple[str, ...]:
        trial = load(file, overrides).trial
        m = Measurement.of(trial)
        folders = {block.kind: block.folder for block in list_blocks(m, "c", IMAGES)}
        of_blocks = (folders[kind] for kind in ("samples", "features", "reference"))
        return compute_trial_id(trial, "data"), *of_blocks, make_protocol_key(m, IMAGES)

    sampler, metric = "evaluation.fid.sampler={kind: rest:SLOW, steps: 5}", "evaluation.fid.also=[rest:ENERGY]"
    space, measured = "evaluation.fid.features=rest:MEANS", "evaluation.variance=rest:HALF"
    wanted = [sampler, metric, space, measured, "diffusion.variance=rest:HALF"]
    before = [look(one) for one in wanted]
    assert look("evaluation.fid.sampler={kind: rest:SLOW, steps: 5, order: 2}") == before[0], "its default"
    assert "-rest.MEANS-" in before[2][2] and ":" not in before[2][2] + before[2][3]
    edit(file, "heavy.py", "return 2", "return 4")  # named by a text alone
    edit(file, "spaces.py", "beta / 2", "beta / 3")
    moved = [[a != b for a, b in zip(then, look(one), strict=True)] for then, one in zip(before, wanted, strict=True)]
    assert moved == [
        [False, True, True, False, True],
        [False, False, False, False, True],
        [False, False, True, True, True],
        [False, False, False, False, True],  # DDIM reads no variance
        [True, False, False, False, False],
    ]


def test_settings_of_ones_own_are_as_others(file: Path) -> None:
    experiment = load(file, [CUBIC, "diffusion.schedule.power=4"])
    assert experiment.diffusion.schedule.model_dump()["power"] == 4.0
    assert Trial.model_validate_json(experiment.trial.model_dump_json()) == experiment.trial
    space, metric = "search.space.diffusion.schedule.power.grid=[2, 3]", "search.metric=eval/energy_classifier"
    found = load(file, ["diffusion.schedule={kind: rest:CUBIC}", space, metric, "evaluation.fid.also=[rest:ENERGY]"])
    assert [v.trial.diffusion.schedule.model_dump()["power"] for v in expand(found)] == [2.0, 3.0]
    kinds = load(
        file, ["search.space.diffusion.schedule.kind.grid=[cosine, rest:CUBIC]", "diffusion.schedule={power: 5}"]
    )
    of_ours, of_own = (v.trial.diffusion.schedule.model_dump() for v in expand(kinds))
    assert "power" not in of_ours and of_own["power"] == 5.0
    file.write_text(
        file.read_text() + "smoke: {diffusion.schedule.kind: 'rest:CUBIC', diffusion.schedule.scale: absolute}\n"
    )
    with pytest.raises(ExperimentError, match=r"power: 5 is without effect on kind: cosine.* take kind: rest:CUBIC"):
        load(file, ["diffusion.schedule={kind: cosine, power: 5}"])
    assert "code" not in resolve(load(ROOT / "experiments/digits.yaml")) and resolve(found)["code"] == ["lib"]


@pytest.mark.parametrize(("given", "orders"), [("", [2, 1]), (", order: 3", [3, 3])])
def test_a_setting_that_two_kinds_have_has_the_default_of_each(file: Path, given: str, orders: list[int]) -> None:
    plain, axis = file.read_text(), "search.space.evaluation.fid.sampler"
    file.write_text(plain.replace("{kind: ddim, steps: 5}", f"{{kind: 'rest:SLOW', steps: 5{given}}}"))
    samplers = [v.trial.evaluation.fid for v in expand(load(file, [f"{axis}.kind.grid=[rest:SLOW, rest:OTHER]"]))]
    assert [fid and fid.sampler.model_dump()["order"] for fid in samplers] == orders
    with pytest.raises(ExperimentError, match=r"sampler\.order: 9 is not a whole number of at most 3"):
        load(file, [f"{axis}.kind.grid=[rest:OTHER]", "evaluation.fid.sampler.order=9"])


REFUSED = {
    "loss.weighting=absent:ROOT": "'absent:ROOT': there is no module absent under {lib} (`code`),",
    "loss.weighting=losses:ROOTS": "{lib}/losses.py has no ROOTS; did you mean 'ROOT'?",
    "loss.weighting=rest:NUMBER": "{lib}/rest.py:12 is of the type int, and a WeightingEntry belongs here",
    "loss.weighting=rest:CUBIC": "{lib}/rest.py:8 is of the type ScheduleEntry, and a WeightingEntry belongs here",
    "loss.weighting=rest:LOST": "{lib}/rest.py:16 names 'heavy:absent', and {lib}/heavy.py has no absent",
    "loss.weighting=rest:TWICE": "rest:TWICE: LossConfig has a setting 'gamma' already; rename it",
    "loss.weighting=broken:X": "{lib}/broken.py:2: SyntaxError: ",
    "loss.weighting=raises:X": "{lib}/raises.py:3: ZeroDivisionError: division by zero",
    "loss.weighting=lacks:X": "{lib}/lacks.py:1: ModuleNotFoundError: No module named 'a_module_that_nobody_has'",
    "loss.weighting=json:X": "{lib}/json.py hides the module json of Python's standard library; rename it",
    "loss.weighting=numpy:X": "{lib}/numpy.py hides the installed module numpy",
    "code=[nowhere]": "code[0]: {folder}/nowhere is no folder",
    "code=[lib, lib2]": "{lib}/losses.py and {folder}/lib2/losses.py are both the module losses; rename one of them",
    "diffusion.schedule={kind: rest:CUBIC, power: -1}": "diffusion.schedule.power: -1 is not a number above 0",
    "diffusion.schedule={kind: rest:CUBIC, powr: 1}": "unknown key; did you mean 'power'?; valid: power, kind",
    "diffusion.schedule={kind: rest:CUBIC, beta_end: 0.1}": "beta_end: 0.1 is without effect on kind: rest:CUBIC",
    "diffusion.schedule={kind: cosine, power: 1}": "diffusion.schedule.power: unknown key",
    "diffusion.schedule={kind: rest:SHORT}": "rest:SHORT makes float64 (49,) of T = 50, in place of float64 (50,)",
    "diffusion.schedule={kind: rest:FAILS}": "{lib}/heavy.py:6: TypeError: ",
    "search.metric=eval/energy": "'eval/energy' is not one of",
    "evaluation.fid.features=losses:ROOT": "is of the type WeightingEntry, and a SpaceEntry belongs here",
    "evaluation.fid.features=clasifier": "did you mean 'classifier'?",
    "evaluation.variance=rest:HEAD": "evaluation.variance: rest:HEAD is made of what a network has learned; take",
    "diffusion.variance=rest:HEAD": "diffusion.variance: rest:HEAD is not trained by loss.objective: mse",
    "evaluation.fid.sampler={kind: rest:UNCOUNTED}": "rest:UNCOUNTED: {lib}/rest.py:18: ZeroDivisionError: division by",
    "diffusion.schedule={kind: rest:UNCHECKED}": "{lib}/heavy.py:10: AttributeError: ",
    "loss.weighting=losses:ROOT@0123456789abcdef": "its code 0123456789abcdef is neither under the folders of `code`",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_is_one_line(setting: str, file: Path) -> None:
    lib = file.parent / "lib"
    for name, text in {
        "broken": "x = 1\ndef (:\n",
        "raises": "x = 0\n\ny = 1 / x\n",
        "lacks": "import a_module_that_nobody_has",
    }.items():
        (lib / f"{name}.py").write_text(text)
    for path in ("lib/json.py", "lib/numpy.py", "lib2/losses.py"):
        if Path(path).stem in setting or ("lib2" in setting and "lib2" in path):
            (file.parent / path).parent.mkdir(exist_ok=True)
            (file.parent / path).write_text(LOSSES)
    overrides = [setting, ROOT_SNR] if "lib2" in setting else [setting]
    with pytest.raises(ExperimentError) as told:
        load(file, overrides)
    assert len(told.value.problems) == 1, told.value.problems
    assert REFUSED[setting].format(lib=lib, folder=file.parent) in told.value.problems[0]


def test_the_command_says_so_with_status_2(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "loss.weighting=losses:ROOTS", "--storage", str(file.parent / "runs")]) == 2
    assert "has no ROOTS" in capsys.readouterr().err and not (file.parent / "runs").exists()


READ = """
import sys
from workers.bundles import look_in
from workers.config import Trial
from workers.kinds import WEIGHTINGS
from workers.storage import Storage
look_in(Storage(sys.argv[1]))
weighting = Trial.model_validate_json(sys.argv[2]).loss.weighting
function = WEIGHTINGS[weighting].load()
print(weighting, function.__code__.co_filename, function(type("Process", (), {"snr": 16.0}), None, None))
"""


def test_code_travels_by_the_storage_and_is_checked_there(file: Path, tmp_path: Path) -> None:
    trial, storage = load(file, [ROOT_SNR]).trial, Storage(tmp_path / "runs")
    for bundle in check_code([trial]):
        keep_bundle(storage, bundle)
    edit(file, "losses.py", "0.5", "0.4")  # the storage has what it was when the file was read

    def read() -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", READ, storage.root, trial.model_dump_json()]
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT)

    kept = tmp_path / "runs/code" / trial.loss.weighting.partition("@")[2] / "losses.py"
    assert read().stdout.split() == [trial.loss.weighting, str(kept), "4.0"]
    kept.write_text(kept.read_text().replace("0.5", "0.7"))
    done = read()
    assert done.returncode and "is neither under the folders" in done.stderr and "losses.py is damaged" in done.stderr


def test_a_job_with_other_code_is_another_job_and_brings_it_along(file: Path, tmp_path: Path) -> None:
    def send() -> tuple[str, list[str], Callable[[Path], None]]:
        search = ["search.space.loss.weighting.grid=[simple, 'losses:ROOT']"]
        job = make_command_job(load(file, search), file, search, "/shared/runs")
        return job.name, shlex.split(job.command), lambda folder: write_code(job.code, folder)

    name, words, write = send()
    assert words[5] == "code=[code]" and name == send()[0]
    write(tmp_path / "code")
    assert {p.name for p in tmp_path.glob("code/**/*.py")} == {"losses.py", "__init__.py", "powers.py"}
    there = load(file, [ROOT_SNR, "code=[code]"])
    assert there.loss.weighting == load(file, [ROOT_SNR]).loss.weighting
    edit(file, "helpers/powers.py", "x**power", "x**power + 0")
    assert send()[0] != name


def test_an_installed_package_counts_by_name_and_version(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, name = tmp_path / "site", "evaluation.fid.sampler={kind: theirs.kinds:SLOW}"

    def install(version: str) -> Trial:
        code.find_distribution.cache_clear()
        info = site / f"theirs-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: theirs\nVersion: {version}\n")
        return load(file, [name]).trial

    (site / "theirs").mkdir(parents=True)
    (site / "theirs/kinds.py").write_text(REST.replace("rest", "theirs.rest"))
    monkeypatch.syspath_prepend(str(site))
    before = install("2.1").evaluation.fid
    assert before and before.sampler.kind == "theirs.kinds:SLOW@theirs-2.1"
    (site / "theirs-2.1.dist-info/METADATA").unlink()
    (site / "theirs-2.1.dist-info").rmdir()
    after = install("2.2").evaluation.fid
    assert after and after.sampler.kind == "theirs.kinds:SLOW@theirs-2.2"
    SAMPLERS.outside.clear()
    with pytest.raises(code.CodeError, match=r"asked for of theirs-2\.1, and theirs-2.2 is installed"):
        SAMPLERS[before.sampler.kind].load()


def test_two_versions_of_a_module_stand_beside_each_other(file: Path) -> None:
    one = load(file, ["evaluation.fid.sampler={kind: rest:SLOW}"]).evaluation.fid
    edit(file, "heavy.py", "return 2", "return 4")
    other = load(file, ["evaluation.fid.sampler={kind: rest:SLOW}"]).evaluation.fid
    assert one and other
    assert [SAMPLERS[fid.sampler.kind].load()() for fid in (one, other, one)] == [2, 4, 2]


def test_a_nightly_file_brings_its_code_and_sends_it_along(file: Path, tmp_path: Path) -> None:
    night = tmp_path / "night.yaml"
    text = (ROOT / "experiments/nightly.yaml").read_text().replace("features: inception", "features: classifier")
    night.write_text(text + "code: [lib]\n")
    asked = ["evaluation.fid.sampler={kind: rest:SLOW, order: 1}", "evaluation.fid.also=[rest:ENERGY]"]
    rules = ["regression.rules=[{metric: eval/energy_classifier, relative: 0.1}]", "regression.against=[last_night]"]
    suite = load_suite(night, [*asked, *rules, "evaluation.fid.sampler.order=3"])
    assert suite.evaluation.fid and suite.evaluation.fid.sampler.model_dump()["order"] == 3
    write_code(list_code([suite]), tmp_path / "sent/code")
    (tmp_path / "sent/night.yaml").write_text(text)
    there = load_suite(tmp_path / "sent/night.yaml", [*asked, *rules, "evaluation.fid.sampler.order=3", "code=[code]"])
    assert there.evaluation == suite.evaluation
    with pytest.raises(ExperimentError, match=r"code\[0\]: .*nowhere is no folder"):
        load_suite(night, ["code=[nowhere]"])


def test_another_sampler_does_not_have_the_settings_of_the_one_before(file: Path) -> None:
    trial = load(file, ["evaluation.fid.sampler={kind: rest:SLOW, order: 3}"]).trial
    own = Measurement.of(trial).model_dump()
    for kind, order in (("ddim", None), ("rest:OTHER", 1)):
        content = Update([f"evaluation.fid.sampler.kind={kind}"], None).of(own)
        fid = Measurement.model_validate(content).evaluation.fid
        assert fid and fid.sampler.model_dump().get("order") == order


@pytest.mark.parametrize(
    ("path", "files", "expected"),
    [
        ("loss.weighting", {"a.py": "1", "b.py": "2"}, CodeChange("is trained again", ("b.py has changed",))),
        ("evaluation.fid.also", {"a.py": "1"}, CodeChange("is measured again", ("b.py has changed",))),
        (
            "evaluation.fid.sampler.kind",
            {"a.py": "1"},
            CodeChange("has its samples drawn again", ("b.py has changed",)),
        ),
        ("evaluation.fid.features", {"a.py": "1"}, CodeChange("is measured again", ("b.py has changed",))),
        ("diffusion.variance", {"a.py": "1"}, CodeChange("is trained again", ("b.py has changed",))),
    ],
)
def test_what_has_changed_is_told_by_file(path: str, files: dict[str, str], expected: CodeChange) -> None:
    now, before = {path: ["m:X@new"]}, {path: ["m:X@old"]}
    then = {"old": {"a.py": "1", "b.py": "1"}}
    assert find_change(now, {"new": files}, before, then) == expected
    assert find_change(now, {"new": files}, now, then) is None and find_change(now, {"new": files}, {}, {}) is None


SHAPES = {
    "evaluation.fid.features=rest:WIDER": "built for 8 x 8 images of 1 channels, makes torch.float32 (2, 1)",
    "evaluation.variance=rest:HALF": "",
    "diffusion={T: 50, variance: rest:HEAD}": "rest:HEAD makes torch.float64 (50,), where numbers (2, 3, 4, 4) are",
}


@pytest.mark.parametrize("setting", SHAPES)
def test_what_needs_torch_is_looked_at_before_ray_starts(setting: str, file: Path) -> None:
    experiment = load(file, [setting, *(["loss.objective=kl"] if "HEAD" in setting else [])])
    found = [finding.text for finding in check_trial(experiment, experiment.trial, describe(experiment.data))]
    told = [drop_digests(text) for text in found if "rest:" in text]
    assert [SHAPES[setting] in text for text in told] == [True] * bool(SHAPES[setting]), found
