"""Measure shards on the machines of a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mergekit_interleave import _requirements
from mergekit_interleave.errors import DirectiveError, RefusedError
from mergekit_interleave.scanning.distribution import (
    LOSSES,
    Job,
    Outcomes,
    Scored,
    Scorer,
    Shard,
    Worker,
    lost,
)

WANTED = "ray>=2.50"
"""The requirement of the extra `ray`."""

LOCAL = "local"


def check() -> None:
    """Check that Ray is installed.

    Raises:
        RequirementError: It is not, or is too old.
    """
    _requirements.check_extra(WANTED)


_VARIABLES = "MK_INTERLEAVE_"
_SECONDS = 10


@dataclass(frozen=True)
class RayActors:
    """Measures shards with actors of a Ray cluster, each of which loads the base once.

    Attributes:
        address: The address of the cluster, as for `ray.init`; `local` starts one on this machine.
        count: The number of actors; None for as many as there is room for.
        cpus: The number of CPUs that each actor reserves and computes with.
        gpus: The number of GPUs that each actor reserves.
    """

    address: str
    count: int | None = None
    cpus: float = 1
    gpus: float = 0

    @contextmanager
    def started(self, job: Job) -> Iterator[Scorer]:
        """Measure shards; see `Way`. The shard of an actor that is lost is given to another."""
        with ExitStack() as stack:
            actors: list[_Actors] = []

            def score(shards: Sequence[Shard]) -> Outcomes:
                if not actors:
                    ray = stack.enter_context(_connected(self.address))
                    actors.append(_Actors(ray, self, job))
                    stack.callback(actors[0].end)
                return actors[0].score(shards)

            yield score

    def room(self, ray: Any) -> int:
        """Return how many actors the machines of the cluster have room for."""
        wanted = {name: each for name, each in {"CPU": self.cpus, "GPU": self.gpus}.items() if each}
        return sum(
            min((int(node["Resources"].get(name, 0) // each) for name, each in wanted.items()),
                default=1)
            for node in ray.nodes()
            if node["Alive"]
        )  # fmt: skip

    def no_room(self) -> RefusedError:
        """Return the error that says that no actor can start."""
        return RefusedError(
            f"no machine of the Ray cluster has {self.cpus:g} CPUs and {self.gpus:g} GPUs",
            hint="use a smaller --num-cpus or --num-gpus",
        )


class _Actor:
    """Measures shards in a process of Ray."""

    def __init__(
        self, directory: str, variables: Mapping[str, str], job: Job, threads: int
    ) -> None:
        with suppress(OSError):  # another machine may not have it
            os.chdir(directory)
        os.environ.update(variables)
        self._worker = Worker(job, threads)

    def ready(self) -> None:
        """Return when the actor has been started."""

    def score(self, shard: Shard) -> Scored:
        """Measure a shard."""
        return self._worker.score(shard)


class _Actors:
    """Actors that are starting, idle and at work, and the shards that wait for them."""

    def __init__(self, ray: Any, how: RayActors, job: Job) -> None:
        self._ray = ray
        self._of = how
        self._waiting: deque[Shard] = deque()
        self._idle: list[Any] = []
        self._pending: dict[Any, tuple[Any, Shard | None]] = {}
        self._losses = 0
        self._class = ray.remote(num_cpus=how.cpus, num_gpus=how.gpus)(_Actor)
        variables = {key: text for key, text in os.environ.items() if key.startswith(_VARIABLES)}
        self._how = (str(Path.cwd()), variables, ray.put(job), max(1, int(how.cpus)))

    def score(self, shards: Sequence[Shard]) -> Outcomes:
        """Measure shards.

        Raises:
            InterleaveError: One cannot be measured, or there is no room for an actor.
        """
        self._waiting.extend(shards)
        room = self._of.room(self._ray)
        actors = len(self._idle) + len(self._pending)
        for _ in range(actors, min(self._of.count or room, room, len(shards))):
            self._add()
        missing = len(shards)
        while missing:
            found = self._next()
            if found is not None:
                missing -= 1
                yield found
            elif not (self._is_measuring or self._of.room(self._ray)):
                raise self._of.no_room()

    @property
    def _is_measuring(self) -> bool:
        return any(shard is not None for _, shard in self._pending.values())

    def _add(self) -> None:
        """Start an actor, as soon as there is room for it."""
        actor = self._class.remote(*self._how)
        self._pending[actor.ready.remote()] = actor, None

    def _next(self) -> tuple[Shard, Scored] | None:
        """Give shards to the idle actors, and wait for an actor.

        Returns:
            The shard that it measured; None if it was only started, or is lost, or if none has
            finished for some seconds.

        Raises:
            InterleaveError: A shard cannot be measured, or actors are lost again and again.
        """
        from ray.exceptions import RayError, RayTaskError  # noqa: PLC0415 - an extra

        while self._waiting and self._idle:
            actor, shard = self._idle.pop(), self._waiting.popleft()
            self._pending[actor.score.remote(shard)] = actor, shard
        done, _ = self._ray.wait([*self._pending], timeout=_SECONDS)
        if not done:
            return None
        actor, given = self._pending.pop(done[0])
        try:
            found = self._ray.get(done[0])
        except RayTaskError as error:
            raise error.cause from None
        except RayError as error:
            self._replace(actor, given, error)
            return None
        self._idle.append(actor)
        if given is None:
            return None
        self._losses = 0
        return given, found

    def _replace(self, actor: Any, shard: Shard | None, error: Exception) -> None:
        """Replace an actor that is lost, and let its shard wait for another.

        Raises:
            RefusedError: Actors are lost again and again.
        """
        self._losses += 1
        if self._losses == LOSSES * (1 + len(self._pending) + len(self._idle)):
            raise lost(error, "see the logs of Ray, or reserve more with --num-cpus") from error
        self._ray.kill(actor)  # so that it frees what it reserved, if it is only out of reach
        if shard is not None:
            self._waiting.appendleft(shard)
        self._add()

    def end(self) -> None:
        """End all actors."""
        for actor in [*self._idle, *(actor for actor, _ in self._pending.values())]:
            self._ray.kill(actor)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Connect to a cluster, or use the connection that this process has.

    Raises:
        DirectiveError: There is no cluster at the address.
    """
    import ray  # noqa: PLC0415 - an extra

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to a server
        options["include_dashboard"] = False
    try:
        _reach(address)
        ray.init(address, **options)
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise DirectiveError(
            f"--ray {address}: {text:.200}", hint="start one with `ray start`, or use --ray local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Check that something listens at an address, for which Ray itself waits for minutes.

    Raises:
        OSError: Nothing does.
        ValueError: The port is not a number.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        socket.create_connection((parts.hostname, parts.port), timeout=_SECONDS).close()
