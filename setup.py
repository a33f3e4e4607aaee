"""Builds ``rmega._C`` from csrc/: for CPUs always, for CUDA where torch is a CUDA build and a
toolkit of the same major version is installed.

The choice looks at the toolkit and at torch's own build, never at the GPU that happens to be
present, so that a login node builds what its compute nodes run. RMEGA_BUILD_CUDA=0 leaves CUDA out;
with RMEGA_BUILD_CUDA=1 a build that would have to leave it out is an error.
Needs an installed torch: ``pip install --no-build-isolation -e .``
"""

import os
import re
import subprocess
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def cuda_toolkit(torch_cuda, asked):
    """(folder of a toolkit that torch can build with or None, its version or why there is none).

    ``torch_cuda``: the CUDA version of torch's build. ``asked``: where torch looks, which goes by
    CUDA_HOME and by where nvcc is found. That may be a wrapper in a folder with no toolkit around
    it, hence the usual places as well.
    """
    folders = [asked, "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))[::-1]]
    others = []
    for folder in dict.fromkeys(map(Path, filter(None, folders))):
        # nvcc alone is not enough: some packages have the compiler without the headers.
        if not all((folder / f).is_file() for f in ("bin/nvcc", "include/cuda_runtime.h")):
            continue
        command = [str(folder / "bin/nvcc"), "--version"]
        try:
            text = subprocess.run(command, capture_output=True, text=True).stdout
        except OSError:
            continue
        version = re.search(r"release (\d+)\.(\d+)", text)
        if version and version[1] == torch_cuda.split(".")[0]:
            return str(folder), f"{version[1]}.{version[2]}"
        others.append(f"{folder} has CUDA {f'{version[1]}.{version[2]}' if version else '?'}")
    if others:
        return None, f"torch is built with CUDA {torch_cuda}, {', '.join(others)}"
    return None, f"no toolkit of CUDA {torch_cuda} (nvcc and cuda_runtime.h; CUDA_HOME names one)"


def extensions():
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        raise SystemExit(
            "error: rmega builds against an installed torch: pip install 'torch>=2.10' first,"
            " then pip install --no-build-isolation -e ."
        ) from None
    wish = os.environ.get("RMEGA_BUILD_CUDA", "")
    home = None
    if wish == "0":
        reason = "RMEGA_BUILD_CUDA=0"
    elif torch.version.cuda is None:
        reason = "torch is built without CUDA"
    else:
        home, reason = cuda_toolkit(torch.version.cuda, cpp_extension.CUDA_HOME)
    if wish == "1" and home is None:
        raise SystemExit(f"error: RMEGA_BUILD_CUDA=1, but {reason}")
    print(
        f"rmega._C for torch {torch.__version__}: "
        + (f"CPU and CUDA {reason} ({home})" if home else f"CPU only: {reason}")
    )
    sources = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc").rglob("*.cpp"))
    # OpenMP is compiled for but not linked: torch's own copy is in the process, and a second one
    # would start a second set of threads on the same cores.
    flags = (
        ["-O3", "-g0", "-fopenmp", "-Wall", "-Wno-unknown-pragmas"] if os.name == "posix" else []
    )
    if not home:
        return [
            cpp_extension.CppExtension("rmega._C", sources, extra_compile_args={"cxx": flags})
        ], cpp_extension
    cpp_extension.CUDA_HOME = home  # where torch takes nvcc, headers and libraries from
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
