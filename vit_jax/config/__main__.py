"""Prints a reference of all settings of an experiment: python -m vit_jax.config > docs/config.md.

The output is Markdown: for each section the key, type, range, default and meaning of each setting,
made from the signatures and docstrings of the functions that take them.
"""

from vit_jax import cli
from vit_jax.config import reference
from vit_jax.errors import UserError, shown


def main(argv: list[str]) -> int:
    """Prints the page."""
    if argv[1:]:
        raise UserError(f'unexpected argument {shown(argv[1])}; see --help')
    print(reference.markdown(), end='')
    return 0


if __name__ == '__main__':
    cli.run(main)
