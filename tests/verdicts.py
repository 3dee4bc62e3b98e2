"""What the scripts that compare vit_jax with another library say of each model, and in the end."""

import collections

import numpy as np

from vit_jax.errors import UserError

TOLERANCE = 1e-4


class Impossible(Exception):
    """The other library cannot make or run the model."""


def largest(values):
    """The largest of numbers; NaN if one of them is."""
    return float(np.max(list(values)))


def judge(compare, folder):
    """(verdict, largest difference, text) of a call that returns the difference of outputs."""
    try:
        value = compare()
    except UserError as e:
        return 'refused', 0.0, str(e).replace(str(folder), '').strip(': ')[:300]
    except Impossible as e:
        return 'impossible', 0.0, str(e).replace('\n', ' ')[:300]
    except Exception as e:  # of the other library, or a fault of vit_jax
        return 'error', 0.0, f'{type(e).__name__}: {e}'.replace('\n', ' ')[:300]
    return 'equal' if value < TOLERANCE else 'wrong', value, f'{value:.1e}'


class Summary:
    """Counts verdicts by group, with the largest difference of models that are equal."""

    def __init__(self):
        self.counts = collections.defaultdict(
            lambda: collections.Counter(equal=0, refused=0, wrong=0)
        )
        self.largest = collections.defaultdict(float)

    def add(self, group, verdict, value):
        self.counts[group][verdict] += 1
        if verdict == 'equal':
            self.largest[group] = max(self.largest[group], value)

    def show(self):
        for group, row in self.counts.items():
            print(f'{group:28} {dict(row)} largest difference {self.largest[group]:.1e}')
        print(f'{"all":28} {dict(sum(self.counts.values(), collections.Counter()))}')
