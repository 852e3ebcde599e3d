"""Build the native kernels with the package. All else is in pyproject.toml.

They are a plain shared library loaded with ctypes, not a Python extension module: no Python or torch headers, one file
for every Python version. `optional`: without a C++ compiler the install goes on, and craton says so when it matters.
"""

import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CPP = Path("src/craton/inference/native/cpp")


class BuildLibrary(build_ext):
    """Name the library without a Python version, and export what the sources export."""

    def get_ext_filename(self, fullname: str) -> str:
        suffix = ".dylib" if sysconfig.get_platform().startswith("macosx") else ".so"
        return str(Path(*fullname.split("."))) + suffix

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """Tag the wheel for the platform but for any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "craton.inference.native._kernels",
            sources=[str(path) for path in sorted(CPP.glob("*.cpp"))],
            depends=[str(path) for path in sorted(CPP.glob("*.h"))],
            language="c++",
            # -ffp-contract=off: every path must round alike; the kernels ask for fused multiply-add where they want it.
            # -Wno-*uninitialized: some versions of GCC warn about their own AVX-512 header.
            extra_compile_args=[
                *("-std=c++17", "-O3", "-g0", "-pthread", "-fvisibility=hidden"),
                *("-ffp-contract=off", "-fno-math-errno", "-Wno-maybe-uninitialized", "-Wno-uninitialized"),
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)
