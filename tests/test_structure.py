"""The house's order: modules import only from those above them here, and heavy libraries stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each line is a room, `workers` or `orchestrator` themselves where it names none; state stands above what uses it.
ORDER = """
    workers: seals syntax code entries process_kinds kinds sections sides bits mistakes warm_start posthoc gpu_parts
    workers: model_settings diffusion_settings loss_settings config layout identity speed signals disk remote storage
    workers: bundles sharing locks noise memos pulse precision journal shapes pausing students passes classes
    workers.data: splits hub mirror cache decoding tree shards vectors built_in arrays parquet_files tar_files cifar10
    workers.data: idx formats locate survey order ranges sources proofs intake windows dataset pixels
    workers: consent
    workers.network: unet_config autoencoder_config attention unet build
    workers.diffusion: schedules laws process formulations guidance predictions bound objectives distillation
    workers.diffusion: timesteps flow samplers gaussian ledger hierarchy likelihood integral
    workers.network: autoencoder discriminator generator manifest diffusers_config student_config pipeline_index
    workers.network: weights averages checkpoint latent_space
    workers.evaluation: frechet fidelity inception blocks features loaded make rates nll summary pictures
    workers.evaluation: canaries
    workers: peak world compiling first_weights latents lessons denoising studying adversarial autoencoding playing
    workers: learner conformity training calibration
    workers: ray_private jobs signs hosts ray_train data_parallel tasks
    orchestrator: interrupts streams cli ray_internals tune_internals
    orchestrator.experiment: settings metrics records starts expand needs continuous distilling told
    orchestrator.experiment: measured_weights check load
    orchestrator.experiment: effort preflight dry_run profiles
    orchestrator.state: rows events saved
    orchestrator.planning: changes decide deadline packing place makespan search
    orchestrator.measuring: differences seeds slowness subjects
    orchestrator.output: terminal speed_table table importance findings markdown figures graph curves page
    orchestrator.clusters: cluster allocation cost throughput sending slurm attaching submission
    orchestrator: command
    orchestrator.execution: loss local_ray hangs session halt
    orchestrator.execution: scratch admission early_stopping trials evaluations measurements
    orchestrator.tracking: provenance glance moves server line views model_code models shipment catalogue
    orchestrator.tracking: writer shipper tracker registry runs outside
    orchestrator: canary origins
    orchestrator.nights: calendar suite hooks decisions night_page shift
    orchestrator: standing telling progress controller
    orchestrator: sweep status report evaluate compare sample nightly conform ui schema completion api __main__
"""
MODULES = [
    f"{room}.{name}"
    for line in ORDER.split("\n")
    if line.strip()
    for room, _, names in [line.strip().partition(":")]
    for name in names.split()
]
ROOMS = {
    "ray": {
        *(f"workers.{name}" for name in ("ray_private", "ray_train", "signs", "hosts", "data_parallel", "tasks")),
        *(
            f"orchestrator.execution.{name}"
            for name in ("local_ray", "hangs", "session", "admission", "early_stopping", "trials", "evaluations")
        ),
        "orchestrator.ray_internals",
        "orchestrator.tune_internals",
        "orchestrator.clusters.submission",
    },
    "mlflow": {f"orchestrator.tracking.{name}" for name in ("catalogue", "writer", "server", "models", "model_code")},
    "rich": {
        *(f"orchestrator.output.{name}" for name in ("table", "terminal")),
        *(f"orchestrator.{name}" for name in ("controller", "telling", "evaluate", "canary", "status")),
        "orchestrator.nights.shift",
    },
    "sklearn": {"workers.data.built_in", "workers.evaluation.features", "orchestrator.output.importance"},
    "optuna": {"orchestrator.planning.search"},
}
MOST_LINES = {"file": 400, "function": 60, "class": 250}
MOST_POSITIONAL = 5  # arguments of a function, beside self; what is beyond that is keyword-only
# What is private of Ray.
OF_RAY = {
    "workers.ray_private",
    "workers.ray_train",
    "orchestrator.ray_internals",
    "orchestrator.tune_internals",
}


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("workers/**/*.py"), *ROOT.glob("orchestrator/**/*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files if f.name != "__init__.py"}


def imported(file: Path) -> set[str]:
    """Every module that a file imports anywhere, with what it takes from a package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_order_names_every_module() -> None:
    assert set(MODULES) == set(modules()) and len(set(MODULES)) == len(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_from_above(name: str) -> None:
    used = imported(modules()[name]) & set(MODULES)
    below = {other for other in used if MODULES.index(other) >= MODULES.index(name)}
    assert not below, f"{name} imports {below}"


@pytest.mark.parametrize("library", ROOMS)
def test_a_library_stays_in_its_rooms(library: str) -> None:
    users = {name for name, file in modules().items() if any(x.split(".")[0] == library for x in imported(file))}
    assert users == ROOMS[library]


def test_what_is_private_of_ray_is_in_its_modules_alone() -> None:
    def private(name: str) -> bool:
        parts = name.split(".")
        return parts[0] == "ray" and any(part.startswith("_") for part in parts)

    assert {name for name, file in modules().items() if any(map(private, imported(file)))} <= OF_RAY


def test_no_two_modules_have_one_name() -> None:
    """Nor names that differ by an s or an -ing."""
    stems: dict[str, list[str]] = {}
    for name in modules():
        stem = name.rpartition(".")[2]
        stems.setdefault(stem.removesuffix("s").removesuffix("ing").rstrip("e"), []).append(name)
    assert [names for names in stems.values() if len(names) > 1] == []


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_too_large_to_be_read_at_a_glance(name: str) -> None:
    text = modules()[name].read_text()
    sizes, positional = [("file", name, len(text.splitlines()))], []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            sizes.append((kind, node.name, (node.end_lineno or node.lineno) - node.lineno + 1))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            positional.append((node.name, len([n for n in names if n not in ("self", "cls")])))
    assert not [each for each in sizes if each[2] > MOST_LINES[each[0]]]
    assert not [each for each in positional if each[1] > MOST_POSITIONAL]


def test_no_file_of_the_tests_and_benchmarks_is_too_long() -> None:
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {name: count for name, count in lines.items() if count > MOST_LINES["file"]} == {}


def test_no_two_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    for name, file in modules().items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(name)
    assert {name: where for name, where in found.items() if len(where) > 1} == {}
