"""Saves a model and its parameters as a checkpoint that other libraries load."""

import math
import operator
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from vit_jax.convert import biases, big_vision, folding, hf, official, timm, towers_saving, views
from vit_jax.convert.agreement import check_params, check_text, check_towers
from vit_jax.convert.documents import PROBLEMS, class_names
from vit_jax.convert.hf import eomt as hf_eomt
from vit_jax.convert.hf import mae as hf_mae
from vit_jax.convert.hf import processor as hf_processor
from vit_jax.convert.hf import vit as hf_vit
from vit_jax.convert.hf import vit_saving
from vit_jax.convert.hf import yolos as hf_yolos
from vit_jax.convert.pieces import file_arrays
from vit_jax.convert.stages import Beside, loss_of, size_of, view_of
from vit_jax.convert.towers_saving import subtree
from vit_jax.convert.write import write_folder, write_npz
from vit_jax.data.tokenizers import Tokenizer
from vit_jax.errors import UserError, shown
from vit_jax.models import (
    detector,
    embedding,
    mae,
    masks,
    mixer,
    patch_classifier,
    relative,
    resnet,
    segmenter,
    text,
    two_towers,
    vit,
)
from vit_jax.models.interface import Metadata

FORMATS = {'official': official, 'big_vision': big_vision, 'timm': timm, 'hf': hf}

AROUND_NAMES = {
    mae.Mae: 'masked autoencoder', detector.Detector: 'detector',
    masks.MaskClassifier: 'mask classifier', segmenter.Segmenter: 'Segmenter',
    patch_classifier.PatchClassifier: 'linear segmenter',
}  # fmt: skip
AROUND = tuple(AROUND_NAMES)  # models around an encoder
TwoTowers = two_towers.TwoTowers
IN_RUNS = (segmenter.Segmenter, patch_classifier.PatchClassifier)  # which no format has
OF_MIXER = ('official', 'timm')  # formats that have MLP-Mixer
PLAIN = {  # {field: values that a format can express that says nothing else}
    'posemb_at': ('stem',), 'patch_norm': (False,), 'last_norm': ('tokens',),
    'pool_style.prefix': (False,), 'pool_style.num_heads': (None,), 'pool_style.mlp_dim': (None,),
    'style.order': ('pre',), 'style.norm': ('layer',), 'style.norms': ((),),
    'style.rope': (None,), 'style.bias': (None,),
}  # fmt: skip


class About(NamedTuple):
    """What is written beside the weights."""

    image_size: tuple[int, int] | None  # (height, width); None: unknown
    classes: Sequence[str] | None  # names by label
    config: dict[str, Any] | None  # of the run that made the weights
    loss: str | None  # training loss of the head
    view: str | dict


