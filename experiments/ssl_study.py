"""Five training methods at equal compute, in miniature: MAE is the best without labels, 78.0%.

    python -m vit_jax.data.prepare
        jft_like:60000x100@28,max_labels=1,cells=1,grey=true,test_examples=2000
        runs/ssl_study/jft_like --shard_examples 5000
    python -m vit_jax.tables ssl_study --run local
    python -m vit_jax.figures runs/ssl_study --out docs/ssl_study

FILE:METHOD,SOURCE pre-trains a ViT of 7.8 MFLOP on 60,000 images of Fashion-MNIST or as many drawn
ones, with 2.4 TFLOP by the count of result.json (within 0.3%; decoder, crops and teacher included),
and measures frozen features with the first 2,000 labelled images of Fashion-MNIST.
FILE:finetune,METHOD,SOURCE,SEED fine-tunes it on these for 400 steps of 64. FILE:none,gap and
none,cls are random weights, with the mean of the patches and, as dino has it, a class token.

Measured here, 38 runs of 51 minutes in all beside other work; 10,000 test images, accuracy in
percent, standard error 0.4 to 0.5: linear probe, 10 neighbours by cosine, fine-tuned (means of
seeds 0 to 2; from drawn images seed 0). Neighbours of raw pixels have 77.1%:

                             Fashion-MNIST        drawn images
    random weights         71.2  63.1  75.5
    ... of a class token   72.9  61.8  77.0
    supervised             79.1  77.5  79.3     71.9  61.5  75.0
    masked_patch           75.0  65.8  75.7     64.2  50.2  66.5
    mae                    77.8  75.4  78.0     74.4  69.0  74.6
    next_patch             74.2  68.1  74.1     72.7  65.5  73.2
    dino                   74.7  59.9  74.3     73.9  54.9  75.4

supervised on Fashion-MNIST has the labels of all 60,000 images. Settings were chosen on validation
images; benchmarks/RESULTS.md lists what was tried, docs/ssl.md what the numbers show.
"""

from ml_collections import ConfigDict

from vit_jax.errors import check_choice
from vit_jax.tables import published

ENCODER = dict(
    name='vit/7', width=96, depth=3, num_heads=2, mlp_dim=192, posemb='sincos2d', unroll=3
)  # fmt: skip
METHODS = {  # settings of the objective, steps of equal compute
    'supervised': ({}, 1600),
    'masked_patch': ({}, 1332),
    'mae': (dict(decoder_width=64, decoder_depth=2, decoder_heads=2, decoder_mlp_dim=128), 2599),
    'next_patch': (dict(head_depth=2, head_width=64), 1202),
    'dino': (
        dict(prototypes=256, hidden=128, bottleneck=64, teacher_temperature=0.025,
             first_temperature=0.025, center_momentum=0.8, teacher_momentum=0.98), 916,
    ),
}  # fmt: skip
SOURCES = {  # name in the table, data set
    'fashion': ('Fashion-MNIST', dict(name='fashion_mnist_debian', split='train')),
    'jft': ('jft_like', dict(name='runs/ssl_study/jft_like', split='train')),
}
LABELLED = dict(name='fashion_mnist_debian', split='train_2k')
TEST = dict(name='fashion_mnist_debian', split='test')
PRETRAINED = tuple(f'{method},{source}' for source in SOURCES for method in METHODS)
RANDOM = {'none,gap': 'random weights', 'none,cls': 'random weights, class token'}
TUNED = (*RANDOM, *PRETRAINED)
SEEDS = {begin: '0' if begin.endswith('jft') else '012' for begin in TUNED}  # of fine-tuning
ARGS = (*TUNED, *(f'finetune,{begin},{seed}' for begin in TUNED for seed in SEEDS[begin]))


def pretrain(config, method, source):
    settings, config.steps = METHODS[method]
    config.objective = dict(name=method, **settings)
    config.data = dict(source=SOURCES[source][1], image_size=28, batch_size=64)
    config.optim = dict(lr=2e-3, warmup=100, weight_decay=0.1, clip=1.0)
    if method == 'dino':
        config.data.update(
            task='crops', batch_size=32, local_size=14, local_count=2, local_area=(0.25, 0.6)
        )
        config.optim = dict(
            lr=1e-3, warmup=100, weight_decay=0.04, decay=('kernel$', 'cls$', 'head/prototypes/'),
            clip=3.0, clip_by='array', hold='head/prototypes/', hold_steps=50,
        )  # fmt: skip
    else:
        config.data.view = dict(name='inception', area=(0.5, 1.0))


def get_config(arg='mae,fashion'):
    check_choice('argument', arg, ARGS)
    begin = arg.removeprefix('finetune,')
    tuned, seed = begin != arg, '0'
    if tuned:
        begin, _, seed = begin.rpartition(',')
    method, source = begin.split(',')
    row = (RANDOM[begin], 'none') if begin in RANDOM else (method, SOURCES[source][0])

    config = ConfigDict()
    config.seed = int(seed)
    config.model = dict(ENCODER, pool='cls' if method == 'dino' or source == 'cls' else 'gap')
    config.expected = []

    def claim(column, metric, label=row):
        config.expected += [
            published.expected('ssl_study', label, column, metric, tolerance=0.02)
        ]

    if tuned:
        config.steps = 400
        config.data = dict(
            source=LABELLED, view=dict(name='shift', pixels=0, flip=True), image_size=28,
            batch_size=64,
        )  # fmt: skip
        config.optim = dict(lr=1e-3, warmup=40, clip=1.0)
        config.evals = dict(test=dict(source=TEST, batch_size=250))
        if begin in PRETRAINED:
            config.init_from = f'runs/ssl_study/{begin}'
        claim(f'fine-tuned, seed {seed}', 'test/accuracy')
        return config
    if begin in PRETRAINED:
        pretrain(config, method, source)
    else:  # nothing is learnt in this step
        config.steps = 1
        config.data = dict(source=LABELLED, view='resize', image_size=28, batch_size=64)
        config.optim = dict(lr=1e-12)
    config.evals = dict(probe=dict(
        type='probe', source=TEST, train_source=LABELLED, batch_size=250, k=(10,),
        pixels=begin == 'none,gap',
    ))  # fmt: skip
    claim('linear probe', 'probe/accuracy')
    claim('10 neighbours', 'probe/10_nn_cosine')
    if begin == 'none,gap':
        claim('10 neighbours', 'probe/10_nn_pixels', ('pixels', 'none'))
    config.report = dict(every=50)
    return config
