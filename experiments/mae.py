"""Masked autoencoders on ImageNet-1k (FILE:MODEL,EPOCHS): 83.6, 85.9 and 86.9% after fine-tuning.

These are published for b/16, l/16 and h/14 with 1,600 epochs in arXiv:2111.06377 table 3
(experiments/finetune_mae.py). Not yet run here.

The recipe is table 8: batches of 4,096, AdamW with b2 0.95, a rate of 1.5e-4 per 256 images, weight
decay 0.05, 40 epochs of warm-up, cosine decay, random resized crops of 20 to 100% of the area and
flips, 75% of the patches hidden, targets normalised by patch, and a decoder of 8 blocks of width
512. EPOCHS is 800 or 1600. Crops are bicubic ones of torchvision, GELU is exact and class and mask
token decay, as in the authors' PyTorch code (facebookresearch/mae). Ours differs in the class
token, which starts at zeros. Products are of bfloat16 and all else of float32, as on the paper's
TPUs.

FILE:l/16,VARIANT is a row of table 1: 800 epochs, pixels that are not normalised unless it is
`norm`. Published in percent after fine-tuning, and of a linear probe:

    default              84.9  73.5        norm      targets normalised     85.4  73.9
    d1   decoder depth   84.8  65.5        w128      decoder width          84.9  69.1
    d2                   84.9  70.0        w256                             84.8  71.3
    d4                   84.9  71.9        w768                             84.4  73.1
    d12                  84.4  73.3        w1024                            84.3  73.1
    block50  sampling    83.9  72.3        none      central crops          84.0  65.7
    block75              82.8  63.9        fixed     crops of a fixed size  84.7  73.1
    grid75               84.0  66.0        encoder  reads mask tokens, too  84.2  59.6

The others are not here, as the paper does not say how they were made: PCA of which patches, with
coefficients of what scale, and how strong colour jitter was; targets of a dVAE need its weights. A
probe on 65,000 images follows the training.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice

IMAGES = 1_281_167  # in ImageNet's train
MODELS = ('b/16', 'l/16', 'h/14')
CROP = dict(name='inception_torchvision', area=(0.2, 1.0), method='bicubic')
CENTRE = dict(name='small_central', smaller=256, method='bicubic', antialias=True,
              rounding='torchvision')  # fmt: skip
VARIANTS = {  # of table 1: settings of the objective, view of training
    'default': ({}, CROP), 'norm': (dict(normalise=True), CROP),
    **{f'd{n}': (dict(decoder_depth=n), CROP) for n in (1, 2, 4, 12)},
    **{f'w{n}': (dict(decoder_width=n), CROP) for n in (128, 256, 768, 1024)},
    'block50': (dict(sampling='block', hide=0.5), CROP),
    'block75': (dict(sampling='block'), CROP), 'grid75': (dict(sampling='grid'), CROP),
    'encoder': (dict(mask_tokens='encoder'), CROP), 'none': ({}, CENTRE),
    'fixed': ({}, dict(name='small_crop', smaller=256, method='bicubic', antialias=True)),
}  # fmt: skip
ARGS = (
    *(f'{model},{epochs}' for epochs in (800, 1600) for model in MODELS),
    *(f'l/16,{variant}' for variant in VARIANTS),
)  # fmt: skip


def get_config(arg='b/16,800'):
    check_choice('argument', arg, ARGS)
    model, _, words = arg.partition(',')
    settings, view = VARIANTS.get(words, (dict(normalise=True), CROP))

    config = ConfigDict()
    config.seed = 0
    config.epochs = 800 if words in VARIANTS else int(words)

    config.model = dict(
        name=f'vit-{model}', posemb='sincos2d_moco', gelu='exact', matmul_dtype='bfloat16',
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    config.objective = dict(name='mae', **dict(normalise=False) | settings)
    config.data = dict(
        source=dict(name='imagenet2012', split='train'), view=view, image_size=224, batch_size=4096
    )
    config.evals = dict(probe=dict(
        type='probe', train_source=dict(name='imagenet2012', split='train[:65000]'),
        source=dict(name='imagenet2012', split='validation'), view=CENTRE, k=(20,), every=50_000,
    ))  # fmt: skip
    config.optim = dict(
        name='adamw', lr=1.5e-4 * 4096 / 256, b2=0.95, weight_decay=0.05,
        decay=('kernel$', '(cls|mask_token)$'), schedule='cosine',
        warmup=round(40 * IMAGES / 4096),
    )  # fmt: skip
    config.checkpoint = dict(every=2_500)
    config.report = dict(every=100)
    return config
