// Forward and backward of packed attention for one (comparison, group), as blocks of brgemm
// GEMMs. Included by packed_attention.cpp after the vector code; L is one of its instruction
// sets.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>

#include <cmath>
#include <cstring>

#include "packed_attention_plan.h"

namespace rmega {
namespace attention {
namespace {

// How GEMMs are computed: T is what operands are stored in. A bfloat16 right operand holds two
// rows interleaved.
struct Bfloat16 {
  using T = uint16_t;
  using Element = at::BFloat16;
  static constexpr int64_t kPair = 2, kPad = 32;  // rows of a block are padded to kPad
};
struct Single {
  using T = float;
  using Element = float;
  static constexpr int64_t kPair = 1, kPad = 16;
};

// C [m, n] (+)= A [m, k] B [k, n]
template <typename Math>
void multiply(int64_t m, int64_t n, int64_t k, const typename Math::T* a, int64_t lda,
              const typename Math::T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  using E = typename Math::Element;
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const E*>(a),
                              reinterpret_cast<const E*>(b), c, Math::kPair == 2);
}

// Scratch memory that starts on a cache line and grows as needed; its content is finite.
template <typename T>
class Scratch {
 public:
  T* get(int64_t n) {
    if (n > size_) {
      memory_ = at::zeros({n * static_cast<int64_t>(sizeof(T))}, at::kByte);
      size_ = n;
    }
    return reinterpret_cast<T*>(memory_.mutable_data_ptr<uint8_t>());
  }

 private:
  at::Tensor memory_;
  int64_t size_ = 0;
};

// A tensor [n, heads, d] whose last dimension is contiguous.
template <typename IO>
struct Rows {
  explicit Rows(const at::Tensor& x)
      : data(static_cast<IO*>(x.data_ptr())), row(x.stride(0)), head(x.stride(1)) {}
  IO* at(int64_t i, int64_t j) const { return data + i * row + j * head; }
  IO* data;
  int64_t row, head;
};

struct Shape {
  int64_t a, g, r, d, padded;  // padded: d rounded up to what GEMMs like
  float scale, scale2;         // scale2 = scale * log2(e): exponents are of 2
};

// bfloat16 as the elementwise code sees it.
inline uint16_t* raw(at::BFloat16* p) { return reinterpret_cast<uint16_t*>(p); }
inline float* raw(float* p) { return p; }

// Rows are far apart in memory, so the hardware does not see the next one coming.
template <typename IO>
void prefetch_row(const IO* row, const Shape& shape) {
  for (const char *p = reinterpret_cast<const char*>(row), *end = p + shape.d * sizeof(IO); p < end;
       p += 64) {
    __builtin_prefetch(p);
  }
}

template <typename IO, typename T>
void copy_row(const IO* from, const Shape& shape, T* to) {
  if constexpr (sizeof(IO) == sizeof(T)) {
    std::memcpy(to, from, shape.d * sizeof(T));
  } else {
    for (int64_t i = 0; i < shape.d; ++i) to[i] = static_cast<T>(from[i]);
  }
  std::memset(to + shape.d, 0, (shape.padded - shape.d) * sizeof(T));
}

// What forward and backward share: gathering rows, and the two forms of a right operand.
template <typename IO, typename Math, typename L>
struct Worker {
  using T = typename Math::T;
  static constexpr int64_t kPair = Math::kPair, kPad = Math::kPad;
  Shape shape;
  int64_t group = 0;

  // Keys or values of a block: [n up to a multiple of kPad][padded].
  void gather_keys(const Rows<const IO>& x, const Run& run, int64_t block, T* to) const {
    const int64_t first = block * run.width, n = std::min(run.width, run.len - first);
    for (int64_t i = 0; i < n; ++i) {
      prefetch_row(x.at(run.start + first + i + 16, group), shape);
      copy_row(x.at(run.start + first + i, group), shape, to + i * shape.padded);
    }
    std::memset(to + n * shape.padded, 0, (round_up(n, kPad) - n) * shape.padded * sizeof(T));
  }

