"""preprocessor_config.json of transformers: how images are prepared for a model.

Reads, too, `image_processor` in processor_config.json, which transformers prefers, and files of
feature extractors, as processors were named before. Keys that a file leaves out have the default of
their class in transformers 5.24.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn

from vit_jax.convert.assumed import IMAGENET
from vit_jax.convert.documents import KINDS, channel_values, option
from vit_jax.errors import UserError
from vit_jax.io.text import brief

HALF = [0.5, 0.5, 0.5]
CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
NEAREST, LANCZOS, BILINEAR, BICUBIC = range(4)  # Pillow's numbers, which the files have
SQUARE = dict(
    size={'height': 224, 'width': 224}, crop_size=None, do_center_crop=False, resample=BICUBIC,
    image_mean=HALF, image_std=HALF, default_to_square=True,
)  # fmt: skip
CROPPED = SQUARE | dict(
    size={'shortest_edge': 224}, crop_size={'height': 224, 'width': 224}, do_center_crop=True,
    image_mean=CLIP[0], image_std=CLIP[1], default_to_square=False,
)  # fmt: skip
AROUND = SQUARE | dict(
    resample=BILINEAR, image_mean=list(IMAGENET['mean']), image_std=list(IMAGENET['std']),
    default_to_square=False,
)  # fmt: skip
# Those of models around an encoder, whose padding makes images of a batch equal in size.
PADDED = ('DPT', 'Yolos', 'Eomt', 'ZoeDepth', 'Owlv2')
DEFAULTS = {
    'ViT': SQUARE | dict(resample=BILINEAR),
    'DeiT': SQUARE | dict(
        size={'height': 256, 'width': 256}, crop_size={'height': 224, 'width': 224},
        do_center_crop=True,
    ),
    'Bit': CROPPED,
    'CLIP': CROPPED,
    'Siglip': SQUARE | dict(default_to_square=False),
    'DINOv3ViT': SQUARE | dict(
        resample=BILINEAR, image_mean=list(IMAGENET['mean']), image_std=list(IMAGENET['std']),
    ),
    'Siglip2': SQUARE | dict(resample=BILINEAR, patch_size=16, max_num_patches=256),
    'ChineseCLIP': CROPPED,
    'Blip': SQUARE | dict(
        size={'height': 384, 'width': 384}, image_mean=CLIP[0], image_std=CLIP[1],
    ),
    'OwlViT': SQUARE | dict(
        size={'height': 768, 'width': 768}, crop_size={'height': 768, 'width': 768},
        image_mean=CLIP[0], image_std=CLIP[1],
    ),
    'Owlv2': SQUARE | dict(
        size={'height': 960, 'width': 960}, resample=BILINEAR, image_mean=CLIP[0],
        image_std=CLIP[1],
    ),
    'Beit': SQUARE | dict(crop_size={'height': 224, 'width': 224}),
    'DPT': SQUARE | dict(size={'height': 384, 'width': 384}),
    'Yolos': AROUND | dict(size={'shortest_edge': 800, 'longest_edge': 1333}),
    'Eomt': AROUND | dict(size={'shortest_edge': 640, 'longest_edge': 640}),
    'ZoeDepth': SQUARE | dict(size={'height': 384, 'width': 512}, resample=BILINEAR),
}  # fmt: skip
OF_MODEL = {  # others: ViT
    'deit': 'DeiT', 'dinov2': 'Bit', 'dinov2_with_registers': 'Bit', 'dinov3_vit': 'DINOv3ViT',
    'beit': 'Beit', 'data2vec-vision': 'Beit', 'aimv2_vision_model': 'CLIP', 'pixio': 'Bit',
    'dpt': 'DPT', 'yolos': 'Yolos',
    'clip': 'CLIP', 'metaclip_2': 'CLIP', 'altclip': 'CLIP', 'chinese_clip': 'ChineseCLIP',
    'siglip': 'Siglip', 'siglip2': 'Siglip2', 'blip': 'Blip', 'owlvit': 'OwlViT',
    'owlv2': 'Owlv2',
}  # fmt: skip
SWITCHES = ('do_resize', 'do_rescale', 'do_normalize')  # true where they are left out
READ = {
    'image_processor_type', 'feature_extractor_type', 'size', 'crop_size', 'do_center_crop',
    'default_to_square', 'resample', 'rescale_factor', 'image_mean', 'image_std', *SWITCHES,
    'patch_size', 'max_num_patches',
}  # fmt: skip
# How arrays are passed and returned, names of other classes, and label maps, which no image has
# here; images are always RGB here.
IRRELEVANT = {
    'processor_class', '_valid_processor_keys', '_processor_class', 'data_format', 'device',
    'input_data_format', 'return_tensors', 'disable_grouping', 'do_convert_rgb', 'auto_map',
    'do_reduce_labels', 'reduce_labels', 'image_seq_length', 'transformers_version', 'backend',
    'pad_size', 'size_divisor', 'ensure_multiple_of', 'keep_aspect_ratio', 'do_split_image',
    'format', 'ignore_index', 'do_convert_annotations', 'num_labels', 'annotation_format',
}  # fmt: skip
# Steps that change pixel values and are not supported.
REFUSED = ('do_flip_channel_order', 'do_grayscale', 'rescale_offset', 'offset', 'do_pad')


class Preprocessing(NamedTuple):
    """The preprocessing that a file describes."""

    normalisation: dict[str, tuple[float, ...]]  # {mean, std} of images in [0, 1]
    size: tuple[int, int] | None = None  # (height, width), None: that of the image, or unknown
    view: dict | None = None  # resizes to that size
    ignored: tuple[tuple[str, str], ...] = ()  # (key, why)
    unknown: tuple[str, ...] = ()  # keys


def processor_settings(
    processor_config: dict[str, Any], preprocessor_config: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """(settings, name of the file that has them); ({}, None) if neither file has any."""
    settings = option(
        processor_config, 'image_processor', 'an object', file='processor_config.json'
    )
    if settings:
        return settings, 'processor_config.json'
    return preprocessor_config, 'preprocessor_config.json' if preprocessor_config else None


def processor_class(config: dict[str, Any], model_type: str, file: str) -> str:
    """A key of DEFAULTS, from the type that the file names or else the type of the model."""
    kind = option(config, 'image_processor_type', 'a text', file=file)
    kind = kind or option(config, 'feature_extractor_type', 'a text', file=file)
    if kind is None:
        return OF_MODEL.get(model_type, 'ViT')
    short = kind.removesuffix('Fast').removesuffix('Pil')
    short = short.removesuffix('ImageProcessor').removesuffix('FeatureExtractor')
    if short not in DEFAULTS:
        names = ', '.join(f'{name}ImageProcessor' for name in DEFAULTS)
        raise UserError(
            f'{file}: image_processor_type {brief(repr(kind))} is unknown; the known ones '
            f'are {names}. Remove the file and give mean=(...) and std=(...), or name one of these'
        )
    return short


def read(config: dict[str, Any], file: str, model_type: str, channels: int) -> Preprocessing:
    """Parses the settings of `file`; raises UserError for a step that is not supported."""
    kind = processor_class(config, model_type, file)
    for key in REFUSED:
        if config.get(key) and not (key == 'do_pad' and kind in PADDED):
            raise UserError(
                f'{file}: {key} is {brief(repr(config[key]))}, which is not supported'
            )
    values = DEFAULTS[kind] | dict.fromkeys(SWITCHES, True)
    values = values | {k: v for k, v in config.items() if v is not None}
    for key in (*SWITCHES, 'do_center_crop', 'default_to_square'):
        option(values, key, 'true or false', file=file)
    size, view, ignored = geometry(values, file)
    for key in ('do_pad', 'keep_aspect_ratio', 'do_split_image'):
        if config.get(key):
            ignored.append((key, 'the encoder takes images of its own size here'))
    unknown = (f'{file}: {brief(k)}' for k in config if k not in READ | IRRELEVANT | {*REFUSED})
    return Preprocessing(
        normalisation(values, channels, file), size, view, tuple(ignored), tuple(unknown)
    )


def normalisation(values: dict[str, Any], channels: int, file: str) -> dict[str, tuple[float, ...]]:
    """{mean, std} of images in [0, 1], equal to rescaling and normalising images in 0..255.

    With x in 0..255, y = x / 255 and factor f: (x f - m) / s = (y - m / (255 f)) / (s / (255 f)).
    """
    factor = option(values, 'rescale_factor', 'a number above 0', 1 / 255, file=file)
    scale = 255 * factor if values['do_rescale'] else 255.0
    mean, std = (0.0,) * channels, (1.0,) * channels
    if values['do_normalize']:
        for key in ('image_mean', 'image_std'):  # the default has three equal channels
            if values[key] is HALF:
                values[key] = 0.5
        mean = channel_values(values, 'image_mean', 'a number', channels, file)
        std = channel_values(values, 'image_std', 'a number above 0', channels, file)
    if math.isclose(scale, 1, rel_tol=1e-9):  # 1 / 255, to any number of digits
        return dict(mean=mean, std=std)
    return dict(mean=tuple(m / scale for m in mean), std=tuple(s / scale for s in std))


def size_dict(values: dict[str, Any], key: str, square: bool, file: str) -> dict[str, int]:
    """A size as a dict of height and width, shortest_edge or other edges of transformers."""
    value = values[key]
    if isinstance(value, int):
        value = {'height': value, 'width': value} if square else {'shortest_edge': value}
    if isinstance(value, list) and len(value) == 2:
        value = {'height': value[0], 'width': value[1]}
    value = {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else {}
    if not value or not all(map(KINDS['a number of pixels'], value.values())):
        raise UserError(
            f'{file}: {key} is {brief(repr(values[key]))}, not pixels or an object as '
            '{"height": 224, "width": 224}'
        )
    return value


def geometry(
    values: dict[str, Any], file: str
) -> tuple[tuple[int, int] | None, dict[str, Any], list[tuple[str, str]]]:
    """((height, width) or None, view, [(key, why)] of settings that no view expresses)."""
    ignored, methods = [], {BILINEAR: 'bilinear', BICUBIC: 'bicubic'}
    method = methods.get(option(values, 'resample', 'a whole number', file=file))
    if method is None:
        method = 'bicubic'
        ignored.append(('resample', 'views here have bilinear and bicubic filters: bicubic'))
    resampling = dict(method=method, antialias=True)
    if values.get('max_num_patches'):
        count = option(values, 'max_num_patches', 'a whole number above 0', file=file)
        patch = option(values, 'patch_size', 'a number of pixels', 16, file=file)
        side = math.isqrt(count) * patch
        ignored.append(('max_num_patches', "the image's aspect stays there; here a square"))
        return (side, side), dict(name='resize', **resampling), ignored
    crop = None
    if values['do_center_crop']:
        crop = values['crop_size'] if values['crop_size'] is not None else values['size']
        crop = size_dict({'crop_size': crop}, 'crop_size', True, file)
        crop = (crop['height'], crop['width']) if crop.keys() == {'height', 'width'} else None
    if not values['do_resize']:
        ignored.append(('do_resize', 'false: images are made to fit the model here'))
        return crop, dict(name='resize', **resampling), ignored
    size = size_dict(values, 'size', values['default_to_square'], file)
    if size.keys() == {'height', 'width'}:
        resized = size['height'], size['width']
        target, name = crop or resized, 'resize'
        shares = {t / w for t, w in zip(target, resized, strict=True)}
        if len(shares) == 1 and max(shares) <= 1:
            crop_argument = {} if shares == {1.0} else {'crop': max(shares)}
            return target, dict(name='resize', **crop_argument, **resampling), ignored
        ignored.append(('crop_size', 'no view has such a part of the squeezed image: the whole'))
    elif size.keys() == {'shortest_edge'}:
        edge = size['shortest_edge']
        target, name = crop or (edge, edge), 'central'
        if crop is None:
            ignored.append(('size', "the image's aspect stays there; here its central square"))
        if max(target) <= edge:
            resampling['rounding'] = 'transformers'
            return target, dict(name='small_central', smaller=edge, **resampling), ignored
        ignored.append(('crop_size', 'more than the image there, with black around it'))
    else:
        target, name = crop, 'central'
        ignored.append(('size', f'no view here has {brief(", ".join(size))}'))
    return target, dict(name=name, **resampling), ignored


def processor_config(
    model: nn.Module, settings: dict[str, Any], kind: str | None = None
) -> dict[str, Any]:
    """Content of preprocessor_config.json.

    `settings` are those of `views.processor_settings`, `kind` is the class of a family of its own.
    """
    if kind is None:
        kind = 'DeiTImageProcessor' if model.dist_token else 'ViTImageProcessor'
    crops = settings['do_center_crop'] or (model.layer_scale is not None)
    if crops and kind != 'CLIPImageProcessor':
        kind = 'BitImageProcessor'  # the others of transformers 4 do not crop
    if kind == 'Siglip2ImageProcessor':  # it makes patches of images of any aspect
        size, patch = settings['size'], model.patch_size
        count = size['height'] // patch[0] * (size['width'] // patch[1])
        settings = dict(
            do_resize=True, resample=settings['resample'], patch_size=patch[0],
            max_num_patches=count,
        )  # fmt: skip
    return dict(
        image_processor_type=kind, **settings, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=list(model.mean), image_std=list(model.std),
        do_convert_rgb=len(model.mean) == 3,
    )  # fmt: skip
