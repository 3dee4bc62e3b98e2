"""Converts checkpoints: python -m vit_jax.convert SRC DST --to official|big_vision|timm|hf.

SRC is anything that vit_jax.load takes: a path, a gs://, https:// or hf:// address, a name of the
catalogue (--list), a run's workdir. Without DST, the command only describes SRC.
--model.FIELD=VALUE overrides a field of the model that was read: --model.epsilon=1e-6.
"""

import difflib
import inspect
import pathlib
import re

import flax.linen as nn
from absl import flags, logging

from vit_jax import cli, config, models
from vit_jax.convert import load, save, tokenizers
from vit_jax.convert.stages import Loaded
from vit_jax.data.tokenizers import Tokenizer
from vit_jax.errors import UserError
from vit_jax.evaluators import classify
from vit_jax.io import storage
from vit_jax.io.text import aligned, brief, printable
from vit_jax.models.detector import Detector
from vit_jax.models.mae import Mae
from vit_jax.models.text import Text
from vit_jax.models.two_towers import TwoTowers

TO = flags.DEFINE_enum('to', None, list(save.FORMATS), 'The format to write.')
LIST = flags.DEFINE_bool('list', False, 'Print the catalogue of public checkpoints.')
LIKE = flags.DEFINE_string('like', None, 'Print the part of it whose names contain this text.')
SIZE = flags.DEFINE_list('image_size', None, 'Pixels, or height,width: resize the positions.')
PART = flags.DEFINE_enum(
    'part', None, list(load.PARTS), 'Of a file that holds more than a ViT: its encoder, or one of '
    'two towers, of images or of texts.',
)  # fmt: skip
CLASSES = flags.DEFINE_integer(
    'num_classes', None, 'A new head of zeros; 0: no head.', lower_bound=0
)
KEEP = flags.DEFINE_bool('keep_pre_logits', False, 'Keep a representation layer under a new head.')
EMA = flags.DEFINE_bool('ema', True, 'Of a run: the moving average of the parameters, if kept.')
FOLD = flags.DEFINE_bool(
    'fold', False, 'Write positions that the format lacks in a way that it has, where no output '
    'changes: sin-cos positions as a table, say.',
)  # fmt: skip
FORCE = flags.DEFINE_bool('force', False, 'Replace what an earlier export wrote at DST.')


def catalogue(like: str = '') -> str:
    """Formats the catalogue of public checkpoints as a table of the names that contain `like`.

    Raises UserError if none does.
    """
    entries = load.catalogue()
    names = [name for name in entries if like.lower() in name.lower()]
    if not names:
        words = {word for name in entries for word in (name, *re.split(r'[/.]', name))}
        near = difflib.get_close_matches(like, sorted(words), 3, cutoff=0.5)
        hint = f'; near it: {", ".join(near)}' if near else ''
        raise UserError(f'no name of the catalogue contains {brief(repr(like))}{hint}')
    rows = [('name', 'family', 'px', 'ImageNet', 'licence', 'address')]
    for name in names:
        row = entries[name]
        accuracy = '' if row['accuracy'] is None else f'{row["accuracy"]:.2f}%'
        accuracy += ' zero-shot' if 'zero-shot' in (row['metric'] or '') else ''
        shown = row['family'], str(row['image_size']), accuracy, row['licence'] or ''
        rows.append((name, *shown, row['address']))
    return aligned(rows)


def size() -> int | tuple[int, ...] | None:
    """Parses --image_size into an int, a tuple or None; raises UserError if it is not numbers."""
    if SIZE.value is None:
        return None
    try:
        numbers = [int(text) for text in SIZE.value]
    except ValueError:
        raise UserError(f'--image_size is {",".join(SIZE.value)}, not pixels') from None
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def describe(loaded: Loaded) -> str:
    """Describes a checkpoint as text: family, name, fields that are not the default, image size."""
    whole = loaded.model
    model = getattr(whole, 'vit', whole)
    fields = models.describe(model)
    defaults = {k: default for k, (_, default) in models.fields(fields['name']).items()}
    lines = [f'{loaded.source}: {fields["name"]}']
    lines += [f'  {k} = {v!r}' for k, v in fields.items() if v != defaults[k] and k != 'name']
    if model is not whole:
        lines.append(f'  inside of {inside_of(whole)}')
    if loaded.image_size:
        lines.append(f'  for images of {loaded.image_size[0]} x {loaded.image_size[1]}')
    return '\n'.join(lines)


def inside_of(whole: nn.Module) -> str:
    """Describes a model around an encoder as text."""
    if isinstance(whole, Mae):
        return f'a masked autoencoder, {whole.decoder_depth} blocks of decoder'
    if isinstance(whole, TwoTowers):
        return f'two towers, beside {models.describe(whole.text)["name"]} for texts'
    name = 'a detector' if isinstance(whole, Detector) else 'a mask classifier'
    if not hasattr(whole, 'queries'):
        return f'a segmenter of {whole.num_classes} classes'
    return f'{name} of {whole.num_classes} classes, {whole.queries} queries'


def tokenizer_of(address: str, loaded: Loaded) -> Tokenizer | None:
    """The tokenizer of two towers or a text tower, if it is beside them."""
    if not isinstance(loaded.model, (TwoTowers, Text)):
        return None
    try:
        return tokenizers.tokenizer(address)
    except UserError as e:
        logging.warning('written without a tokenizer: %s', e)
        return None


def main(argv: list[str], changes: list[tuple[str, str]]) -> None:
    if LIST.value or LIKE.value is not None:
        print(catalogue(LIKE.value or ''))
        return
    if len(argv) not in (2, 3) or (len(argv) == 3) != (TO.value is not None):
        raise UserError('usage: python -m vit_jax.convert SRC [DST --to FORMAT], or --list')
    if len(argv) == 3:
        target = pathlib.Path(argv[2]).expanduser()
        beside = [target.with_suffix('.json')] if target.suffix == '.npz' else []
        for path in (target, *beside):
            storage.check_free(path, FORCE.value)
    fields = {key: config.parse_value(text) for key, text in changes}
    for key in fields.keys() & inspect.signature(load.read).parameters.keys():
        raise UserError(f'--model.{key} is no field of a model; see --help for flags')
    loaded = load.read(
        argv[1], part=PART.value, image_size=size(), num_classes=CLASSES.value,
        keep_pre_logits=KEEP.value, ema=None if EMA.value else False,
        whole=PART.value is None and TO.value == 'hf', towers=True, **fields,
    )  # fmt: skip
    print(printable(describe(loaded), keep='\n'))
    print(load.format_account(loaded.account))
    if len(argv) == 3:
        # some outputs of a run have no name
        outputs = range(getattr(loaded.model, 'num_classes', None) or 0)
        classes = loaded.classes and [classify.class_name(loaded.classes, i) for i in outputs]
        save.save(
            argv[2], loaded.model, loaded.params, TO.value, image_size=loaded.image_size or size(),
            classes=classes, config=loaded.config, loss=loaded.loss, view=loaded.view,
            fold=FOLD.value, tokenizer=tokenizer_of(argv[1], loaded) if TO.value == 'hf' else None,
        )  # fmt: skip
        print(f'Written: {printable(argv[2])} ({TO.value})')


if __name__ == '__main__':
    cli.run(main, 'model')
