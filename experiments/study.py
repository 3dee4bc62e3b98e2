"""A miniature of the scaling study of arXiv:2010.11929 (section 4.4, figures 3 to 5) on two cores.

    python -m vit_jax.data.prepare
        jft_like:100000x1000@32,max_labels=1,cells=1,grey=true,test_examples=5000
        runs/study/jft_like --shard_examples 5000
    python -m vit_jax.tables study --run local
    python -m vit_jax.figures runs/study --out docs/study

FILE:MODEL,IMAGES pre-trains on the first 5k, 20k or all 100k synthetic images for 1,600 steps of
64 images, and ends with few-shot evaluations of frozen features. FILE:DATASET,MODEL,IMAGES
fine-tunes that run for 200 steps on digits (1,437 images) or the first 2,000 of Fashion-MNIST; with
none as IMAGES it starts from random weights. MODEL is one of vit, hybrid, resnet and mixer with 4
to 6.5 (-s) or 7.5 to 9.7 MFLOP per image (-m).

Measured here, seed 0, 56 runs of 1.10 hours in all beside other work. Accuracy in percent from
random weights and from 5k, 20k and 100k images; standard errors are 0.3 to 1.9 points (digits) and
0.4 to 0.5 (Fashion-MNIST):

               digits                          Fashion-MNIST
    vit-m      85.52  90.53  85.52  91.92      67.57  70.24  69.47  69.26
    hybrid-m   94.99  96.10  95.82  98.33      72.90  78.04  76.70  77.03
    resnet-m   99.44  99.16  99.44  99.72      76.79  79.99  79.60  78.45
    mixer-m    97.77  99.44  98.61  99.16      75.56  78.37  76.87  78.23

Pre-training gains 1 to 5 points on Fashion-MNIST; 20 epochs of 5k images are as good as one of
100k. ResNets lead, as in the paper on its smallest data sets; ViTs overtake them only beyond these
sizes. For few shots and the small models: python -m vit_jax.tables study.

Objects that fill at most a quarter of an image, as with cells=2, don't transfer to digits. A ViT
of 11 MFLOP pre-trained on them and fine-tuned by SGD at 0.03 for 200 steps has 33%, or 23% with
grey images, against 87% from random weights.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

MODELS = {
    'vit-s': dict(
        name='vit/8', width=56, depth=4, num_heads=2, mlp_dim=112, pool='gap', unroll=4),
    'vit-m': dict(
        name='vit/8', width=80, depth=4, num_heads=2, mlp_dim=160, pool='gap', unroll=4),
    'hybrid-s': dict(
        name='vit/2', resnet=(1,), resnet_width=0.5, width=48, depth=2, num_heads=2, mlp_dim=96,
        pool='gap', unroll=2),
    'hybrid-m': dict(
        name='vit/1', resnet=(1, 1), resnet_width=0.5, width=48, depth=2, num_heads=2, mlp_dim=96,
        pool='gap', unroll=2),
    'resnet-s': dict(name='bit', units=(1,), width=0.5),
    'resnet-m': dict(name='bit', units=(1, 1), width=0.5),
    'mixer-s': dict(name='mixer/8', width=88, depth=3, tokens_mlp_dim=44, mlp_dim=176, unroll=3),
    'mixer-m': dict(name='mixer/8', width=112, depth=4, tokens_mlp_dim=56, mlp_dim=224, unroll=4),
}  # fmt: skip
IMAGES = {'5k': 'train[:5%]', '20k': 'train[:20%]', '100k': 'train'}
JFT_LIKE = 'runs/study/jft_like'
DATA = {  # name in the table, training, test, test for few shots, view
    'fashion': (
        'Fashion-MNIST', ('fashion_mnist_debian', 'train_2k'), 'test', 'test_1k',
        dict(name='affine', degrees=5.0, scale=0.05, pixels=0.5, flip=True),
    ),
    'digits': (
        'digits', ('digits', 'train'), 'test', 'test',
        dict(name='affine', degrees=10.0, scale=0.1, shear=0.1, pixels=3.0),
    ),
}  # fmt: skip
KINDS = ('vit', 'hybrid', 'resnet', 'mixer')
PRETRAINED = (*(f'{m}-m,{n}' for m in KINDS for n in IMAGES), *(f'{m}-s,100k' for m in KINDS))
BEGUN = (*(f'{m}-m,none' for m in KINDS), *PRETRAINED)
ARGS = (*PRETRAINED, *(f'{data},{begin}' for data in DATA for begin in BEGUN))


def source(name, split):
    return dict(name=name, split=split)


def get_config(arg='vit-m,100k'):
    check_choice('argument', arg, ARGS)
    *tuned, model, images = arg.split(',')
    config = ConfigDict()
    config.seed = 0
    config.steps = 200 if tuned else 1600

    config.model = dict(MODELS[model])
    config.data = dict(image_size=32, batch_size=64)
    config.expected = []

    def claim(column, metric):
        config.expected += [
            published.expected('study', (model, images), column, metric, tolerance=0.03)
        ]

    if tuned:
        title, (name, train), test, _, view = DATA[tuned[0]]
        config.data.source, config.data.view = source(name, train), view
        config.evals = dict(test=dict(source=source(name, test), batch_size=128))
        if images != 'none':
            config.init_from = f'runs/study/{model},{images}'
        config.optim = dict(lr=3e-3, warmup=40, clip=1.0)
        claim(title, 'test/accuracy')
    else:
        config.data.source = source(JFT_LIKE, IMAGES[images])
        config.data.view = dict(name='shift', pixels=2, flip=True)
        config.evals = dict(test=dict(source=source(JFT_LIKE, 'test'), batch_size=128))
        for key, (title, (name, train), _, few, _) in DATA.items():
            config.evals[key] = dict(
                type='probe', source=source(name, few), train_source=source(name, train),
                shots=(10,),
            )  # fmt: skip
            claim(f'{title}, 10 shots', f'{key}/10_shot')
        config.optim = dict(lr=2e-3, warmup=100, weight_decay=0.05, clip=1.0)
    config.report = dict(every=50)
    return config
