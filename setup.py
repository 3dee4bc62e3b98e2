"""Extensions for JPEGs, label maps and augmentations; without them, Pillow does the same.

They need a C compiler, that of JPEGs also the headers of libjpeg-turbo (Debian's libjpeg-dev).
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            'vit_jax.data._jpeg',
            ['vit_jax/data/_jpeg.c'],
            libraries=['jpeg', 'm'],
            extra_compile_args=['-O3', '-ffp-contract=off', '-pthread'],
            py_limited_api=True,
            optional=True,
        ),
        Extension(
            'vit_jax.data._labels',
            ['vit_jax/data/_labels.c'],
            extra_compile_args=['-O3'],
            py_limited_api=True,
            optional=True,
        ),
        Extension(
            'vit_jax.data._operations',
            ['vit_jax/data/_operations.c'],
            extra_compile_args=['-O3', '-ffp-contract=off', '-fno-trapping-math'],
            py_limited_api=True,
            optional=True,
        ),
    ]
)
