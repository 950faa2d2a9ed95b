"""Compiles the C++ kernels while installing. Without a C++ compiler the package installs all the same, without them."""

import importlib.util
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NATIVE = Path("spikingformer") / "native"


def _native_build():
    """spikingformer/native/build.py by its path: importing the package would need torch."""
    spec = importlib.util.spec_from_file_location("native_build", ROOT / NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        output = ROOT / NATIVE if self.editable_mode else Path(self.build_lib) / NATIVE
        if reason := _native_build().build_or_explain(output.resolve()):
            self.warn(f"the C++ kernels were not built, the plain forms will be used: {reason}")


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    def has_ext_modules(self):
        return True


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)