def save(
    path: str | os.PathLike,
    model: nn.Module,
    params: Mapping[str, Any],
    format: str = 'official',
    *,
    image_size: int | Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    config: dict | None = None,
    loss: str | None = None,
    view: str | dict | None = None,
    fold: bool = False,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a checkpoint: 'official' and 'big_vision' an .npz, 'timm' and 'hf' a folder.

    Input size, normalisation, class names, loss, view and config go beside the weights, into
    NAME.json or the JSON files of the folder. The pipelines of timm and transformers then prepare
    images as this model expects; what they have no settings for is logged. What stood at `path` is
    replaced in one step, and stays as it was until then.

    Args:
      params: the parameters, as `load` returns them.
      image_size: int or (height, width). None: that of `model.metadata`, else of a square table.
      classes: names by label. None: those of `model.metadata`.
      config: config of the run that made the weights.
      loss: training loss of the head, 'softmax' or 'sigmoid'. None: that of `model.metadata`, else
        of `config`.
      view: how an image is resized to its size. None: that of the first evaluation of `config`,
        else of `model.metadata`, else 'central'.
      fold: whether to write positions that are computed or absent as a table, and a class token
        with a position as one without it. Outputs stay the same.
      tokenizer: what `vit_jax.tokenizer` returns, whose files are written beside two towers or a
        text tower of format 'hf', for transformers' AutoTokenizer.

    Raises:
      UserError: the format cannot express the model; the message names the field.
    """
    path, params = check_arguments(path, model, params, format, config)
    files = tokenizer_files(model, format, tokenizer)
    if isinstance(model, text.Text):
        check_text(model, params)
        arrays, document = towers_saving.of_text(model, params)
        write_folder(folder_of(path, format), arrays, {'config.json': document}, files)
        return
    whole, beside = (model, params), None
    if isinstance(model, TwoTowers):
        check_towers(model, params)
        model, params = model.image.clone(metadata=model.metadata), subtree(params, 'image')
    about = describe(model, params, image_size, classes, config, loss, view)
    if isinstance(model, AROUND):
        model, params, beside = of_whole(model, params, about)
    fold = fold or beside is not None
    if isinstance(whole[0], TwoTowers) and format == 'hf':
        beside = towers_saving.of_folder(*whole)
    model, params = as_expressed(model, params, format, about.image_size, fold)
    family = family_of(model, format)
    arrays = file_arrays(family.pieces(model), params)
    if format in ('official', 'big_vision'):
        if path.suffix != '.npz':
            raise UserError(f'{path}: format {format} is one file, name it with .npz')
        prefix, record = 'params/' if format == 'big_vision' else '', npz_record(model, about)
        if isinstance(whole[0], TwoTowers):
            others, stated = towers_saving.of_npz(*whole)
            arrays, record = {f'img/{n}': a for n, a in arrays.items()} | others, record | stated
        write_npz(path, {prefix + n: a for n, a in arrays.items()}, record)
        return
    path = folder_of(path, format)
    if about.image_size is None:
        raise UserError(f'format {format} states an image size; give image_size=...')
    documents, notes = folder_documents(format, model, about)
    if hasattr(family, 'complete'):
        arrays = family.complete(model, arrays)
    if beside:
        arrays = beside.finish(arrays)
        documents['config.json'] = beside.document(documents['config.json'] | beside.config)
    write_folder(path, arrays, documents, files)
    if notes:
        logging.warning('%s: as %s prepares images: %s', path, format, '; '.join(notes))


def folder_of(path: pathlib.Path, format: str) -> pathlib.Path:
    """The path of a folder; raises UserError for that of a file."""
    if path.suffix in ('.npz', '.safetensors'):
        raise UserError(f'{path}: format {format} is a folder, name it without {path.suffix}')
    return path


def tokenizer_files(
    model: nn.Module, format: str, tokenizer: Tokenizer | None
) -> dict[str, bytes]:
    """{name: content} of a tokenizer's files; raises UserError where they have no place."""
    if tokenizer is None:
        return {}
    if format != 'hf' or not isinstance(model, (TwoTowers, text.Text)):
        raise UserError(
            f"a tokenizer is written beside two towers or a text tower of format 'hf', not beside "
            f'a {type(model).__name__} of {format!r}; tokenizer.save(FOLDER) writes it alone'
        )
    return tokenizer.files()


def family_of(model: nn.Module, format: str) -> ModuleType:
    """The module that writes a model in a format, as one of the kinds of models of its library.

    It has `pieces`, `limits` and, for a folder, `model_config`. It may have `absent_biases`, those
    that its files lack, too, and `complete`, which makes the file's arrays of those of the pieces.
    """
    if format == 'timm':
        return timm.class_of_model(model)
    return hf.family_of_model(model) if format == 'hf' else FORMATS[format]


def as_expressed(
    model: nn.Module,
    params: dict[str, np.ndarray],
    format: str,
    size: tuple[int, int] | None,
    fold: bool,
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """(model, params) of equal outputs, with the biases, positions and head that the format has.

    Raises UserError if it cannot express the model, or the parameters are not the model's.
    """
    if fold:
        model, params = folding.fold_positions(model, params, format, size)
    if isinstance(model, vit.Vit) and model.style.unbiased:
        absent = getattr(family_of(model, format), 'absent_biases', lambda model: ())
        model, params = biases.with_zeros(model, params, absent(model))
    check_expressible(model, format, fold)
    check_params(model, params, size)
    if family_of(model, format) is hf_vit:
        model, params = vit_saving.with_both_pools(model, params)
    return model, params


def of_whole(
    model: nn.Module, params: dict[str, np.ndarray], about: About
) -> tuple[vit.Vit, dict[str, np.ndarray], Beside]:
    """(encoder, its parameters, what its folder of transformers has beside it) of one in AROUND."""
    size = about.image_size
    if size is None:
        raise UserError('format hf states an image size; give image_size=...')
    check_params(model, params, size)
    if 'cls' in model.vit.prefix:
        encoder = model.vit.clone(pool='cls', cls_token=None)
    else:
        encoder = model.vit.clone(pool='gap', cls_token=None)
    if isinstance(model, mae.Mae):
        return hf_mae.beside(model, encoder, params, size)
    module = hf_yolos if isinstance(model, detector.Detector) else hf_eomt
    return module.beside(model, encoder, params, size, about.classes)


def check_arguments(
    path: Any, model: Any, params: Any, format: str, config: Any
) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """(path, parameters by their name); raises UserError for other arguments of `save`."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(model, nn.Module):
        raise UserError('save takes a path, a model and its parameters, in this order')
    if not isinstance(params, Mapping) or params.keys() == {'params'}:
        raise UserError("give the parameters as load returns them: variables['params']")
    if '\0' in str(path):
        raise UserError(f'{path}: a path has no null character')
    if config is not None and not isinstance(config, dict):
        raise UserError(f'config is {shown(config)}, not the dict of a config.json')
    path = pathlib.Path(os.path.expanduser(path))
    if format not in FORMATS:
        raise UserError(f'format {format!r} is none of {", ".join(FORMATS)}')
    if '://' in str(path) or ':/' in str(path):
        raise UserError(f'{path}: save writes local files; copy them from there')
    if isinstance(model, mixer.Mixer) and format not in OF_MIXER:
        raise UserError(f'format {format} has no MLP-Mixer; {" and ".join(OF_MIXER)} have')
    if isinstance(model, IN_RUNS) or isinstance(model, AROUND) and format != 'hf':
        where = 'its workdir keeps it' if isinstance(model, IN_RUNS) else 'hf has'
        raise UserError(
            f'format {format} has no {AROUND_NAMES[type(model)]}; {where}, and of a file or run '
            "vit_jax.load(path, part='encoder') (--part encoder) is the ViT alone"
        )
    if isinstance(model, TwoTowers) and format not in towers_saving.FORMATS:
        raise UserError(
            f'format {format} has no two towers; {" and ".join(towers_saving.FORMATS)} have, and '
            "of a file vit_jax.load(path, part='image') (--part image) is the image tower alone"
        )
    if isinstance(model, text.Text) and format != 'hf':
        raise UserError(f'format {format} has no text tower alone; hf has')
    if isinstance(model, resnet.Bit) and format != 'timm':
        raise UserError(f'format {format} has no BiT ResNet; timm has, and a workdir keeps one')
    return path, {k: np.asarray(v) for k, v in flatten_dict(params, sep='/').items()}


def describe(
    model: nn.Module,
    params: dict[str, np.ndarray],
    image_size: int | Sequence[int] | None,
    classes: Sequence[str] | None,
    config: dict[str, Any] | None,
    loss: str | None,
    view: str | dict | None,
) -> About:
    """Completes arguments of `save` by the model's metadata and the config; checks them."""
    metadata = model.metadata or Metadata()
    size = size_of(image_size) or metadata.image_size or table_size(model, params)
    if classes is None and metadata.classes and len(metadata.classes) == model.num_classes:
        classes = metadata.classes
    loss = loss or metadata.loss or loss_of(config)
    if loss is not None and loss not in PROBLEMS:
        raise UserError(f'loss is {loss!r}, not one of {", ".join(PROBLEMS)}')
    if classes is not None and len(classes) and class_names(classes) is None:
        raise UserError(f'classes is {shown(classes)}, not a list of names')
    if classes is not None and len(classes) != model.num_classes:
        raise UserError(f'{len(classes)} class names for a head of {model.num_classes} classes')
    view = views.check_view(view) or view_of(config) or metadata.view
    return About(size, classes, config, loss, view)


def table_size(model: nn.Module, params: dict[str, np.ndarray]) -> tuple[int, int] | None:
    """Image size (height, width) of a square table of positions or offsets; None without one."""
    if 'posemb' in params:
        count = params['posemb'].shape[1] - sum(model.prefix_posemb.values())
        side = math.isqrt(count)
        return (side * model.stride[0], side * model.stride[1]) if side * side == count else None
    table = next((x for n, x in params.items() if n.split('/')[-1] == 'bias_table'), None)
    if table is None:
        return None
    before, rows = sum(model.prefix.values()), table.shape[-2]
    side = relative.square_side(rows, before)
    size = side * model.stride[0], side * model.stride[1]
    return size if side and relative.rows((side, side), before) == rows else None


def check_expressible(model: nn.Module, format: str, fold: bool = False) -> None:
    """Raises UserError for a field of the model that the format cannot express."""
    for field, values in limits_of(model, format).items():
        value = operator.attrgetter(field)(model)
        if value not in values:
            ways = ' or '.join(map(repr, values))
            foldable = field == 'cls_posemb' or (field == 'posemb' and value in embedding.FIXED)
            ways += '; fold=True (--fold) writes it so' if foldable and not fold else ''
            others = [other for other in FORMATS if other != format and can_express(model, other)]
            ways += f'; format {" and ".join(others)} can' if others else ''
            raise UserError(
                f'format {format} cannot express {field}={value!r} of this model, only {ways}'
            )
    channels = len(model.mean)
    if channels != 3 and format in ('official', 'big_vision'):
        raise UserError(f'format {format} has images of 3 channels, not {channels}')


def can_express(model: nn.Module, format: str) -> bool:
    """Whether the format can express every field of the model."""
    if not isinstance(model, vit.Vit) and format not in (
        OF_MIXER if isinstance(model, mixer.Mixer) else ('timm',)
    ):
        return False
    limits = limits_of(model, format)
    return all(operator.attrgetter(f)(model) in values for f, values in limits.items())


def limits_of(model: nn.Module, format: str) -> dict[str, tuple]:
    """{field: values that the format can express}."""
    return (PLAIN if isinstance(model, vit.Vit) else {}) | family_of(model, format).limits(model)


def npz_record(model: nn.Module, about: About) -> dict[str, Any]:
    """Metadata to write beside an .npz, as a JSON object."""
    size, view = about.image_size, about.view
    return dict(
        image_size=list(size) if size else None, mean=list(model.mean), std=list(model.std),
        classes=list(about.classes) if about.classes else None, loss=about.loss,
        config=about.config, view=dict(name=view) if isinstance(view, str) else dict(view),
    )  # fmt: skip


def folder_documents(
    format: str, model: nn.Module, about: About
) -> tuple[dict[str, Any], list[str]]:
    """({name: content} of the JSON files of a folder, notes on what they lack of the view)."""
    family = family_of(model, format)
    documents = {'config.json': family.model_config(model, about.image_size, about.classes)}
    if about.loss is not None:
        documents['config.json']['problem_type'] = PROBLEMS[about.loss]
    if format == 'hf':
        settings, notes = views.processor_settings(about.view, about.image_size)
        kind = getattr(family, 'PROCESSOR', None)
        documents['preprocessor_config.json'] = hf_processor.processor_config(model, settings, kind)
    else:
        settings, notes = views.pretrained_settings(about.view, about.image_size)
        documents['config.json']['pretrained_cfg'] |= settings
    if about.config is not None:
        documents['run_config.json'] = about.config
    return documents, notes
