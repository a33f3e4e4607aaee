// gather_last_token on a GPU: one block per gathered row.
#include <type_traits>

#include "device.cuh"

namespace rmega {
namespace {

constexpr int kThreads = 256;

template <typename Unit>
__global__ void gather_rows(const Unit* __restrict__ hidden, const int64_t* __restrict__ last,
                            Unit* __restrict__ out, int64_t t, int64_t units) {
  const int64_t i = blockIdx.x, row = last[i];
  require_row(row, t, "gather_last_token");
  for (int64_t j = threadIdx.x; j < units; j += blockDim.x) {
    out[i * units + j] = hidden[row * units + j];
  }
}

// Block i does the work of its row if no earlier i has the same row, and then adds all that have,
// in their order.
template <typename T>
__global__ void add_rows(const T* __restrict__ grad, const int64_t* __restrict__ last,
                         T* __restrict__ out, int64_t t, int64_t n, int64_t h) {
  const int64_t i = blockIdx.x, row = last[i];
  require_row(row, t, "gather_last_token backward");
  bool repeated = false;
  for (int64_t j = threadIdx.x; j < i && !repeated; j += blockDim.x) {
    repeated = last[j] == row;
  }
  if (__syncthreads_or(repeated)) {
    return;
  }
  bool single = true;
  for (int64_t j = i + 1 + threadIdx.x; j < n && single; j += blockDim.x) {
    single = last[j] != row;
  }
  single = !__syncthreads_or(!single);
  for (int64_t k = threadIdx.x; k < h; k += blockDim.x) {
    auto sum = load(grad[i * h + k]);
    for (int64_t j = i + 1; j < n && !single; ++j) {
      if (last[j] == row) {
        sum += load(grad[j * h + k]);
      }
    }
    store(&out[row * h + k], sum);
  }
}

}  // namespace

int launch_gather_rows(const void* hidden, const int64_t* last, void* out, int64_t t, int64_t n,
                       int64_t row_bytes, Stream stream) {
  const auto bits =
      reinterpret_cast<uint64_t>(hidden) | reinterpret_cast<uint64_t>(out) | uint64_t(row_bytes);
  for_copy_width(copy_width(bits), [&](auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    gather_rows<Unit><<<static_cast<unsigned>(n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const Unit*>(hidden), last, static_cast<Unit*>(out), t,
        row_bytes / int64_t(sizeof(Unit)));
  });
  return cudaGetLastError();
}

int launch_gather_rows_backward(const void* grad, const int64_t* last, void* grad_hidden, int64_t t,
                                int64_t n, int64_t h, DType dtype, Stream stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  for_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    // Zero bits are +0 in every dtype here.
    cudaMemsetAsync(grad_hidden, 0, static_cast<size_t>(t) * h * sizeof(T), cuda_stream);
    if (n > 0) {
      add_rows<T><<<static_cast<unsigned>(n), kThreads, 0, cuda_stream>>>(
          static_cast<const T*>(grad), last, static_cast<T*>(grad_hidden), t, n, h);
    }
  });
  return cudaGetLastError();
}

}  // namespace rmega
