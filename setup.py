"""Builds ``rmega._C`` from csrc/: CPU always, CUDA where the toolkit and a CUDA build of torch are
there.

The choice looks at the toolkit and at torch's own build, never at the GPU that happens to be
present, so that a login node builds what its compute nodes run. RMEGA_BUILD_CUDA=0 leaves CUDA out.
Needs an installed torch: ``pip install --no-build-isolation -e .``
"""

import os
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def extensions():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        raise SystemExit(
            "error: rmega builds against an installed torch: pip install 'torch>=2.10' first,"
            " then pip install --no-build-isolation -e ."
        ) from None
    with_cuda = (
        torch.version.cuda is not None
        and cpp_extension.CUDA_HOME is not None
        and os.environ.get("RMEGA_BUILD_CUDA", "1") != "0"
    )
    print(
        f"rmega._C: {'CPU and CUDA' if with_cuda else 'CPU only'} (torch {torch.__version__}, its"
        f" CUDA {torch.version.cuda or 'none'}, toolkit"
        f" {cpp_extension.CUDA_HOME or 'not looked for'})"
    )
    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob("*.cpp"))
    # OpenMP is compiled for but not linked: torch's own copy is in the process, and a second one
    # would start a second set of threads on the same cores.
    flags = (
        ["-O3", "-g0", "-fopenmp", "-Wall", "-Wno-unknown-pragmas"] if os.name == "posix" else []
    )
    if not with_cuda:
        return [
            cpp_extension.CppExtension("rmega._C", sources, extra_compile_args={"cxx": flags})
        ], cpp_extension
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    sources += sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob("*.cu"))
    return [
        cpp_extension.CUDAExtension(
            "rmega._C",
            sources,
            define_macros=[("RMEGA_WITH_CUDA", None)],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3", "--expt-relaxed-constexpr"]},
        )
    ], cpp_extension


ext_modules, cpp_extension = extensions()
setup(ext_modules=ext_modules, cmdclass={"build_ext": cpp_extension.BuildExtension})
