"""CUDA kernels made by NVRTC: compiled for GPUs that need not be there, kept in a cache, and launched through a recorder."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flowkern
from flowkern import ops
from flowkern._core import backend as _backend, nvrtc
from flowkern.ops.autoregressive import cuda, cuda_gather

H100, GPU = (9, 0), torch.device("cuda", 0)
KINDS = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float64))
VARIANTS = [
    cuda.variant(kernel, dtype, stored, tile, fits)
    for kernel in (cuda.FORWARD, cuda.BACKWARD)
    for dtype, stored in KINDS
    for tile in cuda.TILES[dtype]
    for fits in (True, False)
] + [cuda_gather.variant(*kinds) for kinds in KINDS]
SMALL = VARIANTS[0]

needs_nvrtc = pytest.mark.skipif(bool(nvrtc.missing()), reason=nvrtc.missing())


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    """What is found out once a process is found out by each of these tests."""
    caches = (nvrtc._bindings, nvrtc.reason, nvrtc._sources, nvrtc._kernel, _backend._triton_reason, _backend._report)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


# --- compilation ---


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join([variant.kernel, *dict(variant.macros).values()]))
def test_every_variant_compiles_without_spills(variant: nvrtc.Variant, architecture: str) -> None:
    pytest.importorskip("triton", reason="its cuobjdump reads what was compiled")
    from flowkern.kernels.compile import cubin_resources

    registers, spilled = cubin_resources(nvrtc.compiled(variant, architecture))
    assert spilled == 0
    assert registers * int(dict(variant.macros)["FLOWKERN_THREADS"]) <= 2**16


@pytest.mark.slow
@needs_nvrtc
def test_what_lies_in_shared_memory_is_not_read_through_the_read_only_cache() -> None:
    """Staged weights would be: the address is undefined there. Both kinds of reads are in the kernel."""
    ptx = nvrtc.compiled(SMALL, "compute_80").decode()
    source = nvrtc._sources()["autoregressive_inverse.cu"]
    headers = {name: text for name, text in nvrtc._sources().items() if name.endswith(".cuh")}
    headers["products.cuh"] = headers["products.cuh"].replace("if constexpr (staged) return *from;", "")
    always = nvrtc._translated(source, headers, "compute_80", SMALL.macros).decode()
    assert 0 < ptx.count("ld.global.nc") < always.count("ld.global.nc")


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join([variant.kernel, *dict(variant.macros).values()]))
def test_every_access_says_where_it_goes(variant: nvrtc.Variant) -> None:
    """An access of which the compiler does not know whether it is of shared or of global memory takes longer."""
    ptx = nvrtc.compiled(variant, "compute_80").decode()
    assert re.search(r"\bld\.(global|shared)", ptx)
    assert not re.search(r"\b(ld|st)\.(?!global|shared|param)", ptx)


@needs_nvrtc
def test_the_log_of_what_does_not_compile_is_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWKERN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_sources", lambda: {"broken.cu": "int broken = nowhere;"})
    with pytest.raises(RuntimeError, match=r'(?s)NVRTC does not compile a kernel for sm_80: .*"nowhere" is undefined'):
        nvrtc.compiled(nvrtc.Variant("broken"), "sm_80")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("known", "capability", "expected"),
    [
        ((75, 80, 90), (8, 0), "sm_80"),
        ((75, 80, 86, 90), (8, 6), "sm_86"),
        ((75, 80, 90), (8, 9), "compute_80"),  # as PTX, which the driver compiles
        ((80, 90), (12, 0), "compute_90"),
        ((100, 120), (9, 0), "NVRTC 13.0 does not compile for sm_90"),
        ((75, 80), (7, 5), "the kernels need compute capability 8.0, this GPU has 7.5"),
    ],
)
def test_targets(monkeypatch: pytest.MonkeyPatch, known: tuple[int, ...], capability: tuple[int, int], expected: str) -> None:
    library = SimpleNamespace(nvrtcGetSupportedArchs=lambda: (0, known), nvrtcVersion=lambda: (0, 13, 0))
    monkeypatch.setattr(nvrtc, "_bindings", lambda: (library, None, ""))
    if " " not in expected:
        assert nvrtc.target(capability) == expected
    else:
        with pytest.raises(RuntimeError, match=expected):
            nvrtc.target(capability)


# --- the cache ---


class Compiler:
    """Stands in for NVRTC."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = 0
        self.sources = {"kernel.cu": "source", "common.cuh": "header"}
        self.version = (13, 0)
        monkeypatch.setattr(nvrtc, "_translated", self.translated)
        monkeypatch.setattr(nvrtc, "_sources", lambda: self.sources)
        library = SimpleNamespace(nvrtcVersion=lambda: (0, *self.version))
        monkeypatch.setattr(nvrtc, "_bindings", lambda: (library, None, ""))

    def translated(self, source: str, headers: dict[str, str], target: str, macros: Any) -> bytes:
        self.calls += 1
        return f"{source} {headers} {target} {macros}".encode()


