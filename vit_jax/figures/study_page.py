"""The parts of a page about a folder of runs."""

from collections.abc import Iterator, Sequence

from etils import epath

from vit_jax.data import mixture
from vit_jax.figures import grid, methods, page, scaling
from vit_jax.run import results


def of_study(
    runs: Sequence[tuple[str, dict, dict]], out: epath.Path
) -> Iterator[page.Part]:
    """Draws the runs of a folder in comparison; yields the parts of its page."""
    found = scaling.points(runs)
    if scaling.draw_images(out / 'images.png', found):
        yield 'Transfer and the size of the pre-training', (
            'Models that were pre-trained on several numbers of images (arXiv:2010.11929 figures '
            '3 and 4).'), out / 'images.png'
    compared = methods.points(runs)
    if compared:
        methods.draw(out / 'methods.png', compared)
        yield 'Training methods', (
            'Frozen features and fine-tuning, by the data of the pre-training; each small dot is a '
            'run.'), out / 'methods.png'
    elif found:
        scaling.draw_compute(out / 'compute.png', found)
        yield 'Transfer and the compute of the pre-training', (
            'Of the runs on most images; all their forward and backward passes (figure 5).'), (
            out / 'compute.png')
    grids = grid.panels(runs)
    if grids:
        grid.draw(out / 'grid.png', grids)
        yield 'Augmentation and regularization', (
            'Accuracy in percent and its gain over the weakest augmentation at the lowest rate '
            '(arXiv:2106.10270 figure 4).'), out / 'grid.png'
    hours = sum(results.costs(result)['device_hours'] for _, _, result in runs)
    rows = [('run', 'model', 'data', 'accuracy', 'seconds')]
    for path, config, result in runs:
        value = scaling.accuracy(config, result)
        rows.append((
            path, scaling.label_of(config, result), mixture.title(config['data']['source']),
            '' if value is None else page.format_value(value), page.format_value(result['seconds']),
        ))  # fmt: skip
    yield 'Runs', f'{len(runs):,}; {hours:,.3g} device-hours in all.', rows
