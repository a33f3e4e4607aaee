# The set-up that examples/quickstart.sh and tests/run.sh share. Source it, then call: rmega_setup [EXTRAS]
#
# It takes the active environment (VIRTUAL_ENV, CONDA_PREFIX), else makes .venv in the checkout; installs torch, what
# rmega needs and rmega itself (editable), which builds rmega._C; and sets PYTHON. A second call finds the stamp of the
# first one and returns at once. What pip says goes to .cache/setup.log.

RMEGA_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
RMEGA_TORCH=2.13.0                                     # what a fresh environment gets
RMEGA_TORCH_RANGE="torch>=2.10,<2.14"                  # what an environment may bring along (as in pyproject.toml)
RMEGA_BUILD_NEEDS=("setuptools>=77" wheel "pybind11>=2.13,<4" ninja "numpy>=1.26,<3")

rmega_fail() {
    echo "error: $*" >&2
    return 1
}

# rmega_pip WHAT ARGUMENTS...: quiet; on failure the end of what pip said, and how to see the rest.
rmega_pip() {
    local what="$1" start=$SECONDS
    shift
    echo "set-up: $what ..."
    if ! "$PYTHON" -m pip --disable-pip-version-check "$@" >>"$RMEGA_LOG" 2>&1; then
        tail -n 15 "$RMEGA_LOG" >&2
        rmega_fail "$what failed; all that pip said is in $RMEGA_LOG"
        return 1
    fi
    echo "set-up: $what: done in $((SECONDS - start)) s"
}

rmega_python_is_new() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Sets PYTHON; makes .venv if there is no environment to use.
rmega_find_python() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" base
    local install="install Python 3.10 or newer (Debian, Ubuntu: apt install python3 python3-venv python3-dev; \
Fedora: dnf install python3 python3-devel; macOS: brew install python)"
    if [[ -n "$active" && -x "$active/bin/python" ]]; then
        PYTHON="$active/bin/python"
        rmega_python_is_new "$PYTHON" ||
            { rmega_fail "the active environment $active has a Python older than 3.10: deactivate it, or $install"; return 1; }
        return 0
    fi
    PYTHON="$RMEGA_ROOT/.venv/bin/python"
    if rmega_python_is_new "$PYTHON" && "$PYTHON" -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    for base in python3 python3.12 python3.11 python3.13 python3.10 python; do
        if command -v "$base" >/dev/null && rmega_python_is_new "$base"; then
            echo "set-up: making .venv with $("$base" --version)"
            "$base" -m venv --clear "$RMEGA_ROOT/.venv" >/dev/null 2>&1 ||
                { rm -rf "$RMEGA_ROOT/.venv"
                  rmega_fail "$base cannot make a virtual environment: install the package python3-venv (apt install python3-venv)"
                  return 1; }
            return 0
        fi
    done
    rmega_fail "no Python 3.10 or newer found: $install"
}

# A compiler and Python's headers, for rmega._C.
rmega_check_compiler() {
    local candidate
    if [[ -z "${CXX:-}" ]] && ! command -v c++ >/dev/null; then
        for candidate in g++ clang++; do
            if command -v "$candidate" >/dev/null; then export CXX="$candidate"; break; fi
        done
    fi
    command -v "${CXX:-c++}" >/dev/null ||
        { rmega_fail "no C++ compiler found${CXX:+ (CXX=$CXX)}: install the package g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
          return 1; }
    "$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        { rmega_fail "the headers of Python (Python.h) are missing: install the package python3-dev (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
          return 1; }
}

rmega_has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU
}

# Keeps a torch of the supported range that is there already; else installs the pinned one.
rmega_install_torch() {
    local found
    found="$("$PYTHON" - "$RMEGA_TORCH_RANGE" <<'EOF' 2>/dev/null
import importlib.metadata, re, sys
version = importlib.metadata.version("torch")
low, high = (tuple(map(int, bound.split("."))) for bound in re.findall(r"[\d.]+", sys.argv[1]))
sys.exit(not low <= tuple(map(int, version.split("+")[0].split(".")[:2])) < high or print(version))
EOF
    )" && { echo "set-up: keeping torch $found"; return 0; }
    if rmega_has_gpu || [[ "$(uname -s)" != Linux ]]; then
        rmega_pip "torch $RMEGA_TORCH" install "torch==$RMEGA_TORCH"
        return
    fi
    # Without a GPU the build without CUDA does the same and is a tenth as large: from where pip is told to look, else
    # from pytorch.org, else the large one.
    echo "set-up: torch $RMEGA_TORCH (CPU build) ..."
    local pip=("$PYTHON" -m pip --disable-pip-version-check install) start=$SECONDS
    "${pip[@]}" "torch==$RMEGA_TORCH+cpu" >>"$RMEGA_LOG" 2>&1 ||
        "${pip[@]}" --timeout 20 --retries 2 --index-url https://download.pytorch.org/whl/cpu "torch==$RMEGA_TORCH" >>"$RMEGA_LOG" 2>&1 ||
        rmega_pip "torch $RMEGA_TORCH from the package index (the CPU build could not be reached)" install "torch==$RMEGA_TORCH" || return 1
    echo "set-up: torch $RMEGA_TORCH: done in $((SECONDS - start)) s"
}