def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWKERN_CACHE_DIR", str(tmp_path / "new"))
    compiler, variant = Compiler(monkeypatch), nvrtc.Variant("kernel", (("T", "4"),))
    code = nvrtc.compiled(variant, "sm_80")
    assert nvrtc.compiled(variant, "sm_80") == code
    assert compiler.calls == 1
    (kept,) = (tmp_path / "new").iterdir()
    assert kept.read_bytes() == code
    # Whatever the code depends on makes another file.
    nvrtc.compiled(variant, "sm_90")
    nvrtc.compiled(variant._replace(macros=(("T", "8"),)), "sm_80")
    compiler.version = (13, 1)
    nvrtc.compiled(variant, "sm_80")
    for name in compiler.sources:
        compiler.sources = {**compiler.sources, name: "changed"}
        nvrtc.compiled(variant, "sm_80")
    assert compiler.calls == len(list((tmp_path / "new").iterdir())) == 6
    kept.write_bytes(b"")  # of a disk that was full
    compiler.version, compiler.sources = (13, 0), {"kernel.cu": "source", "common.cuh": "header"}
    assert nvrtc.compiled(variant, "sm_80") == code == kept.read_bytes()


def test_a_cache_that_cannot_be_written_is_said_and_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, variant = Compiler(monkeypatch), nvrtc.Variant("kernel")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLOWKERN_CACHE_DIR", str(tmp_path / "file" / "below"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="compiled anew in each process, the cache cannot be written: .*Not a directory"):
            assert nvrtc.compiled(variant, "sm_80").startswith(b"source")
    assert compiler.calls == 2


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLOWKERN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert nvrtc.cache() == Path("/home/somebody/.cache/flowkern")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert nvrtc.cache() == Path("/elsewhere/flowkern")
    monkeypatch.setenv("FLOWKERN_CACHE_DIR", "/named")
    assert nvrtc.cache() == Path("/named")


# --- launches ---


class Status(int):
    name = "CUDA_ERROR_INVALID_IMAGE"


