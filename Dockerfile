# rmega for CUDA users, on NVIDIA's PyTorch image, whose torch is kept. This file has not been built
# by its authors yet: report what fails.
#
#   docker build -t rmega .
#   docker run --gpus all --ipc=host --rm -it -v "$PWD/runs:/workspace/rmega/runs" rmega
ARG BASE=nvcr.io/nvidia/pytorch:25.12-py3
FROM ${BASE}

WORKDIR /workspace/rmega
# The image's torch as a constraint: no requirement replaces it. (The image has a constraints file
# of its own, which pins versions for its own packages; ours takes its place.)
RUN python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > /constraints.txt
ENV PIP_CONSTRAINT=/constraints.txt
RUN pip install --no-cache-dir "setuptools>=77" wheel "pybind11>=2.13,<4" ninja

COPY . .
# Compute capabilities to compile for: A100, H100/H200.
ENV TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"
RUN pip install --no-cache-dir --no-build-isolation -e ".[plots,serve,track]"
CMD ["bash"]
