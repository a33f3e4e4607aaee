# The set-up of examples/quickstart.sh and tests/run.sh. Source it, then call rmega_setup.
#
# Uses the active environment, else makes .venv; keeps an installed torch, else installs one;
# builds and installs rmega (editable) with the extras plots, serve and test; sets PYTHON. A second
# call returns at once. The output of pip is in .cache/setup.log.

RMEGA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
RMEGA_CACHE="$RMEGA_ROOT/.cache"
RMEGA_TORCH=2.13.0  # what an environment without a torch of 2.10 or newer gets
# Container images often set this. Then every start of Python would compile 2,000 modules of torch
# and Megatron-Core again, which takes 4 s: pip leaves that to the first import (below).
unset PYTHONDONTWRITEBYTECODE

rmega_fail() { echo "error: $*" >&2; return 1; }

# rmega_pip WHAT ARGUMENTS...: pip install, quietly; on failure the end of its output. Bytecode is
# left to the first import of a module: a run imports a quarter of what pip would compile.
rmega_pip() {
    local what="$1" start=$SECONDS
    echo "set-up: $what ..."
    "$PYTHON" -m pip --disable-pip-version-check install --no-compile "${@:2}" \
        >>"$RMEGA_CACHE/setup.log" 2>&1 ||
        { tail -n 15 "$RMEGA_CACHE/setup.log" >&2
          rmega_fail "$what failed; the whole output of pip is in $RMEGA_CACHE/setup.log"; return; }
    echo "set-up: $what: done in $((SECONDS - start)) s"
}

rmega_is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# rmega_torch_of PYTHON: the version of its torch, if that is 2.10 or newer.
rmega_torch_of() {
    "$1" -c 'import importlib.metadata, re
version = importlib.metadata.version("torch")
raise SystemExit([*map(int, re.findall(r"\d+", version))] < [2, 10] or print(version))' 2>/dev/null
}

# Sets PYTHON; makes .venv if there is no environment to use.
rmega_find_python() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" base options=() torch
    local install="install Python 3.10 or newer (Debian, Ubuntu: apt install python3 python3-venv \
python3-dev; Fedora: dnf install python3 python3-devel; macOS: brew install python)"
    if [[ -n "$active" && -x "$active/bin/python" ]]; then
        PYTHON="$active/bin/python"
        rmega_is_new "$PYTHON" || rmega_fail "the active environment $active has a Python older \
than 3.10: deactivate it, or $install"
        return
    fi
    PYTHON="$RMEGA_ROOT/.venv/bin/python"
    ! rmega_is_new "$PYTHON" || ! "$PYTHON" -m pip --version >/dev/null 2>&1 || return 0
    for base in python3 python3.12 python3.11 python3.13 python3.10 python; do
        command -v "$base" >/dev/null && rmega_is_new "$base" || continue
        # A torch built for this machine (NVIDIA's containers) is shared, not installed again; the
        # packages of another virtual environment cannot be shared.
        ! "$base" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)' ||
            ! torch="$(rmega_torch_of "$base")" || options=(--system-site-packages --without-pip)
        echo "set-up: making .venv with $("$base" --version)${torch:+ and its torch $torch}"
        "$base" -m venv --clear ${options[@]+"${options[@]}"} "$RMEGA_ROOT/.venv" &>/dev/null &&
            return
        rm -rf "$RMEGA_ROOT/.venv"
        rmega_fail "$base cannot make a virtual environment: install the package python3-venv (apt \
install python3-venv)"
        return
    done
    rmega_fail "no Python 3.10 or newer found: $install"
}

# What rmega._C takes: a compiler and Python's headers.
rmega_check_compiler() {
    CXX="${CXX:-$(command -v c++ || command -v g++ || command -v clang++ || true)}"
    command -v "${CXX:-c++}" >/dev/null || rmega_fail "no C++ compiler found${CXX:+ (CXX=$CXX)}: \
install the package g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: \
xcode-select --install)" || return
    export CXX
    "$PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || rmega_fail "the \
headers of Python (Python.h) are missing: install the package python3-dev (Debian, Ubuntu: apt \
install python3-dev; Fedora: dnf install python3-devel)"
}

rmega_has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# Without a GPU the CPU build, a tenth as large: from where pip is configured to look or from
# pytorch.org, else the large one.
rmega_install_torch() {
    local torch cpu=https://download.pytorch.org/whl/cpu
    if torch="$(rmega_torch_of "$PYTHON")"; then
        echo "set-up: keeping torch $torch"
    elif rmega_has_gpu || [[ "$(uname -s)" != Linux ]]; then
        rmega_pip "torch $RMEGA_TORCH" "torch==$RMEGA_TORCH"
    else
        rmega_pip "torch $RMEGA_TORCH (CPU build)" "torch==$RMEGA_TORCH+cpu" 2>/dev/null ||
            rmega_pip "torch $RMEGA_TORCH (CPU build) from $cpu" --timeout 20 --retries 2 \
                --index-url "$cpu" "torch==$RMEGA_TORCH" 2>/dev/null ||
            rmega_pip "torch $RMEGA_TORCH from the package index" "torch==$RMEGA_TORCH"
    fi
}

# What the installation was made with; a change means a new one.
rmega_stamp() {
    "$PYTHON" -c 'import sys, importlib.metadata as metadata
print(sys.version.split()[0], sys.prefix, *map(metadata.version, ("torch", "rmega")))' 2>/dev/null
}
rmega_is_installed() {
    [[ -e "$RMEGA_CACHE/setup.stamp" && "$(rmega_stamp)" == "$(<"$RMEGA_CACHE/setup.stamp")" ]] &&
        compgen -G "$RMEGA_ROOT/rmega/_C.*" >/dev/null && [[ -z "$(find "$RMEGA_ROOT/csrc" \
            "$RMEGA_ROOT"/{setup.py,pyproject.toml} -newer "$RMEGA_CACHE/setup.stamp")" ]]
}

rmega_setup() {
    local start=$SECONDS
    rmega_find_python || return
    ! rmega_is_installed || return 0
    mkdir -p "$RMEGA_CACHE"
    : >"$RMEGA_CACHE/setup.log"
    rmega_check_compiler || return
    "$PYTHON" -m pip --version &>/dev/null || "$PYTHON" -m ensurepip &>/dev/null ||
        rmega_fail "$PYTHON has no pip: install the package python3-pip, or deactivate that \
environment" || return
    echo "set-up: into ${PYTHON%/bin/python}, once; a later start takes seconds"
    rmega_install_torch || return
    # The constraint: no requirement of another package replaces the installed torch.
    echo "torch==$(rmega_torch_of "$PYTHON")" >"$RMEGA_CACHE/constraints.txt"
    rmega_pip "what the build needs" "setuptools>=77" wheel "pybind11>=2.13,<4" ninja \
        "numpy>=1.26,<3" || return
    rmega_pip "rmega and what it needs (builds rmega._C: two minutes or so)" --no-build-isolation \
        -c "$RMEGA_CACHE/constraints.txt" -e "$RMEGA_ROOT[plots,serve,test]" || return
    ! rmega_has_gpu || "$PYTHON" -c 'import torch
if not torch.cuda.is_available():
    print(f"set-up: this machine has an NVIDIA GPU that torch {torch.__version__} cannot use (a \
build without CUDA, or a driver that is too old for it): using the CPU")'
    rmega_stamp >"$RMEGA_CACHE/setup.stamp"
    echo "set-up: done in $((SECONDS - start)) s"
}
