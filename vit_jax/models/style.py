"""How blocks of transformers differ: order and kind of norms, absent biases, positions."""

import dataclasses
from typing import Literal

from vit_jax.models import relative, rotary

PROJECTIONS = ('query', 'key', 'value')


@dataclasses.dataclass(frozen=True)
class Style:
    """How blocks differ from those of arXiv:2010.11929; the defaults are those blocks."""

    # norm before attention and before the MLP (pre); after each, before its residual sum (post,
    # arXiv:2111.09883 section 3.2); or one norm before both, which run in parallel
    # (arXiv:2302.05442 section 2)
    order: Literal['pre', 'post', 'parallel'] = 'pre'
    norm: Literal['layer', 'rms'] = 'layer'  # kind of all norms of the model
    # further norms: of each head's queries and keys (arXiv:2302.05442 section 2), of the output of
    # attention before its projection, of the hidden layer of the MLP (arXiv:2303.11331)
    norms: tuple[Literal['query_key', 'attention', 'mlp'], ...] = ()
    # layers without a bias: projections of attention, both layers of the MLP
    unbiased: tuple[Literal['query', 'key', 'value', 'out', 'mlp'], ...] = ()
    rope: rotary.Rope | None = None  # rotary positions of the patches
    bias: relative.Bias | None = None  # biases of attention by the offset of two patches

    def __post_init__(self) -> None:
        for field, order in (('norms', ('query_key', 'attention', 'mlp')),
                             ('unbiased', (*PROJECTIONS, 'out', 'mlp'))):  # fmt: skip
            values = getattr(self, field)
            if isinstance(values, (list, tuple)) and set(values) <= set(order):
                object.__setattr__(self, field, tuple(n for n in order if n in values))


    @property
    def rotary(self) -> rotary.Rope | None:
        """`rope` as blocks apply it, by halves where they reorder the channels of the projection.

        Neighbours are slow to exchange on TPUs. Norms of queries and keys have scales by channel.
        """
        return dataclasses.replace(self.rope, pairs='halves') if self.reorders else self.rope

    @property
    def reorders(self) -> bool:
        """Whether the projection has the channels of queries and keys by rotary.by_halves."""
        neighbours = self.rope is not None and self.rope.pairs == 'neighbours'
        return neighbours and 'query_key' not in self.norms


PLAIN = Style()
