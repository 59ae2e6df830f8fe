"""The Ray of this machine, started ahead of its session."""

import os
import re
import time

import pytest
import ray
from conftest import title

from orchestrator.execution import local_ray
from orchestrator.execution.loss import find_marked
from orchestrator.execution.session import open_session


@ray.remote(num_cpus=1)
def look() -> tuple[int, bool, int, bool]:
    """The process, whether PyTorch is there before it is asked for, in how many threads it computes, and a secret."""
    import sys

    loaded = "torch" in sys.modules
    import torch

    return os.getpid(), loaded, torch.get_num_threads(), "PLANTED" in os.environ


def test_a_session_takes_over_what_was_started_ahead_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PLANTED", "1")
    with local_ray.start_early():
        [early] = local_ray._early
        node, marked = ray.get_runtime_context().get_node_id(), find_marked(early.marker)
        assert marked and "OMP_NUM_THREADS" not in os.environ
        assert not [pid for pid in marked if re.search(r"/(dashboard|monitor|log_monitor)\.py", title(pid))]
        time.sleep(3)  # the command loads, and Ray looks whether processes are without work
        with local_ray.start_early():  # nothing more, as one is there
            assert local_ray._early == [early]
        with open_session(None):
            assert not local_ray.is_early() and ray.get_runtime_context().get_node_id() == node
            pid, *found = ray.get(look.remote())
            assert pid in marked and found == [True, 1, True]
            with local_ray.start_early(), open_session(None):
                assert ray.get_runtime_context().get_node_id() == node
        assert not ray.is_initialized() and not find_marked(early.marker)


def test_what_no_session_takes_over_is_ended() -> None:
    with local_ray.start_early():
        [early] = local_ray._early
    assert not ray.is_initialized() and not find_marked(early.marker) and not local_ray.is_early()
