"""Batches of images and labels, for tests of data sets and of their order."""

from vit_jax.data import pipeline
from vit_jax.data.tasks import classify


def batches(source, seed, *, view, image_size, augment=(), **options):
    """pipeline.batches of the task classify."""
    task = classify.classify(source, view=view, image_size=image_size, augment=augment)
    return pipeline.batches(source, task, seed, **options)


def examples(source, *, view, image_size, **options):
    """pipeline.examples of the task classify."""
    task = classify.classify(source, view=view, image_size=image_size)
    return pipeline.examples(source, task, **options)
