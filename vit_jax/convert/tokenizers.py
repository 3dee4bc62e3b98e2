"""The tokenizer of a checkpoint, from any address that `load` takes."""

import os

from vit_jax.convert import load, run
from vit_jax.data import tokenizers
from vit_jax.data.tokenizers import folders
from vit_jax.errors import UserError


def tokenizer(path: str | os.PathLike, *, length: int | None = None) -> tokenizers.Tokenizer:
    """Reads the tokenizer of a checkpoint, with its length, padding and cleaning of texts.

        tokens = vit_jax.tokenizer(path)(['a shoe', 'a bag'])  # int32 [2, L]

    Args:
      path: what `vit_jax.load` takes: a path, an address or a name of the catalogue of a folder
        with a tokenizer, or a run; also a file of a tokenizer alone, see `data.tokenizers.load`.
      length: number of tokens of a text, in place of its own.

    Raises:
      UserError: there is none, or it is broken.
    """
    return tokenizers.load(address_of(path), length=length)


def address_of(path: str | os.PathLike) -> str:
    """Address of a checkpoint's tokenizer; raises UserError for a run that has none."""
    found = load.catalogue().get(str(path), {}).get('tokenizer')
    address = found or load.resolve(str(path))
    if found is None and run.is_run(address):
        root = run.split_address(address)[0]
        address = root / folders.INSIDE
        if not address.exists():
            raise UserError(f'{root} has no tokenizer: its run reads no texts')
    return os.fspath(address)


def warn_of_another(checkpoint: str, named: tokenizers.Named | None) -> None:
    """Logs if the tokenizer of a checkpoint, where it has one, makes other ids than `named`."""
    try:
        own = address_of(checkpoint)
    except UserError:  # it has none
        return
    if named is not None:
        tokenizers.warn_of_another(own, named)
