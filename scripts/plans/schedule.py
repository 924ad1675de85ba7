"""How long work takes on many GPUs of which some fail: passes, pieces, a simulation; no torch."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

AUTOATTACK = {
    "apgd-ce": (100, 100),
    "apgd-t": (900, 900),
    "fab-t": (1900, 900),
    "square": (5000, 0),
}
"""AutoAttack standard: attack -> forwards and input gradients of an image that it does not break.

The sums, 7,900 and 1,900, are counted (`cost` of reports on digits and MNIST); their shares are
those of the attacks' own settings.
"""


@dataclass(frozen=True)
class Piece:
    """A piece of work for one GPU, which goes on after the last part that was finished.

    Args:
        parts: seconds of each; where one ends, its result is saved.
        needs: places of pieces that must be finished before.
    """

    parts: Sequence[float]
    needs: Sequence[int] = ()

    @property
    def seconds(self) -> float:
        """Of all parts, on a GPU that does not fail."""
        return math.fsum(self.parts)


@dataclass(frozen=True)
class Cluster:
    """GPUs and what goes wrong with them.

    Args:
        gpus: of all machines.
        per_node: GPUs of a machine.
        start: seconds until a GPU takes its first piece, also after a repair.
        each: seconds that every piece takes besides: a process begins, or a claim is made.
        failure: mean seconds between two failures of one machine or another; they come by chance
            at a constant rate. inf is none.
        notice: seconds until others take the pieces of a machine that has failed.
        repair: seconds until it is back.
    """

    gpus: int
    per_node: int = 8
    start: float = 0.0
    each: float = 0.0
    failure: float = math.inf
    notice: float = 120.0
    repair: float = 1800.0


@dataclass
class Played:
    """What a simulation came to.

    Args:
        seconds: until the last piece was finished.
        efficiency: work's seconds over those of all GPUs until then.
        failures: of machines.
        lost: GPU-seconds of work that were done again.
    """

    seconds: float
    efficiency: float
    failures: int
    lost: float


def simulate(pieces: Sequence[Piece], cluster: Cluster, seed: int = 0) -> Played:
    """Play a schedule: a GPU that is free takes the first piece that is ready.

    Args:
        pieces: in their order.
        cluster: what they run on.
        seed: of the failures.

    Raises:
        ValueError: pieces that wait for each other, or no GPU.
    """
    return _Simulation(pieces, cluster, random.Random(seed)).play()


@dataclass
class _Simulation:
    pieces: Sequence[Piece]
    cluster: Cluster
    rng: random.Random
    now: float = 0.0
    failures: int = 0
    lost: float = 0.0
    events: list[tuple[float, int, str, int]] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    running: dict[int, tuple[int, float]] = field(default_factory=dict)  # GPU -> piece, since when
    ends: dict[int, int] = field(default_factory=dict)  # GPU -> the event that ends its piece
    ups: dict[int, int] = field(default_factory=dict)  # GPU -> the event that brings it up
    down: set[int] = field(default_factory=set)  # machines
    number: int = 0

    def play(self) -> Played:
        self.done = [0.0] * len(self.pieces)  # seconds that are saved
        self.finished = [False] * len(self.pieces)
        self.waiting = list(range(len(self.pieces)))
        self.ready: list[int] = []
        for gpu in range(self.cluster.gpus):
            self.ups[gpu] = self._at(self.cluster.start, "up", gpu)
        self._next_failure()
        self._find_ready()
        while not all(self.finished):
            if not self.running and not self.events:
                raise ValueError("pieces that wait for each other, or no GPU")
            self.now, number, what, which = heapq.heappop(self.events)
            if what == "end" and self.ends.get(which) == number:
                self._end(which)
            elif what == "fail":
                self._fail()
            elif what == "up" and self.ups[which] == number:  # no failure came before
                self.down.discard(which // self.cluster.per_node)
                heapq.heappush(self.free, which)
            elif what == "again":
                heapq.heappush(self.ready, which)
            self._begin()
        work = math.fsum(piece.seconds for piece in self.pieces)
        return Played(self.now, work / (self.cluster.gpus * self.now), self.failures, self.lost)

    def _at(self, delay: float, what: str, which: int) -> int:
        self.number += 1
        heapq.heappush(self.events, (self.now + delay, self.number, what, which))
        return self.number

    def _next_failure(self) -> None:
        if self.cluster.failure < math.inf:
            self._at(self.rng.expovariate(1 / self.cluster.failure), "fail", 0)

    def _find_ready(self) -> None:
        for one in [*self.waiting]:
            if all(self.finished[other] for other in self.pieces[one].needs):
                self.waiting.remove(one)
                heapq.heappush(self.ready, one)

    def _begin(self) -> None:
        while self.ready and self.free:
            gpu, one = heapq.heappop(self.free), heapq.heappop(self.ready)
            self.running[gpu] = one, self.now
            left = self.pieces[one].seconds - self.done[one]
            self.ends[gpu] = self._at(self.cluster.each + left, "end", gpu)

    def _end(self, gpu: int) -> None:
        one, _ = self.running.pop(gpu)
        self.finished[one] = True
        heapq.heappush(self.free, gpu)
        self._find_ready()

    def _fail(self) -> None:
        """A machine, any of those that work: its pieces are begun again where they were saved."""
        size, gpus = self.cluster.per_node, range(self.cluster.gpus)
        self._next_failure()
        up = sorted({gpu // size for gpu in gpus} - self.down)
        if not up:
            return
        node = self.rng.choice(up)
        self.failures += 1
        self.down.add(node)
        for gpu in gpus[node * size : (node + 1) * size]:
            if gpu in self.running:
                one, since = self.running.pop(gpu)
                del self.ends[gpu]
                reached = self.done[one] + max(0.0, self.now - since - self.cluster.each)
                saved = [0.0, *accumulate(self.pieces[one].parts)]
                self.done[one] = max(part for part in saved if part <= reached)
                self.lost += reached - self.done[one]
                self._at(self.cluster.notice, "again", one)
            elif gpu in self.free:
                self.free.remove(gpu)
                heapq.heapify(self.free)
            self.ups[gpu] = self._at(self.cluster.repair + self.cluster.start, "up", gpu)


def autoattack(
    images: int,
    batch: int,
    standing: Mapping[str, float],
    seconds: float,
    half: float,
    rng: random.Random,
) -> list[Piece]:
    """The pieces of AutoAttack standard, one per batch, saved after each of its attacks.

    An attack pays for every image that still stands before it.

    Args:
        images: to be judged.
        batch: images of a piece.
        standing: share of all images that are right when ``clean``, and that still stand after
            ``apgd-ce`` and after ``apgd-t``; the others break hardly any more.
        seconds: of a pass of an image in a large batch.
        half: images at a time at which a GPU reaches half of its rate.
        rng: draws which images stand.
    """
    pieces = []
    for start in range(0, images, batch):
        drawn = [rng.random() for _ in range(min(batch, images - start))]
        stand = {name: sum(one < share for one in drawn) for name, share in standing.items()}
        before = dict(zip(AUTOATTACK, (*stand.values(), stand["apgd-t"]), strict=True))
        parts = [len(drawn) + half]  # clean
        parts += [sum(AUTOATTACK[name]) * (n + half) if n else 0.0 for name, n in before.items()]
        pieces.append(Piece([seconds * part for part in parts]))
    return pieces


def training(epochs: int, images: int, passes: float, seconds: float) -> Piece:
    """A training, saved after every epoch.

    Args:
        epochs: how many.
        images: of an epoch, validation included.
        passes: of an image, in forwards.
        seconds: of a pass of an image in a batch.
    """
    return Piece([images * passes * seconds] * epochs)
