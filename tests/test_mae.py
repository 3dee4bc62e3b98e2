"""Masked autoencoders: against transformers, on any number of devices, and as what others load."""

import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
from compared import assert_close, compiled, random_images, randomised
from learners import assert_trees_close
from PIL import Image
from recorded import DATA, location

import vit_jax
from vit_jax import assembly, config, models, optim, sharding, step, train
from vit_jax.assembly import initial
from vit_jax.data import pipeline
from vit_jax.distributed.stop import Stop
from vit_jax.errors import UserError
from vit_jax.figures import restored
from vit_jax.models import embedding
from vit_jax.models.mae import Mae, around_encoder
from vit_jax.objectives import Examples, mae

FILE = pathlib.Path(__file__).with_name('tiny_mae.py')
IMAGE = (16, 24, 3)
WIDTHS = dict(width=16, depth=2, num_heads=2, mlp_dim=24, posemb='sincos2d_moco')
SMALL = dict(decoder_width=16, decoder_depth=1, decoder_heads=2)


def learner(image=IMAGE, model=None, **settings):
    """The objective for a tiny ViT with 4 x 6 patches."""
    vit = models.build('vit/4', **WIDTHS | (model or {}))
    spec = {'image': jax.ShapeDtypeStruct(image, np.uint8)}
    return mae.mae(vit, Examples(spec), **SMALL | settings)


def a_batch(size=8, image=IMAGE):
    rng = np.random.default_rng(3)
    mask = np.ones(size, np.float32)
    mask[2] = 0
    return {'image': rng.integers(0, 256, (size, *image), dtype=np.uint8), 'mask': mask}


@functools.cache
def recorded():
    """(model, parameters, what transformers made)."""
    return *vit_jax.load(location('hf_mae')), dict(np.load(DATA / 'hf_mae.results.npz'))


def test_the_recorded_prediction_mask_and_both_losses():
    model, params, expected = recorded()
    images = expected['images'].astype(np.float32)
    prediction, out = model.apply({'params': params}, images, noise=expected['noise'])
    assert_close(prediction, expected['prediction'])
    assert_close(out['visible'], expected['visible'])
    np.testing.assert_array_equal(out['mask'], expected['mask'])
    for normalise, name in ((True, 'loss_normalised'), (False, 'loss_pixels')):
        targets = mae.patch_targets(jnp.asarray(images), (8, 8), normalise)
        loss = mae.hidden_error(prediction, targets, out['mask']).mean()
        np.testing.assert_allclose(loss, expected[name], rtol=1e-5)
    assert model.normalised and model.hide == 0.6


def test_the_loss_is_that_of_the_model_for_examples_with_mask_one():
    model, params, _ = recorded()
    settings = dict(
        hide=0.6, decoder_width=16, decoder_depth=1, decoder_heads=2, decoder_mlp_dim=20
    )
    vit = model.vit.clone(posemb='learn', pool='cls', cls_token=None)
    spec = {'image': jax.ShapeDtypeStruct((32, 32, 3), np.uint8)}
    for normalise in (True, False):
        objective = mae.mae(vit, Examples(spec), normalise=normalise, **settings)
        fixed = around_encoder(model.vit, **settings)
        weights = {k: v for k, v in params.items() if k != 'decoder_posemb'}
        batch, key = a_batch(image=(32, 32, 3)), jax.random.key(5)
        found = jax.jit(objective.loss)(weights, {}, {}, batch, key, 0)[1][0]['loss']
        noise = mae.draw_noise(jax.random.fold_in(key, mae.NOISE), 8, (4, 4))
        images = vit.normalise(batch['image'])
        prediction, out = compiled(fixed)(weights, images, noise=noise)
        wanted = []
        for i in np.flatnonzero(batch['mask']):  # patch by patch, in float64
            for n in np.flatnonzero(out['mask'][i]):
                y, x = divmod(int(n), 4)
                patch = np.asarray(images[i, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8], np.float64)
                patch = patch.reshape(-1)
                if normalise:
                    variance = np.sum((patch - patch.mean()) ** 2) / (len(patch) - 1)
                    patch = (patch - patch.mean()) / np.sqrt(variance + 1e-6)
                wanted.append(np.mean((np.asarray(prediction[i, n]) - patch) ** 2))
        assert len(wanted) == 7 * 10
        np.testing.assert_allclose(found, np.mean(wanted), rtol=1e-5)


def transformers_model(**fields):
    transformers = pytest.importorskip('transformers')
    defaults = dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=20, patch_size=4, image_size=16,
    )  # fmt: skip
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**defaults | fields)).eval()


