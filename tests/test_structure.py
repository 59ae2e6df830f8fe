"""The house's order: a module imports only from those above it here, and heavy libraries stay in their rooms."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = """
    workers.config workers.speed workers.storage workers.noise workers.mirror workers.formats workers.data
    workers.pixels workers.journal
    workers.unet_config workers.unet
    workers.diffusion.schedules workers.diffusion.process workers.diffusion.predictions
    workers.diffusion.bound workers.diffusion.objectives workers.diffusion.timesteps workers.diffusion.flow
    workers.diffusion.samplers workers.diffusion.gaussian
    workers.ledger workers.likelihood workers.frechet workers.fidelity workers.inception workers.features
    workers.diffusers_config workers.checkpoint workers.blocks workers.evaluation workers.summary
    workers.pictures
    workers.canaries workers.training workers.calibration workers.tasks
    orchestrator.settings orchestrator.experiment orchestrator.preflight orchestrator.search orchestrator.plan
    orchestrator.profiles orchestrator.subjects orchestrator.terminal orchestrator.comparing
    orchestrator.clusters.cluster orchestrator.clusters.cost orchestrator.clusters.calibration
    orchestrator.clusters.submission
    orchestrator.execution.session orchestrator.execution.training orchestrator.execution.evaluations
    orchestrator.measuring
    orchestrator.reports.results orchestrator.reports.archive orchestrator.reports.importance
    orchestrator.reports.plots orchestrator.reports.page
    orchestrator.tracking.provenance orchestrator.tracking.server orchestrator.tracking.line
    orchestrator.tracking.views orchestrator.tracking.model_code orchestrator.tracking.models
    orchestrator.tracking.tracker orchestrator.tracking.registry orchestrator.tracking.record
    orchestrator.canary
    orchestrator.nights.schedule orchestrator.nights.suite orchestrator.nights.hooks
    orchestrator.nights.decisions orchestrator.nights.report orchestrator.nights.shift
    orchestrator.controller
    orchestrator.sweep orchestrator.status orchestrator.report orchestrator.evaluate orchestrator.compare
    orchestrator.sample orchestrator.nightly
    orchestrator.ui orchestrator.schema orchestrator.api
""".split()
ROOMS = {
    "ray": {
        "workers.tasks",
        "orchestrator.clusters.submission",
        "orchestrator.execution.session",
        "orchestrator.execution.training",
        "orchestrator.execution.evaluations",
    },
    "mlflow": {f"orchestrator.tracking.{name}" for name in ("tracker", "server", "models", "model_code")},
    "rich": {
        "orchestrator.reports.results",
        "orchestrator.terminal",
        "orchestrator.controller",
        "orchestrator.evaluate",
        "orchestrator.canary",
        "orchestrator.status",
        "orchestrator.nights.shift",
    },
    "sklearn": {"workers.formats", "workers.features", "orchestrator.reports.importance"},
    "optuna": {"orchestrator.search"},
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
    assert set(ORDER) == set(modules())


@pytest.mark.parametrize("name", ORDER)
def test_imports_only_from_above(name: str) -> None:
    used = imported(modules()[name]) & set(ORDER)
    below = {other for other in used if ORDER.index(other) >= ORDER.index(name)}
    assert not below, f"{name} imports {below}"


@pytest.mark.parametrize("library", ROOMS)
def test_a_library_stays_in_its_rooms(library: str) -> None:
    users = {name for name, file in modules().items() if any(x.split(".")[0] == library for x in imported(file))}
    assert users == ROOMS[library]