  // Rows [i, i + n) of a segment's queries (or what belongs to them), up to a multiple of kPad.
  void gather_queries(const Rows<const IO>& x, const Segment& segment, int64_t i, int64_t n,
                      T* to) const {
    for (int64_t j = 0; j < n; ++j) {
      prefetch_row(row(x, segment, i + j + 16), shape);
      copy_row(row(x, segment, i + j), shape, to + j * shape.padded);
    }
    std::memset(to + n * shape.padded, 0, (round_up(n, kPad) - n) * shape.padded * sizeof(T));
  }

  template <typename X>
  X* row(const Rows<X>& x, const Segment& segment, int64_t i) const {
    return x.at(segment.q_start + i / shape.r, group * shape.r + i % shape.r);
  }

  // in [n][padded] transposed, as a right operand [padded][ld].
  void transposed(const T* in, int64_t n, int64_t ld, T* out) const {
    L::transpose(reinterpret_cast<const uint32_t*>(in), shape.padded / kPair, round_up(n, kPad),
                 shape.padded / kPair, reinterpret_cast<uint32_t*>(out), ld);
  }

  // in [n][padded] as a right operand; returns it (in itself where nothing need be done).
  const T* interleaved(const T* in, int64_t n, T* out) const {
    if constexpr (kPair == 1) return in;
    if constexpr (kPair == 2) {
      L::interleave(in, round_up(n, kPad), shape.padded, reinterpret_cast<uint32_t*>(out));
    }
    return out;
  }

  // Where a row's log-sum-exp is kept, in [tq, a].
  int64_t lse_at(const Segment& segment, int64_t i) const {
    return (segment.q_start + i / shape.r) * shape.a + group * shape.r + i % shape.r;
  }

  // visit(run, block, width, seen) for each block of keys that rows [i, i + n) of a segment see:
  // the last row sees its first `width` keys, row i + j the first seen(j) of these (all, or fewer,
  // or none).
  template <typename Visit>
  void for_each_block(const Unit& unit, const Segment& segment, int64_t i, int64_t n,
                      const Visit& visit) const {
    for (const bool own : {false, true}) {
      if (!own && segment.prefix < 0) continue;
      const Run& run = unit.runs[own ? segment.own : segment.prefix];
      const int64_t before = run.len - segment.q_len + 1;
      const auto seen_of_run = [&](int64_t j) {
        return own ? before + (i + j) / shape.r : run.len;
      };
      const int64_t last = seen_of_run(n - 1);
      for (int64_t first = 0; first < last; first += run.width) {
        const int64_t width = std::min(run.width, last - first);
        visit(run, first / run.width, width,
              [&](int64_t j) { return std::clamp<int64_t>(seen_of_run(j) - first, 0, width); });
      }
    }
  }
};

template <typename IO, typename Math, typename L>
struct Forward : Worker<IO, Math, L> {
  using typename Worker<IO, Math, L>::T;
  Rows<const IO> q, k, v;
  Rows<IO> out;
  float* lse;  // [tq, a], base 2
  Scratch<T> keys_memory, values_memory, rows_memory, queries_memory, weights_memory;
  Scratch<float> scores_memory, sums_memory;

  Forward(const Shape& shape, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
          const at::Tensor& out, const at::Tensor& lse)
      : Worker<IO, Math, L>{shape},
        q(q),
        k(k),
        v(v),
        out(out),
        lse(lse.mutable_data_ptr<float>()) {}

  void run(const Unit& unit, int64_t group) {
    this->group = group;
    const int64_t padded = this->shape.padded, block_size = kKeys * padded;
    T* keys = keys_memory.get(unit.num_blocks * block_size);
    T* values = values_memory.get(unit.num_blocks * block_size);
    T* rows = rows_memory.get(block_size);
    for (const Run& run : unit.runs) {
      for (int64_t b = 0; b * run.width < run.len; ++b) {
        const int64_t n = std::min(run.width, run.len - b * run.width),
                      at = (run.first_block + b) * block_size;
        this->gather_keys(k, run, b, rows);
        this->transposed(rows, n, kKeys, keys + at);
        this->gather_keys(v, run, b, Math::kPair == 1 ? values + at : rows);
        if (Math::kPair == 2) this->interleaved(rows, n, values + at);
      }
    }
    for (const Segment& segment : unit.segments) {
      const int64_t n = segment.q_len * this->shape.r, step = even_block(n, kQueries);
      for (int64_t i = 0; i < n; i += step)
        block(unit, segment, i, std::min(step, n - i), keys, values);
    }
  }

