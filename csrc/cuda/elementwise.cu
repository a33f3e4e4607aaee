// rms_norm, swiglu and rope on a GPU: each reads its inputs once from memory, computes in fp32
// (fp64 for fp64) and rounds once, as elementwise_kernels.h does. Elements are moved V at a time,
// 16 bytes where shapes and addresses allow it.
#include <algorithm>
#include <type_traits>

#include "device.cuh"

namespace rmega {
namespace {

template <typename T, typename Acc>
__device__ __forceinline__ Acc rounded(Acc x) {
  T narrow;
  store(&narrow, x);
  return load(narrow);
}

// For elements of T. Half precision keeps 11 bits of the result at most; there the fast
// instructions are exact enough: __expf errs by 2 + 1.2 |x| units in the last place of fp32, at
// most 1e-5 of the result, __fdividef by 2. The latter is 0 for a divisor beyond 2^126, as the
// sigmoid there is.
template <typename T>
__device__ __forceinline__ typename Accumulate<T>::type sigmoid(typename Accumulate<T>::type x) {
  if constexpr (std::is_same_v<T, double>) {
    return 1.0 / (1.0 + exp(-x));
  } else if constexpr (std::is_same_v<T, float>) {
    return 1.0f / (1.0f + expf(-x));
  } else {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  }
}
__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

// The sum over a block of up to 32 warps, in one order, for every thread. `room` holds 32 and is
// free again after it.
template <typename Acc>
__device__ __forceinline__ Acc block_sum(Acc x, Acc* room) {
  for (int mask = 16; mask > 0; mask /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, mask);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  if (lane == 0) {
    room[warp] = x;
  }
  __syncthreads();
  x = lane < warps ? room[lane] : Acc(0);
  for (int mask = 16; mask > 0; mask /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, mask);
  }
  __syncthreads();
  return x;
}

constexpr int kThreads = 256, kMostThreads = 512;

// One row per block. kAdd: the row is round(x + residual), which also goes to `total`.
template <typename T, int V, bool kAdd>
__global__ void norm_forward(const T* __restrict__ x, const T* __restrict__ residual,
                             const T* __restrict__ weight, T* __restrict__ total, T* __restrict__ y,
                             typename Accumulate<T>::type* __restrict__ inv, int64_t h,
                             double eps) {
  using Acc = typename Accumulate<T>::type;
  __shared__ Acc room[32];
  x += blockIdx.x * h;
  y += blockIdx.x * h;
  if constexpr (kAdd) {
    residual += blockIdx.x * h;
    total += blockIdx.x * h;
  }
  Acc sum = 0;
  for (int64_t j = int64_t(threadIdx.x) * V; j < h; j += int64_t(blockDim.x) * V) {
    Lane<T, V> in = read<V>(x + j);
    if constexpr (kAdd) {
      const Lane<T, V> more = read<V>(residual + j);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        store(&in.at[k], load(in.at[k]) + load(more.at[k]));
      }
      write(total + j, in);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sum += load(in.at[k]) * load(in.at[k]);
    }
  }
  const Acc scale = Acc(1) / square_root(block_sum(sum, room) / Acc(h) + Acc(eps));
  if (threadIdx.x == 0) {
    inv[blockIdx.x] = scale;
  }
  for (int64_t j = int64_t(threadIdx.x) * V; j < h; j += int64_t(blockDim.x) * V) {
    // The row again, from the cache; of `total` what this thread has written.
    const Lane<T, V> in = read<V>((kAdd ? total : x) + j), w = read<V>(weight + j);
    Lane<T, V> out;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      store(&out.at[k], load(w.at[k]) * rounded<T>(load(in.at[k]) * scale));
    }
    write(y + j, out);
  }
}

// dx = inv (w dy - x inv^2 mean(w dy x)), kAdd: + dtotal; partial [gridDim.x, h] = sums over this
// block's rows of dy round(x inv). A thread has K lanes of a row, whose columns' sums stay in its
// registers.
template <typename T, int V, int K, bool kAdd>
__global__ void __launch_bounds__(kMostThreads)
    norm_backward(const T* __restrict__ dy, const T* __restrict__ dtotal, const T* __restrict__ x,
                  const T* __restrict__ weight,
                  const typename Accumulate<T>::type* __restrict__ inv, T* __restrict__ dx,
                  typename Accumulate<T>::type* __restrict__ partial, int64_t rows, int64_t h) {
  using Acc = typename Accumulate<T>::type;
  __shared__ Acc room[32];
  Acc dweight[K][V] = {};
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Acc scale = inv[row];
    Lane<T, V> lane_x[K], lane_dy[K];
    Acc sum = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const int64_t j = (int64_t(threadIdx.x) + int64_t(i) * blockDim.x) * V;
      if (j < h) {
        lane_x[i] = read<V>(x + row * h + j);
        lane_dy[i] = read<V>(dy + row * h + j);
        const Lane<T, V> w = read<V>(weight + j);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const Acc value = load(lane_x[i].at[k]), grad = load(lane_dy[i].at[k]);
          dweight[i][k] += grad * rounded<T>(value * scale);
          sum += load(w.at[k]) * grad * value;
        }
      }
    }
    const Acc shrink = block_sum(sum, room) / Acc(h) * scale * scale * scale;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      const int64_t j = (int64_t(threadIdx.x) + int64_t(i) * blockDim.x) * V;
      if (j < h) {
        const Lane<T, V> w = read<V>(weight + j);
        Lane<T, V> out, more;
        if constexpr (kAdd) {
          more = read<V>(dtotal + row * h + j);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const Acc own =
              load(w.at[k]) * load(lane_dy[i].at[k]) * scale - load(lane_x[i].at[k]) * shrink;
          if constexpr (kAdd) {
            store(&out.at[k], load(more.at[k]) + own);
          } else {
            store(&out.at[k], own);
          }
        }
        write(dx + row * h + j, out);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const int64_t j = (int64_t(threadIdx.x) + int64_t(i) * blockDim.x) * V;
    if (j < h) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        partial[blockIdx.x * h + j + k] = dweight[i][k];
      }
    }
  }
}

