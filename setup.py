"""What pyproject.toml cannot say: the library of the products, built where there is a C compiler.

Without one the build goes on, and torch's products serve.
"""

from setuptools import Extension, setup

SOURCES = "engine/kernels/src"

setup(
    ext_modules=[
        Extension(
            "moestro.engine.kernels._native",  # no Python in it: it is called through ctypes
            sources=[
                f"{SOURCES}/{name}.c"
                for name in (
                    "choose",
                    "experts",
                    "isa_avx2",
                    "isa_avx512",
                    "isa_avxvnni",
                    "isa_plain",
                    "pool",
                )
            ],
            depends=[
                f"{SOURCES}/{name}.h"
                for name in (
                    "amx",
                    "calls",
                    "float_stripe",
                    "int_stripe",
                    "moestro",
                    "panels",
                    "pool",
                    "products",
                    "rowwise",
                    "scratch",
                    "simd_avx2",
                    "simd_avx512",
                    "simd_plain",
                    "stripes",
                )
            ],
            # Contraction off: which sums are fused is written in the source, not the compiler's.
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-psabi",
            ],
            libraries=["m", "pthread"],
            optional=True,
        )
    ]
)
