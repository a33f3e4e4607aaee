// qkv_rope on a GPU: split of the fused projection, rotation and gather of the keys, gather of the
// values in one launch; their gradients back into the fused projection in another. Everything is
// read and written once, computed in fp32 (fp64 for fp64) and rounded once.
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

// Thread i of the grid takes V channels of both halves of one head: first of all queries, then of
// the keys of all output rows, then of the values.
template <typename T, typename C, int V, typename Index>
__global__ void qkv_forward(const T* __restrict__ x, const C* __restrict__ cos,
                            const C* __restrict__ sin, const int32_t* __restrict__ rows,
                            T* __restrict__ query, T* __restrict__ key, T* __restrict__ value,
                            Index t, Index total, Index a, Index g, Index half,
                            int64_t row_stride) {
  const Index lanes = half / V, queries = t * a * lanes, keys = total * g * lanes;
  Index i = Index(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= queries + 2 * keys) {
    return;
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
  if (part == kValue) {
    write(to, in1);
    write(to + half, in2);
    return;
  }
  const Lane<C, V> c = read<V>(cos + row * half + j), s = read<V>(sin + row * half + j);
  Lane<T, V> out1, out2;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const auto x1 = load(in1.at[k]), x2 = load(in2.at[k]);
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

}  // namespace

int launch_qkv_rope(const void* x, const void* cos, const void* sin, const int32_t* rows,
                    void* query, void* key, void* value, const QkvShape& shape, int64_t row_stride,
                    DType dtype, bool float_tables, Stream stream) {
  const int64_t half = shape.d / 2;
  const uint64_t bits =
      bits_of(x, cos, sin, query, key, value) | uint64_t(row_stride) * (dtype == DType::f64   ? 8
                                                                        : dtype == DType::f32 ? 4
                                                                                              : 2);
  with_types(dtype, float_tables, bits, half, [&](auto lanes, auto* element, auto* angle) {
    using T = std::remove_pointer_t<decltype(element)>;
    using C = std::remove_pointer_t<decltype(angle)>;
    constexpr int V = decltype(lanes)::value;
    const int64_t count = (shape.t * shape.a + 2 * shape.total * shape.g) * (half / V);
    for_index(count, [&](auto index) {
      using Index = decltype(index);
      const unsigned blocks = blocks_for(count);
      qkv_forward<T, C, V, Index><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
          static_cast<const T*>(x), static_cast<const C*>(cos), static_cast<const C*>(sin), rows,
          static_cast<T*>(query), static_cast<T*>(key), static_cast<T*>(value), Index(shape.t),
          Index(shape.total), Index(shape.a), Index(shape.g), Index(half), row_stride);
    });
  });
  return cudaGetLastError();
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
