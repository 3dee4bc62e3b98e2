"""From a checkpoint of any family, at any address, to a model and its parameters."""

import difflib
import importlib.resources
import json
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_jax import models
from vit_jax.convert import big_vision, fetch, files, hf, official, pieces, run, surgery, timm
from vit_jax.errors import UserError
from vit_jax.models import layers


class Loaded(NamedTuple):
    """What `read` found: all that is needed to use the weights."""

    model: Any
    params: Any
    account: list  # rows of `table`: (what was done, array or arrays, detail)
    source: str  # the family
    image_size: tuple | None  # (height, width) of the parameters, None where any fits
    classes: tuple | None  # names by label
    config: dict | None  # of the run that made them


class Found(NamedTuple):
    """An opened file, understood: what its arrays are, not yet their values."""

    family: str
    kind: str  # 'vit' or 'mixer'
    fields: dict
    arrays: dict  # {name in the pieces: files.Array}
    pieces: Any  # model -> [Piece]
    rows: tuple | None  # (name, rows) of the position table
    unused: dict  # {name: why}
    image_size: tuple | None
    classes: tuple | None
    config: dict | None


def load(path, *, image_size=None, num_classes=None, keep_pre_logits=False, ema=False, **fields):
    """(model, parameters) of a checkpoint, of which nothing needs to be said but where it is.

    `path` is a local path, a gs://, https:// or hf:// address or a name of the catalogue, of: an
    official or big_vision .npz ('FILE.npz:img' for one tower of several); a timm or Hugging Face
    folder or .safetensors; a run's workdir or one of its checkpoints, with the moving average of
    its parameters where `ema`. `image_size` (int or (height, width)) resizes the position table
    by the rule of the source. `num_classes` gives a new zero head (0: none) and drops a
    representation layer (arXiv:2010.11929 section 3.2) unless `keep_pre_logits`. `fields` override
    what was read of the model, as `num_heads`, `epsilon` or `dtype`; `source_image_size` is the
    size that a table was made for, where it is not square. Parameters are float32.
    Raises UserError for whatever is broken, unknown or left unexplained.
    """
    found = read(
        path, image_size=image_size, num_classes=num_classes, keep_pre_logits=keep_pre_logits,
        ema=ema, **fields,
    )  # fmt: skip
    logging.info('%s: %s\n%s', path, found.source, table(found.account))
    return found.model, found.params


def read(
    path,
    *,
    image_size=None,
    num_classes=None,
    keep_pre_logits=False,
    ema=False,
    values=True,
    source_image_size=None,
    **fields,
):
    """`Loaded`, with arguments as those of `load`; without `values` no parameters are read."""
    address, tower = split(resolve(str(path)))
    surgery_of = dict(
        image_size=size_of(image_size), num_classes=num_classes, values=values,
        keep_pre_logits=keep_pre_logits, source_image_size=size_of(source_image_size),
        fields=fields,
    )  # fmt: skip
    if run.is_run(address):
        return fitted(run.found(address, ema), str(path), **surgery_of)
    local = fetch.local(address)
    if run.is_run(str(local)):
        return fitted(run.found(str(local), ema), str(path), **surgery_of)
    if ema:
        raise UserError(f'{path} is no checkpoint of a run, so it has no moving average (ema)')
    with understood(local, tower) as found:
        return fitted(found, str(path), **surgery_of)


def resolve(path):
    """The address of a name of the catalogue; anything else as it is."""
    names = catalogue()
    if path in names:
        return names[path]['address']
    group = path.split('/')[0]
    if not os.path.exists(os.path.expanduser(path)) and '://' not in path:
        near = difflib.get_close_matches(path, names, 3)
        if near and (group in {name.split('/')[0] for name in names} or '.' not in path):
            raise UserError(f'no file {path}, and no such name; the nearest: {", ".join(near)}')
    return path


def catalogue():
    """{name: {address, family, image_size, source, metric, accuracy}} of public checkpoints."""
    file = importlib.resources.files('vit_jax.convert') / 'catalogue.json'
    return json.loads(file.read_text())


def split(address):
    """('file.npz', 'img') of 'file.npz:img'; the tower is None without one."""
    match = re.fullmatch(r'(.*\.npz):(\w+)', address)
    return (match[1], match[2]) if match else (address, None)


def size_of(image_size):
    """(height, width) of an int or a pair, None of None."""
    if image_size is None:
        return None
    pair = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise UserError(f'image_size is {image_size!r}, not a number of pixels or (height, width)')
    return pair