// Block b has lanes [b % tiles * kThreads, + kThreads) of row b / tiles.
template <typename T, int V>
__global__ void glu_forward(const T* __restrict__ x, T* __restrict__ y, int64_t f, unsigned tiles) {
  const int64_t row = blockIdx.x / tiles;  // 32 bits: a division of 64 is a call
  const int64_t j = int64_t(blockIdx.x % tiles * kThreads + threadIdx.x) * V;
  if (j >= f) {
    return;
  }
  const Lane<T, V> gate = read<V>(x + row * 2 * f + j), up = read<V>(x + row * 2 * f + f + j);
  Lane<T, V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const auto g = load(gate.at[k]);
    store(&out.at[k], g * sigmoid<T>(g) * load(up.at[k]));
  }
  write(y + row * f + j, out);
}

template <typename T, int V>
__global__ void glu_backward(const T* __restrict__ dy, const T* __restrict__ x, T* __restrict__ dx,
                             int64_t f, unsigned tiles) {
  const int64_t row = blockIdx.x / tiles;  // 32 bits: a division of 64 is a call
  const int64_t j = int64_t(blockIdx.x % tiles * kThreads + threadIdx.x) * V;
  if (j >= f) {
    return;
  }
  const Lane<T, V> gate = read<V>(x + row * 2 * f + j), up = read<V>(x + row * 2 * f + f + j);
  const Lane<T, V> grad = read<V>(dy + row * f + j);
  Lane<T, V> dgate, dup;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const auto g = load(gate.at[k]), d = load(grad.at[k]), s = sigmoid<T>(g);
    store(&dgate.at[k], d * load(up.at[k]) * s * (1 + g * (1 - s)));
    store(&dup.at[k], d * (g * s));
  }
  write(dx + row * 2 * f + j, dgate);
  write(dx + row * 2 * f + f + j, dup);
}

// Thread i of the grid turns V channels of both halves of one head. C: element type of the tables.
// Index: 32 bits where they are enough, because a division of 64 is a call.
template <typename T, typename C, int V, typename Index>
__global__ void rotate(const T* __restrict__ x, const C* __restrict__ cos,
                       const C* __restrict__ sin, T* __restrict__ y, Index t, Index a, Index half,
                       int64_t row_stride, int64_t head_stride, float sign) {
  const Index lanes = half / V, i = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= t * a * lanes) {
    return;
  }
  const int64_t j = i % lanes * V, head = i / lanes % a, row = i / lanes / a;
  const T* from = x + row * row_stride + head * head_stride + j;
  const Lane<T, V> in1 = read<V>(from), in2 = read<V>(from + half);
  const Lane<C, V> c = read<V>(cos + row * half + j), s = read<V>(sin + row * half + j);
  Lane<T, V> out1, out2;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const auto x1 = load(in1.at[k]), x2 = load(in2.at[k]);
    const auto cosine = load(c.at[k]), sine = load(s.at[k]) * sign;
    store(&out1.at[k], x1 * cosine - x2 * sine);
    store(&out2.at[k], x2 * cosine + x1 * sine);
  }
  T* to = y + (row * a + head) * 2 * half + j;
  write(to, out1);
  write(to + half, out2);
}

int threads_for(int64_t lanes) {
  return static_cast<int>(
      std::min<int64_t>(kMostThreads, (std::max<int64_t>(lanes, 1) + 31) / 32 * 32));
}

}  // namespace

