"""Many prompts over several machines: a Ray cluster with a copy of the model on every node.

The driver keeps tasks and results; a node has nothing that could be lost with it but the answers under way, which go
back to be answered by others. Ray is imported late: it is needed for this alone, and takes a second.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from grok_local.adapters.replica import Order, Ready, Replica
from grok_local.errors import GrokLocalError, OptionError, WorkerError, WorkerLost
from grok_local.runtime.text.batch import Prepared, Result

if TYPE_CHECKING:
    from grok_local.machine.facts import Say
    from grok_local.runtime.scheduling.generation import Stats
    from grok_local.runtime.text.batch import Watch

__all__ = ["Backlog", "Fleet"]

_TIMEOUT = 5.0  # seconds until an address that says nothing is given up
_LOOK_EVERY = 1.0  # seconds between questions how far a node is
_MOST_LOSSES = 2  # nodes that may die of a task
_USUAL_WIDTH = 32  # sequences that a node will hardly choose more of: threads are made before it is asked

Task = Prepared | Result  # what cannot be run is its own result


class Backlog:
    """Tasks that no node has, in the order in which they are given out."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._waiting = deque(tasks)
        self._losses = Counter[int]()

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self) -> Task:
        """The next one. Raises IndexError."""
        return self._waiting.popleft()

    def put_back(self, tasks: Iterable[Prepared], *, blamed: bool) -> list[Result]:
        """A node is lost: what it had is next, in its order. With `blamed`, one of them may have been the reason.

        Returns errors, as results, of those that this is the second node for.
        """
        given_up = []
        for task in sorted(tasks, key=lambda task: -task.index):
            self._losses[task.index] += blamed
            if self._losses[task.index] < _MOST_LOSSES:
                self._waiting.appendleft(task)
            else:
                error = WorkerLost(f"{_MOST_LOSSES} nodes broke down while they answered it: it is not tried again")
                given_up.append(Result(task.index, task.id, error=error))
        return given_up


@dataclass(eq=False)
class _Node:
    """A node that loads its model, or with a `width`, has it. `seen` is what the `tasks` it has took so far."""

    name: str
    id: str
    actor: Any
    width: int = 0
    tasks: dict[int, Prepared] = field(default_factory=dict)
    seen: dict[int, Stats] = field(default_factory=dict)
    is_asked: bool = False

    @property
    def load(self) -> float:
        """Tasks for each place."""
        return len(self.tasks) / self.width


@dataclass(frozen=True)
class _Call:
    """What a node was asked, and what to do with its answer."""

    node: _Node
    use: Callable[[Any], list[Result]]


