"""tmp"""
from typing import NamedTuple
class Amount(NamedTuple):
    """Calls of a collective, and the bytes of their whole tensors: what was gathered, unscattered, reduced or sent."""

    calls: int
    size: int


Amounts = dict[tuple[str, str], Amount]  # by axis and collective


def plus(amounts: Amounts, axis: str, collective: str, amount: Amount) -> None:
    """Add to the entry of an axis and a collective, in place."""
    calls, size = amounts.get((axis, collective), (0, 0))
    amounts[axis, collective] = Amount(calls + amount.calls, size + amount.size)
