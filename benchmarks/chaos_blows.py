"""Which kills a chaos test makes: who is hit, at which moment, drawn from a seed alone."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

Victim = Literal["tree", "worker", "supervisor"]
Moment = Literal["start-up", "training", "evaluation", "finish"]

VICTIMS: Final[tuple[Victim, ...]] = ("tree", "worker", "supervisor")
MOMENTS: Final[tuple[Moment, ...]] = ("start-up", "training", "evaluation", "finish")


@dataclass(frozen=True)
class Blow:
    """A kill that is to come.

    share: of the moment's longest delay. late: a start-up is that of the workers, not of the sweep's own process.
    harshly: what brings a start-up about is another kill of the tree, else SIGTERM. num_ended: trials that must have
    ended before.
    """

    victim: Victim
    moment: Moment
    share: float
    late: bool
    harshly: bool
    num_ended: int = 0


def draw(seed: int, num: int, victims: Sequence[Victim] = VICTIMS, trials: int = 0) -> list[Blow]:
    """Blows in random order, each victim at each moment about equally often; the first hits the very first start.

    trials: of the sweep, to spread the blows over; else each comes as early as it can.
    """
    chance = random.Random(seed)
    pairs = [(victim, moment) for moment in MOMENTS for victim in victims]
    drawn: list[tuple[Victim, Moment]] = []
    while len(drawn) < num:
        drawn += chance.sample(pairs, len(pairs))
    drawn = drawn[:num]
    first = next((i for i, (_, moment) in enumerate(drawn) if moment == "start-up"), 0)
    drawn.insert(0, drawn.pop(first))
    return [
        Blow(*pair, chance.random(), chance.random() < 0.5, chance.random() < 0.5, number * max(0, trials - 2) // num)
        for number, pair in enumerate(drawn)
    ]