class understood:
    """Opens a local file or folder of any family as a `Found`; a context manager."""

    def __init__(self, local, tower=None):
        self.local, self.tower, self.opened = pathlib.Path(local), tower, []

    def __enter__(self):
        try:
            return self.find()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *exception):
        for manager in reversed(self.opened):
            manager.__exit__(None, None, None)
        self.opened = []

    def arrays_of(self, paths):
        """{name: Array} of one or several files."""
        arrays = {}
        for path in paths:
            manager = files.opened(path)
            part = manager.__enter__()
            self.opened.append(manager)
            if arrays.keys() & part.keys():
                raise UserError(f'{path}: array {min(arrays.keys() & part.keys())} is there twice')
            arrays |= part
        return arrays

    def find(self):
        """The family, by the names of the arrays."""
        paths, folder = weight_files(self.local)
        try:
            arrays = self.arrays_of(paths)
            if str(paths[0]).endswith('.npz'):
                return npz(arrays, self.tower, read_sidecar(paths[0]))
            config = read_json(folder / 'config.json')
            record = read_json(folder / 'run_config.json') or None
            if timm.matches(arrays):
                return timm_folder(arrays, config, record)
            if hf.matches(arrays):
                processor = read_json(folder / 'preprocessor_config.json')
                return hf_folder(arrays, config, processor, record)
        except UserError as e:
            raise UserError(e if str(self.local) in str(e) else f'{self.local}: {e}') from e
        some = ', '.join(list(arrays)[:3])
        raise UserError(f'{self.local}: no known family of ViTs has arrays named {some}, ...')


def weight_files(local):
    """(the files with arrays, the folder with the JSON files beside them)."""
    if not local.is_dir():
        if local.suffix not in ('.npz', '.safetensors'):
            pickled = local.suffix in ('.bin', '.pt', '.pth', '.pkl', '.ckpt')
            why = 'pickled weights are refused' if pickled else 'no known kind of file'
            raise UserError(f'{local}: {why}; give an .npz, a .safetensors or a folder with one')
        return [local], local.parent
    found = sorted(local.glob('*.safetensors'))
    whole = [p for p in found if p.name in ('model.safetensors', 'open_clip_model.safetensors')]
    shards = [p for p in found if re.fullmatch(r'model-\d+-of-\d+\.safetensors', p.name)]
    chosen = whole[:1] or shards or found
    if not chosen:
        raise UserError(f'{local} has no .safetensors file; pickled weights are refused')
    if len(chosen) > 1 and not shards:
        names = ', '.join(p.name for p in chosen)
        raise UserError(f'{local} has several files of weights, name one: {names}')
    return chosen, local