int launch_rms_norm(const void* x, const void* residual, const void* weight, void* total, void* y,
                    void* inv, int64_t rows, int64_t h, double eps, DType dtype, Stream stream) {
  for_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const uint64_t bits = bits_of(x, residual, weight, total, y) | uint64_t(h) * sizeof(T);
    with_lanes<T>(bits, [&](auto lanes) {
      constexpr int V = decltype(lanes)::value;
      const int threads = threads_for(h / V);
      const auto run = [&](auto add) {
        constexpr bool kAdd = decltype(add)::value;
        const auto blocks = static_cast<unsigned>(rows);
        norm_forward<T, V, kAdd><<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(x), static_cast<const T*>(residual),
            static_cast<const T*>(weight), static_cast<T*>(total), static_cast<T*>(y),
            static_cast<typename Accumulate<T>::type*>(inv), h, eps);
      };
      if (residual != nullptr) {
        run(std::true_type());
      } else {
        run(std::false_type());
      }
    });
  });
  return cudaGetLastError();
}

int launch_rms_norm_backward(const void* dy, const void* dtotal, const void* x, const void* weight,
                             const void* inv, void* dx, void* partial, int64_t rows, int64_t h,
                             int64_t parts, DType dtype, Stream stream) {
  for_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    using Acc = typename Accumulate<T>::type;
    with_lanes<T>(bits_of(dy, dtotal, x, weight, dx) | uint64_t(h) * sizeof(T), [&](auto lanes) {
      constexpr int V = decltype(lanes)::value;
      const auto run = [&](auto each, auto add) {
        constexpr int K = decltype(each)::value;
        constexpr bool kAdd = decltype(add)::value;
        const int threads = threads_for((h / V + K - 1) / K);
        const auto blocks = static_cast<unsigned>(parts);
        norm_backward<T, V, K, kAdd><<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(
            static_cast<const T*>(dy), static_cast<const T*>(dtotal), static_cast<const T*>(x),
            static_cast<const T*>(weight), static_cast<const Acc*>(inv), static_cast<T*>(dx),
            static_cast<Acc*>(partial), rows, h);
      };
      const auto with_k = [&](auto add) {
        const int64_t each = (h / V + kMostThreads - 1) / kMostThreads;
        if (each <= 1) {
          run(Number<1>(), add);
        } else if (each <= 2) {
          run(Number<2>(), add);
        } else if (each <= 4) {
          run(Number<4>(), add);
        } else {  // what does not fit into registers is spilled
          run(Number<kMostNormWidth / kMostThreads>(), add);
        }
      };
      if (dtotal != nullptr) {
        with_k(std::true_type());
      } else {
        with_k(std::false_type());
      }
    });
  });
  return cudaGetLastError();
}

int launch_swiglu(const void* x, void* y, int64_t rows, int64_t f, DType dtype, Stream stream) {
  for_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_lanes<T>(bits_of(x, y) | uint64_t(f) * sizeof(T), [&](auto lanes) {
      constexpr int V = decltype(lanes)::value;
      const auto tiles = static_cast<unsigned>((f / V + kThreads - 1) / kThreads);
      glu_forward<T, V>
          <<<static_cast<unsigned>(rows * tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(x), static_cast<T*>(y), f, tiles);
    });
  });
  return cudaGetLastError();
}

int launch_swiglu_backward(const void* dy, const void* x, void* dx, int64_t rows, int64_t f,
                           DType dtype, Stream stream) {
  for_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_lanes<T>(bits_of(dy, x, dx) | uint64_t(f) * sizeof(T), [&](auto lanes) {
      constexpr int V = decltype(lanes)::value;
      const auto tiles = static_cast<unsigned>((f / V + kThreads - 1) / kThreads);
      glu_backward<T, V>
          <<<static_cast<unsigned>(rows * tiles), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<T*>(dx), f, tiles);
    });
  });
  return cudaGetLastError();
}

int launch_rope(const void* x, const void* cos, const void* sin, void* y, int64_t t, int64_t a,
                int64_t d, int64_t row_stride, int64_t head_stride, bool backwards, DType dtype,
                bool float_tables, Stream stream) {
  const int64_t half = d / 2;
  for_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const uint64_t strides =
        (uint64_t(row_stride) | uint64_t(head_stride) | uint64_t(half)) * sizeof(T);
    with_lanes<T>(bits_of(x, cos, sin, y) | strides, [&](auto lanes) {
      constexpr int V = decltype(lanes)::value;
      const auto run = [&](auto* angle) {
        using C = std::remove_pointer_t<decltype(angle)>;
        const int64_t count = t * a * (half / V), blocks = (count + kThreads - 1) / kThreads;
        const auto start = [&](auto index) {
          using Index = decltype(index);
          rotate<T, C, V, Index>
              <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
                  static_cast<const T*>(x), static_cast<const C*>(cos), static_cast<const C*>(sin),
                  static_cast<T*>(y), Index(t), Index(a), Index(half), row_stride, head_stride,
                  backwards ? -1.0f : 1.0f);
        };
        for_index(count, start);
      };
      if (float_tables) {
        run(static_cast<float*>(nullptr));
      } else {
        run(static_cast<T*>(nullptr));
      }
    });
  });
  return cudaGetLastError();
}

}  // namespace rmega
