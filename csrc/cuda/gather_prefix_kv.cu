// gather_prefix_kv on a GPU, by an index that is made once per pack (prefix_index in
// gather_prefix_kv.cpp): the source row of every output row and, for the backward pass, the output
// rows of every source row in the order of segments.
#include "device.cuh"

namespace rmega {
namespace {

constexpr int kThreads = 256;

// A thread moves one unit of one output row. A row is `runs` runs of `run` units: one run where the
// groups of x lie side by side, else one per group.
template <typename Unit, typename Index>
__global__ void gather_prefix(const Unit* __restrict__ x, const int32_t* __restrict__ rows,
                              Unit* __restrict__ out, int64_t t, Index total, Index runs, Index run,
                              int64_t row_stride, int64_t run_stride) {
  const Index width = runs * run, i = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= total * width) {
    return;
  }
  const Index j = i % width;
  const int64_t row = rows[i / width];
  require_row(row, t, "gather_prefix_kv");
  const int64_t at = runs == 1 ? int64_t(j) : int64_t(j / run) * run_stride + j % run;
  out[i] = x[row * row_stride + at];
}

// A thread adds up V columns of one source row.
template <typename T, int V, typename Index>
__global__ void scatter_prefix(const T* __restrict__ grad, const int32_t* __restrict__ offsets,
                               const int32_t* __restrict__ sources, T* __restrict__ grad_x, Index t,
                               int64_t total, Index width) {
  const Index lanes = width / V, i = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= t * lanes) {
    return;
  }
  const int64_t row = i / lanes, j = i % lanes * V;
  typename Accumulate<T>::type sum[V] = {};
  for (int32_t e = offsets[row]; e < offsets[row + 1]; ++e) {
    const int64_t source = sources[e];
    require_row(source, total, "gather_prefix_kv backward");
    const Lane<T, V> lane = read<V>(grad + source * width + j);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sum[k] += load(lane.at[k]);
    }
  }
  Lane<T, V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    store(&out.at[k], sum[k]);
  }
  write(grad_x + row * width + j, out);
}

unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

}  // namespace

int launch_gather_prefix(const void* x, const int32_t* rows, void* out, int64_t t, int64_t total,
                         int64_t g, int64_t d, int64_t x_stride0, int64_t x_stride1,
                         int element_size, Stream stream) {
  const bool dense_row = g <= 1 || x_stride1 == d;
  const int64_t runs = dense_row ? 1 : g;
  const int64_t run = (dense_row ? g * d : d) * element_size;
  const int64_t row_stride = x_stride0 * element_size, run_stride = x_stride1 * element_size;
  uint64_t bits = bits_of(x, out) | uint64_t(run) | uint64_t(row_stride);
  if (!dense_row) {
    bits |= uint64_t(run_stride);
  }
  for_copy_width(copy_width(bits), [&](auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    constexpr int64_t size = sizeof(Unit);
    const int64_t count = total * runs * run / size;
    for_index(count, [&](auto index) {
      using Index = decltype(index);
      const unsigned blocks = blocks_for(count);
      gather_prefix<Unit, Index><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const Unit*>(x), rows, static_cast<Unit*>(out), t, Index(total), Index(runs),
          Index(run / size), row_stride / size, run_stride / size);
    });
  });
  return cudaGetLastError();
}

int launch_gather_prefix_backward(const void* grad, const int32_t* offsets, const int32_t* sources,
                                  void* grad_x, int64_t t, int64_t total, int64_t width,
                                  DType dtype, Stream stream) {
  for_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_lanes<T>(bits_of(grad, grad_x) | uint64_t(width) * sizeof(T), [&](auto lanes) {
      constexpr int V = decltype(lanes)::value;
      const int64_t count = t * (width / V);
      for_index(count, [&](auto index) {
        using Index = decltype(index);
        const unsigned blocks = blocks_for(count);
        scatter_prefix<T, V, Index><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(grad), offsets, sources, static_cast<T*>(grad_x), Index(t), total,
            Index(width));
      });
    });
  });
  return cudaGetLastError();
}

}  // namespace rmega
