"""Trains a tokenizer: python -m vit_jax.data.tokenizers --captions FILE_OR_DATASET --out DIR.

The captions are those of a .txt, one a line, or of any data set that data.source.name takes, whose
field --text names as data.text does. The same captions give the same files. Prints the size of the
vocabulary, how many tokens a caption has, how many of them are bytes of characters that have no
token, and how a few captions are cut. The folder serves as data.tokenizer; transformers reads that
of a BPE, too.
"""

import json
import os
from collections.abc import Iterator

from absl import flags
from etils import epath

from vit_jax import cli
from vit_jax.data import captions, reading, sources
from vit_jax.data.images import Unreadable
from vit_jax.data.tokenizers import training
from vit_jax.errors import UserError
from vit_jax.io import storage
from vit_jax.io.text import printable

FLAGS = flags.FLAGS
MOST_FILE = 2**32  # bytes of a .txt


def lines_of(path: str) -> list[str]:
    """The captions of a text file, without empty lines."""
    try:
        text = storage.read_local(path, MOST_FILE).decode('utf-8-sig')
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not UTF-8: byte {e.start} is {e.reason}') from e
    except OSError as e:
        raise UserError(f'cannot read {path}: {e.strerror or e}') from e
    return [line.strip() for line in text.splitlines() if line.strip()]


def captions_of(name: str, split: str, field: str | None, tolerance: float) -> Iterator[str]:
    """Yields all captions of a data set; raises UserError once too many examples have none."""
    source, bad = sources.load(name=name, split=split, label=None), 0
    for i in range(len(source)):
        try:
            yield from captions.of_record(source.records[i], field)
        except Exception as e:
            bad += 1
            if bad > tolerance * len(source):
                why = e if isinstance(e, (UserError, Unreadable)) else reading.why(e)
                raise UserError(f'{reading.name(source, i)}: {why}') from e


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}')
    out = epath.Path(os.path.expanduser(FLAGS.out))
    storage.check_free(out, FLAGS.force)
    storage.make_folder(out)
    name = os.path.expanduser(FLAGS.captions)
    if name.endswith('.txt'):
        texts = lines_of(name)
    else:
        texts = list(captions_of(FLAGS.captions, FLAGS.split, FLAGS.text, FLAGS.tolerance))
    if not texts:
        raise UserError(f'{FLAGS.captions} has no captions')
    tokenizer = training.train(
        texts, kind=FLAGS.kind, vocab_size=FLAGS.vocab_size, length=FLAGS.length, lower=FLAGS.lower
    )
    tokenizer.save(out)
    found = training.report(tokenizer, texts)
    shown = [texts[i] for i in range(0, len(texts), -(-len(texts) // FLAGS.count))]
    examples = {text: training.pieces(tokenizer, text) for text in shown}
    if FLAGS.json:
        print(json.dumps(found._asdict() | {'examples': examples}))
        return
    for text, parts in examples.items():
        print(f'{printable(text)[:60]:60}  {printable(" | ".join(parts))[:120]}')
    print(
        f'{found.captions:,} captions; {found.vocab_size:,} tokens in the vocabulary; a caption '
        f'has {found.tokens:.1f} of them, {found.spelled:.2%} spell characters by bytes; '
        f'{found.cut:.1%} of the captions are cut at {tokenizer.length}'
    )
    print(f'Tokenizer: {printable(FLAGS.out)}')


if __name__ == '__main__':
    flags.DEFINE_string('captions', None, 'A .txt, or the name of a data set.', required=True)
    flags.DEFINE_string('out', None, 'Folder of the tokenizer.', required=True)
    flags.DEFINE_integer('vocab_size', 8000, 'Most tokens in the vocabulary.', lower_bound=1)
    flags.DEFINE_enum('kind', 'bpe', ['bpe', 'unigram'], 'Kind of model.')
    flags.DEFINE_integer('length', 32, 'Tokens of a text, with its end.', lower_bound=1)
    flags.DEFINE_bool('lower', True, 'Lower-case texts.')
    flags.DEFINE_string('split', 'train', 'Split of the data set.')
    flags.DEFINE_string('text', None, 'Field of the captions, as data.text.')
    flags.DEFINE_float(
        'tolerance', 0.0, 'Share of examples that may have no caption, and are left out.',
        lower_bound=0, upper_bound=1,
    )  # fmt: skip
    flags.DEFINE_integer('count', 5, 'Captions to show, cut.', lower_bound=1)
    flags.DEFINE_bool('force', False, 'Replace a folder of --out that is there.')
    flags.DEFINE_bool('json', False, 'Print one JSON line in place of text.')
    cli.run(main)
