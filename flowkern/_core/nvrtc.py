"""CUDA kernels without nvcc: NVRTC compiles the sources of csrc/cuda at first use, and the driver launches what comes out.

Both come with torch's CUDA wheels, as does ``cuda.bindings``. What was compiled is kept in a folder (``cache``), keyed by the
sources, the GPU and the version of NVRTC. Nothing here waits for the device, so that a launch can be captured in a CUDA graph
once its kernel is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.resources
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "Variant",
    "cache",
    "check_capability",
    "compiled",
    "launch",
    "missing",
    "one_line",
    "reason",
    "target",
    "version",
]

#: The oldest compute capability that the kernels are written for.
OLDEST = (8, 0)


class Variant(NamedTuple):
    """The ``__global__`` function of ``csrc/cuda/<kernel>.cu``, which has the file's name, and the macros that make it."""

    kernel: str
    macros: tuple[tuple[str, str], ...] = ()


_PROBE = 'extern "C" __global__ void probe() {}'


# --- what the machine has ---


@functools.cache
def _bindings() -> tuple[Any, Any, str]:
    """(NVRTC, the driver, ""), or why they cannot be had."""
    try:
        nvrtc, driver = (importlib.import_module(f"cuda.bindings.{name}") for name in ("nvrtc", "driver"))
    except ImportError as error:
        return None, None, f"cuda.bindings cannot be imported (pip install 'flowkern[cuda]'): {error}"
    try:
        _checked(nvrtc.nvrtcVersion())
    except Exception as error:  # of the finder of libraries, or of the library
        return None, None, f"NVRTC was not found (pip install 'flowkern[cuda]'): {one_line(error)}"
    return nvrtc, driver, ""


def missing() -> str:
    """Why no kernel can be compiled, on whatever GPU; empty if NVRTC and the driver's bindings are there."""
    return _bindings()[2]


def version() -> str:
    """That of NVRTC, as "13.0". Raises RuntimeError if it is missing."""
    if missing():
        raise RuntimeError(missing())
    return ".".join(map(str, _checked(_bindings()[0].nvrtcVersion())))


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def check_capability(capability: tuple[int, int]) -> None:
    """Raises RuntimeError for a GPU that is older than those that the kernels are written for."""
    if capability < OLDEST:
        needed, found = (".".join(map(str, version)) for version in (OLDEST, capability))
        raise RuntimeError(f"the kernels need compute capability {needed}, this GPU has {found}")


def _checked(answer: tuple[Any, ...]) -> Any:
    """The values of an answer of cuda.bindings. Raises RuntimeError if it says that something went wrong."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"{type(status).__name__} {status.name}")
    return values[0] if len(values) == 1 else values


def target(capability: tuple[int, int]) -> str:
    """What to compile for on a GPU of this compute capability: machine code (``sm_90``), or PTX (``compute_121``) where the GPU
    is newer than NVRTC. Raises RuntimeError where NVRTC is of no use for it."""
    check_capability(capability)
    wanted = 10 * capability[0] + capability[1]
    known = [number for number in _checked(_bindings()[0].nvrtcGetSupportedArchs()) if number <= wanted]
    if not known:
        raise RuntimeError(f"NVRTC {version()} does not compile for sm_{wanted}")
    return f"sm_{wanted}" if wanted in known else f"compute_{max(known)}"


@functools.cache
def reason(device: torch.device) -> str:
    """Why no CUDA kernel can be compiled or launched for this device; empty if they can, which is tried once."""
    _, driver, why = _bindings()
    if why:
        return why
    try:
        newest = _checked(driver.cuDriverGetVersion())
        if newest // 1000 < int(version().split(".")[0]):
            return f"the NVIDIA driver is of CUDA {newest // 1000}, older than NVRTC {version()}: update it"
        code = _translated(_PROBE, {}, target(torch.cuda.get_device_capability(device)), ())
        with torch.cuda.device(device):
            _loaded(code, "probe")
    except Exception as error:  # whatever it is, the torch code serves
        return f"a CUDA kernel cannot be made here: {one_line(error)}"
    return ""


# --- compilation ---


@functools.cache
def _sources() -> dict[str, str]:
    folder = importlib.resources.files("flowkern.kernels.cuda")
    return {file.name: file.read_text("utf-8") for file in folder.iterdir() if file.name.endswith((".cu", ".cuh"))}


def compiled(variant: Variant, target: str) -> bytes:
    """The machine code or PTX of a variant, from the cache if it is there. Raises RuntimeError with what NVRTC says."""
    source = _sources()[f"{variant.kernel}.cu"]
    headers = {name: text for name, text in _sources().items() if name.endswith(".cuh")}
    key = hashlib.sha256(repr((source, sorted(headers.items()), variant, target, version())).encode()).hexdigest()[:32]
    name = f"{variant.kernel}-{target}-{key}"
    with contextlib.suppress(OSError, RuntimeError):
        if found := Path(cache(), name).read_bytes():
            return found
    code = _translated(source, headers, target, variant.macros)
    try:
        _keep(Path(cache(), name), code)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        warnings.warn(
            f"flowkern: CUDA kernels are compiled anew in each process, the cache cannot be written: {error}", stacklevel=2
        )
    return code


def cache() -> Path:
    """The folder of compiled kernels: ``FLOWKERN_CACHE_DIR``, else ``flowkern`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if named := os.environ.get("FLOWKERN_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "flowkern")


def _keep(path: Path, code: bytes) -> None:
    """Writes it whole or not at all: other processes may look for it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        beside = Path(folder, path.name)
        beside.write_bytes(code)
        os.replace(beside, path)


def _translated(source: str, headers: Mapping[str, str], target: str, macros: tuple[tuple[str, str], ...]) -> bytes:
    nvrtc = _bindings()[0]
    names, texts = [name.encode() for name in headers], [text.encode() for text in headers.values()]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", len(names), texts, names))
    options = [f"--gpu-architecture={target}", "--std=c++17", *(f"-D{name}={value}" for name, value in macros)]
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(status):
            log = _filled(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
            raise RuntimeError(f"NVRTC does not compile a kernel for {target}: {log}")
        if target.startswith("sm_"):
            return _filled(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        return _filled(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _filled(size: Any, fill: Any, program: Any) -> bytes:
    buffer = bytes(_checked(size(program)))
    _checked(fill(program, buffer))
    return buffer


# --- launches ---


def _loaded(code: bytes, kernel: str) -> Any:
    """The kernel, for every device that runs its code."""
    driver = _bindings()[1]
    library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    return _checked(driver.cuLibraryGetKernel(library, kernel.encode()))


@functools.lru_cache(maxsize=256)
def _kernel(variant: Variant, device: torch.device) -> Any:
    """The kernel with all the shared memory that a block can have."""
    driver = _bindings()[1]
    kernel = _loaded(compiled(variant, target(torch.cuda.get_device_capability(device))), variant.kernel)
    most = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuKernelSetAttribute(attribute, most, kernel, driver.CUdevice(device.index)))
    return kernel


def launch(
    variant: Variant, arguments: ctypes.Structure, *, blocks: int, threads: int, shared: int, device: torch.device
) -> None:
    """Start a kernel that takes one structure, on torch's current stream of ``device``. Raises RuntimeError if it cannot."""
    driver = _bindings()[1]
    with torch.cuda.device(device):
        kernel = driver.CUfunction(int(_kernel(variant, device)))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream(device).cuda_stream
        grid_and_block = (blocks, 1, 1, threads, 1, 1)
        _checked(driver.cuLaunchKernel(kernel, *grid_and_block, shared, stream, ctypes.addressof(parameters), 0))
