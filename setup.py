"""What pyproject.toml cannot say: the library of the products, built where a C compiler works.

Without one the build goes on, and torch's products serve.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES = "engine/kernels/src"
MISSING = (
    "moestro: the C library of its products could not be built ({why}); torch's products serve"
    " instead, which decode at a fraction of the speed. Install a C compiler that works (on"
    " Debian: apt-get install gcc libc6-dev) and moestro again"
)


class BuildLibrary(build_ext):
    """One library for every Python: it is called through ctypes, and has no Python in it."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            # What an earlier build has left here or in place was made from other sources.
            package, _, name = ext.name.rpartition(".")
            in_place = self.get_finalized_command("build_py").get_package_dir(package)
            for path in (Path(self.get_ext_fullpath(ext.name)), Path(in_place, f"{name}.so")):
                path.unlink(missing_ok=True)
            self.warn(MISSING.format(why=error))


class TagByPlatform(bdist_wheel):
    """For any Python that the package takes, on the platform that the library was built for."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def files(suffix: str) -> list[str]:
    return sorted(str(path) for path in Path(SOURCES).glob(f"*{suffix}"))


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagByPlatform},
    ext_modules=[
        Extension(
            "moestro.engine.kernels._native",
            sources=files(".c"),
            depends=files(".h"),
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
    ],
)
