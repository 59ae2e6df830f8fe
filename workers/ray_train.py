"""What is private of Ray Train: the place to look at when Ray is upgraded, beside `workers.ray_private`."""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


class _MeetingInAFolder(_TorchBackend):
    """Workers of one machine find each other by a file: at an address, torch would listen to other machines too."""

    def on_start(self, worker_group: Any, backend_config: "MeetInAFolder") -> None:
        gpus, path = (
            worker_group.get_resources_per_worker().get("GPU", 0),
            Path(backend_config.folder, uuid.uuid4().hex),
        )
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend="nccl" if gpus else "gloo",
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=path.as_uri(),
                )
                for rank in range(len(worker_group))
            ]
        )


@dataclass
class MeetInAFolder(TorchConfig):
    folder: str = ""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _MeetingInAFolder
