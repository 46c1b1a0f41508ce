"""Which cycles speculation makes: how many tokens are drafted, in one forward or two; or none, which is AR decoding.

A fixed pace makes the same cycles all the time. A measured one has seen what a forward over so many tokens costs on
this device, and how often the drafts of this text are accepted, and makes the cycle that promises most tokens a second.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cycle:
    """One round of speculation. forwards: 1 or 2. length: tokens drafted after a verified one, the next one included.

    With a length of 1 nothing is drafted, and a cycle of one forward is a step of AR decoding.
    """

    forwards: int
    length: int

    def inputs(self, spare_masks: int) -> list[tuple[int, bool]]:
        """Of each forward, tokens and masks of one row, and whether masks are among them.

        spare_masks: how many masks more than drafts a block has.
        """
        masks = self.length > 1
        block = self.length + spare_masks if masks else 1
        return [(self.length * block, masks)] if self.forwards == 1 else [(block, masks), (self.length, False)]

    def gain(self, accepted: float) -> float:
        """Tokens gained where so many drafts are accepted: one more a forward."""
        return self.forwards + accepted


class Pace:
    """The same cycle all the time. adaptive: `length` is the longest, and that of each row follows `adapted_length`."""

    def __init__(self, cycle: Cycle, *, adaptive: bool = False) -> None:
        self.cycle, self.adaptive, self.longest = cycle, adaptive, cycle.length
        self.first_length = min(2, self.longest) if adaptive else self.longest

    def choose(self, num_rows: int) -> Cycle:  # noqa: ARG002
        """The next cycle of so many rows."""
        return self.cycle

    def learn_cost(self, num_inputs: int, masks: bool, seconds: float) -> None:
        """A forward over so many tokens, and masks if there were any, took this long."""

    def learn_drafts(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """Of so many drafts of each row so many were accepted."""

    def next_length(self, length: int, gained: int) -> int:
        """A row's draft length after a cycle that gained so many tokens."""
        return adapted_length(length, gained, self.longest) if self.adaptive else length


def adapted_length(length: int, gained: int, longest: int) -> int:
    """Next cycle's draft length: one more than the last cycle gained, or twice the last one if nothing was refused."""
    return min(longest, 2 * length if gained > length else max(2, gained + 1))


# --- measured


@dataclass
class Costs:
    """Seconds of a forward by the number of its inputs, a running mean; once: of sizes that were measured once.

    The first forward of a size may prepare for the later ones, so it only says what they cost at most.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    once: dict[int, float] = field(default_factory=dict)

    def learn(self, num_inputs: int, seconds: float) -> None:
        known = self.seconds.get(num_inputs)
        if known is not None:
            few = seconds < known / 2  # what was known prepared for others too
            self.seconds[num_inputs] = seconds if few else known + _SHARE * (min(seconds, 2 * known) - known)
        elif num_inputs in self.once:
            self.seconds[num_inputs] = min(seconds, self.once.pop(num_inputs))
        else:
            self.once[num_inputs] = seconds

    def is_guess(self, num_inputs: int) -> bool:
        """Whether the cost of a size is neither known from two forwards nor lies between known ones."""
        return not self.seconds or not min(self.seconds) <= num_inputs <= max(self.seconds)

    def largest(self) -> int:
        """Of the sizes so far; 0 before the first forward."""
        return max([0, *self.seconds, *self.once])

    def of(self, num_inputs: int) -> float:
        """What a forward costs: as measured, between two sizes on the line between them, past the largest on half the
        slope from the smallest: sizes not tried yet look cheap, but not free."""
        if num_inputs in self.seconds:
            return self.seconds[num_inputs]
        most = self.once.get(num_inputs, math.inf)
        sizes = sorted(self.seconds)
        place = bisect_right(sizes, num_inputs)
        if not place:
            return most if num_inputs in self.once else 0.0
        low, high = (sizes[place - 1], sizes[place]) if place < len(sizes) else (sizes[0], sizes[-1])
        slope = 0.0 if low == high else (self.seconds[high] - self.seconds[low]) / (high - low)
        if place < len(sizes):
            return min(most, self.seconds[low] + slope * (num_inputs - low))
        return min(most, self.seconds[high] + max(0.0, slope) / 2 * (num_inputs - high))


_SHARE = 0.1
"""Weight of the newest forward in a running mean."""
_KEPT = 0.95
"""Share of what is known of the drafts that a cycle with drafts keeps."""
_OLD = 0.25
"""Share of what is known of the drafts that the next call takes over."""
_PROBES = 0.03
"""Share of the time that may be lost to drafts where AR decoding is faster; of n rows, each of which tells something,
this over the root of n."""
_SURE = 1.2
"""How much faster than AR decoding drafts are where any cycle may be tried: what a bad one costs is soon won back."""
_AR = Cycle(1, 1)


@dataclass
class Experience:
    """What calls with one model have seen, for the next one: costs of forwards of tokens alone and of those with masks,
    which adapters make slower; and drafts, see `MeasuredPace`."""

    tokens: Costs = field(default_factory=Costs)
    masks: Costs = field(default_factory=Costs)
    tried: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)

    def cost(self, num_inputs: int, masks: bool) -> float:
        """Seconds of a forward; one with masks takes at least as long as one without."""
        cost = self.tokens.of(num_inputs)
        return max(cost, self.masks.of(num_inputs)) if masks else cost


_experience: weakref.WeakKeyDictionary[Any, Experience] = weakref.WeakKeyDictionary()


def experience_of(network: Any) -> Experience:
    """What was seen of the network's model as it runs now: packed and compiled passes have costs of their own."""
    ways = (getattr(network, way, None) for way in ("packed", "compiled", "model"))
    way = next((way for way in ways if way is not None), None)
    return Experience() if way is None else _experience.setdefault(way, Experience())