  void block(const Unit& unit, const Segment& segment, int64_t i, int64_t n, const T* keys,
             const T* values) {
    const int64_t padded = this->shape.padded, n16 = round_up(n, 16);
    T* queries = queries_memory.get(kQueries * padded);
    T* weights = weights_memory.get(kQueries * kKeys);
    float* scores = scores_memory.get(kQueries * kKeys);
    float* sums = sums_memory.get(kQueries * padded);
    float top[kQueries], total[kQueries];
    std::fill_n(top, n, -1e30f);
    std::fill_n(total, n, 0.0f);
    this->gather_queries(q, segment, i, n, queries);
    bool first = true;
    this->for_each_block(
        unit, segment, i, n, [&](const Run& run, int64_t b, int64_t width, const auto& seen) {
          const int64_t padded_width = round_up(width, Math::kPad),
                        at = (run.first_block + b) * kKeys * padded;
          multiply<Math>(n16, padded_width, padded, queries, padded, keys + at, kKeys, scores,
                         kKeys, false);
          for (int64_t j = 0; j < n; ++j) {
            const float shrink =
                L::softmax_row(scores + j * kKeys, seen(j), padded_width, this->shape.scale2,
                               top + j, total + j, weights + j * kKeys);
            if (!first && shrink != 1.0f) L::scale_row(sums + j * padded, padded, shrink);
          }
          multiply<Math>(n16, padded, padded_width, weights, kKeys, values + at, padded, sums,
                         padded, !first);
          first = false;
        });
    for (int64_t j = 0; j < n; ++j) {
      L::store_row(sums + j * padded, this->shape.d, 1.0f / total[j],
                   raw(this->row(out, segment, i + j)));
      lse[this->lse_at(segment, i + j)] = top[j] + std::log2(total[j]);
    }
  }
};

template <typename IO, typename Math, typename L>
struct Backward : Worker<IO, Math, L> {
  using typename Worker<IO, Math, L>::T;
  Rows<const IO> grad, q, k, v, out;
  const float* lse;
  Rows<IO> grad_q, grad_k, grad_v;
  Scratch<T> keys_memory, values_memory, keys_t_memory, rows_memory, block_memory, weights_memory;
  Scratch<float> grad_keys_memory, grad_values_memory, scores_memory, grad_q_memory;

  Backward(const Shape& shape, const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
           const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
           const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v)
      : Worker<IO, Math, L>{shape},
        grad(grad),
        q(q),
        k(k),
        v(v),
        out(out),
        lse(lse.const_data_ptr<float>()),
        grad_q(grad_q),
        grad_k(grad_k),
        grad_v(grad_v) {}

  void run(const Unit& unit, int64_t group) {
    this->group = group;
    const int64_t padded = this->shape.padded, block_size = kKeys * padded,
                  size = unit.num_blocks * block_size;
    T* keys = keys_memory.get(size);
    T* values = values_memory.get(size);
    T* keys_t = keys_t_memory.get(size);
    T* pairs = rows_memory.get(block_size);
    float* grad_keys = grad_keys_memory.get(size);
    float* grad_values = grad_values_memory.get(size);
    std::memset(grad_keys, 0, size * sizeof(float));
    std::memset(grad_values, 0, size * sizeof(float));
    for (const Run& run : unit.runs) {
      for (int64_t b = 0; b * run.width < run.len; ++b) {
        const int64_t n = std::min(run.width, run.len - b * run.width),
                      at = (run.first_block + b) * block_size;
        this->gather_keys(k, run, b, keys + at);
        this->gather_keys(v, run, b, values + at);
        if constexpr (Math::kPair == 1) this->transposed(keys + at, n, kKeys, keys_t + at);
        if constexpr (Math::kPair == 2) {
          this->transposed(keys + at, n, kKeys, pairs);
          L::separate(reinterpret_cast<const uint32_t*>(pairs), padded, round_up(n, Math::kPad),
                      kKeys, keys_t + at);
        }
      }
    }
    for (const Segment& segment : unit.segments) {
      const int64_t n = segment.q_len * this->shape.r, step = even_block(n, kQueries);
      for (int64_t i = 0; i < n; i += step) {
        block(unit, segment, i, std::min(step, n - i), keys, values, keys_t, grad_keys,
              grad_values);
      }
    }
    for (const Run& run : unit.runs) {
      for (int64_t i = 0; i < run.len; ++i) {
        const int64_t at = (run.first_block + i / run.width) * block_size + i % run.width * padded;
        L::store_row(grad_keys + at, this->shape.d, this->shape.scale,
                     raw(grad_k.at(run.start + i, group)));
        L::store_row(grad_values + at, this->shape.d, 1.0f, raw(grad_v.at(run.start + i, group)));
      }
    }
  }

