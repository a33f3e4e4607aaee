"""Every CUDA kernel compiles, with nothing but nvcc, for the architectures that are shipped; no GPU
is needed."""

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = (
    shutil.which("nvcc")
    or shutil.which("/usr/local/cuda/bin/nvcc")
    or shutil.which("/usr/local/bin/nvcc")
)
KERNELS = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))

OPTIMIZED, UNOPTIMIZED = ("c++17", 90), ("c++20", 80)
"""A standard and an architecture: torch 2.10 builds with the one standard, 2.13 with the other, and
the newer architecture's instructions are looked at below. Neither changes what the optimizer does,
which takes most of the time."""

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def test_each_op_has_its_kernel():
    ops = {"gather_last_token", "pairwise_loss", "gather_prefix_kv", "qkv_rope", "elementwise"}
    assert {f"{op}.cu" for op in ops} <= set(KERNELS)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """(kernel, standard, arch) -> (result of nvcc, folder with out.o and the PTX), made once."""

    @functools.cache
    def make(kernel: str, standard: str, arch: int):
        folder = tmp_path_factory.mktemp(Path(kernel).stem)
        command = [
            NVCC,
            f"-std={standard}",
            *(["-O3"] if (standard, arch) == OPTIMIZED else ["-Xcicc", "-O0", "-Xptxas", "-O0"]),
            "-c",
            str(CSRC / "cuda" / kernel),
            "-o",
            str(folder / "out.o"),
            "--keep",
            f"--keep-dir={folder}",
            f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]",
            "--Werror=all-warnings",
            "-Xcompiler=-Wall,-fPIC",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return done, folder

    return make


@needs_nvcc
@pytest.mark.parametrize("standard, arch", [OPTIMIZED, UNOPTIMIZED])
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles(kernel, standard, arch, compiled):
    done, folder = compiled(kernel, standard, arch)
    assert done.returncode == 0, done.stderr
    assert (folder / "out.o").stat().st_size > 0


def kernels_of(source: str, compiled) -> dict[str, str]:
    """Mangled name -> PTX of each kernel of a file."""
    done, folder = compiled(source, *OPTIMIZED)
    assert done.returncode == 0, done.stderr
    (ptx,) = [p.read_text() for p in folder.glob("*.ptx")]
    texts = re.split(r"(?=\.entry )", ptx)[1:]
    return {re.search(r"\.entry (\w+)", text)[1]: text for text in texts}


@needs_nvcc
def test_projection_moves_whole_lanes_and_divides_in_32_bits(compiled):
    """Half precision, heads of a multiple of 16: 16 bytes at a time, of elements and of tables;
    divisions of 64 bits are calls."""
    found = 0
    for kernel, text in kernels_of("qkv_rope.cu", compiled).items():
        if not re.search(r"qkv_(for|back)wardI\d*(__nv_bfloat16|__half)\S*Li8Ej", kernel):
            continue
        found += 1
        assert set(re.findall(r"st\.global\S*", text)) == {"st.global.v4.u32"}, kernel
        loads = set(re.findall(r"ld\.global\S*", text))
        # lanes, and single numbers of the index
        assert all(".v4." in load or load.endswith(("u32", "s32", "b32")) for load in loads), loads
        assert not re.findall(r"(?:div|rem)\.[us]64", text), kernel
    assert found == 3 * 2 * 2  # forward with and without norms, backward; dtypes of both


@needs_nvcc
def test_swiglu_stores_whole_lanes_and_divides_fast_in_half_precision(compiled):
    """Half precision: one store of 16 bytes per lane and no exact division, which is a call. fp32
    keeps the exact one."""
    kernels = kernels_of("elementwise.cu", compiled)
    for direction, lanes in (("glu_forward", 1), ("glu_backward", 2)):
        for dtype, width in (("__nv_bfloat16", 8), ("__half", 8), ("f", 4)):
            name = re.compile(rf"{direction}I(\d+)?{dtype}Li{width}E")
            (text,) = (text for kernel, text in kernels.items() if name.search(kernel))
            stores = re.findall(r"st\.global\S*", text)
            assert stores == ["st.global.v4.u32"] * lanes, (direction, dtype, stores)
            exact = "div.rn.f32" in text or "rcp.rn.f32" in text
            assert exact == (dtype == "f"), (direction, dtype)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@needs_nvcc
def test_torch_side_of_the_cuda_build_type_checks(tmp_path):
    """The .cpp files with the CUDA branch on; a CPU wheel of torch ships those headers but for one
    generated file."""
    import sysconfig

    from torch.utils import cpp_extension

    toolkit = Path(os.path.realpath(NVCC)).parent.parent / "include"
    if not (toolkit / "cuda_runtime_api.h").exists():
        toolkit = Path("/usr/local/cuda/include")
    if not (toolkit / "cuda_runtime_api.h").exists():
        pytest.skip("the CUDA toolkit's headers were not found")
    stub = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n")
    includes = [
        str(tmp_path),
        *cpp_extension.include_paths(),
        str(toolkit),
        sysconfig.get_paths()["include"],
    ]
    source = "".join(
        f'#include "{path}"\n'
        for path in sorted(CSRC.rglob("*.cpp"))
        if "CUDA_CALL" in path.read_text()
    )
    (tmp_path / "all.cpp").write_text(source)
    command = [
        "g++",
        "-std=c++20",
        "-fsyntax-only",
        "-DRMEGA_WITH_CUDA",
        *[f"-I{path}" for path in includes],
        str(tmp_path / "all.cpp"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
