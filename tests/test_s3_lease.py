"""One driver a sweep, where the lease lies on S3."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest
import s3_storage

from orchestrator.nights.shift import _lock_suite
from workers import locks
from workers.config import Mistake
from workers.locks import Leases, lock
from workers.storage import Storage

ROOT = Path(__file__).parent.parent

HOLD = """
import sys
from workers import locks
from workers.storage import Storage
locks.BEAT_S, locks.SETTLE_S = 0.2, 0.1
with locks.lock(Storage(sys.argv[1]), "sweeps/a/lock"):
    print("held", flush=True)
    sys.stdin.read()
"""

endpoint = s3_storage.endpoint
own = s3_storage.own


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BEAT_S": 0.2, "STALE_S": 3.0, "SETTLE_S": 0.1}.items():
        monkeypatch.setattr(locks, name, value)


def test_a_lease_refuses_a_second_process_until_the_first_dies(own: Storage, brisk: None) -> None:
    command = [sys.executable, "-c", HOLD, own.root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Mistake, match=f"in use by process {holder.pid} on "), lock(own, "sweeps/a/lock"):
            pass
        with lock(own, "sweeps/b/lock"):
            pass
        holder.kill()
    assert own.exists("sweeps/a/lock")
    with lock(own, "sweeps/a/lock"):  # abandoned: taken over
        pass
    assert not own.exists("sweeps/a/lock")
    with lock(own, "sweeps/a/lock"):  # freed at the end of the `with`
        pass


def test_a_lease_that_a_process_before_this_one_left_to_its_owner_is_taken_at_once(
    own: Storage, brisk: None, caplog
) -> None:
    left = {"holder": "another", "who": "process 1 on h (sweep x)", "owner": "sweep x", "beat": 7}
    own.write_sealed("locks/a", left)
    leases = Leases(own)
    assert leases.find_holder("locks/a") == left["who"] and leases.find_holder("locks/a", "sweep x") == ""
    with lock(own, "locks/a", "sweep x"):
        assert leases.find_holder("locks/a", "sweep y").startswith(f"process {os.getpid()} on ")
    assert leases.find_holder("locks/a") == "" and "seeing for" not in caplog.text


def test_two_nights_of_one_suite_are_not_run_beside_each_other(own: Storage, brisk: None) -> None:
    with _lock_suite(own, "nightly/small", date(2026, 3, 1)):
        refused = pytest.raises(Mistake, match="2026-03-02 is skipped: that of 2026-03-01 is still running")
        with refused, _lock_suite(own, "nightly/small", date(2026, 3, 2)):
            pass
    with _lock_suite(own, "nightly/small", date(2026, 3, 2)):
        assert own.read_sealed("nightly/small/running.json")["day"] == "2026-03-02"


def test_of_two_that_take_a_lease_in_the_same_moment_one_gets_it(own: Storage, brisk: None) -> None:
    got, together = [], threading.Barrier(2)

    def take(name: str) -> str:
        together.wait()
        try:
            with lock(Storage(own.root), "lock"):
                got.append(name)
                together.wait()
        except Mistake as mistake:
            together.wait()
            return str(mistake)
        return ""

    with ThreadPoolExecutor(2) as pool:
        output = list(pool.map(take, "ab"))
    assert len(got) == 1 and sum("in use by" in text for text in output) == 1


def test_a_damaged_lease_is_taken_over_where_nobody_writes_it_again(own: Storage, brisk: None, caplog) -> None:
    own.write("lock", b'{"holder": ')
    with lock(own, "lock"):
        assert own.read_sealed("lock")["who"].startswith("process ")
    assert "lock is damaged" in caplog.text and "is held by somebody" in caplog.text


def test_a_holder_that_lost_its_lease_is_interrupted(own: Storage, brisk: None, caplog) -> None:
    with pytest.raises(KeyboardInterrupt), lock(own, "lock"):
        own.write_sealed("lock", {"holder": "another", "who": "process 1 on elsewhere", "beat": 0})
        threading.Event().wait(60)
    assert "taken over by process 1 on elsewhere" in caplog.text
    assert own.read_sealed("lock")["holder"] == "another"


def test_a_holder_in_another_thread_is_interrupted_there(own: Storage, brisk: None) -> None:
    came = []

    def hold() -> None:
        try:
            with lock(own, "lock"):
                own.write_sealed("lock", {"holder": "another", "who": "process 1 on elsewhere", "beat": 0})
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    time.sleep(0.05)
        except KeyboardInterrupt:
            came.append("interrupt")

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert came == ["interrupt"]


@pytest.mark.parametrize("inherited", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_holder_that_inherited_sigint_as_ignored_is_interrupted_too(own: Storage, brisk: None, inherited) -> None:
    before = signal.signal(signal.SIGINT, inherited)
    try:
        with pytest.raises(KeyboardInterrupt), lock(own, "lock"):
            own.write_sealed("lock", {"holder": "another", "who": "process 1 on elsewhere", "beat": 0})
            threading.Event().wait(60)
        assert signal.getsignal(signal.SIGINT) is inherited
    finally:
        signal.signal(signal.SIGINT, before)