# One line that changes whenever the set-up has to be done again.
rmega_stamp() {
    "$PYTHON" - "$RMEGA_ROOT" <<'EOF'
import hashlib, importlib.metadata, pathlib, sys
root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256()
for path in [root / "setup.py", root / "pyproject.toml", *sorted(filter(pathlib.Path.is_file, (root / "csrc").rglob("*")))]:
    digest.update(path.name.encode() + b"\0" + path.read_bytes())
try:
    torch, _ = importlib.metadata.version("torch"), importlib.metadata.version("rmega")
except importlib.metadata.PackageNotFoundError:
    torch = "none"
built = "built" if list((root / "rmega").glob("_C.*")) else "not built"
print(digest.hexdigest(), sys.version.split()[0], sys.prefix, torch, built)
EOF
}

# What the extras of rmega (comma-separated) need, a requirement a line, as the installed package says.
rmega_needs_of() {
    "$PYTHON" - "$1" <<'EOF'
import importlib.metadata, re, sys
for line in importlib.metadata.requires("rmega"):
    requirement, _, marker = line.partition(";")
    if set(re.findall(r"""extra == ["'](\w+)["']""", marker)) & set(sys.argv[1].split(",")):
        print(requirement.strip())
EOF
}

# rmega_setup [EXTRAS]: comma-separated. The stamp holds the extras that are there, and what the rest was made from.
rmega_setup() {
    local extras="${1:-}" stamp_file="$RMEGA_ROOT/.cache/setup.stamp" start=$SECONDS have missing="" extra needs
    rmega_find_python || return 1
    have="$(cat "$stamp_file" 2>/dev/null || true)"
    for extra in ${extras//,/ }; do
        [[ ",${have%%$'\n'*}," == *",$extra,"* ]] || missing="$missing${missing:+,}$extra"
    done
    mkdir -p "$RMEGA_ROOT/.cache"
    RMEGA_LOG="$RMEGA_ROOT/.cache/setup.log"
    if [[ -n "$have" && "${have#*$'\n'}" == "$(rmega_stamp)" ]]; then
        [[ -n "$missing" ]] || return 0
        : >"$RMEGA_LOG"
        needs=()  # not mapfile: macOS has bash 3
        while IFS= read -r extra; do needs+=("$extra"); done < <(rmega_needs_of "$missing")
        rmega_pip "what $missing needs" install "${needs[@]}" || return 1
        extras="${have%%$'\n'*}"
        printf '%s\n%s\n' "$extras${extras:+,}$missing" "$(rmega_stamp)" >"$stamp_file"
        return 0
    fi
    : >"$RMEGA_LOG"
    rm -f "$stamp_file"
    rmega_check_compiler || return 1
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >>"$RMEGA_LOG" 2>&1 ||
        { rmega_fail "$PYTHON has no pip: install the package python3-pip, or deactivate that environment"; return 1; }
    echo "set-up: into $("$PYTHON" -c 'import sys; print(sys.prefix)'), once; a later start takes seconds"
    rmega_install_torch || return 1
    rmega_pip "what the build needs" install "${RMEGA_BUILD_NEEDS[@]}" || return 1
    rmega_pip "rmega and what it needs (builds rmega._C: two minutes or so)" \
        install --no-build-isolation -e "$RMEGA_ROOT${extras:+[$extras]}" || return 1
    if rmega_has_gpu && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
        echo "set-up: this machine has an NVIDIA GPU that torch $("$PYTHON" -c 'import torch; print(torch.__version__)') cannot use (a build without CUDA, or a driver that is too old for it): going on with the CPU"
    fi
    printf '%s\n%s\n' "$extras" "$(rmega_stamp)" >"$stamp_file"
    echo "set-up: done in $((SECONDS - start)) s"
}
