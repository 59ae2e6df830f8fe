"""What is written into one run of MLflow. A call that is cut off can be made again: it leaves nothing twice."""

import hashlib
import json
import logging
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.tracking.catalogue import Catalogue, Run
from orchestrator.tracking.line import CallLine
from orchestrator.tracking.shipment import LoggedDataset, Status, Value, format_param
from workers.journal import read_image

log = logging.getLogger(__name__)

BATCH = 100  # points per call
PARAM_LIMIT, TAG_LIMIT = 6000, 8000  # characters, beyond which MLflow cuts without a word


class Writer:
    """Writes into the runs of a catalogue. What cannot be had any more is refused in `line`."""

    def __init__(self, catalogue: Catalogue, line: CallLine) -> None:
        self._catalogue, self._line = catalogue, line

    def resume(self, run: Run) -> None:
        if run.status != "RUNNING":
            self._catalogue.client.update_run(run.run_id, status="RUNNING")
            run.status = "RUNNING"

    def log_params(self, run: Run, name: str, params: Mapping[str, Value]) -> dict[str, str]:
        """Logs the params that the run is without. Returns a tag for each that has another value there, which stays."""
        from mlflow.entities import Param

        changed = {}
        wanted = {key: self._fit_text(run, key, format_param(value), PARAM_LIMIT) for key, value in params.items()}
        for key in wanted.keys() & run.params.keys():
            if wanted[key] != run.params[key]:  # a param cannot be changed once it is logged
                log.warning("%s: MLflow keeps %s=%s; it is now %s", name, key, run.params[key], wanted[key])
                changed[f"changed.{key}"] = wanted[key]
        new = [Param(key, text) for key, text in wanted.items() if key not in run.params]
        for start in range(0, len(new), BATCH):
            self._catalogue.client.log_batch(run.run_id, params=new[start : start + BATCH])
        run.params = wanted | run.params
        return changed

    def tag(self, run: Run, tags: Mapping[str, str]) -> None:
        """Sets the tags that have other values there."""
        from mlflow.entities import RunTag

        texts = {key: self._fit_text(run, key, text, TAG_LIMIT) for key, text in tags.items()}
        new = [RunTag(key, text) for key, text in texts.items() if run.tags.get(key) != text]
        for start in range(0, len(new), BATCH):
            self._catalogue.client.log_batch(run.run_id, tags=new[start : start + BATCH])
        run.tags |= texts

    def _fit_text(self, run: Run, key: str, text: str, limit: int) -> str:
        """`text`, or where MLflow would cut it without a word: its beginning, and the whole of it as an artifact."""
        if len(text) <= limit:
            return text
        path = f"long/{key}.txt"
        self.log_artifact(run, text.encode(), path)
        return f"{text[: limit - 500 if limit == TAG_LIMIT else 100]} ... (the whole: artifact {path})"

    def log_input(self, run: Run, used: LoggedDataset) -> None:
        from mlflow.entities import Dataset as MlflowDataset
        from mlflow.entities import DatasetInput, InputTag

        digest = used.digest[:36]  # the longest that MLflow takes
        if (used.name, digest) in run.datasets:
            return
        images = {"type": "tensor", "tensor-spec": {"dtype": used.dtype, "shape": [-1, *used.shape]}}
        dataset = MlflowDataset(
            name=used.name,
            digest=digest,
            source_type="local",
            source=json.dumps({"uri": used.source}),
            schema=json.dumps({"mlflow_tensorspec": {"features": json.dumps([images]), "targets": None}}),
            profile=json.dumps(dict(used.profile)),
        )
        self._catalogue.client.log_inputs(
            run.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", used.context)])]
        )
        run.datasets.add((used.name, digest))

    def list_points(self, run: Run, entry: Mapping[str, Any]) -> list[Any]:
        """The points (Metrics of MLflow) of a line of the journal that the run was not found to have."""
        from mlflow.entities import Metric

        step, at = entry["step"], entry["time_ms"]
        finite = self._keep_finite(run, entry.get("metrics", {}), step)
        return [Metric(name, value, at, step) for name, value in finite.items() if (step, name) not in run.points]

    def log_points(self, run: Run, points: list[Any]) -> None:
        self._catalogue.client.log_batch(run.run_id, metrics=points)

    def log_metrics(self, run: Run, metrics: Mapping[str, float], step: int, time_ms: int) -> None:
        """Points that are in no journal. Those that the run has already are not logged again."""
        from mlflow.entities import Metric

        finite = self._keep_finite(run, metrics, step)
        logged = {
            (point.key, point.step, point.value)
            for key in finite.keys() & run.metrics
            for point in self._catalogue.client.get_metric_history(run.run_id, key)
        }
        new = [Metric(key, value, time_ms, step) for key, value in finite.items() if (key, step, value) not in logged]
        if new:
            self._catalogue.client.log_batch(run.run_id, metrics=new)
            run.metrics |= finite.keys()

    def _keep_finite(self, run: Run, metrics: Mapping[str, Any], step: int) -> dict[str, float]:
        """MLflow would turn infinity into 1.8e308: what is not finite becomes a tag, the first time it happens."""
        values = {key: math.nan if value is None else float(value) for key, value in metrics.items()}
        odd = {
            f"nonfinite.{key}": f"{value} at step {step}" for key, value in values.items() if not math.isfinite(value)
        }
        self.tag(run, {key: text for key, text in odd.items() if key not in run.tags})
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def log_image(self, run: Run, entry: Mapping[str, Any]) -> None:
        """As MlflowClient.log_image names its files, but by what tells them apart: a repeat writes over itself."""
        from io import BytesIO

        from mlflow.tracking.multimedia import compress_image_size
        from PIL import Image

        unique = run.make_image_id(entry)
        if unique in run.files:
            return
        png = read_image(self._catalogue.storage, entry)
        if png is None:  # told, and no reason to hold back the points after it
            self._line.refuse(f"image {entry['path']}: it is gone or damaged in {self._catalogue.storage.find_url()}")
            return
        key = re.sub(r"[^\w\-. ]", "~", entry["image"], flags=re.ASCII)
        stem = f"images/{key}+step+{entry['step']}+timestamp+{entry['time_ms']}+{unique}"
        small = BytesIO()
        compress_image_size(Image.open(BytesIO(png))).save(small, format="WEBP")
        self._upload(run, png, f"{stem}.png")
        self._upload(run, small.getvalue(), f"{stem}+compressed.webp")
        if "mlflow.loggedImages" not in run.tags:
            self._catalogue.client.set_tag(run.run_id, "mlflow.loggedImages", "True")
            run.tags["mlflow.loggedImages"] = "True"

    def log_artifact(self, run: Run, content: bytes | Path, path: str) -> None:
        mark = hashlib.sha256(content if isinstance(content, bytes) else content.read_bytes()).hexdigest()[:16]
        if run.artifacts.get(path) != mark:
            self._upload(run, content, path)
            run.artifacts[path], self._catalogue.is_changed = mark, True

    def _upload(self, run: Run, content: bytes | Path, path: str) -> None:
        folder, _, file = path.rpartition("/")
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary, file)
            if isinstance(content, bytes):
                local.write_bytes(content)
            else:
                shutil.copyfile(content, local)
            self._catalogue.client.log_artifact(run.run_id, str(local), folder or None)

    def close(
        self, run: Run, status: Status, note: str = "", end_ms: int | None = None, tags: Mapping[str, str] | None = None
    ) -> None:
        self.tag(run, {**(tags or {}), **({"mlflow.note.content": note} if note else {})})
        if run.status != status:
            self._catalogue.client.set_terminated(run.run_id, status, end_ms)
            run.status = status
