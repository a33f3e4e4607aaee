// qkv_rope on a GPU: split of the fused projection, rotation and gather of the keys, gather of the
// values in one launch; their gradients back into the fused projection in another. Everything is
// read and written once, computed in fp32 (fp64 for fp64) and rounded once. With norms, queries and
// keys are also divided by their root mean square over the channels of a head before they are
// rotated.
#include "device.cuh"

namespace rmega {
namespace {

constexpr int kThreads = 256;

enum Part { kQuery = 0, kKey = 1, kValue = 2 };

// First column of a head in a row of the fused projection: [g, r + 2, d] with r query heads, the
// key and the value of each group, or [2, g, d] without queries.
template <typename Index>
__device__ __forceinline__ Index column_of(int part, Index head, Index a, Index g, Index d) {
  if (part == kQuery) {
    return (head + head / (a / g) * 2) * d;
  }
  if (a == 0) {
    return ((part - kKey) * g + head) * d;
  }
  const Index r = a / g;
  return (head * (r + 2) + r + (part - kKey)) * d;
}

// The sum over the threads that share a head: `lanes` neighbors, a power of two up to a warp. Every
// thread of the warp calls it.
template <typename Acc>
__device__ __forceinline__ Acc head_sum(Acc x, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, mask);
  }
  return x;
}
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// Thread i of the grid takes V channels of both halves of one head: first of all queries, then of
// the keys of all output rows, then of the values. kNorm: with the weights [d] of the norms.
template <typename T, typename C, int V, typename Index, bool kNorm>
__global__ void qkv_forward(const T* __restrict__ x, const T* __restrict__ q_weight,
                            const T* __restrict__ k_weight, const C* __restrict__ cos,
                            const C* __restrict__ sin, const int32_t* __restrict__ rows,
                            T* __restrict__ query, T* __restrict__ key, T* __restrict__ value,
                            Index t, Index total, Index a, Index g, Index half, int64_t row_stride,
                            double eps) {
  using Acc = typename Accumulate<T>::type;
  const Index lanes = half / V, queries = t * a * lanes, keys = total * g * lanes;
  Index i = Index(blockIdx.x) * kThreads + threadIdx.x;
  const bool active = i < queries + 2 * keys;
  if (!active) {
    if constexpr (!kNorm) {
      return;
    }
    i = queries + 2 * keys - 1;  // takes part in the sums of its warp, and writes nothing
  }
  int part = kQuery;
  if (i >= queries) {
    i -= queries;
    part = i < keys ? kKey : kValue;
    i -= i < keys ? 0 : keys;
  }
  const Index heads = part == kQuery ? a : g, head = i / lanes % heads, at = i / lanes / heads;
  const int64_t j = i % lanes * V, row = part == kQuery ? int64_t(at) : int64_t(rows[at]);
  require_row(row, t, "qkv_rope");
  const T* from = x + row * row_stride + column_of<Index>(part, head, a, g, 2 * half) + j;
  T* to = part == kQuery ? query : part == kKey ? key : value;
  to += (int64_t(at) * heads + head) * 2 * half + j;
  const Lane<T, V> in1 = read<V>(from), in2 = read<V>(from + half);
  Acc scale = 1;
  if constexpr (kNorm) {
    Acc sum = 0;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sum += load(in1.at[k]) * load(in1.at[k]) + load(in2.at[k]) * load(in2.at[k]);
    }
    scale = Acc(1) / root(head_sum(sum, int(lanes)) / Acc(2 * half) + Acc(eps));
    if (!active) {
      return;
    }
  }
  if (part == kValue) {
    write(to, in1);
    write(to + half, in2);
    return;
  }
  const Lane<C, V> c = read<V>(cos + row * half + j), s = read<V>(sin + row * half + j);
  Lane<T, V> out1, out2, w1, w2;
  if constexpr (kNorm) {
    const T* weight = (part == kQuery ? q_weight : k_weight) + j;
    w1 = read<V>(weight), w2 = read<V>(weight + half);
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    Acc x1 = load(in1.at[k]), x2 = load(in2.at[k]);
    if constexpr (kNorm) {
      x1 *= scale * load(w1.at[k]);
      x2 *= scale * load(w2.at[k]);
    }
    const auto cosine = load(c.at[k]), sine = load(s.at[k]);
    store(&out1.at[k], x1 * cosine - x2 * sine);
    store(&out2.at[k], x2 * cosine + x1 * sine);
  }
  write(to, out1);
  write(to + half, out2);
}

