"""The extension that decodes JPEGs; where it can't be built, Pillow does the same more slowly.

It needs a C compiler and the headers of libjpeg-turbo (Debian's libjpeg-dev).
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
        )
    ]
)
