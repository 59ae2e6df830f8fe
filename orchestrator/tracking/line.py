"""Calls to MLflow, made in order on a thread of their own, each until it succeeds or is refused."""

import logging
import threading
from collections import deque
from collections.abc import Callable

from orchestrator.tracking.server import classify_failure, shorten_failure

SAID = 3  # refused calls that are told one by one: where the first is refused, so may all be
log = logging.getLogger(__name__)


class CallLine:
    """Calls waiting in line for one thread, which makes each until it succeeds or is refused.

    `where` names the place for people; `answers` asks it something cheap, and raises where it is down.
    """

    def __init__(self, where: str, answers: Callable[[], object]) -> None:
        self.failing = ""  # why the call at the head does not get through just now
        self.standing = False  # whether that is so until somebody mends something
        self.refused: list[str] = []
        self.done = self.attempts = 0
        self._where, self._answers = where, answers
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
            log.log(logging.WARNING if len(self.refused) <= SAID else logging.INFO, "MLflow is without %s", what)

    def __len__(self) -> int:
        return len(self._calls)

    def wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Waits until `ready()`; a pause between two attempts is cut short."""
        self._hurry.set()
        with self._changed:
            return self._changed.wait_for(ready, timeout_s)

    def wait_empty(self, timeout_s: float) -> None:
        """Waits until no call is left, or until one is made that fails for a reason that stands."""
        before = self.attempts
        self.wait(lambda: not self._calls or (self.standing and self.attempts > before), timeout_s)

    def wait_while_it_goes(self, silent_s: float) -> None:
        """Waits as `wait_empty` does, however long it takes, as long as a call gets through every `silent_s`."""
        done = -1
        while self._calls and done != self.done and not (done >= 0 and self.standing):
            if done >= 0:
                log.warning(
                    "MLflow at %s takes what is left: %d calls. Interrupting loses nothing; the same command ships "
                    "the rest",
                    self._where,
                    len(self._calls),
                )
            done = self.done
            self.wait_empty(silent_s)

    def _work(self) -> None:
        attempts = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._calls))
                what, call = self._calls[0]
            failing, refused, kind = "", "", ""
            try:
                call()
            except Exception as error:  # whatever it is: kept, told, and the next call gets its turn
                text, kind = shorten_failure(error), classify_failure(error)
                # Nothing works without the first call, the connection: it is never given up.
                lasts = kind == "standing" or (kind == "passing" and not (attempts >= 5 and self._is_up()))
                if lasts or not self.done:
                    failing = text
                    log.info("MLflow: %s: attempt %d failed, will be repeated: %s", what, attempts + 1, text)
                else:
                    refused = f"{what}: {text}"
                    log.debug("refused", exc_info=True)
            with self._changed:
                if failing and not self.failing:
                    meanwhile = "the journals keep every point meanwhile"
                    log.warning("MLflow at %s: %s; tried again, %s", self._where, failing, meanwhile)
                self.failing, self.standing = failing, bool(failing) and kind != "passing"
                self.refuse(refused)
                self.attempts += 1
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
