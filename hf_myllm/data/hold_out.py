"""Choose the items that are held out for validation: by what they are, not by their place in the data.

An item is held out if the hash of its text is among the lowest. So items that alternate (one label after the other) do
not fall in step with the choice, equal items stay on one side, the order of the data does not matter, and data that is
added leaves most items where they are. The seed of a run does not matter either: runs that differ only in their seed
are compared on the same validation items.
"""

import hashlib
from collections import Counter, defaultdict

import numpy as np

_RANKED = 1 << 17  # of more items, the share below a fixed limit is exact enough


class HoldOut:
    """Decides which items are held out. `seen` is None unless nearly all items are equal.

    Args:
        items: an iterable over (group, [`text_hash`]) of all items. The share is held out of each group, such as a
            label.
        fraction: share of the items to hold out.
        by_position: hold out evenly spaced items, as runs that began with version 0.1 did.
    """

    def __init__(self, items, fraction, by_position=False):
        self.fraction, self.by_position, self.seen = fraction, by_position, None
        self.limits = defaultdict(int)
        if not fraction or by_position:
            return
        groups = defaultdict(Counter)
        for count, (group, item) in enumerate(items, start=1):
            groups[group][item] += 1
            if count > _RANKED:
                self.limits = defaultdict(lambda: int(fraction * (1 << 64)))
                return
        self.limits, num_chosen = _find_limits(groups, fraction)
        num_items = sum(counts.total() for counts in groups.values())
        if not num_chosen and int(num_items * fraction + 0.5):  # nearly all items are equal: tell them apart
            self.seen = Counter()
            repeated = {
                group: [_hash_repeated(item, n) for item, count in counts.items() for n in range(count)]
                for group, counts in groups.items()
            }
            self.limits, _ = _find_limits(repeated, fraction)

    def choose(self, first, hashes, group=None):
        """Return which of some consecutive items of a group are held out; items are asked for in order.

        Args:
            first: the position of the first one in the data.
            hashes: their [`text_hash`]es, (items,) uint64.
        """
        if self.by_position:  # with 0.05, the 10th, 30th, 50th, ... item
            counts = np.floor(np.arange(first, first + len(hashes) + 1) * self.fraction + 0.5)
            return np.diff(counts) > 0
        if self.seen is not None:
            items = hashes.tolist()
            for index, item in enumerate(items):
                items[index] = _hash_repeated(item, self.seen[group, item])
                self.seen[group, item] += 1
            hashes = np.array(items, dtype=np.uint64)
        return hashes < np.uint64(self.limits[group])


def _find_limits(groups, fraction):
    """Return the limit of each group, below which as many of its hashes are as are to be held out, but never all; and
    the number of hashes below all limits."""
    limits, total, num_chosen = defaultdict(int), 0, 0
    for group in sorted(groups, key=repr):
        hashes, before = sorted(groups[group]), total
        total += len(hashes)
        count = int(total * fraction + 0.5) - int(before * fraction + 0.5)  # adds up over all groups
        count = min(count, len(hashes) - 1)
        limits[group], num_chosen = hashes[count], num_chosen + count
    return limits, num_chosen


def text_hash(text):
    """Return a number below 2^64 that stands for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _hash_repeated(item, number):
    """Return the hash of one of several equal items."""
    return text_hash(f"{item} {number}")
