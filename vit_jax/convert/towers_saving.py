"""What files of two towers have beside the image tower, to save a `models.two_towers.TwoTowers`.

And what a folder of a text tower alone has.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.convert import big_vision_text, hf
from vit_jax.convert.hf import clip as hf_clip
from vit_jax.convert.hf import siglip as hf_siglip
from vit_jax.convert.hf import siglip2 as hf_siglip2
from vit_jax.convert.hf import text as hf_text
from vit_jax.convert.pieces import file_arrays
from vit_jax.convert.stages import Beside
from vit_jax.errors import UserError
from vit_jax.models.text import Text
from vit_jax.models.two_towers import TwoTowers

FORMATS = ('hf', 'big_vision')  # that have two towers
PLAIN = {  # {field: values of a text tower that a format can express that says nothing else}
    'pool_style.prefix': (False,), 'pool_style.num_heads': (None,), 'pool_style.mlp_dim': (None,),
    'style.order': ('pre',), 'style.norm': ('layer',), 'style.norms': ((),),
    'style.unbiased': ((),), 'style.rope': (None,), 'style.bias': (None,),
}  # fmt: skip
PROJECTED = 'a projection after the text tower'
CLASSES = {  # of transformers, by the family of the image tower: (class, model_type)
    hf_clip: ('CLIPModel', 'clip'), hf_siglip: ('SiglipModel', 'siglip'),
    hf_siglip2: ('Siglip2Model', 'siglip2'),
}  # fmt: skip


def subtree(params: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Those parameters {name: array} that are below `name`, without it."""
    start = f'{name}/'
    return {n.removeprefix(start): x for n, x in params.items() if n.startswith(start)}


def check_text(model: Text, format: str, limits: Mapping[str, tuple]) -> None:
    """Raises UserError for a field of a text tower that the format cannot express."""
    for field, values in (PLAIN | dict(limits)).items():
        value = operator.attrgetter(field)(model)
        if value not in values:
            raise UserError(
                f'format {format} cannot express text.{field}={value!r} of this model, only '
                + ' or '.join(map(repr, values))
            )


def scalars_of(model: TwoTowers, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{temperature, bias} as files have them: bounded, and a bias of 0 in place of none."""
    temperature = params['temperature']
    if model.temperature_max is not None:
        temperature = np.minimum(temperature, np.float32(math.log(model.temperature_max)))
    return dict(temperature=temperature, bias=params.get('bias', np.zeros((), np.float32)))


def of_npz(
    model: TwoTowers, params: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays beside `img/` of big_vision, what the .json beside them states of the text tower)."""
    check_text(model.text, 'big_vision', big_vision_text.limits())
    words = subtree(params, 'text')
    if model.text.num_classes is not None and model.text.head_bias is None:
        words['head/bias'] = np.zeros(model.text.num_classes, np.float32)
    arrays = file_arrays(big_vision_text.pieces(model.text), words)
    scalars = file_arrays(
        big_vision_text.scalar_pieces(model.use_bias), scalars_of(model, params)
    )
    stated = {name: getattr(model.text, name) for name in big_vision_text.LEFT_OPEN}
    return arrays | scalars, dict(text=stated)


def of_folder(model: TwoTowers, params: Mapping[str, np.ndarray]) -> Beside:
    """What a folder of transformers has beside the image tower, as CLIP or SigLIP.

    Raises UserError for a model that none of transformers' classes can be.
    """
    family = hf.family_of_model(model.image)
    if family not in CLASSES:
        raise UserError(
            'format hf has two towers as those of CLIP and SigLIP, whose image towers have a norm '
            "before the first block (pre_norm) or attention pooling (pool='map'); big_vision has "
            'others'
        )
    name, kind = CLASSES[family]
    siglip = family is not hf_clip
    check_folder(model, name, siglip)
    scalars = dict.fromkeys(hf_text.SCALARS.values(), 'vector' if siglip else 'same')
    own = file_arrays(hf_text.pieces(model.text), subtree(params, 'text'))
    own |= file_arrays(hf_text.scalar_pieces(siglip, scalars), scalars_of(model, params))

    def finish(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outside = (hf_clip.PROJECTION, 'vision_model.')
        return own | {
            n if n.startswith(outside) else f'vision_model.{n}': x for n, x in arrays.items()
        }

    def document(config: dict[str, Any]) -> dict[str, Any]:
        vision = {k: v for k, v in config.items() if k not in ('architectures', 'dtype')}
        words = hf_text.model_config(model.text, siglip, kind)
        shared = {} if siglip else dict(projection_dim=model.image.num_classes)
        return dict(
            architectures=[name], model_type=kind, dtype='float32', text_config=words,
            vision_config=vision, **shared,
        )  # fmt: skip

    return Beside(finish, {}, document)


def of_text(
    model: Text, params: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, config.json) of a folder of transformers of a text tower alone.

    It is CLIP's if its tokens attend to those before them, else SigLIP's. Raises UserError for a
    field that this cannot express.
    """
    siglip = not model.causal
    name = 'SiglipTextModel' if siglip else 'CLIPTextModel'
    if not siglip and model.num_classes is not None:
        name += 'WithProjection'
    check_text(model, 'hf', hf_text.limits(siglip))
    wrong = wrong_text(model, siglip)
    if not siglip:
        wrong.pop(PROJECTED)
    for what in (what for what, found in wrong.items() if found):
        raise UserError(f'format hf has this text tower as {name}, which has {what}')
    config = hf_text.model_config(model, siglip, 'siglip' if siglip else 'clip')
    return file_arrays(hf_text.pieces(model), params), dict(
        config, architectures=[name], dtype='float32'
    )


def wrong_text(model: Text, siglip: bool) -> dict[str, bool]:
    """{what the classes of transformers have: whether a text tower lacks it}."""
    projected = model.num_classes is not None
    return {
        'a bias of the text projection': siglip and projected and model.head_bias is None,
        'no bias of the text projection':
            not siglip and projected and model.head_bias is not None,
        PROJECTED: not projected,
        f'no end token {hf_text.LEGACY_EOS}, which stands for the highest id':
            model.eos_id == hf_text.LEGACY_EOS and not siglip,
    }  # fmt: skip


def check_folder(model: TwoTowers, name: str, siglip: bool) -> None:
    """Raises UserError for what transformers' class of that name cannot express."""
    check_text(model.text, 'hf', hf_text.limits(siglip))
    projected = model.image.num_classes is not None
    wrong = {
        'no projection after the image tower': siglip and projected,
        'a projection after the image tower': not siglip and not projected,
        **wrong_text(model.text, siglip),
        'no bias of the logits': not siglip and model.use_bias,
    }
    for what in (what for what, found in wrong.items() if found):
        raise UserError(f'format hf has these towers as {name}, which has {what}')
