"""The picture of a run: what is drawn, in what order, and that nothing overlaps."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vit_jax.evaluators import classify
from vit_jax.figures import model_page, style, summary

pytestmark = pytest.mark.filterwarnings('error')

RED, GREEN = (255, 0, 0), (0, 255, 0)
TRAIN = [{'step': s, 'loss': 3 / s, 'accuracy': 1 - 1 / s, 'lr': 0.1} for s in range(1, 40)]
EVALS = [{'step': s, 'test/loss': 4 / s, 'test/accuracy': 0.9 + s / 1000} for s in (10, 20, 39)]
LONG = tuple(f'$\\{i}$ is no formula\nbut a name longer than its image' for i in range(1000))


def fields(n=12, size=(8, 8), *, maps=2, **changes):
    """Arguments of a summary: every fifth of n images is wrong."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, *size, 3), dtype=np.uint8)
    labels = np.arange(n) % 3
    attention = rng.uniform(size=(maps, 2, 3))
    return dict(
        title='a run', evaluation='val', lines=TRAIN + EVALS, images=images, labels=labels,
        predictions=np.where(np.arange(n) % 5 == 1, (labels + 1) % 3, labels),
        confidences=rng.uniform(size=n), classes=('ant', 'bee', 'cat'),
        attention=attention, attended=images[:maps],
    ) | changes


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a summary -> the figure and the picture as Pillow opens it."""
    drawn = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            drawn.append(self)

    def draw(**arguments):
        with monkeypatch.context() as patch:
            patch.setattr(summary, 'Figure', Kept)
            path = write(tmp_path, **arguments)
        with Image.open(path) as picture:
            picture.load()
        return drawn[-1], picture

    return draw


def write(folder, **arguments):
    summary.draw(folder / 'summary.png', **arguments)
    return folder / 'summary.png'


def words(figure):
    return [text.get_text() for text in figure.texts]


def captions(figure):
    """The lines of text below the images, each image's joined."""
    start = next(i for i, text in enumerate(words(figure)) if text.startswith('Most confident'))
    lines = itertools.takewhile(lambda x: not x.startswith('Where'), words(figure)[start + 1 :])
    return ' '.join(lines)


def test_class_attention_is_the_class_tokens_row_without_registers():
    attention = np.random.default_rng(0).uniform(size=(2, 3, 4, 9, 9))  # 1 + 2 + 2 * 3 tokens
    expected = np.zeros((3, 2, 3))
    for b, y, x in np.ndindex(3, 2, 3):
        expected[b, y, x] = np.mean([attention[1, b, head, 0, 3 + 3 * y + x] for head in range(4)])
    expected = [a / a.sum() for a in expected]
    found = model_page.class_attention(attention, (2, 3), registers=2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_class_attention_checks_the_grid():
    with pytest.raises(ValueError, match='9 tokens.* 1 registers and 2 x 3'):
        model_page.class_attention(np.zeros((1, 1, 1, 9, 9)), (2, 3), registers=1)


def test_class_attention_of_a_token_that_sees_no_patch_is_finite():
    found = model_page.class_attention(np.eye(5)[None, None, None], (2, 2))
    np.testing.assert_array_equal(found, np.zeros((1, 2, 2)))


def test_mistakes_come_first_and_the_most_confident_of_them():
    order = summary.mistakes_first(
        np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 2]),
        np.array([0.9, 0.5, 0.8, 1.0, 0.6, 0.7]),
    )
    assert order.tolist() == [2, 4, 1, 0, 3, 5]


def test_captions_name_the_prediction_and_where_wrong_the_truth(draw):
    figure, _ = draw(**fields(
        n=4, labels=[0, 1, 2, 0], predictions=[0, 2, 2, 1], confidences=[0.91, 0.52, 0.73, 0.64]
    ))
    assert captions(figure) == 'bee 64% ≠ ant cat 52% ≠ bee ant 91% cat 73%'
    assert 'Evaluation val: 2 of 4 images wrong' in words(figure)


def test_classes_of_one_name_are_still_two_classes(draw):
    figure, _ = draw(**fields(
        n=2, labels=[0, 1], predictions=[1, 1], confidences=[0.5, 1], classes=('crane', 'crane')
    ))
    assert captions(figure) == 'crane 50% ≠ crane crane 100%'


