// gather_prefix_kv on a GPU. Forward: one block per (segment, slice of its output rows). Backward: one block per source
// row, which finds the segments that hold it and adds their rows in the order of segments.
#include <type_traits>

#include "device.cuh"

namespace rmega {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kSlices = 32;

struct Segment {
  int64_t prefix_start, prefix_len, own_start, own_len, out_start;
  __device__ __forceinline__ Segment(const int64_t* __restrict__ index, int64_t s, int64_t i)
      : prefix_start(index[i]),
        prefix_len(index[s + i]),
        own_start(index[2 * s + i]),
        own_len(index[3 * s + i]),
        out_start(index[4 * s + i]) {}
};

// A row is `runs` runs of `run` units: one run where the groups of x lie side by side, else one per group.
template <typename Unit>
__global__ void gather_prefix(const Unit* __restrict__ x, const int64_t* __restrict__ index, Unit* __restrict__ out,
                              int64_t t, int64_t s, int64_t total, int64_t runs, int64_t run, int64_t row_stride,
                              int64_t run_stride) {
  const Segment segment(index, s, blockIdx.x);
  const int64_t len = segment.prefix_len + segment.own_len, width = runs * run;
  if (len > 0) {
    require_row(segment.out_start + len - 1, total, "gather_prefix_kv: last output row");
  }
  for (int64_t i = blockIdx.y; i < len; i += gridDim.y) {
    const int64_t row = i < segment.prefix_len ? segment.prefix_start + i : segment.own_start + i - segment.prefix_len;
    require_row(row, t, "gather_prefix_kv");
    Unit* target = out + (segment.out_start + i) * width;
    for (int64_t j = threadIdx.x; j < width; j += kThreads) {
      target[j] = x[row * row_stride + (runs == 1 ? j : j / run * run_stride + j % run)];
    }
  }
}

template <typename T>
__global__ void scatter_prefix(const T* __restrict__ grad, const int64_t* __restrict__ index, T* __restrict__ grad_x,
                               int64_t s, int64_t width) {
  using Acc = typename Accumulate<T>::type;
  __shared__ int64_t rows[2 * kThreads];  // gradient rows of this source row, in the order of segments
  __shared__ int counts[kWarps];
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // A thread's columns: column, column + kThreads, ... four at a time, so that a sum stays in a register.
  for (int64_t first = 0; first < width; first += 4 * kThreads) {
    Acc sum[4] = {0, 0, 0, 0};
    for (int64_t base = 0; base < s; base += kThreads) {
      int64_t prefix_row = -1, own_row = -1;
      if (base + threadIdx.x < s) {
        const Segment segment(index, s, base + threadIdx.x);
        const int64_t in_prefix = row - segment.prefix_start, in_own = row - segment.own_start;
        if (in_prefix >= 0 && in_prefix < segment.prefix_len) {
          prefix_row = segment.out_start + in_prefix;
        }
        if (in_own >= 0 && in_own < segment.own_len) {
          own_row = segment.out_start + segment.prefix_len + in_own;
        }
      }
      const unsigned with_prefix = __ballot_sync(0xffffffffu, prefix_row >= 0);
      const unsigned with_own = __ballot_sync(0xffffffffu, own_row >= 0);
      const unsigned before = (1u << lane) - 1u;
      if (lane == 0) {
        counts[warp] = __popc(with_prefix) + __popc(with_own);
      }
      __syncthreads();
      int at = __popc(with_prefix & before) + __popc(with_own & before), count = 0;
      for (int i = 0; i < kWarps; ++i) {
        at += i < warp ? counts[i] : 0;
        count += counts[i];
      }
      if (prefix_row >= 0) {
        rows[at++] = prefix_row;
      }
      if (own_row >= 0) {
        rows[at] = own_row;
      }
      __syncthreads();
      for (int i = 0; i < count; ++i) {
        const T* source = grad + rows[i] * width;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int64_t column = first + k * kThreads + threadIdx.x;
          if (column < width) {
            sum[k] += load(source[column]);
          }
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t column = first + k * kThreads + threadIdx.x;
      if (column < width) {
        store(&grad_x[row * width + column], sum[k]);
      }
    }
  }
}

}  // namespace

int launch_gather_prefix(const void* x, const int64_t* index, void* out, int64_t t, int64_t s, int64_t total,
                         int64_t g, int64_t d, int64_t x_stride0, int64_t x_stride1, int element_size, Stream stream) {
  const bool dense_row = g <= 1 || x_stride1 == d;
  const int64_t runs = dense_row ? 1 : g;
  const int64_t run = (dense_row ? g * d : d) * element_size;
  const int64_t row_stride = x_stride0 * element_size, run_stride = x_stride1 * element_size;
  uint64_t bits = reinterpret_cast<uint64_t>(x) | reinterpret_cast<uint64_t>(out) | uint64_t(run) | uint64_t(row_stride);
  if (!dense_row) {
    bits |= uint64_t(run_stride);
  }
  for_copy_width(copy_width(bits), [&](auto* unit) {
    using Unit = std::remove_pointer_t<decltype(unit)>;
    constexpr int64_t size = sizeof(Unit);
    const dim3 grid(static_cast<unsigned>(s), kSlices);
    gather_prefix<Unit><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const Unit*>(x), index, static_cast<Unit*>(out), t, s, total, runs, run / size, row_stride / size,
        run_stride / size);
  });
  return cudaGetLastError();
}

int launch_gather_prefix_backward(const void* grad, const int64_t* index, void* grad_x, int64_t t, int64_t s,
                                  int64_t width, DType dtype, Stream stream) {
  for_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    scatter_prefix<T><<<static_cast<unsigned>(t), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(grad), index, static_cast<T*>(grad_x), s, width);
  });
  return cudaGetLastError();
}

}  // namespace rmega