class Driver:
    """Stands in for the driver's bindings and a GPU of torch's, and records what they are asked."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = H100):
        self.of_cuda, self.loads, self.launches, self.attributes = 13050, Status(0), [], []
        self.arguments: list[Any] = []
        library = nvrtc._bindings()[0]
        monkeypatch.setattr(nvrtc, "_bindings", lambda: (library, self, ""))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232448)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))

    def cuDriverGetVersion(self) -> Any:
        return Status(0), self.of_cuda

    def cuLibraryLoadData(self, code: bytes, *options: Any) -> Any:
        assert code.startswith(b"\x7fELF")
        return self.loads, 5

    def cuLibraryGetKernel(self, library: int, name: bytes) -> Any:
        return Status(0), 6

    def cuKernelSetAttribute(self, *arguments: Any) -> Any:
        self.attributes.append(arguments)
        return (Status(0),)

    def CUfunction(self, kernel: int) -> int:
        return kernel

    def CUdevice(self, index: int) -> int:
        return index

    def cuLaunchKernel(self, kernel: int, *rest: Any) -> Any:
        self.launches.append((kernel, *rest[:8]))
        address = ctypes.cast(rest[8], ctypes.POINTER(ctypes.c_void_p))[0]
        self.arguments.append(ctypes.string_at(address, ctypes.sizeof(cuda.Arguments)))
        return (Status(0),)


@needs_nvrtc
def test_a_call_is_two_launches_on_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    network = ops.AutoregressiveNetwork((1, 2, 3), ((1, 2, 2, 1),))
    tensors = [torch.randn(4, 3), torch.randn(4), torch.randn(6, 4), torch.randn(6)]
    z = torch.randn(3, 7).t()
    x, logabsdet = torch.empty(7, 3), torch.empty(7)
    launch = nvrtc.launch
    monkeypatch.setattr(nvrtc, "launch", lambda *given, device, **grid: launch(*given, device=GPU, **grid))
    for _ in range(2):
        cuda.forward(z, tensors, network.text, [False], x, logabsdet)
    assert driver.attributes == [("shared", 232448, 6, 0)] * 2
    assert [launched[:6] for launched in driver.launches] == [(6, 1, 1, 1, 256, 1), (6, 7, 1, 1, 512, 1)] * 2
    kernel, *grid, threads, one, two, shared, stream = driver.launches[1]
    assert (kernel, *grid, threads, one, two, stream) == (6, 7, 1, 1, 512, 1, 1, 77)
    assert shared >= 2 * 512 * 4
    arguments = cuda.Arguments.from_buffer_copy(driver.arguments[1])
    assert (arguments.z, arguments.z_row, arguments.z_column) == (z.data_ptr(), 1, 7)
    assert (arguments.x, arguments.x_row, arguments.logabsdet) == (x.data_ptr(), 3, logabsdet.data_ptr())
    assert (arguments.batch, arguments.features, arguments.networks, arguments.scratch) == (7, 3, 1, None)


# --- reasons ---


def explained() -> list[str]:
    tensors: Any = [SimpleNamespace(device=GPU, is_cpu=False, is_cuda=True)]
    return _backend.reasons("cuda", {"cuda": print}, tensors)


@needs_nvrtc
def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    assert explained() == []
    tensors: Any = [SimpleNamespace(device=GPU, is_cpu=False, is_cuda=True)]
    assert _backend.choose("op", {"cuda": print, "triton": print, "torch": print}, tensors) == "cuda"
    nvrtc.reason.cache_clear()
    driver.loads = Status(200)
    assert explained() == ["a CUDA kernel cannot be made here: Status CUDA_ERROR_INVALID_IMAGE"]
    nvrtc.reason.cache_clear()
    driver.of_cuda = 11080
    assert explained() == [f"the NVIDIA driver is of CUDA 11, older than NVRTC {nvrtc.version()}: update it"]


@needs_nvrtc
def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, (7, 5))
    why = "the kernels need compute capability 8.0, this GPU has 7.5"
    assert explained() == [f"a CUDA kernel cannot be made here: {why}"]
    tensors: Any = [SimpleNamespace(device=GPU, is_cpu=False, is_cuda=True)]
    monkeypatch.setattr(_backend, "_has_triton", True)
    assert _backend.reasons("triton", {"triton": print}, tensors) == [f"Triton does not run here: {why}"]


def test_cpu_tensors_are_not_served() -> None:
    assert _backend.reasons("cuda", {"cuda": print}, [torch.ones(1)]) == ["it serves CUDA tensors, these are on 'cpu'"]
    z, network = torch.randn(2, 3), ops.AutoregressiveNetwork((1, 2, 3), ())
    with flowkern.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for but cannot serve: it serves CUDA"):
        ops.autoregressive_inverse(z, [torch.randn(6, 3), torch.randn(6)], network)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
@needs_nvrtc
def test_no_driver() -> None:
    assert explained()[0].startswith("a CUDA kernel cannot be made here: ")
    assert "driver" in explained()[0]


@pytest.mark.parametrize("missing", ["cuda.bindings", "cuda.bindings.nvrtc"])
def test_no_bindings(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "cuda.bindings.nvrtc" if missing == "cuda.bindings" else "", raising=False)
    assert explained()[0].startswith("cuda.bindings cannot be imported (pip install 'flowkern[cuda]'): ")


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found() -> Any:
        raise OSError("libnvrtc.so.13\nis not there")

    fake = SimpleNamespace(nvrtcVersion=not_found)
    monkeypatch.setattr(nvrtc.importlib, "import_module", lambda name: fake)
    assert explained() == ["NVRTC was not found (pip install 'flowkern[cuda]'): libnvrtc.so.13 is not there"]
    with pytest.raises(RuntimeError, match="NVRTC was not found"):
        nvrtc.version()


def test_triton_without_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles its driver's shim when it is first used, long after it was imported."""

    class Runtime:
        @property
        def driver(self) -> Any:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    monkeypatch.setattr(_backend, "_has_triton", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: H100)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(_backend.importlib, "import_module", lambda name: SimpleNamespace(runtime=Runtime()))
    tensors: Any = [SimpleNamespace(device=GPU, is_cpu=False, is_cuda=True)]
    why = "Triton does not run here: Failed to find C compiler. Please specify via CC."
    kernels: Any = {"triton": print, "torch": print}
    assert _backend.reasons("triton", kernels, tensors) == [why]
    with pytest.warns(UserWarning, match=f"flowkern: ops run without their triton kernels: {why}"):
        assert _backend.choose("op", kernels, tensors) == "torch"
    assert _backend.choose("op", kernels, tensors) == "torch"  # and says nothing: it is said once
    with (
        flowkern.backend("triton"),
        pytest.raises(RuntimeError, match="op: backend 'triton' was asked for but cannot serve: " + why),
    ):
        _backend.choose("op", kernels, tensors)