  // All GEMMs have keys as rows: scores [keys, queries] = K Q^T, and the gradient of queries is
  // summed transposed.
  void block(const Unit& unit, const Segment& segment, int64_t i, int64_t n, const T* keys,
             const T* values, const T* keys_t, float* grad_keys, float* grad_values) {
    const int64_t padded = this->shape.padded, padded_n = round_up(n, Math::kPad),
                  block_size = kQueries * padded;
    T* queries = block_memory.get(6 * block_size);
    T *grads = queries + block_size, *queries_t = grads + block_size,
      *grads_t = queries_t + block_size;
    T *queries_2 = grads_t + block_size, *grads_2 = queries_2 + block_size;
    T* weights = weights_memory.get(3 * kKeys * kQueries);
    T *grad_scores = weights + kKeys * kQueries, *grad_scores_2 = grad_scores + kKeys * kQueries;
    float* scores = scores_memory.get(2 * kKeys * kQueries);
    float* grad_weights = scores + kKeys * kQueries;
    float* grad_queries_t = grad_q_memory.get(2 * block_size);
    float* grad_queries = grad_queries_t + block_size;
    float shift[kQueries] = {}, delta[kQueries] = {};
    int32_t limit[kQueries] = {};

    this->gather_queries(out, segment, i, n, queries);
    this->gather_queries(grad, segment, i, n, grads);
    for (int64_t j = 0; j < n; ++j) {
      delta[j] = L::dot(queries + j * padded, grads + j * padded, padded);
      shift[j] = lse[this->lse_at(segment, i + j)];
    }
    this->gather_queries(q, segment, i, n, queries);
    this->transposed(queries, n, kQueries, queries_t);
    this->transposed(grads, n, kQueries, grads_t);
    const T* queries_right = this->interleaved(queries, n, queries_2);
    const T* grads_right = this->interleaved(grads, n, grads_2);

    bool first = true;
    this->for_each_block(
        unit, segment, i, n, [&](const Run& run, int64_t b, int64_t width, const auto& seen) {
          const int64_t padded_width = round_up(width, Math::kPad),
                        at = (run.first_block + b) * kKeys * padded;
          multiply<Math>(padded_width, padded_n, padded, keys + at, padded, queries_t, kQueries,
                         scores, kQueries, false);
          multiply<Math>(padded_width, padded_n, padded, values + at, padded, grads_t, kQueries,
                         grad_weights, kQueries, false);
          for (int64_t j = 0; j < n; ++j) limit[j] = static_cast<int32_t>(seen(j));
          L::weights_and_gradients(scores, grad_weights, kQueries, padded_width, limit[0], padded_n,
                                   this->shape.scale2, shift, delta, limit, weights, grad_scores,
                                   reinterpret_cast<uint32_t*>(grad_scores_2));
          multiply<Math>(padded_width, padded, padded_n, weights, kQueries, grads_right, padded,
                         grad_values + at, padded, true);
          multiply<Math>(padded_width, padded, padded_n, grad_scores, kQueries, queries_right,
                         padded, grad_keys + at, padded, true);
          multiply<Math>(padded, padded_n, padded_width, keys_t + at, kKeys,
                         Math::kPair == 1 ? grad_scores : grad_scores_2, kQueries, grad_queries_t,
                         kQueries, !first);
          first = false;
        });
    L::transpose(reinterpret_cast<const uint32_t*>(grad_queries_t), kQueries, padded, padded_n,
                 reinterpret_cast<uint32_t*>(grad_queries), padded);
    for (int64_t j = 0; j < n; ++j) {
      L::store_row(grad_queries + j * padded, this->shape.d, this->shape.scale,
                   raw(this->row(grad_q, segment, i + j)));
    }
  }
};

}  // namespace
}  // namespace attention
}  // namespace rmega
