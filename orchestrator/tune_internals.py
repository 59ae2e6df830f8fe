"""What is private of Ray Tune: the place to look at when Ray is upgraded, beside `ray_internals`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.air._internal import usage
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial

_DEFAULTS, _COPIED = class_cache.DEFAULT_ENV_VARS, class_cache.ENV_VARS_TO_PROPAGATE


def choose_environments(local: bool) -> None:
    """Chooses the variables that Tune copies into the environments of its actors.

    The keys of AWS are not among them, as Ray logs these environments in clear, for all to read: nodes have keys of
    their own. The processes of a local Ray inherit all that is ours. With nothing to copy, an actor is one of the
    processes that are there already, and Ray makes none for it.
    """
    class_cache.DEFAULT_ENV_VARS = {} if local else _DEFAULTS
    class_cache.ENV_VARS_TO_PROPAGATE = set() if local else {name for name in _COPIED if not name.startswith("AWS_")}


def count_no_loggers() -> None:
    """Keeps Tune from loading the integrations of all loggers that it knows, only to count which of them are used.

    It would wait for MLflow, which loads meanwhile.
    """
    usage.tag_callbacks = lambda _: False


@contextmanager
def treat_out_of_memory_as_death() -> Iterator[None]:
    """Has Tune treat a trial whose process Ray killed on a full machine as one whose process died.

    Ray's memory monitor gives the calls of such a process an error that Tune 2.60 does not count among the deaths of
    an actor, and ends the whole sweep by.
    """
    task_failed, first_result = RayActorManager._actor_task_failed, Trial._get_default_result_or_future

    def failed(manager: RayActorManager, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, ray.exceptions.OutOfMemoryError):
            why = f"its machine was full, and Ray ended its process: {str(exception).splitlines()[0]}"
            exception = ray.exceptions.RayActorError(error_msg=why)
        task_failed(manager, tracked_actor_task, exception)

    def result(trial: Trial) -> dict[str, Any] | None:
        try:
            return first_result(trial)
        except ray.exceptions.OutOfMemoryError:  # it died before it had told anything
            trial._default_result_or_future = None
            return None

    RayActorManager._actor_task_failed, Trial._get_default_result_or_future = failed, result
    try:
        yield
    finally:
        RayActorManager._actor_task_failed, Trial._get_default_result_or_future = task_failed, first_result
