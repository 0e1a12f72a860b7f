"""A checker of your own: the last number of a completion, within a relative tolerance (docs/factories.md).

data: {checker: "own_checker:make", checker_settings: {tolerance: 0.01}}
"""

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def make(tolerance=0.0):
    """Called once in each process of the checker, with data.checker_settings."""

    def check(completion, answer):
        """True, False, 1, 0, or one of: correct, wrong, unparseable, timeout."""
        numbers = NUMBER.findall(completion.replace(",", ""))
        if not numbers:
            return "unparseable"
        return abs(float(numbers[-1]) - float(answer)) <= tolerance * abs(float(answer))

    return check
