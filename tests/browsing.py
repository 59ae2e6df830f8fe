"""MLflow's own pages on a storage, in Debian's Chromium: what stands on them, and their pictures.

`python tests/browsing.py STORAGE SWEEP FOLDER` (make pictures) takes the pictures of docs/, and of a sweep over the
scale of guidance a figure of it.
"""

import base64
import html
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from playwright.sync_api import Page, sync_playwright

from orchestrator import load_results, open_model, ui
from workers.data.pixels import draw_grid

CHROMIUM = shutil.which("chromium")
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
).split()
# MLflow opens its assistant beside everything the first time that a browser comes.
CLOSED = """
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
"""
ML = "workflowType=machine_learning"
WAIT_MS = 60_000


@dataclass(frozen=True)
class Recorded:
    """What MLflow has of a sweep, by its API: what the pages are held against."""

    sweep: str
    experiment: str
    tags: dict[str, str]  # of the experiment
    parent: Run
    trials: list[Run]  # best first

    @staticmethod
    def of(storage: Path, sweep: str) -> "Recorded":
        client = MlflowClient(f"sqlite:///{storage.absolute()}/mlflow.db")
        experiment = client.get_experiment_by_name(sweep)
        assert experiment, f"{storage} has no sweep {sweep}"
        runs = client.search_runs([experiment.experiment_id], order_by=["metrics.`eval/nll_bpd`"])
        trials = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
        [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        return Recorded(sweep, experiment.experiment_id, experiment.tags, parent, trials)

    def names(self, **tags: str) -> list[str]:
        return [str(run.info.run_name) for run in self.trials if tags.items() <= run.data.tags.items()]

    def view(self, title: str) -> str:
        """The page of a shared view by its title."""
        views = {k: json.loads(text) for k, text in self.tags.items() if k.startswith("mlflow.sharedViewState.")}
        [key] = [key.rpartition(".")[2] for key, view in views.items() if view["name"] == f"{self.sweep}: {title}"]
        return f"#/experiments/{self.experiment}/runs?{ML}&viewStateShareKey={key}&compareRunsMode=CHART"

    def by_setting(self) -> str:
        """The title of the view by the first of the settings."""
        return re.findall(r"\[(by .+?)\]", self.tags["mlflow.note.content"])[0]

    def compare_page(self) -> str:
        """MLflow's older page that compares runs."""
        ids = quote(json.dumps([run.info.run_id for run in self.trials]))
        return f"#/compare-runs?runs={ids}&experiments={quote(json.dumps([self.experiment]))}&{ML}"

    def run_page(self, run: Run) -> str:
        return f"#/experiments/{self.experiment}/runs/{run.info.run_id}?{ML}"

    def model_page(self) -> str:
        return f"#/models/{self.sweep}?{ML}"


@contextmanager
def served(storage: Path) -> Iterator[str]:
    """The address of the UI's server on the storage."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ui.make_server_command(storage, port), env={**os.environ, **ui.LIGHT}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while True:
            assert server.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


@contextmanager
def browser() -> Iterator["Browser"]:
    """A fresh Chromium. Its pages are tall, as charts are drawn when they come into sight."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        context = chromium.new_context()
        context.set_default_timeout(WAIT_MS)
        context.add_init_script(CLOSED)
        yield Browser(context)
        chromium.close()


class Browser:
    def __init__(self, context: Any) -> None:
        self._context = context

    @contextmanager
    def page(self, base: str, where: str, height: int = 2600, width: int = 1500) -> Iterator[Page]:
        page = self._context.new_page()
        page.set_viewport_size({"width": width, "height": height})
        page.goto(f"{base}{where}" if base == "about:" else f"{base}/{where}")
        yield page
        page.close()


# What stands on a page. Each waits for it, and fails where it does not come.

PLOTS = """() => [...document.querySelectorAll('.js-plotly-plot')].filter(p => (p.data || []).length).map(plot => {
    const title = axis => axis && axis.title ? axis.title.text || axis.title : '', first = plot.data[0];
    return {kind: first.type, x_title: title(plot.layout.xaxis), y_title: title(plot.layout.yaxis),
            traces: [...new Set(plot.data.map(trace => trace.name))], x: [...(first.x || [])], y: [...(first.y || [])],
            colours: first.marker ? first.marker.color : null};
})"""
IMAGES = """() => [...document.images].filter(
    image => image.src.includes('get-artifact') && image.naturalWidth && image.getBoundingClientRect().width).length"""


def plots(page: Page, n: int, **wanted: str) -> list[dict[str, Any]]:
    """The plots that have what is wanted, such as x_title="eval/nll_bpd": n or more."""
    chosen = f"wanted => ({PLOTS})().filter(plot => Object.entries(wanted).every(([k, v]) => plot[k] === v))"
    page.wait_for_function(f"([wanted, n]) => ({chosen})(wanted).length >= n", arg=[wanted, n])
    return list(page.evaluate(chosen, wanted))


def plot(page: Page, x: str, y: str) -> dict[str, Any]:
    """The scatter plot of y against x."""
    [found] = plots(page, 1, x_title=x, y_title=y)
    return found


def axes(page: Page) -> list[str]:
    """The labels of the parallel coordinates, in which MLflow cuts long ones short."""
    labels = page.locator(".parcoords .dimension .label")
    labels.first.wait_for()
    return [str(label.text_content()) for label in labels.all()]


def images(page: Page, n: int) -> int:
    """How many logged images are seen: n or more."""
    page.wait_for_function(f"n => ({IMAGES})() >= n", arg=n)
    return int(page.evaluate(IMAGES))


def texts(page: Page, *wanted: str) -> None:
    for text in wanted:
        page.get_by_text(text).first.wait_for()


SCALE = "evaluation.fid.sampler.guidance"
SHOWN = (0.0, 1.0, 2.0, 5.0)  # scales of which samples are shown


def take_guidance(storage: Path, sweep: str, folder: Path) -> None:
    """guidance.png: the sweep's own plots by the scale, and below them samples of the guided network, a row a class."""
    trials = load_results(sweep, storage)
    guided = trials.loc[trials[SCALE].ne(1), "trial"].iloc[0].partition("-")[0]
    model = open_model(guided, storage)
    labels = [label for label in range(len(model.class_names)) for _ in range(10)]
    plots = [(p.stem, p.read_bytes()) for p in sorted((storage / f"sweeps/{sweep}").glob("guidance-*.png"))]
    grids = [
        (f"scale {scale:g}", draw_grid(torch.from_numpy(drawn), 256))
        for scale in SHOWN
        for drawn in [model.sample(len(labels), steps=20, labels=labels, guidance=scale)]
    ]
    rows = (
        "".join(
            f"<figure style='margin:8px'><img width={width} src='data:image/png;base64,"
            f"{base64.b64encode(png).decode()}'><figcaption>{html.escape(name)}</figcaption></figure>"
            for name, png in row
        )
        for row, width in ((plots, 480), (grids, 350))
    )
    style = "display:flex;font:15px sans-serif;text-align:center"
    with browser() as chromium, chromium.page("about:", "blank", 672, 1490) as page:
        page.set_content("".join(f"<div style='{style}'>{row}</div>" for row in rows))
        page.screenshot(path=folder / "guidance.png", full_page=True)


def main(storage: Path, sweep: str, folder: Path) -> None:
    if any((storage / f"sweeps/{sweep}").glob("guidance-*.png")):
        return take_guidance(storage, sweep, folder)
    recorded = Recorded.of(storage, sweep)
    images_shown = min(len(recorded.trials), 10)  # MLflow shows the pictures of ten runs at most
    with served(storage) as base, browser() as chromium:

        def shoot(name: str, where: str, width: int, height: int, ready: Callable[[Page], object]) -> None:
            with chromium.page("file://" if where.startswith("/") else base, where.lstrip("/"), height, width) as page:
                ready(page)
                page.wait_for_timeout(1000)  # for what moves to come to rest
                page.screenshot(path=folder / f"{name}.png")

        def compared(page: Page) -> None:
            images(page, images_shown)
            plots(page, 3, kind="scatter")

        by_setting, report = (
            recorded.view(recorded.by_setting()),
            str(storage.absolute() / f"sweeps/{sweep}/report.html"),
        )
        shoot("mlflow", recorded.view("all trials"), 1500, 2720, compared)
        shoot("mlflow-setting", by_setting, 1200, 900, lambda page: plots(page, 2, kind="bar"))
        shoot("mlflow-model", recorded.model_page(), 1200, 760, lambda page: texts(page, "candidate"))
        shoot("report", report, 1280, 2420, lambda page: texts(page, "What matters"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
