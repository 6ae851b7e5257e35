"""`FairQueue`: jobs that wait, in an order in which no client keeps the others from their turn."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


class FairQueue(Generic[Item]):
    """A queue that gives every client the same share of what is served, by cost.

    This is start-time fair queueing (Goyal, Vin, Cheng 1996): an item may start when the client's
    items before it are done, had the client its share alone, and the earliest start comes first. Of
    one client the first to come is the first to be served.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Item]] = []
        self._removed: set[int] = set()
        self._numbers: dict[Item, int] = {}
        self._finish: dict[str, float] = {}
        self._now = 0.0
        self._count = count()

    def __len__(self) -> int:
        return len(self._numbers)

    def push(self, item: Item, client: str, cost: float) -> None:
        """Add an item of a client."""
        start = max(self._now, self._finish.get(client, 0.0))
        self._finish[client] = start + cost
        number = next(self._count)
        self._numbers[item] = number
        heapq.heappush(self._heap, (start, number, item))

    def pop(self) -> Item:
        """The next item; IndexError if there is none."""
        while True:
            start, number, item = heapq.heappop(self._heap)
            if number in self._removed:
                self._removed.discard(number)
                continue
            del self._numbers[item]
            self._now = start
            if not self._numbers:  # nobody owes anybody anything
                self._finish.clear()
            return item

    def remove(self, item: Item) -> bool:
        """Take an item out; False if it is not here."""
        number = self._numbers.pop(item, None)
        if number is None:
            return False
        self._removed.add(number)
        if len(self._removed) > 64 and len(self._removed) > len(self._numbers):
            self._heap = [entry for entry in self._heap if entry[1] not in self._removed]
            heapq.heapify(self._heap)
            self._removed.clear()
        return True