def read_json(path):
    """The object in a file, {} where there is none."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is no JSON file ({e})') from e
    if not isinstance(value, dict):
        raise UserError(f'{path} is no JSON object')
    return value


def read_sidecar(path):
    """NAME.json beside NAME.npz where it was written with it, else {}."""
    record = read_json(path.with_suffix('.json')) if path.with_suffix('.json').exists() else {}
    return record if record.get('arrays') == files.zip_digest(path) else {}


def npz(arrays, tower, record):
    """An official or a big_vision file, with what `save` wrote beside it."""
    extra = dict(
        image_size=size_of(record.get('image_size')), classes=names(record.get('classes')),
        config=record.get('config'),
    )  # fmt: skip
    tidy = official.tidy(arrays) if tower is None else {}
    if official.matches(tidy):
        kind, fields = official.describe(tidy)
        return Found(
            'official', kind, fields, tidy, official.pieces, official.table_rows(tidy), {}, **extra
        )
    tidy, unused = big_vision.tidy(arrays, tower)
    if not big_vision.matches(tidy):
        raise UserError(f'no known family of ViTs has arrays named {", ".join(list(arrays)[:3])}')
    kind, fields = big_vision.describe(tidy)
    stacked = big_vision.is_stacked(tidy)
    return Found(
        'big_vision', kind, fields, tidy, lambda m: big_vision.pieces(m, stacked),
        big_vision.table_rows(tidy), unused, **extra,
    )  # fmt: skip


def timm_folder(arrays, config, record):
    """A timm file with its config.json."""
    if config.get('model_type') is not None and 'architecture' not in config:
        raise UserError('config.json is one of transformers, the arrays are those of timm')
    kind, fields = timm.describe(arrays, config)
    return Found(
        'timm', kind, fields, arrays, timm.pieces, timm.table_rows(arrays),
        explained(arrays, timm.UNUSED), timm.image_size(config), names(config.get('label_names')),
        record,
    )  # fmt: skip


def hf_folder(arrays, config, processor, record):
    """A folder of transformers."""
    tidy = hf.tidy(arrays)
    kind, fields = hf.describe(tidy, config, processor)
    labels = config.get('id2label')
    found = None
    if isinstance(labels, dict) and fields['num_classes']:
        found = [labels.get(str(i)) for i in range(fields['num_classes'])]
        if all(name == f'LABEL_{i}' for i, name in enumerate(found)):
            found = None
    return Found(
        'hf', kind, fields, tidy, hf.pieces, hf.table_rows(tidy), explained(tidy, hf.UNUSED),
        hf.image_size(config), names(found), record,
    )  # fmt: skip


def names(values):
    """Class names as a tuple, None where they are no list of strings."""
    sound = isinstance(values, (list, tuple)) and all(isinstance(v, str) for v in values)
    return tuple(values) if sound and values else None


def explained(arrays, patterns):
    """{name: why} of the arrays that a family leaves out."""
    return {n: why for n in arrays for pattern, why in patterns if re.fullmatch(pattern, n)}


def fitted(found, path, *, fields, image_size, num_classes, keep_pre_logits, source_image_size,
           values):  # fmt: skip
    """`Loaded` of a `Found`: heads changed, the table resized, every array accounted for."""
    try:
        source, grid = understand(found, fields, source_image_size)
        model, fresh = with_head(source, num_classes, keep_pre_logits)
        target = target_grid(found, model, grid, image_size)
        used = [p for p in found.pieces(model) if p.ours.split('/')[0] not in fresh]
        unused = leftover(found, source, used, fresh)
        params, zeros = None, []
        if values:
            params, zeros = filled(model, found, used, grid, target)
    except UserError as e:
        raise UserError(e if path in str(e) else f'{path}: {e}') from e
    size = None
    if target is not None:
        size = tuple(n * s for n, s in zip(target, model.stride, strict=True))
    account = [('loaded', p.theirs, p.ours) for p in used if p.theirs in found.arrays]
    if found.rows and target != grid:
        way = f'{grid[0]} x {grid[1]} -> {target[0]} x {target[1]}, {model.interpolation}'
        account.append(('resized', found.rows[0], way))
    account += [('re-initialised', name, 'zeros: the file has none') for name in zeros]
    for name in fresh:
        if name != 'pre_logits' and (name != 'dist_head' or model.dist_head):
            account.append(('re-initialised', name, f'zeros: {model.num_classes} classes'))
    account += [('unused', name, why) for name, why in sorted(unused.items())]
    classes = found.classes if not fresh else None
    if classes is not None and len(classes) != model.num_classes:
        classes = None
    return Loaded(model, params, account, found.family, size, classes, found.config)


def understand(found, fields, source_image_size):
    """(the model that the file tells of, the grid (h, w) that its parameters fit, None: any)."""
    values = {**found.fields, **fields}
    size = source_image_size or found.image_size
    if found.kind == 'mixer':
        model = built('mixer', values)
        return model, grid_of(official.tokens(found.arrays), model, size)
    if found.rows is None:
        return built('vit', values), None
    name, rows = found.rows
    probe = built('vit', values)
    fits = []
    for cls, registers in prefixes(found, probe):
        model = built('vit', {'cls_posemb': cls, 'registers_posemb': registers, **values})
        before = sum(model.prefix_posemb.values())
        grid = grid_of(rows - before, model, size) if rows > before else None
        if before not in [b for b, *_ in fits]:
            fits.append((before, model, grid))
    known = [(model, grid) for _, model, grid in fits if grid is not None]
    if len(known) == 1 or (len(fits) == 1 and source_image_size is None):
        return known[0] if known else (fits[0][1], None)
    why = 'could be several' if known else 'is no grid'
    prefix = ' or '.join(str(before) for before, *_ in fits)
    raise UserError(
        f'array {name} has {rows} positions, {prefix} of them of the tokens {list(probe.prefix)}: '
        f'what is left {why}; give source_image_size=(height, width), which it was made for'
    )


def prefixes(found, model):
    """[(cls_posemb, registers_posemb)] that a file of this family can mean, likeliest first."""
    if found.family in ('official', 'hf'):
        return [(True, False)]
    if found.family == 'big_vision':  # the second: files from before the class token came after
        return [(False, False), (True, False)]
    if model.dist_token:
        return [(True, True)]
    return [(False, False), (True, True)]


def grid_of(count, model, size):
    """(h, w) of `count` patches: those of an image of `size`, else a square; None if neither."""
    if size is not None:
        y, x = model.stride
        h, w = size[0] // y, size[1] // x
        return (h, w) if h * w == count else None
    side = math.isqrt(count)
    return (side, side) if side * side == count and count else None


def built(kind, values):
    """The model of a file's fields; fields without effect have their default values."""
    model = models.build(f'{kind}/{values["patch_size"][0]}', **values)
    if kind == 'mixer':
        return model
    plain = model.clone(cls_token=None)
    changes = {'cls_token': None} if plain.prefix == model.prefix else {}
    if not {'cls', 'dist'} & model.prefix.keys() or model.posemb != 'learn':
        changes['cls_posemb'] = True
    if not model.registers or model.posemb != 'learn':
        changes['registers_posemb'] = False
    return model.clone(**changes)