class Fleet:
    """The nodes of a cluster; `address` is what `ray.init` takes, and `run` as `Model.run`. A context manager.

    Every node loads the model of the `order`, once there are tasks; one that cannot, or is lost, is left out, which
    `say` is told. With `fingerprint`, all nodes have to have that one: their results are the same to the bit.

    The constructor raises OptionError where Ray is missing or the address is none, WorkerError where no cluster is.
    """

    def __init__(self, address: str, order: Order, *, fingerprint: str | None, say: Say) -> None:
        self._address, self._order, self._fingerprint, self._say = address, order, fingerprint, say
        self._ray = _joined(address)
        self._backlog = Backlog(())
        self._nodes: list[_Node] = []
        self._calls: dict[Any, _Call] = {}
        self._looked = 0.0

    def run(self, tasks: Iterable[Task], *, size: int, watch: Watch = lambda _: None) -> Generator[Result]:
        """Results as they come; `watch` is shown now and then what each answer under way took so far.

        Raises WorkerError when no node is left, OptionError for one with another fingerprint.
        """
        self._backlog = Backlog(tasks)
        self._begin()
        while True:
            yield from self._given_out(size)
            if not self._backlog and not any(node.tasks for node in self._nodes):
                return
            if not self._nodes:
                raise WorkerError(f"--ray {self._address}: no node is left that could answer")
            yield from self._next()
            watch([stats for node in self._nodes for stats in node.seen.values()])

    def close(self) -> None:
        """End the copies of the model, and leave the cluster; safe to call twice."""
        for node in self._nodes:
            self._ray.kill(node.actor)
        self._nodes.clear()
        self._calls.clear()
        self._ray.shutdown()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Have every node load its model."""
        for found in self._ray.nodes():
            if found["Alive"]:
                node = _Node(found["NodeName"], found["NodeID"], self._actor(found))
                self._nodes.append(node)
                self._calls[node.actor.open.remote()] = _Call(node, partial(self._opened, node))

    def _actor(self, found: dict[str, Any]) -> Any:
        """A copy of the model on a node. It gets all GPUs there: Ray hides those that nobody asks for."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(found["NodeID"], soft=False)
        gpus = 0 if self._fingerprint else found["Resources"].get("GPU", 0)
        threads = 2 * (self._order.parallel or _USUAL_WIDTH) + 1
        options = {"num_cpus": 0, "num_gpus": gpus, "max_concurrency": threads, "scheduling_strategy": there}
        return self._ray.remote(Replica).options(**options).remote(self._order)

    def _opened(self, node: _Node, ready: Ready) -> list[Result]:
        for note in ready.notes:
            self._say(f"note: node {node.name}: {note}")
        if self._fingerprint not in (None, ready.fingerprint):
            raise OptionError(
                f"reproducible: node {node.name} would compute other bits ({ready.fingerprint}) than this machine "
                f"({self._fingerprint}): its processor or its llama.cpp is another"
            )
        self._say(f"node {node.name} is ready: {ready.width} go together")
        node.width = ready.width
        return []

    def _lost(self, node: _Node, error: Exception) -> list[Result]:
        """Go on without a node; what it had under way comes next. A machine that is gone died of no task."""
        self._nodes.remove(node)
        self._calls = {ref: call for ref, call in self._calls.items() if call.node is not node}
        self._ray.kill(node.actor)
        alive = any(found["Alive"] for found in self._ray.nodes() if found["NodeID"] == node.id)
        reason = _reason(error) if alive else "the machine does not answer any more"
        what = f"is lost, and {len(node.tasks)} answers go back in the queue" if node.width else "is left out"
        self._say(f"note: node {node.name} {what}: {reason}")
        return self._backlog.put_back(node.tasks.values(), blamed=alive)

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def _given_out(self, size: int) -> Iterator[Result]:
        """Give tasks to the nodes that have fewest for their width; what cannot be run is a result already."""
        while self._backlog and (node := self._freest()):
            task = self._backlog.take()
            if isinstance(task, Result):
                yield task
            else:
                node.tasks[task.index] = task
                answer = node.actor.answer.remote(task, size)
                self._calls[answer] = _Call(node, partial(self._answered, node))

    def _freest(self) -> _Node | None:
        """The node to have the next task. Twice its width, so that no place waits for the network; towards the end no
        more than its width, so that no task waits for a place while others are free.
        """
        ready = [node for node in self._nodes if node.width]
        spare = len(self._backlog) // max(sum(node.width for node in ready), 1)
        free = [node for node in ready if len(node.tasks) < node.width + min(node.width, spare)]
        return min(free, key=lambda node: node.load, default=None)

    def _next(self) -> Iterator[Result]:
        """What comes of the next answer to a question, if there is one within a moment."""
        self._look()
        done, _ = self._ray.wait(list(self._calls), timeout=_LOOK_EVERY)
        for ref in done:
            call = self._calls.pop(ref)
            try:
                value = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                yield from self._lost(call.node, error)
            else:
                yield from call.use(value)

    def _answered(self, node: _Node, result: Result) -> list[Result]:
        del node.tasks[result.index]
        node.seen.pop(result.index, None)
        return [result]

    def _look(self) -> None:
        """Ask how far the nodes are, if that is long ago."""
        if time.monotonic() - self._looked >= _LOOK_EVERY:
            self._looked = time.monotonic()
            for node in self._nodes:
                if node.tasks and not node.is_asked:
                    node.is_asked = True
                    self._calls[node.actor.under_way.remote()] = _Call(node, partial(self._seen, node))

    def _seen(self, node: _Node, stats: dict[int, Stats]) -> list[Result]:
        node.is_asked = False
        node.seen = {index: one for index, one in stats.items() if index in node.tasks}
        return []


# -- the cluster -------------------------------------------------------------------------------------------------------


def _joined(address: str) -> Any:
    """Ray, connected. Raises OptionError, WorkerError."""
    # Ray prints what nodes tell on stdout, where results may go; it reads this when it is imported.
    os.environ.update(RAY_DEDUP_LOGS="1", RAY_DEDUP_LOGS_SKIP_REGEX="^")
    try:
        import ray
    except ImportError:
        raise OptionError(f"--ray needs Ray, on every machine: {sys.executable} -m pip install ray") from None
    _check_port(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except ValueError as error:
        raise OptionError(f"--ray {address}: {_line(error)}") from None
    except (OSError, RuntimeError) as error:
        raise WorkerError(f"--ray {address}: {_line(error)}") from None
    return ray


def _check_port(address: str) -> None:
    """Raises WorkerError where nobody listens, for which Ray would wait for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d{1,5})", address)
    try:
        if match:
            socket.create_connection((match[1], int(match[2])), timeout=_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = "ray start --head, on one of the machines, says the address"
        raise WorkerError(f"--ray {address}: nobody answers there ({reason}): {advice}") from None


def _reason(error: Exception) -> str:
    """Why a node that is still there is of no use any more."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, GrokLocalError):
        return _line(cause)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {_line(cause)}"
    return "its process ended (Ray's logs there may say why)"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