// Thread i of the grid takes V channels of both halves of one head of one row of the projection: a
// query's gradient, or the sum over the output rows that hold the key or value, in the order of
// segments; turned back.
template <typename T, typename C, int V, typename Index>
__global__ void qkv_backward(const T* __restrict__ dquery, const T* __restrict__ dkey,
                             const T* __restrict__ dvalue, const C* __restrict__ cos,
                             const C* __restrict__ sin, const int32_t* __restrict__ offsets,
                             const int32_t* __restrict__ sources, T* __restrict__ dx, Index t,
                             int64_t total, Index a, Index g, Index half) {
  using Acc = typename Accumulate<T>::type;
  const Index lanes = half / V, slots = a + 2 * g, d = 2 * half;
  const Index i = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= t * slots * lanes) {
    return;
  }
  const Index slot = i / lanes % slots;
  const int64_t j = i % lanes * V, row = i / lanes / slots;
  const int part = slot < a ? kQuery : slot < a + g ? kKey : kValue;
  const Index head = part == kQuery ? slot : part == kKey ? slot - a : slot - a - g;
  Acc sum1[V] = {}, sum2[V] = {};
  const auto add = [&](const T* from) {
    const Lane<T, V> in1 = read<V>(from), in2 = read<V>(from + half);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sum1[k] += load(in1.at[k]);
      sum2[k] += load(in2.at[k]);
    }
  };
  if (part == kQuery) {
    add(dquery + (row * a + head) * d + j);
  } else {
    const T* grad = (part == kKey ? dkey : dvalue) + int64_t(head) * d + j;
    for (int32_t e = offsets[row]; e < offsets[row + 1]; ++e) {
      const int64_t source = sources[e];
      require_row(source, total, "qkv_rope backward");
      add(grad + source * g * d);
    }
  }
  T* to = dx + row * slots * d + column_of<Index>(part, head, a, g, d) + j;
  Lane<T, V> out1, out2;
  if (part == kValue) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      store(&out1.at[k], sum1[k]);
      store(&out2.at[k], sum2[k]);
    }
  } else {
    const Lane<C, V> c = read<V>(cos + row * half + j), s = read<V>(sin + row * half + j);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const auto cosine = load(c.at[k]), sine = load(s.at[k]);
      store(&out1.at[k], sum1[k] * cosine + sum2[k] * sine);
      store(&out2.at[k], sum2[k] * cosine - sum1[k] * sine);
    }
  }
  write(to, out1);
  write(to + half, out2);
}

