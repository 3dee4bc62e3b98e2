"""Writes a data set as shards of records: python -m vit_jax.data.prepare SRC DST.

SRC is anything that data.source.name takes; its other fields can be given: --source.image=png. DST
is a local folder. Once it has manifest.json, the last file to be written, it is a data set, which
can be SRC too. The same command resumes a run that was stopped; the files depend neither on the
number of workers nor on where it was stopped.

An image longer than --max_side is reduced to it (Pillow's bicubic filter, antialiased) and encoded
as a JPEG of --quality. A smaller image of another format is encoded, too; a smaller JPEG is copied
byte for byte. --max_side=0 copies all. --keep names other fields of the records that are written,
such as mask, or boxes,labels,crowd; masks and boxes have the pixels of their images, so it needs
--max_side=0. Images with duplicates in the sets of --against are left out
and listed in removed.jsonl; see data/prepare/duplicates.py.
"""

import os
import sys

from absl import flags

from vit_jax import cli
from vit_jax.data.prepare import duplicates, folder
from vit_jax.errors import UserError
from vit_jax.io.text import printable

SPLIT = flags.DEFINE_list(
    'split', None, 'Splits to prepare; by default train, and what SRC has for validation and test.'
)
OPTIONS = (
    flags.DEFINE_integer(
        'max_side', 512, 'Most pixels of the longer side; 0 copies images of any size.',
        lower_bound=0,
    ),
    flags.DEFINE_integer(
        'quality', 92, 'Quality of the JPEGs that are encoded.', lower_bound=1, upper_bound=100
    ),
    flags.DEFINE_list('keep', [], 'Fields that are written beside image, label and name.'),
    flags.DEFINE_integer('workers', os.cpu_count(), 'Number of processes.', lower_bound=1),
    flags.DEFINE_integer('shard_examples', 8192, 'Examples of a shard.', lower_bound=1),
    flags.DEFINE_integer(
        'shards', None, 'Shards of a split, in place of --shard_examples.', lower_bound=1
    ),
    flags.DEFINE_multi_string(
        'against', [], 'Test set, SRC or SRC:SPLIT (split test if not given), whose duplicates are '
        'left out'
    ),
    flags.DEFINE_integer(
        'distance', duplicates.DISTANCE, 'Most bits of 255 in which near duplicates differ; -1: '
        'exact duplicates only.', lower_bound=-1, upper_bound=255,
    ),
    flags.DEFINE_float(
        'tolerance', 0.0, 'Share of images that may be unreadable, and are left out.',
        lower_bound=0, upper_bound=1,
    ),
)  # fmt: skip

USAGE = 'usage: python -m vit_jax.data.prepare SRC DST [--split train,validation] [...]'


def main(argv: list[str], changes: list[tuple[str, str]]) -> None:
    if len(argv) != 3:
        raise UserError(USAGE)
    fields = {}
    if changes:
        from vit_jax import config  # takes seconds, in each worker too

        fields = {key: config.parse_value(text) for key, text in changes}
    options = {flag.name: flag.value for flag in OPTIONS}
    try:
        manifest = folder.prepare(*argv[1:], splits=SPLIT.value, fields=fields, **options)
    except KeyboardInterrupt:
        print('interrupted; the same command resumes', file=sys.stderr)
        sys.exit(130)
    for split, counts in manifest.get('counts', {}).items():
        shards = manifest['splits'][split]
        print(
            f'{split}: {counts["examples"]:,} images, {sum(x["bytes"] for x in shards):,} bytes, '
            f'{len(shards):,} shard{"s" * (len(shards) > 1)}; {counts["removed"]:,} duplicates and '
            f'{counts["unreadable"]:,} unreadable left out'
        )
    print(f'Data set: {printable(argv[2])}')


if __name__ == '__main__':
    cli.run(main, 'source')