def fill_positions(module):
    """Sets the positions to those of transformers' own function, in the order of the public files.

    The class itself leaves zeros there, and files have them (transformers 5.24).
    """
    import torch
    from transformers.models.vit_mae import modeling_vit_mae as code

    with torch.no_grad():
        for table in (module.vit.embeddings.position_embeddings, module.decoder.decoder_pos_embed):
            width = table.shape[-1]
            made = code.build_2d_sinusoidal_position_embedding(4, 4, width, cls_token=True)
            table.copy_(torch.cat([made[:, width // 2 :], made[:, : width // 2]], 1)[None])


def by_torch(module, images, noise):
    """(prediction, mask, the encoder's output) of transformers, for images of any aspect."""
    import torch

    with torch.no_grad():
        out = module.vit(torch.from_numpy(images.transpose(0, 3, 1, 2)),
                         noise=torch.from_numpy(noise))  # fmt: skip
        prediction = module.decoder(out.last_hidden_state, out.ids_restore).logits
    return prediction.numpy(), out.mask.numpy(), out.last_hidden_state.numpy()


@pytest.mark.parametrize('fields, noisy', [
    (dict(image_size=[8, 32], qkv_bias=False, layer_norm_eps=1e-3), True),
    (dict(hidden_act='gelu_pytorch_tanh', mask_ratio=0.3, num_channels=1), True),
    (dict(norm_pix_loss=True), False),  # fixed positions
])
def test_transformers_reads_what_is_saved_and_what_it_writes_is_read(tmp_path, fields, noisy):
    module = randomised(transformers_model(**fields))
    if not noisy:
        fill_positions(module)
    module.save_pretrained(tmp_path / 'in')
    model, params = vit_jax.load(tmp_path / 'in')
    size = model.metadata.image_size
    images, noise = random_images(2, *size, len(model.mean)), random_images(2, 16)
    assert isinstance(model, Mae) and model.normalised == ('norm_pix_loss' in fields)
    learnt = model.vit.posemb, model.decoder_posemb
    assert learnt == (('learn',) * 2 if noisy else ('sincos2d_moco',) * 2)

    def check(module):
        prediction, out = compiled(model)(params, images, noise=noise)
        theirs = by_torch(module, images, noise)
        for ours, wanted in zip((prediction, out['mask'], out['visible']), theirs, strict=True):
            assert_close(np.asarray(ours), wanted)

    check(module)
    vit_jax.save(tmp_path / 'out', model, params, 'hf')
    again, info = type(module).from_pretrained(tmp_path / 'out', output_loading_info=True)
    assert not any(info.values()), info
    check(again.eval())
    back, weights = vit_jax.load(tmp_path / 'out')
    assert back == model
    jax.tree.map(np.testing.assert_array_equal, weights, params)
    with pytest.raises(UserError, match='format timm has no masked autoencoder; hf has'):
        vit_jax.save(tmp_path / 'timm', model, params, 'timm')


def test_the_encoder_alone_is_the_whole_one_where_all_is_visible(tmp_path):
    model, params, expected = recorded()
    vit, weights = vit_jax.load(location('hf_mae'), part='encoder')
    images = expected['images'].astype(np.float32)
    noise = np.tile(np.arange(16.0), (2, 1))
    _, out = compiled(model.clone(hide=0.0))(params, images, noise=noise)
    encoded = compiled(vit)(weights, images)[1]['encoded']
    np.testing.assert_allclose(out['visible'][:, 1:], encoded, atol=1e-5)
    larger, resized = vit_jax.load(location('hf_mae'), image_size=(40, 24), hide=0.5)
    noise, images = random_images(2, 15), random_images(2, 40, 24, 3)
    prediction, out = compiled(larger)(resized, images, noise=noise)
    assert prediction.shape == (2, 15, 192) and out['mask'].sum() == 2 * 8
    with pytest.raises(UserError, match="no other head; part='encoder'"):
        vit_jax.load(location('hf_mae'), num_classes=3)
    with pytest.raises(UserError, match=r'noise is None, not \[2, 15\]'):
        compiled(larger)(resized, images)


def test_positions_are_those_of_the_code_of_the_paper():
    """Exponents i / (D / 4), columns before rows (facebookresearch/mae, pos_embed.py)."""
    found = embedding.fixed('sincos2d_moco', 3, 5, 16)
    for n in range(15):
        row, column = divmod(n, 5)
        angles = [place / 10_000 ** (i / 4) for place in (column, row) for i in range(4)]
        parts = np.split(np.array(angles), 2)
        wanted = np.concatenate([f(a) for a in parts for f in (np.sin, np.cos)])
        np.testing.assert_allclose(found[0, n], wanted, atol=1e-6)


@pytest.mark.parametrize('sampling', ['random', 'block', 'grid'])
def test_shares_are_exact_and_what_is_hidden_is_drawn_as_named(sampling):
    grid = (6, 8)
    noise = mae.draw_noise(jax.random.key(0), 64, grid, sampling)
    hidden = {}
    for hide in (0.75, 0.6, 0.1, 0.9):
        net = around_encoder(models.build('vit/4', None), hide=hide)
        count = net.visible_count(48)
        assert count == int(48 * (1 - hide))
        rank = jnp.argsort(jnp.argsort(noise, axis=1), axis=1)
        hidden[hide] = np.asarray(rank >= count).reshape(64, *grid)
        assert np.all(hidden[hide].sum((1, 2)) == 48 - count)
    same = hidden[0.6][:, :, 1:] == hidden[0.6][:, :, :-1]  # neighbours
    if sampling == 'grid':
        assert not hidden[0.75][:, ::2, ::2].any()
        np.testing.assert_array_equal(hidden[0.75].sum(0) // 64, 1 - np.pad(
            np.ones((3, 4)), 0).repeat(2, 0).repeat(2, 1) * (np.add.outer(
                np.arange(6) % 2, np.arange(8) % 2) == 0))  # fmt: skip
    else:
        assert same.mean() > 0.7 if sampling == 'block' else 0.45 < same.mean() < 0.6
        assert 0.1 < hidden[0.6].mean(0).min() and hidden[0.6].mean(0).max() < 1
    assert len({h.tobytes() for h in hidden[0.6]}) > 32


@pytest.mark.parametrize('where', ['decoder', 'encoder'])
def test_what_is_hidden_changes_no_code(where):
    objective = learner(mask_tokens=where)
    params = objective.init(jax.random.key(0))
    net = around_encoder(models.build('vit/4', None, **WIDTHS), mask_tokens=where, **SMALL)
    images, noise = random_images(2, *IMAGE), random_images(2, 24)
    predict = compiled(net)
    prediction, out = predict(params, images, noise=noise)
    patches = np.where(out['mask'][..., None], np.nan, embedding.cut(jnp.asarray(images), (4, 4)))
    blind = embedding.joined(jnp.asarray(patches), (4, 6), (4, 4))
    np.testing.assert_array_equal(predict(params, blind, noise=noise)[0], prediction)
    hidden = np.asarray(prediction)[np.asarray(out['mask']) > 0]
    assert len(np.unique(hidden, axis=0)) == len(hidden) == 2 * 18  # each has its position
    assert out['visible'].shape[1] == 1 + (24 if where == 'encoder' else 6)
    assert params['mask_token'].shape[2] == 16 and objective.flops == net.flops(IMAGE)


def test_settings_are_checked():
    for words, settings in (
        ('hide is 0.97: none of 24 patches', dict(hide=0.97)),
        ('objective.hide is 0, which hides none', dict(hide=0.0)),
        ('decoder width 16 is not divisible by its number of heads, 5', dict(decoder_heads=5)),
        ("model.pool is 'map', which a masked", dict(model=dict(pool='map'))),
        ('model.last_norm is', dict(model=dict(last_norm='pooled'))),
        ('config data.image_size: image size 17 x 24', dict(image=(17, 24, 3))),
    ):
        with pytest.raises(UserError, match=words):
            learner(**settings)


def test_mask_tokens_in_the_encoder_cost_three_times_as_much():
    """arXiv:2111.06377 table 1c: training has 3.3 times the FLOPs with them."""
    nets = (
        around_encoder(models.build('vit-l/16', None), mask_tokens=where)
        for where in ('encoder', 'decoder')
    )
    more, few = (net.flops((224, 224, 3)) for net in nets)
    assert 3.2 < more / few < 3.35


def test_flops_are_those_that_the_compiler_counts():
    vit = models.build('vit/8', None, width=256, depth=1, num_heads=4, mlp_dim=512)
    net = around_encoder(vit, decoder_width=192, decoder_depth=1, decoder_heads=2)
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((1, 64, 96, 3), (1, 96))]
    params = jax.eval_shape(net.init, jax.random.key(0), shapes[0])['params']
    apply = jax.jit(lambda p, images, noise: net.apply({'params': p}, images, noise=noise)[0])
    counted = apply.lower(params, *shapes).compile().cost_analysis()['flops']
    assert 1 < counted / net.flops((64, 96, 3)) < 1.06  # norms, softmax and GELU, too


def steps_of(objective, devices, count=3, accumulate=1, **mesh):
    """(losses, final parameters) of steps on one batch."""
    mesh = sharding.make_mesh(jax.devices()[:devices], **mesh)
    tx = optim.make(step.abstract_params(objective), 10, objective.rules, name='sgd', lr=0.1)
    abstract = step.abstract_state(objective, tx, mesh)
    state = step.init(objective, tx, 0, abstract)
    advance = step.compiled(objective, tx, abstract, mesh, accumulate=accumulate)
    losses = []
    for _ in range(count):
        state, metrics = advance(state, sharding.put(a_batch(), mesh), {})
        losses.append(float(metrics['loss']))
    return losses, jax.device_get(state.params)


@pytest.mark.slow
def test_eight_devices_are_one_on_any_mesh():
    objective = learner(model=dict(drop_path=0.3))
    one = steps_of(objective, 1)
    assert one[0][-1] != one[0][0]
    eight = steps_of(objective, 8, fsdp=2, tensor=2)
    assert_trees_close(eight, one, rtol=1e-4, atol=1e-5)
    fsdp = sharding.make_mesh(jax.devices(), fsdp=4)
    tx = optim.make(step.abstract_params(objective), 10, objective.rules)
    split = step.abstract_state(objective, tx, fsdp).params
    for name in ('decoder_embedding', 'decoder_head'):
        assert split[name]['kernel'].sharding.spec[0] == 'fsdp'
    assert 'fsdp' in split['decoder']['attn']['qkv']['kernel'].sharding.spec


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return launched.write_images(tmp_path_factory.mktemp('images'), {'train': 12, 'val': 5})


def run(folder, path):
    return train.train(config.load(f'{FILE}:{folder}', []), path, Stop())


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp('mae') / 'run'
    return path, run(folder, path)


def test_a_run_learns_is_probed_and_resumes_to_the_bit(folder, whole, tmp_path):
    path, result = whole
    losses = [line['loss'] for line in launched.metrics(path) if 'loss' in line]
    assert losses[-1] < 0.7 * losses[0]
    assert 0 <= result['metrics']['probe/1_nn'] <= 1
    again = shutil.copytree(path, tmp_path / 'run')
    (again / 'result.json').unlink()
    shutil.rmtree(again / 'checkpoints' / '12')
    run(folder, again)  # from step 8
    a, b = (launched.state(w, 12) for w in (path, again))
    assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def test_a_run_is_loaded_whole_saved_for_transformers_and_by_its_encoder(folder, whole, tmp_path):
    path, _ = whole
    model, params = vit_jax.load(path)
    assert isinstance(model, Mae) and not model.normalised and model.decoder_width == 12
    full = config.load(f'{FILE}:{folder}', [])
    parts = assembly.make(full, devices=jax.devices()[:1])
    batch = next(pipeline.batches(parts.source, parts.task, 0, batch_size=4))
    images, noise = model.normalise(batch['image']), random_images(4, 8)
    prediction, out = compiled(model)(params, images, noise=noise)
    vit, weights = vit_jax.load(path, part='encoder')
    seen = jax.jit(parts.objective.predict)(params, batch)
    np.testing.assert_allclose(
        compiled(vit)(weights, images)[1]['encoded'], seen['encoded'], atol=1e-6
    )
    other = json.loads((path / 'config.json').read_text())
    del other['objective']['mask_tokens']
    shutil.copytree(path, tmp_path / 'other')
    (tmp_path / 'other' / 'config.json').write_text(json.dumps(other))
    with pytest.raises(UserError, match="not the config of a run .*'mask_tokens'"):
        vit_jax.load(tmp_path / 'other')
    pytest.importorskip('transformers')
    import transformers

    square, weights = vit_jax.load(path, image_size=(16, 16))
    vit_jax.save(tmp_path / 'out', square, weights, 'hf')
    module = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / 'out').eval()
    images, noise = random_images(2, 16, 16, 3), random_images(2, 16)
    wanted = compiled(square)(weights, images, noise=noise)[0]
    assert_close(np.asarray(wanted), by_torch(module, images, noise)[0])
    back, again = vit_jax.load(tmp_path / 'out')
    assert back.clone(vit=square.vit, decoder_mlp_dim=None) == square
    assert back.vit.posemb == 'sincos2d_moco'
    jax.tree.map(np.testing.assert_array_equal, again, weights)


@pytest.mark.parametrize('posemb', ['learn', 'sincos2d_moco'])
def test_its_encoder_begins_a_supervised_run(folder, whole, posemb):
    path, _ = whole

    def begun(size):
        given = config.experiment.read(f'{FILE}:{folder}')
        given['model'] |= dict(posemb=posemb, pool='gap', cls_token=True)
        given['data']['image_size'] = size
        given |= dict(objective=dict(name='supervised'), evals={}, init_from=str(path))
        full = config.complete(given)
        return initial.first_state(full, assembly.make(full, devices=jax.devices()[:1]))

    state, account = begun((16, 16))
    encoder = vit_jax.load(path, part='encoder')[1]
    for name in ('embedding', 'encoder', 'norm', 'cls'):
        jax.tree.map(np.testing.assert_array_equal, state.params[name], encoder[name])
    assert ('resized' in account) == (posemb == 'learn')
    if posemb == 'learn':
        assert state.params['posemb'].shape == (1, 1 + 16, 16)
        assert np.abs(state.params['posemb'][0, 0]).max() == 0
        table = begun((16, 8))[0].params['posemb']
        np.testing.assert_array_equal(table[:, 1:], embedding.fixed('sincos2d_moco', 4, 2, 16))


@pytest.mark.parametrize('normalised', [True, False])
def test_no_hidden_pixel_leaks_into_the_pictures(normalised):
    model, params, _ = recorded()
    model = model.clone(normalised=normalised)
    rng = np.random.default_rng(0)
    images, other = rng.integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)
    noise = random_images(3, 16)
    ranks = np.argsort(np.argsort(noise, axis=1), axis=1).reshape(3, 4, 4, 1)
    visible = (ranks < 6).repeat(8, 1).repeat(8, 2)  # of 16 patches, hide is 0.6
    seen, made = restored.restore(model, params, images, noise)
    np.testing.assert_array_equal(seen, np.where(visible, images, restored.GREY))
    np.testing.assert_array_equal(np.where(visible, made, 0), np.where(visible, images, 0))
    for pictures in zip(
        restored.restore(model, params, np.where(visible, images, other), noise), (seen, made),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(*pictures)
    changed = restored.restore(model, params, np.where(visible, other, images), noise)[1]
    assert np.mean(np.where(visible, 0, changed) != np.where(visible, 0, made)) > 0.2
    if normalised:  # one grey everywhere is restored, as means and deviations are those around
        grey, half = np.full_like(images, 90), dict(mean=(0.5,) * 3, std=(0.5,) * 3)
        made = restored.restore(model.clone(vit=model.vit.clone(**half)), params, grey, noise)[1]
        assert np.abs(made.astype(int) - 90).max() <= 1


def test_the_command_draws_what_is_restored(tmp_path):
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    picture = tmp_path / 'out.png'
    command = ['predict', tmp_path / '0.png', tmp_path / '1.png', '--hide=0.5', f'--out={picture}']
    status, output, errors = launched.run(*command, f'--checkpoint={location("hf_mae")}')
    assert status == 0, errors
    assert 'image, 8 of 16 patches, restored; mean and deviation of hidden patches are' in output
    sheet = np.asarray(Image.open(picture))
    assert sheet.shape == (2 * 32 + 8, 3 * 32 + 2 * 8, 3)
    grey = np.all(sheet[:32, 40:72] == restored.GREY, axis=-1)
    assert grey.mean() == pytest.approx(0.5, abs=0.01)
    arguments = dict(hide=0.5, seed=1)
    restored.write(tmp_path / 'b.png', location('hf_mae'), [str(tmp_path / '0.png')], **arguments)
    again = np.asarray(Image.open(tmp_path / 'b.png'))
    np.testing.assert_array_equal(again[:, :32], sheet[:32, :32])
    assert (again[:, 40:72] != sheet[:32, 40:72]).any()  # another seed
    with pytest.raises(UserError, match='is not a masked autoencoder with its decoder'):
        restored.write(tmp_path / 'c.png', DATA / 'timm_vit_token', [], **arguments)


@pytest.mark.slow
def test_commands_and_images_take_its_encoder(whole, tmp_path):
    path, _ = whole
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / 'a.png')
    status, _, errors = launched.run(
        'predict', tmp_path / 'a.png', f'--checkpoint={path}', f'--features={tmp_path}/f.npz'
    )
    assert status == 0, errors
    model, params = vit_jax.load(path)
    images = vit_jax.preprocess(model, [str(tmp_path / 'a.png')])
    vit, weights = vit_jax.load(path, part='encoder')
    features = compiled(vit)(weights, images)[1]['pre_logits']
    np.testing.assert_allclose(np.load(tmp_path / 'f.npz')['features'], features, atol=1e-5)
    noise = np.arange(8.0)[None]
    assert compiled(model)(params, images, noise=noise)[1]['visible'].shape == (1, 3, 16)