// As qkv_backward, through the norms of queries and keys as well: x is what they were made of.
// Blocks take rows of the projection in turn; a thread always has the same channels, whose
// gradients of the weights it sums in registers: partial [gridDim.x, 2, d].
template <typename T, typename C, int V>
__global__ void __launch_bounds__(kThreads)
    qkv_norm_backward(const T* __restrict__ dquery, const T* __restrict__ dkey,
                      const T* __restrict__ dvalue, const T* __restrict__ x,
                      const T* __restrict__ q_weight, const T* __restrict__ k_weight,
                      const C* __restrict__ cos, const C* __restrict__ sin,
                      const int32_t* __restrict__ offsets, const int32_t* __restrict__ sources,
                      T* __restrict__ dx, typename Accumulate<T>::type* __restrict__ partial,
                      int64_t t, int64_t total, int a, int g, int half, int64_t row_stride,
                      double eps) {
  using Acc = typename Accumulate<T>::type;
  __shared__ Acc room[kThreads * 2 * V];  // [threads of a channel, d]
  const int lanes = half / V, slots = a + 2 * g, d = 2 * half;
  const int j = int(threadIdx.x) % lanes * V;
  Acc dweight[2][2][V] = {};  // of query and key, of both halves
  for (int64_t row = blockIdx.x; row < t; row += gridDim.x) {
    for (int first = 0; first < slots * lanes; first += kThreads) {
      const int e = first + int(threadIdx.x);
      const bool active = e < slots * lanes;
      const int slot = active ? e / lanes : slots - 1;
      const int part = slot < a ? kQuery : slot < a + g ? kKey : kValue;
      const int head = part == kQuery ? slot : part == kKey ? slot - a : slot - a - g;
      const int64_t column = column_of<int>(part, head, a, g, d) + j;
      Acc grad1[V] = {}, grad2[V] = {};
      const auto add = [&](const T* from) {
        const Lane<T, V> in1 = read<V>(from), in2 = read<V>(from + half);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          grad1[k] += load(in1.at[k]);
          grad2[k] += load(in2.at[k]);
        }
      };
      if (part == kQuery) {
        add(dquery + (row * a + head) * d + j);
      } else {
        const T* grad = (part == kKey ? dkey : dvalue) + int64_t(head) * d + j;
        for (int32_t s = offsets[row]; s < offsets[row + 1]; ++s) {
          const int64_t source = sources[s];
          require_row(source, total, "qkv_norm_rope backward");
          add(grad + source * g * d);
        }
      }
      Acc squares = 0, dot = 0;
      Lane<T, V> x1, x2, w1, w2;
      if (part != kValue) {
        const T* weight = (part == kQuery ? q_weight : k_weight) + j;
        x1 = read<V>(x + row * row_stride + column), w1 = read<V>(weight);
        x2 = read<V>(x + row * row_stride + column + half), w2 = read<V>(weight + half);
        const Lane<C, V> c = read<V>(cos + row * half + j), s = read<V>(sin + row * half + j);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const Acc cosine = load(c.at[k]), sine = load(s.at[k]);
          const Acc turned = grad1[k] * cosine + grad2[k] * sine;
          grad2[k] = grad2[k] * cosine - grad1[k] * sine;
          grad1[k] = turned;
          const Acc v1 = load(x1.at[k]), v2 = load(x2.at[k]);
          squares += v1 * v1 + v2 * v2;
          dot += load(w1.at[k]) * grad1[k] * v1 + load(w2.at[k]) * grad2[k] * v2;
        }
      }
      squares = head_sum(squares, lanes);
      dot = head_sum(dot, lanes);
      if (!active) {
        continue;
      }
      Lane<T, V> out1, out2;
      const Acc scale = Acc(1) / root(squares / Acc(d) + Acc(eps));
      const Acc shrink = dot / Acc(d) * scale * scale * scale;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        Acc own1 = grad1[k], own2 = grad2[k];
        if (part != kValue) {
          const Acc v1 = load(x1.at[k]), v2 = load(x2.at[k]);
          own1 = load(w1.at[k]) * grad1[k] * scale - v1 * shrink;
          own2 = load(w2.at[k]) * grad2[k] * scale - v2 * shrink;
          // Both sums by selection: an array indexed by `part` would live in memory.
          const Acc of1 = grad1[k] * v1 * scale, of2 = grad2[k] * v2 * scale;
          dweight[0][0][k] += part == kQuery ? of1 : Acc(0);
          dweight[0][1][k] += part == kQuery ? of2 : Acc(0);
          dweight[1][0][k] += part == kQuery ? Acc(0) : of1;
          dweight[1][1][k] += part == kQuery ? Acc(0) : of2;
        }
        store(&out1.at[k], own1);
        store(&out2.at[k], own2);
      }
      T* to = dx + row * slots * d + column;
      write(to, out1);
      write(to + half, out2);
    }
  }
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    Acc* own = room + int(threadIdx.x) / lanes * d + j;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      own[k] = dweight[kind][0][k];
      own[half + k] = dweight[kind][1][k];
    }
    __syncthreads();
    for (int channel = threadIdx.x; channel < d; channel += kThreads) {
      Acc sum = 0;
      for (int i = 0; i < kThreads / lanes; ++i) {
        sum += room[i * d + channel];
      }
      partial[(int64_t(blockIdx.x) * 2 + kind) * d + channel] = sum;
    }
    __syncthreads();
  }
}

unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>((count + kThreads - 1) / kThreads);
}

// f(Number<V>(), T*(nullptr), C*(nullptr)) for the dtypes of elements and tables.
template <typename F>
void with_types(DType dtype, bool float_tables, uint64_t bits, int64_t half, F f) {
  for_dtype(dtype, [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    with_lanes<T>(bits | uint64_t(half) * sizeof(T), [&](auto lanes) {
      if (float_tables) {
        f(lanes, element, static_cast<float*>(nullptr));
      } else {
        f(lanes, element, element);
      }
    });
  });
}

// Whether head_sum can add up the lanes of a head.
bool is_part_of_warp(int64_t lanes) { return lanes <= 32 && (lanes & (lanes - 1)) == 0; }
constexpr int kInvalid = 1;  // cudaErrorInvalidValue

uint64_t row_bits(int64_t row_stride, DType dtype) {
  return uint64_t(row_stride) * (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2);
}