def test_images_follow_the_order_and_small_ones_are_not_smoothed(draw):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[0] = 7
    images[1, :, :4], images[1, :, 4:] = RED, GREEN
    figure, picture = draw(**fields(
        images=images, labels=[0, 0], predictions=[0, 1], confidences=[0.9, 0.8], n=2
    ))
    box = figure.axes[2].get_window_extent()  # after the two curves, the first image
    inner = picture.convert('RGB').crop((
        round(box.x0) + 6, picture.height - round(box.y1) + 6,
        round(box.x1) - 6, picture.height - round(box.y0) - 6,
    ))
    assert {color for _, color in inner.getcolors()} == {RED, GREEN}


def test_final_values_are_written_by_each_curve(draw):
    lines = TRAIN + EVALS + [{'step': 39, 'knn/accuracy': 0.75}]
    figure, _ = draw(**fields(lines=lines))
    loss, accuracy = (
        [text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes[:2]
    )
    assert loss == ['training', 'test  0.103']
    assert accuracy == ['training', 'test  93.90%', 'knn  75.00%']


def test_a_curve_that_is_missing_is_said_to_be(draw):
    figure, _ = draw(**fields(lines=[{'step': 1, 'loss': 2.0}]))
    loss, accuracy = ([text.get_text() for text in ax.texts] for ax in figure.axes[:2])
    assert (loss, accuracy) == ([], ['not recorded'])


@pytest.mark.parametrize('last, scale', [(0.5, 'linear'), (0.01, 'log'), (0.0, 'linear')])
def test_a_log_scale_is_said(draw, last, scale):
    lines = [{'step': 1, 'loss': 2.0}, {'step': 2, 'loss': last}]
    figure, _ = draw(**fields(lines=lines))
    assert figure.axes[0].get_yscale() == scale
    assert ('Loss (log scale)' in words(figure)) == (scale == 'log')


def test_without_attention_the_grid_takes_the_room(draw):
    with_maps, _ = draw(**fields(n=90))
    without, _ = draw(**fields(n=90, attention=None, attended=None))
    assert any('class token' in text for text in words(with_maps))
    assert not any('class token' in text for text in words(without))
    assert captions(without).count('%') > captions(with_maps).count('%')


def test_each_map_lies_cell_by_cell_over_its_own_image_in_grey(draw):
    arguments = fields(size=(16, 24), maps=3)
    arguments['attended'][2] = RED
    figure, _ = draw(**arguments)
    pairs = zip(figure.axes[-6::2], figure.axes[-5::2], strict=True)
    for i, (plain, mapped) in enumerate(pairs):
        np.testing.assert_array_equal(plain.images[0].get_array(), arguments['attended'][i])
        grey, cells = mapped.images
        np.testing.assert_array_equal(cells.get_array(), arguments['attention'][i])
        assert cells.get_interpolation() == 'nearest' and cells.get_clim()[0] == 0
        assert cells.get_extent() == list(grey.get_extent()) == [-0.5, 23.5, 15.5, -0.5]
    assert np.unique(grey.get_array()) == 76  # 0.299 * 255


def test_accuracy_keeps_to_its_range(draw):
    lines = [{'step': 1, 'accuracy': 0.0}, {'step': 2, 'accuracy': 1.0}]
    low, high = draw(**fields(lines=lines))[0].axes[1].get_ylim()
    assert -0.03 < low <= 0 and 1 <= high < 1.03


ODD = {
    'usual': {},
    'one image': dict(n=1, maps=1),
    'no image': dict(n=0, maps=0),
    'all right': dict(n=5, predictions=np.arange(5) % 3),
    'all wrong': dict(n=90, predictions=(np.arange(90) + 1) % 3),
    'one line': dict(lines=TRAIN[:1]),
    'no evaluation': dict(lines=TRAIN),
    'evaluations alone': dict(lines=EVALS[:1]),
    'no line': dict(lines=[]),
    'not finite': dict(lines=[{'step': 1, 'loss': np.nan, 'test/accuracy': None}]),
    'perfect': dict(lines=[{'step': 9, 'loss': 0.0, 'accuracy': 1.0}]),
    'no step': dict(lines=[{'step': 0, 'test/loss': 2.3, 'test/accuracy': 0.1}]),
    'many evaluations': dict(lines=[
        {'step': 1_000_000, f'$\\{i}$_a_long_evaluation_name/{key}': 0.98765}
        for i in range(9) for key in ('loss', 'accuracy')
    ]),
    'long names': dict(n=20, classes=LONG, title='a title ' * 40),
    'fewer names than outputs': dict(classes=('ant',)),
    'wide': dict(size=(8, 64)),
    'tall': dict(size=(64, 8)),
    'large': dict(size=(224, 160)),
    'no attention': dict(attention=None, attended=None),
    'attention nowhere': dict(attention=np.zeros((2, 2, 3))),
}


@pytest.mark.parametrize('case', ODD)
def test_texts_stay_on_the_page_and_apart(draw, monkeypatch, case):
    shown = {}  # ticks beyond the axes have texts that are never drawn
    original = Text.draw

    def draw_and_note(self, renderer, *args, **kwargs):
        if self.get_text():
            shown[self] = self.get_text(), self.get_window_extent(renderer)
        original(self, renderer, *args, **kwargs)

    monkeypatch.setattr(Text, 'draw', draw_and_note)
    _, picture = draw(**fields(**ODD[case]))
    assert picture.width == 1800 and 700 < picture.height < 3000
    boxes = list(shown.values())
    assert len(boxes) > 10
    for text, box in boxes:
        assert 0 <= box.x0 and box.x1 <= picture.width, text
        assert 0 <= box.y0 and box.y1 <= picture.height, text
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        wide = min(box.x1, other.x1) - max(box.x0, other.x0)
        high = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert wide <= 1 or high <= 1, (a, b)  # a pixel of rounding


def test_long_names_are_cut_to_their_room():
    text = style.shorten('great white shark', 0.6, 7)
    assert text.endswith('…') and 'great white shark'.startswith(text[:-1])
    assert 0.5 < style.text_width(text, 7) <= 0.6
    assert style.shorten('ant', 0.6, 7) == 'ant'


def test_cut_names_still_differ():
    names = [f'a long beginning that all names share, {c}' for c in 'abcd']
    tail = style.distinct_tail(names)
    assert len({style.shorten(name, 0.6, 7, tail=tail) for name in names}) == 4
    assert all(style.text_width(style.shorten(n, 0.6, 7, tail=tail), 7) <= 0.6 for n in names)
    assert style.distinct_tail(['ant', 'bee']) == style.distinct_tail(None) == 0


@pytest.mark.parametrize('values, shown', [
    ([63.187, 63.1871], ['63.187', '63.1871']), ([0.0, 2e-5], ['0', '2e-5']), ([5], ['5']),
    ([12500, 17500], ['12500', '17500']), ([], []), ([-1, 0], ['-1', '0']), ([0, 1e-17, 0.5], None),
])
def test_ticks_are_numbers_in_full(values, shown):
    found = style.PlainFormatter().format_ticks(values)
    assert shown is None or found == shown
    assert len(set(found)) == len(values)


def test_equal_arguments_give_equal_bytes(tmp_path, draw):
    first = write(tmp_path, **fields()).read_bytes()
    assert write(tmp_path, **fields()).read_bytes() == first
    assert write(tmp_path, **fields(title='another')).read_bytes() != first
    _, picture = draw(**fields())
    assert set(picture.info) == {'dpi'}  # neither a time nor a version


def test_a_failure_leaves_the_former_file(tmp_path, monkeypatch):
    before = write(tmp_path, **fields(n=1)).read_bytes()

    def fails(self, file, **_):
        if hasattr(file, 'write'):
            file.write(b'half')
        else:
            file.write_bytes(b'half')
        raise MemoryError

    monkeypatch.setattr(Figure, 'savefig', fails)
    with pytest.raises(MemoryError):
        write(tmp_path, **fields(n=2))
    assert (tmp_path / 'summary.png').read_bytes() == before


def test_of_several_labels_the_predicted_one_is_shown():
    labels = np.array([[3, 1], [2, -1], [0, 4]])
    shown = classify.one_label(labels, np.array([1, 0, 0]))
    assert shown.tolist() == [1, 2, 0]
    assert classify.one_label(labels[:, 0], np.array([1, 0, 0])).tolist() == [3, 2, 0]
