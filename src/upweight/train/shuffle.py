"""A shuffle of any number of items that needs no memory: item i of the shuffled order is computed, not looked up.

A Feistel network of `ROUNDS` rounds permutes the smallest power of four that holds `count`; numbers that fall outside
are sent through again until they land inside (cycle walking), fewer than four times on average.
"""

ROUNDS = 6
_MASK = (1 << 64) - 1


def shuffled(index: int, count: int, key: int) -> int:
    """The item at place `index` of the order that `key` gives to `count` items; a permutation of range(count)."""
    if not 0 <= index < count:
        raise IndexError(f"place {index} of {count} items")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & low
        for turn in range(ROUNDS):
            left, right = right, left ^ (_mixed(right + (turn << 58) + key) & low)
        value = left << half | right
        if value < count:
            return value


def _mixed(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