template <bool kNorm>
int run_forward(const void* x, const HeadNorms& norms, const void* cos, const void* sin,
                const int32_t* rows, void* query, void* key, void* value, const QkvShape& shape,
                int64_t row_stride, DType dtype, bool float_tables, Stream stream) {
  const int64_t half = shape.d / 2;
  const uint64_t bits = bits_of(x, norms.q_weight, norms.k_weight, cos, sin, query, key, value) |
                        row_bits(row_stride, dtype);
  bool valid = true;
  with_types(dtype, float_tables, bits, half, [&](auto lanes, auto* element, auto* angle) {
    using T = std::remove_pointer_t<decltype(element)>;
    using C = std::remove_pointer_t<decltype(angle)>;
    constexpr int V = decltype(lanes)::value;
    valid = !kNorm || is_part_of_warp(half / V);
    if (!valid) {
      return;
    }
    const int64_t count = (shape.t * shape.a + 2 * shape.total * shape.g) * (half / V);
    for_index(count, [&](auto index) {
      using Index = decltype(index);
      const unsigned blocks = blocks_for(count);
      qkv_forward<T, C, V, Index, kNorm>
          <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
              static_cast<const T*>(x), static_cast<const T*>(norms.q_weight),
              static_cast<const T*>(norms.k_weight), static_cast<const C*>(cos),
              static_cast<const C*>(sin), rows, static_cast<T*>(query), static_cast<T*>(key),
              static_cast<T*>(value), Index(shape.t), Index(shape.total), Index(shape.a),
              Index(shape.g), Index(half), row_stride, norms.eps);
    });
  });
  return valid ? int(cudaGetLastError()) : kInvalid;
}

}  // namespace

int launch_qkv_rope(const void* x, const void* cos, const void* sin, const int32_t* rows,
                    void* query, void* key, void* value, const QkvShape& shape, int64_t row_stride,
                    DType dtype, bool float_tables, Stream stream) {
  return run_forward<false>(x, {}, cos, sin, rows, query, key, value, shape, row_stride, dtype,
                            float_tables, stream);
}

int launch_qkv_norm_rope(const void* x, const HeadNorms& norms, const void* cos, const void* sin,
                         const int32_t* rows, void* query, void* key, void* value,
                         const QkvShape& shape, int64_t row_stride, DType dtype, bool float_tables,
                         Stream stream) {
  return run_forward<true>(x, norms, cos, sin, rows, query, key, value, shape, row_stride, dtype,
                           float_tables, stream);
}

int launch_qkv_norm_rope_backward(const void* dquery, const void* dkey, const void* dvalue,
                                  const void* x, const HeadNorms& norms, const void* cos,
                                  const void* sin, const int32_t* offsets, const int32_t* sources,
                                  void* dx, void* partial, const QkvShape& shape,
                                  int64_t row_stride, int64_t parts, DType dtype,
                                  bool float_tables, Stream stream) {
  const int64_t half = shape.d / 2;
  const uint64_t bits =
      bits_of(dquery, dkey, dvalue, x, norms.q_weight, norms.k_weight, cos, sin, dx) |
      row_bits(row_stride, dtype);
  bool valid = true;
  with_types(dtype, float_tables, bits, half, [&](auto lanes, auto* element, auto* angle) {
    using T = std::remove_pointer_t<decltype(element)>;
    using C = std::remove_pointer_t<decltype(angle)>;
    constexpr int V = decltype(lanes)::value;
    valid = is_part_of_warp(half / V);
    if (!valid) {
      return;
    }
    const auto blocks = static_cast<unsigned>(parts);
    qkv_norm_backward<T, C, V><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(dquery), static_cast<const T*>(dkey), static_cast<const T*>(dvalue),
        static_cast<const T*>(x), static_cast<const T*>(norms.q_weight),
        static_cast<const T*>(norms.k_weight), static_cast<const C*>(cos),
        static_cast<const C*>(sin), offsets, sources, static_cast<T*>(dx),
        static_cast<typename Accumulate<T>::type*>(partial), shape.t, shape.total, int(shape.a),
        int(shape.g), int(half), row_stride, norms.eps);
  });
  return valid ? int(cudaGetLastError()) : kInvalid;
}

int launch_qkv_rope_backward(const void* dquery, const void* dkey, const void* dvalue,
                             const void* cos, const void* sin, const int32_t* offsets,
                             const int32_t* sources, void* dx, const QkvShape& shape, DType dtype,
                             bool float_tables, Stream stream) {
  const int64_t half = shape.d / 2;
  const uint64_t bits = bits_of(dquery, dkey, dvalue, cos, sin, dx);
  with_types(dtype, float_tables, bits, half, [&](auto lanes, auto* element, auto* angle) {
    using T = std::remove_pointer_t<decltype(element)>;
    using C = std::remove_pointer_t<decltype(angle)>;
    constexpr int V = decltype(lanes)::value;
    const int64_t count = shape.t * (shape.a + 2 * shape.g) * (half / V);
    for_index(count, [&](auto index) {
      using Index = decltype(index);
      const unsigned blocks = blocks_for(count);
      qkv_backward<T, C, V, Index><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(dquery), static_cast<const T*>(dkey), static_cast<const T*>(dvalue),
          static_cast<const C*>(cos), static_cast<const C*>(sin), offsets, sources,
          static_cast<T*>(dx), Index(shape.t), shape.total, Index(shape.a), Index(shape.g),
          Index(half));
    });
  });
  return cudaGetLastError();
}

}  // namespace rmega