class MeasuredPace(Pace):
    """The cycle that promises most tokens a second, from measured costs and the acceptance of the last cycles.

    tried, accepted: of the j-th draft after the AR token, once those before it were accepted; weighted by age. Where
    AR decoding promises most, a draft is tried now and then, at no more than `_PROBES` of the time. apart: a draft
    forward verifies nothing (`adapt_anchor`), so cycles that draft have two forwards, of which one gives a token more.
    Drafts of earlier calls count for `_OLD` of what they did: the next text may be another one.
    """

    def __init__(self, longest: int, seen: Experience, spare_masks: int = 1, *, apart: bool = False) -> None:
        super().__init__(Cycle(2 if apart else 1, longest))
        self.seen, self.spare_masks, self.apart = seen, spare_masks, apart
        for drafts in (seen.tried, seen.accepted):
            drafts[:] = [_OLD * count for count in drafts] + [0.0] * (longest - len(drafts))
        self.tried, self.accepted = seen.tried, seen.accepted
        lengths = [n for n in range(2, longest + 1) if n <= 4 or n % 2 == 0]
        kinds = (2,) if apart else (2, 1)
        self.cycles = [_AR] + [Cycle(forwards, length) for length in lengths for forwards in kinds]
        self.seconds_without_drafts = 0.0

    def choose(self, num_rows: int) -> Cycle:
        probe = Cycle(2, min(3, self.longest))
        first = self._first(num_rows, probe) if num_rows > 1 else None
        if first is not None:
            return first
        best = self._fastest(num_rows, probe)
        if best != _AR or self.longest == 1:
            self.seconds_without_drafts = 0.0
            return best
        wasted = self._cost(probe, num_rows) - self._gain(probe, 0) * self._cost(_AR, num_rows)
        if _PROBES / num_rows**0.5 * self.seconds_without_drafts < wasted:
            return best
        self.seconds_without_drafts = 0.0
        return probe

    def _first(self, num_rows: int, probe: Cycle) -> Cycle | None:
        """What a batch begins with: AR decoding, which loses nothing and tells what all else must beat, and one short
        draft; None once both are known."""
        if self.seen.tokens.is_guess(num_rows):
            return _AR
        return probe if self.longest > 1 and not self.seen.masks.seconds else None

    def _fastest(self, num_rows: int, probe: Cycle) -> Cycle:
        """The cycle that gains most a second, as far as is known.

        One row may make any: one that does not pay costs little, and is learnt from. A batch makes large ones only
        where smaller ones pay well.
        """

        def speed(cycle: Cycle) -> float:
            return self._gain(cycle, self._expected(cycle)) / max(self._cost(cycle, num_rows), 1e-9)

        if num_rows > 1:
            best = max(self._near(num_rows, probe), key=speed)
            if speed(best) <= _SURE * speed(_AR):
                return best
        return max(self.cycles, key=speed)

    def _near(self, num_rows: int, probe: Cycle) -> list[Cycle]:
        """Cycles that are not much larger than forwards so far: in a batch a long draft that does not pay costs many
        steps of AR decoding."""
        most = 3 * max(self.seen.tokens.largest(), self.seen.masks.largest())
        return [cycle for cycle in self.cycles if cycle == probe or self._inputs(cycle, num_rows) <= most]

    def _inputs(self, cycle: Cycle, num_rows: int) -> int:
        """Inputs of the largest forward of a cycle."""
        return num_rows * max(inputs for inputs, _ in cycle.inputs(self.spare_masks))

    def _gain(self, cycle: Cycle, accepted: float) -> float:
        """Tokens that a cycle gains where so many drafts are accepted."""
        return cycle.gain(accepted) - int(self.apart and cycle != _AR)

    def _cost(self, cycle: Cycle, num_rows: int) -> float:
        """Seconds of a cycle."""
        return sum(self.seen.cost(num_rows * inputs, masks) for inputs, masks in cycle.inputs(self.spare_masks))

    def _expected(self, cycle: Cycle) -> float:
        """Drafts accepted in a cycle; a place seldom tried counts as the mean of all, and one not tried as certain."""
        mean = (sum(self.accepted) + 1) / (sum(self.tried) + 1)
        total, chance = 0.0, 1.0
        for tried, accepted in zip(self.tried[: cycle.length - 1], self.accepted, strict=False):
            chance *= (accepted + mean) / (tried + 1)
            total += chance
        return total

    def learn_cost(self, num_inputs: int, masks: bool, seconds: float) -> None:
        (self.seen.masks if masks else self.seen.tokens).learn(num_inputs, seconds)
        self.seconds_without_drafts += seconds

    def learn_drafts(self, drafted: Sequence[int], accepted: Sequence[int]) -> None:
        if not any(drafted):
            return
        for place in range(len(self.tried)):
            tried = sum(n > place and m >= place for n, m in zip(drafted, accepted, strict=True))
            passed = sum(n > place and m > place for n, m in zip(drafted, accepted, strict=True))
            self.tried[place] = _KEPT * self.tried[place] + tried
            self.accepted[place] = _KEPT * self.accepted[place] + passed
