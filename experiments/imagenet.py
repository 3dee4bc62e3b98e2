"""Evaluates an ImageNet-1k classifier on all test sets: vit_jax.evaluate --checkpoint X.

Published for ViT-S/16 of arXiv:2205.01580 with 90 epochs: 76.5% on ImageNet, 83.1% on ReaL, 64.2%
on V2. Not yet run here.

The sets are ImageNet, ReaL's labels (arXiv:2006.07159), V2 (arXiv:1902.10811), A (arXiv:1907.07174)
and R (arXiv:2006.16241), which have 200 of the classes and are scored among these, and Sketch
(arXiv:1905.13549). FILE:c evaluates the 75 corrupted sets of C (arXiv:1903.12261) and their mean,
FILE:objectnet the folder objectnet, which experiments/finetune.py describes.
Images are resized as in the code of the ViT papers, to 256 by area, then cropped to 224; override
with --config.data.image_size=384 and --config.evals.X.view.name=central. The sets have their names
in TFDS, which prepares each once. Their classes are named like n01440764, so a checkpoint with
names in words (tench) needs --labels=by_number.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice

SETS = {  # name in TFDS, split, label, whether the classes are a subset of the 1,000
    'val': ('imagenet2012', 'validation', 'label', False),
    'real': ('imagenet2012_real', 'validation', 'real_label', False),
    'v2': ('imagenet_v2/matched-frequency', 'test', 'label', False),
    'a': ('imagenet_a', 'test', 'label', True),
    'r': ('imagenet_r', 'test', 'label', True),
    'sketch': ('imagenet_sketch', 'test', 'label', False),
}
CORRUPTIONS = (  # arXiv:1903.12261 section 4.1, without the four extra ones
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur',
    'zoom_blur', 'snow', 'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate',
    'jpeg_compression',
)  # fmt: skip
ARGS = ('all', 'c', 'objectnet')


def get_config(arg='all'):
    check_choice('argument', arg, ARGS)
    sets = SETS
    if arg == 'objectnet':
        sets = {'objectnet': ('objectnet', 'test', 'label', False)}
    if arg == 'c':
        names = [f'{c}_{severity}' for c in CORRUPTIONS for severity in range(1, 6)]
        sets = {f'c/{n}': (f'imagenet2012_corrupted/{n}', 'validation', 'label', False)
                for n in names}  # fmt: skip

    config = ConfigDict()
    config.steps = 1  # nothing is trained

    config.model = dict()  # read from the checkpoint
    config.data = dict(
        source=dict(name='imagenet2012', split='train'), view='small_central', image_size=224,
        batch_size=256,
    )  # fmt: skip
    config.evals = {
        name: dict(
            source=dict(name=data, split=split, label=label), subset=subset,
            view='resize' if arg == 'c' else 'small_central',  # images of C are 224 x 224
        )
        for name, (data, split, label, subset) in sets.items()
    }  # fmt: skip
    return config