def with_head(model, num_classes, keep_pre_logits):
    """(the model with another head, the names of its parameters that are made anew)."""
    if num_classes is None:
        return model, ()
    if not isinstance(num_classes, int) or num_classes < 0:
        raise UserError(f'num_classes is {num_classes!r}, not a number of classes (0: no head)')
    changes = dict(num_classes=num_classes or None)
    fresh = ['head']
    if getattr(model, 'dist_head', False):
        fresh.append('dist_head')
        changes['dist_head'] = bool(num_classes)
    if getattr(model, 'representation_size', None) is not None and not keep_pre_logits:
        fresh.append('pre_logits')
        changes['representation_size'] = None
    return model.clone(**changes), tuple(fresh)


def target_grid(found, model, grid, image_size):
    """The grid that the parameters are to fit, None where they fit any."""
    if image_size is None:
        return grid
    target = layers.grid(image_size, model.stride)
    if found.kind == 'mixer' and target != grid:
        count = official.tokens(found.arrays)
        if math.prod(target) != count:
            raise UserError(
                f'an MLP-Mixer works with the {count} patches that it was trained with; an image '
                f'of {image_size[0]} x {image_size[1]} has {math.prod(target)}'
            )
    if found.rows is not None and grid is None:
        raise UserError(
            f'array {found.rows[0]} has {found.rows[1]} positions, which are no square; to resize '
            'it, give source_image_size=(height, width), which it was made for'
        )
    return target


def leftover(found, source, used, fresh):
    """{array: why it is not used}; UserError for one that nothing explains."""
    taken = {piece.theirs for piece in used}
    unused = dict(found.unused)
    for piece in found.pieces(source):
        if piece.theirs not in taken and piece.theirs in found.arrays:
            dropped = piece.ours.startswith('pre_logits/')
            why = 'dropped with the head' if dropped else 'another head is asked for'
            unused[piece.theirs] = why
    for name, array in found.arrays.items():
        if name not in taken and name not in unused:
            raise UserError(
                f'array {name} {list(array.shape)} is nothing that a {found.family} model of '
                f'{describe(source)} has'
            )
    return unused


def describe(model):
    """'vit-b/16 (width 768, depth 12)'."""
    return f'{models.describe(model)["name"]} (width {model.width}, depth {model.depth})'


def filled(model, found, used, grid, target):
    """(parameters as jax arrays, names of those that are zeros as the file has none)."""
    channels = len(model.mean)
    size = target or (1, 1)
    if target is None and found.rows is not None:  # no square, and nobody asks for its sides
        size = (1, found.rows[1] - sum(model.prefix_posemb.values()))
    image = [n * s for n, s in zip(size, model.stride, strict=True)]
    images = jax.ShapeDtypeStruct((1, *image, channels), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
    shapes = {name: x.shape for name, x in flatten_dict(shapes, sep='/').items()}
    if found.rows is not None:
        shapes['posemb'] = (1, found.rows[1], model.width)
    params = {name: aligned(shape) for name, shape in shapes.items()}
    written = {piece.ours for piece in used}
    for name in params.keys() - written:
        params[name][...] = 0  # a new head
    zeros = pieces.fill(used, found.arrays, params)
    if found.rows is not None and target != grid:
        params['posemb'] = surgery.resize(params['posemb'], grid, target, model.interpolation)
    return unflatten_dict({n: jnp.asarray(x) for n, x in params.items()}, sep='/'), zeros


def aligned(shape):
    """An uninitialised float32 array that JAX on a CPU takes over without a copy."""
    count = math.prod(shape)
    raw = np.empty(count * 4 + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count * 4].view(np.float32).reshape(shape)


def table(account):
    """The account as text: one line for each kind of change, the many that are loaded as one."""
    lines = []
    loaded = [row for row in account if row[0] == 'loaded']
    if loaded:
        places = len({row[2] for row in loaded})
        lines.append(('loaded', f'{len(loaded)} arrays', f'into {places} parameters'))
    groups = {}
    for what, name, detail in account:
        if what != 'loaded':
            groups.setdefault((what, detail), []).append(name)
    for (what, detail), members in groups.items():
        some = ', '.join(members[:3]) + (f', ... ({len(members)})' if len(members) > 3 else '')
        lines.append((what, some, detail))
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    return '\n'.join(
        f'{what.ljust(widths[0])}  {which.ljust(widths[1])}  {detail}'
        for what, which, detail in lines
    )
