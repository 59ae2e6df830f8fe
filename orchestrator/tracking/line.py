"""Calls to MLflow, made in order on a thread of their own, each until it succeeds or is refused."""

import logging
import threading
from collections import deque
from collections.abc import Callable

from orchestrator.tracking.server import may_pass, reason

log = logging.getLogger(__name__)


class Line:
    """Calls waiting in line for one thread, which makes each until it succeeds or is refused."""

    def __init__(self, answers: Callable[[], object]) -> None:
        self.failing = ""  # why the call at the head does not get through just now
        self.refused: list[str] = []
        self.done = 0
        self._answers = answers
        self._calls: deque[tuple[str, Callable[[], object]]] = deque()
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    def put(self, what: str, call: Callable[[], object]) -> None:
        with self._changed:
            self._calls.append((what, call))
            self._changed.notify_all()

    def refuse(self, what: str) -> None:
        if what and what not in self.refused:
            self.refused.append(what)
            log.warning("MLflow is without %s", what)

    def __len__(self) -> int:
        return len(self._calls)

    def wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until `ready()`; a pause between two attempts is cut short."""
        self._hurry.set()
        with self._changed:
            return self._changed.wait_for(ready, timeout_s)

    def _work(self) -> None:
        attempts = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._calls))
                what, call = self._calls[0]
            failing, refused = "", ""
            try:
                call()
            except Exception as error:  # whatever it is: kept, said, and the next call gets its turn
                text = reason(error)
                # Nothing works without the first call, the connection: it is never given up.
                if not self.done or (may_pass(error) and not (attempts >= 5 and self._is_up())):
                    failing = text
                    log.info("MLflow: %s: attempt %d failed, will be repeated: %s", what, attempts + 1, text)
                else:
                    refused = f"{what}: {text}"
                    log.debug("refused", exc_info=True)
            with self._changed:
                if failing and not self.failing:
                    log.warning("MLflow does not answer; training goes on and the journal keeps it: %s", failing)
                self.failing = failing
                self.refuse(refused)
                if not failing:
                    self._calls.popleft()
                    self.done += 1
                self._changed.notify_all()
            attempts = attempts + 1 if failing else 0
            if failing:
                self._hurry.wait(min(10.0, 0.25 * 2**attempts))
                self._hurry.clear()

    def _is_up(self) -> bool:
        try:
            self._answers()
        except Exception:  # a probe: whatever it raises, the server is not up; the reason is logged
            log.debug("MLflow is down", exc_info=True)
            return False
        return True
