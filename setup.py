"""Builds the CPU's extension with ninja, without torch: each kernel once per instruction set.

FLOWKERN_EXT=auto (default) builds it where a compiler is found and otherwise installs the pure-Python library with one
warning; 0 never builds it; 1 makes a failed build an error.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODES = ("auto", "0", "1")
FLAGS = [
    "-std=c++17",
    # Vectorized as by -O3, whose other passes take a third more time to compile and make no kernel faster on the whole.
    "-O2",
    "-ftree-vectorize",
    "-fPIC",
    "-fvisibility=hidden",
    # Arithmetic stays as written: no -ffast-math. These two only say that nobody reads errno or the exception flags.
    "-fno-math-errno",
    "-fno-trapping-math",
]
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}


def mode() -> str:
    value = os.environ.get("FLOWKERN_EXT", "auto")
    if value not in MODES:
        raise SystemExit(f"FLOWKERN_EXT: unknown value {value!r}; expected one of {', '.join(MODES)}")
    return value


def compiler() -> str:
    """The C++ compiler: CXX, or the first of the usual names. Raises RuntimeError if there is none."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(name.split()[0]):
            return name
    raise RuntimeError("no C++ compiler was found (set CXX, or install g++ or clang++)")


def accepts(cxx: str, folder: Path, *flags: str, source: str = "int main() { return 0; }") -> bool:
    """Whether the compiler builds and links ``source`` with these flags."""
    probe = folder / "probe.cpp"
    probe.write_text(source)
    command = [*cxx.split(), *flags, str(probe), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True).returncode == 0


def ninja_file(cxx: str, folder: Path, output: Path) -> str:
    """The text of build.ninja: every kernel source once per instruction set, what they share, and the link."""
    import pybind11

    # Copy loops stay loops (csrc/cpu/coupling.h says why); only gcc would turn them into calls.
    only = ["-fno-tree-loop-distribute-patterns", "-fvect-cost-model=dynamic"]
    gcc_only = [f for f in only if accepts(cxx, folder, "-Werror", f)]
    threads = ["-fopenmp"] if accepts(cxx, folder, "-fopenmp", source="#include <omp.h>\nint main() {}") else ["-fopenmp-simd"]
    threads = [flag for flag in threads if accepts(cxx, folder, flag)]
    x86 = platform.machine() in ("x86_64", "AMD64")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}", *(["-DFLOWKERN_X86"] if x86 else [])]
    link = ["-undefined", "dynamic_lookup", "-bundle"] if sys.platform == "darwin" else ["-shared"]
    rules = [
        f"cxx = {cxx}",
        f"flags = {' '.join([*FLAGS, *gcc_only, *threads, *os.environ.get('CXXFLAGS', '').split()])}",
        "rule compile\n  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx {' '.join([*link, *threads])} $in -o $out",
    ]
    objects = []

    def compile_one(source: Path, name: str, extra: list[str]) -> None:
        objects.append(name)
        rules.append(f"build {name}: compile {escape(source)}\n  extra = {' '.join(extra)}")

    for isa, isa_flags in ISAS.items() if x86 else [("baseline", [])]:
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            compile_one(source, f"{source.stem}.{isa}.o", [*isa_flags, f"-DFLOWKERN_ISA={isa}"])
    for source in sorted((ROOT / "csrc").glob("*.cpp")):
        compile_one(source, f"{source.stem}.o", includes)
    rules.append(f"build {escape(output)}: link {' '.join(objects)}")
    return "\n".join(rules) + "\n"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildWithNinja(build_ext):
    """Compiles the extension with ninja: parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(ext.name, output)
        except (RuntimeError, OSError, subprocess.CalledProcessError, ImportError) as error:
            output.unlink(missing_ok=True)  # of an earlier build: it does not belong to these sources
            if mode() == "1":
                raise RuntimeError(f"FLOWKERN_EXT=1, but the CPU extension could not be built: {error}") from error
            warnings.warn(f"flowkern is installed without its CPU kernels and runs in pure torch: {error}", stacklevel=1)

    def _build(self, name: str, output: Path) -> None:
        folder = Path(self.build_temp).resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(compiler(), folder, output))
        subprocess.run([ninja(), "-C", str(folder)], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        self.extensions: list[Extension] = [ext for ext in self.extensions if self._built(ext)]
        super().copy_extensions_to_source()

    def _built(self, ext: Extension) -> bool:
        places = Path(self.get_ext_fullpath(ext.name)), Path(self.build_lib) / self.get_ext_filename(ext.name)
        return any(place.exists() for place in places)


def ninja() -> str:
    """The ninja executable: that of the build requirement, else one on the path."""
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("ninja was not found (pip install ninja)") from None
        return found


extensions: list[Extension] = []
if mode() == "0":
    warnings.warn("FLOWKERN_EXT=0: flowkern is installed without its CPU kernels and runs in pure torch", stacklevel=1)
else:
    extensions.append(Extension("flowkern._native", sources=[], optional=mode() != "1"))
setup(ext_modules=extensions, cmdclass={"build_ext": BuildWithNinja})
