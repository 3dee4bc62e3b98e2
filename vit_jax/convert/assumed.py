"""What is assumed of a model where no file states it: normalisation of images, number of heads."""

from vit_jax.models import vit

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
# clip.py of the code of arXiv:2103.00020
CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


def half_normalisation(channels: int) -> dict[str, tuple[float, ...]]:
    """{mean, std} that normalise images of `channels` channels to [-1, 1]."""
    return {field: (0.5,) * channels for field in ('mean', 'std')}


def guess_heads(width: int, depth: int) -> int | None:
    """Guesses the number of heads, which fused weights do not show; None without a guess."""
    for size in vit.SIZES.values():
        if (size['width'], size['depth']) == (width, depth):
            return size['num_heads']
    return width // 64 if width % 64 == 0 else None
