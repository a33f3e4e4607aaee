// Packed attention on the CPU: queries of a segment see a shared prefix in full and their own keys causally.
//
// Letters: t tokens, tq query rows, s segments, a query heads, g key/value groups, r = a / g, d head size.
// Work is cut into (comparison, group) pairs; each packs its keys and values once, for the prefix and all responses,
// and owns the gradients of its rows, so that sums have a fixed order and nothing is shared between threads. The r
// query heads of a group are rows of one matrix (row i = token i / r, head i % r). Matrix products are ATen's brgemm
// (AMX, AVX-512 or AVX2 through oneDNN); softmax and its derivative are in packed_attention_lanes.h. Memory beside the
// results is linear in the tokens of one comparison.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than the base instruction set stay inside inlined code

namespace rmega {
namespace {
#if defined(__x86_64__)
#define LANES Avx512
#define LANES_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#include "packed_attention_lanes.h"
#undef LANES
#undef LANES_TARGET
#define LANES Avx2
#define LANES_TARGET __attribute__((target("avx2,fma")))
#include "packed_attention_lanes.h"
#undef LANES
#undef LANES_TARGET
#endif
#define LANES Portable
#define LANES_TARGET
#include "packed_attention_lanes.h"
#undef LANES
#undef LANES_TARGET
}  // namespace
}  // namespace rmega

namespace rmega {
namespace {

constexpr int64_t kQueries = 64;  // rows of a query block
constexpr int64_t kKeys = 128;    // rows of a key block

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A run of key rows: a prefix or a segment's own keys. Its blocks are numbered on within the unit.
struct Run {
  int64_t start, len, first_block;
};

struct Segment {
  int64_t q_start, q_len, own, prefix;  // indices into the unit's runs; prefix -1: none
};

// A comparison: segments that share keys, and no key with any other unit.
struct Unit {
  std::vector<Run> runs;
  std::vector<Segment> segments;
  int64_t num_blocks = 0;
  double cost = 0;
};

std::vector<Unit> make_units(const at::Tensor& segments, int64_t tq, int64_t t) {
  TORCH_CHECK(segments.dim() == 2 && segments.size(0) == 6 && segments.scalar_type() == at::kInt &&
                  segments.is_contiguous(),
              "packed_attention: segments must be int32 [6, s], got ", segments.scalar_type(), " ", segments.sizes());
  const int64_t s = segments.size(1);
  const auto at = [&, data = segments.const_data_ptr<int32_t>()](int64_t row, int64_t i) -> int64_t {
    return data[row * s + i];
  };
  std::map<int64_t, size_t> unit_of;  // first key row of a run that others may share -> unit
  std::vector<Unit> units;
  std::vector<std::pair<int64_t, int64_t>> key_runs, query_runs;
  const auto run_of = [&](Unit& unit, int64_t start, int64_t len) -> int64_t {
    for (size_t i = 0; i < unit.runs.size(); ++i) {
      if (unit.runs[i].start == start && unit.runs[i].len == len) return i;
    }
    unit.runs.push_back({start, len, unit.num_blocks});
    unit.num_blocks += (len + kKeys - 1) / kKeys;
    key_runs.emplace_back(start, start + len);
    return unit.runs.size() - 1;
  };
  for (int64_t i = 0; i < s; ++i) {
    const int64_t q_start = at(0, i), q_len = at(1, i), k_start = at(2, i), k_len = at(3, i);
    const int64_t prefix_start = at(4, i), prefix_len = at(5, i);
    TORCH_CHECK(q_start >= 0 && q_len > 0 && q_start + q_len <= tq && k_start >= 0 && k_len >= q_len &&
                    k_start + k_len <= t && prefix_start >= 0 && prefix_len >= 0 && prefix_start + prefix_len <= t,
                "packed_attention: segment ", i, " has queries ", q_start, "+", q_len, " of ", tq, ", keys ", k_start,
                "+", k_len, ", prefix ", prefix_start, "+", prefix_len, " of ", t);
    const auto [place, fresh] = unit_of.try_emplace(prefix_len > 0 ? prefix_start : k_start, units.size());
    if (fresh) units.emplace_back();
    Unit& unit = units[place->second];
    const int64_t prefix = prefix_len > 0 ? run_of(unit, prefix_start, prefix_len) : -1;
    unit.segments.push_back({q_start, q_len, run_of(unit, k_start, k_len), prefix});
    unit.cost += static_cast<double>(q_len + 16) * (prefix_len + k_len - q_len / 2.0) + k_len;
    query_runs.emplace_back(q_start, q_start + q_len);
  }
  for (auto* runs : {&key_runs, &query_runs}) {  // each row has one owner, or threads would write over one another
    std::sort(runs->begin(), runs->end());
    for (size_t i = 1; i < runs->size(); ++i) {
      TORCH_CHECK((*runs)[i].first >= (*runs)[i - 1].second, "packed_attention: segments overlap at ",
                  runs == &key_runs ? "key" : "query", " row ", (*runs)[i].first);
    }
  }
  std::sort(units.begin(), units.end(), [](const Unit& x, const Unit& y) { return x.cost > y.cost; });
  return units;
}

// run(unit, group) for all pairs, the longest first, on all threads.
template <typename Make>
void for_each_task(const std::vector<Unit>& units, int64_t groups, const Make& make_worker) {
  const int64_t tasks = static_cast<int64_t>(units.size()) * groups;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(tasks, at::get_num_threads()));
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      auto worker = make_worker();
      for (int64_t task = next++; task < tasks; task = next++) worker.run(units[task / groups], task % groups);
    }
    at::native::cpublas::brgemm_release();
  });
}

// How products are computed: T is what operands are stored in. A bfloat16 right operand holds two rows interleaved.
struct Half {
  using T = uint16_t;
  using Element = at::BFloat16;
  static constexpr int64_t kPair = 2;
};
struct Single {
  using T = float;
  using Element = float;
  static constexpr int64_t kPair = 1;
};

// C [m, n] (+)= A [m, k] B [k, n]
template <typename Math>
void multiply(int64_t m, int64_t n, int64_t k, const typename Math::T* a, int64_t lda, const typename Math::T* b,
              int64_t ldb, float* c, int64_t ldc, bool add) {
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
  int64_t a, g, r, d, padded;  // padded: d rounded up to what products like
  float scale, scale2;         // scale2 = scale * log2(e): exponents are of 2
};

// bfloat16 as the elementwise code sees it.
inline uint16_t* raw(at::BFloat16* p) { return reinterpret_cast<uint16_t*>(p); }
inline float* raw(float* p) { return p; }

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
  static constexpr int64_t kPair = Math::kPair;
  Shape shape;
  int64_t group = 0;

  // Keys or values of a block: [n up to a multiple of 32][padded].
  void gather_keys(const Rows<const IO>& x, const Run& run, int64_t block, T* to) const {
    const int64_t first = block * kKeys, n = std::min(kKeys, run.len - first);
    for (int64_t i = 0; i < n; ++i) copy_row(x.at(run.start + first + i, group), shape, to + i * shape.padded);
    std::memset(to + n * shape.padded, 0, (round_up(n, 32) - n) * shape.padded * sizeof(T));
  }

  // Rows [i, i + n) of a segment's queries (or what belongs to them), up to a multiple of 32.
  void gather_queries(const Rows<const IO>& x, const Segment& segment, int64_t i, int64_t n, T* to) const {
    for (int64_t j = 0; j < n; ++j) copy_row(row(x, segment, i + j), shape, to + j * shape.padded);
    std::memset(to + n * shape.padded, 0, (round_up(n, 32) - n) * shape.padded * sizeof(T));
  }

  template <typename X>
  X* row(const Rows<X>& x, const Segment& segment, int64_t i) const {
    return x.at(segment.q_start + i / shape.r, group * shape.r + i % shape.r);
  }

  // in [n][padded] transposed, as a right operand [padded][ld].
  void transposed(const T* in, int64_t n, int64_t ld, T* out) const {
    L::transpose(reinterpret_cast<const uint32_t*>(in), shape.padded / kPair, round_up(n, 32), shape.padded / kPair,
                 reinterpret_cast<uint32_t*>(out), ld);
  }

  // in [n][padded] as a right operand; returns it (in itself where nothing need be done).
  const T* interleaved(const T* in, int64_t n, T* out) const {
    if constexpr (kPair == 1) return in;
    if constexpr (kPair == 2) {
      L::interleave(in, round_up(n, 32), shape.padded, reinterpret_cast<uint32_t*>(out));
    }
    return out;
  }

  // visit(run, block, width, seen) for each block of keys that rows [i, i + n) of a segment see: its first `width` keys
  // are seen by one of them, and row i + j sees the first seen(j) of it (maybe none, maybe more than there are).
  template <typename Visit>
  void for_each_block(const Unit& unit, const Segment& segment, int64_t i, int64_t n, const Visit& visit) const {
    for (const bool own : {false, true}) {
      if (!own && segment.prefix < 0) continue;
      const Run& run = unit.runs[own ? segment.own : segment.prefix];
      const int64_t before = run.len - segment.q_len + 1;
      const auto seen_in_all = [&](int64_t j) { return own ? before + (i + j) / shape.r : run.len; };
      const int64_t last = seen_in_all(n - 1);
      for (int64_t first = 0; first < last; first += kKeys) {
        visit(run, first / kKeys, std::min(kKeys, last - first), [&](int64_t j) { return seen_in_all(j) - first; });
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

  Forward(const Shape& shape, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
          const at::Tensor& lse)
      : Worker<IO, Math, L>{shape}, q(q), k(k), v(v), out(out), lse(lse.mutable_data_ptr<float>()) {}

  void run(const Unit& unit, int64_t group) {
    this->group = group;
    const int64_t padded = this->shape.padded, block_size = kKeys * padded;
    T* keys = keys_memory.get(unit.num_blocks * block_size);
    T* values = values_memory.get(unit.num_blocks * block_size);
    T* rows = rows_memory.get(block_size);
    for (const Run& run : unit.runs) {
      for (int64_t b = 0; b * kKeys < run.len; ++b) {
        const int64_t n = std::min(kKeys, run.len - b * kKeys), at = (run.first_block + b) * block_size;
        this->gather_keys(k, run, b, rows);
        this->transposed(rows, n, kKeys, keys + at);
        this->gather_keys(v, run, b, Math::kPair == 1 ? values + at : rows);
        if (Math::kPair == 2) this->interleaved(rows, n, values + at);
      }
    }
    for (const Segment& segment : unit.segments) {
      const int64_t n = segment.q_len * this->shape.r;
      for (int64_t i = 0; i < n; i += kQueries) block(unit, segment, i, std::min(kQueries, n - i), keys, values);
    }
  }

  void block(const Unit& unit, const Segment& segment, int64_t i, int64_t n, const T* keys, const T* values) {
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
    this->for_each_block(unit, segment, i, n, [&](const Run& run, int64_t b, int64_t width, const auto& seen) {
      const int64_t width32 = round_up(width, 32), at = (run.first_block + b) * kKeys * padded;
      multiply<Math>(n16, width32, padded, queries, padded, keys + at, kKeys, scores, kKeys, false);
      for (int64_t j = 0; j < n; ++j) {
        const float shrink = L::softmax_row(scores + j * kKeys, std::clamp<int64_t>(seen(j), 0, width), width32, this->shape.scale2,
                                            top + j, total + j, weights + j * kKeys);
        if (!first && shrink != 1.0f) L::scale_row(sums + j * padded, padded, shrink);
      }
      multiply<Math>(n16, padded, width32, weights, kKeys, values + at, padded, sums, padded, !first);
      first = false;
    });
    for (int64_t j = 0; j < n; ++j) {
      L::store_row(sums + j * padded, this->shape.d, 1.0f / total[j], raw(this->row(out, segment, i + j)));
      lse[(segment.q_start + (i + j) / this->shape.r) * this->shape.a + this->group * this->shape.r +
          (i + j) % this->shape.r] = top[j] + std::log2(total[j]);
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

  Backward(const Shape& shape, const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
           const at::Tensor& out, const at::Tensor& lse, const at::Tensor& grad_q, const at::Tensor& grad_k,
           const at::Tensor& grad_v)
      : Worker<IO, Math, L>{shape}, grad(grad), q(q), k(k), v(v), out(out), lse(lse.const_data_ptr<float>()),
        grad_q(grad_q), grad_k(grad_k), grad_v(grad_v) {}

  void run(const Unit& unit, int64_t group) {
    this->group = group;
    const int64_t padded = this->shape.padded, block_size = kKeys * padded, size = unit.num_blocks * block_size;
    T* keys = keys_memory.get(size);
    T* values = values_memory.get(size);
    T* keys_t = keys_t_memory.get(size);
    T* pairs = rows_memory.get(block_size);
    float* grad_keys = grad_keys_memory.get(size);
    float* grad_values = grad_values_memory.get(size);
    std::memset(grad_keys, 0, size * sizeof(float));
    std::memset(grad_values, 0, size * sizeof(float));
    for (const Run& run : unit.runs) {
      for (int64_t b = 0; b * kKeys < run.len; ++b) {
        const int64_t n = std::min(kKeys, run.len - b * kKeys), at = (run.first_block + b) * block_size;
        this->gather_keys(k, run, b, keys + at);
        this->gather_keys(v, run, b, values + at);
        if constexpr (Math::kPair == 1) this->transposed(keys + at, n, kKeys, keys_t + at);
        if constexpr (Math::kPair == 2) {
          this->transposed(keys + at, n, kKeys, pairs);
          L::separate(reinterpret_cast<const uint32_t*>(pairs), padded, round_up(n, 32), kKeys, keys_t + at);
        }
      }
    }
    for (const Segment& segment : unit.segments) {
      const int64_t n = segment.q_len * this->shape.r;
      for (int64_t i = 0; i < n; i += kQueries) {
        block(unit, segment, i, std::min(kQueries, n - i), keys, values, keys_t, grad_keys, grad_values);
      }
    }
    for (const Run& run : unit.runs) {
      for (int64_t i = 0; i < run.len; ++i) {
        const int64_t at = run.first_block * block_size + i * padded;
        L::store_row(grad_keys + at, this->shape.d, this->shape.scale, raw(grad_k.at(run.start + i, group)));
        L::store_row(grad_values + at, this->shape.d, 1.0f, raw(grad_v.at(run.start + i, group)));
      }
    }
  }

  // All products have keys as rows: scores [keys, queries] = K Q^T, and the gradient of queries is summed transposed.
  void block(const Unit& unit, const Segment& segment, int64_t i, int64_t n, const T* keys, const T* values,
             const T* keys_t, float* grad_keys, float* grad_values) {
    const int64_t padded = this->shape.padded, n32 = round_up(n, 32), block_size = kQueries * padded;
    T* queries = block_memory.get(6 * block_size);
    T *grads = queries + block_size, *queries_t = grads + block_size, *grads_t = queries_t + block_size;
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
      shift[j] = lse[(segment.q_start + (i + j) / this->shape.r) * this->shape.a + this->group * this->shape.r +
                     (i + j) % this->shape.r];
    }
    this->gather_queries(q, segment, i, n, queries);
    this->transposed(queries, n, kQueries, queries_t);
    this->transposed(grads, n, kQueries, grads_t);
    const T* queries_right = this->interleaved(queries, n, queries_2);
    const T* grads_right = this->interleaved(grads, n, grads_2);

    bool first = true;
    this->for_each_block(unit, segment, i, n, [&](const Run& run, int64_t b, int64_t width, const auto& seen) {
      const int64_t width32 = round_up(width, 32), at = (run.first_block + b) * kKeys * padded;
      multiply<Math>(width32, n32, padded, keys + at, padded, queries_t, kQueries, scores, kQueries, false);
      multiply<Math>(width32, n32, padded, values + at, padded, grads_t, kQueries, grad_weights, kQueries, false);
      for (int64_t j = 0; j < n; ++j) limit[j] = static_cast<int32_t>(std::min(width, seen(j)));
      L::weights_and_gradients(scores, grad_weights, kQueries, width32, limit[0], n32, this->shape.scale2, shift,
                               delta, limit, weights, grad_scores, reinterpret_cast<uint32_t*>(grad_scores_2));
      multiply<Math>(width32, padded, n32, weights, kQueries, grads_right, padded, grad_values + at, padded, true);
      multiply<Math>(width32, padded, n32, grad_scores, kQueries, queries_right, padded, grad_keys + at, padded, true);
      multiply<Math>(padded, n32, width32, keys_t + at, kKeys, Math::kPair == 1 ? grad_scores : grad_scores_2,
                     kQueries, grad_queries_t, kQueries, !first);
      first = false;
    });
    L::transpose(reinterpret_cast<const uint32_t*>(grad_queries_t), kQueries, padded, n32,
                 reinterpret_cast<uint32_t*>(grad_queries), padded);
    for (int64_t j = 0; j < n; ++j) {
      L::store_row(grad_queries + j * padded, this->shape.d, this->shape.scale, raw(this->row(grad_q, segment, i + j)));
    }
  }
};

// Calls with<IO, Math, Lanes>() for a dtype and this CPU.
bool bfloat16_products() {
  static const bool supported = [] {
    const std::vector<at::BFloat16> a(32 * 32), b(32 * 32);
    std::vector<float> c(32 * 32);
    try {
      at::native::cpublas::brgemm(32, 32, 32, 32, 32, 32, false, a.data(), b.data(), c.data(), true);
    } catch (const c10::Error&) {
      return false;
    }
    at::native::cpublas::brgemm_release();
    return true;
  }();
  return supported;
}

template <typename Lanes, typename With>
void with_math(at::ScalarType dtype, const With& with) {
  if (dtype == at::kFloat) return with(float{}, Single{}, Lanes{});
  if (bfloat16_products()) return with(at::BFloat16{}, Half{}, Lanes{});
  with(at::BFloat16{}, Single{}, Lanes{});
}

template <typename With>
void with_lanes(at::ScalarType dtype, const With& with) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return with_math<Avx512>(dtype, with);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return with_math<Avx2>(dtype, with);
#endif
  with_math<Portable>(dtype, with);
}

Shape check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.sizes() == k.sizes() && q.size(2) == k.size(2) && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0,
              "packed_attention: q must be [tq, r * g, d], k and v [t, g, d], got ", q.sizes(), ", ", k.sizes(), ", ",
              v.sizes());
  TORCH_CHECK((q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16) &&
                  k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
              "packed_attention: q, k and v must be float32 or bfloat16, got ", q.scalar_type(), ", ", k.scalar_type(),
              ", ", v.scalar_type());
  TORCH_CHECK(scale > 0, "packed_attention: scale must be positive, got ", scale);
  const int64_t a = q.size(1), g = k.size(1), d = q.size(2);
  return {a, g, a / g, d, round_up(d, 32), static_cast<float>(scale), static_cast<float>(scale * 1.4426950408889634)};
}

at::Tensor dense_rows(const at::Tensor& x) { return x.stride(2) == 1 ? x : x.contiguous(); }

std::tuple<at::Tensor, at::Tensor> packed_attention(const at::Tensor& q_in, const at::Tensor& k_in,
                                                    const at::Tensor& v_in, const at::Tensor& segments, double scale) {
  const Shape shape = check(q_in, k_in, v_in, scale);
  const at::Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  const std::vector<Unit> units = make_units(segments, q.size(0), k.size(0));
  at::Tensor out = at::zeros(q.sizes(), q.options());
  at::Tensor lse = at::zeros({q.size(0), shape.a}, q.options().dtype(at::kFloat));
  with_lanes(q.scalar_type(), [&](auto io, auto math, auto lanes) {
    using Task = Forward<decltype(io), decltype(math), decltype(lanes)>;
    for_each_task(units, shape.g, [&] { return Task(shape, q, k, v, out, lse); });
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> packed_attention_backward(
    const at::Tensor& grad_in, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
    const at::Tensor& out, const at::Tensor& lse, const at::Tensor& segments, double scale) {
  const Shape shape = check(q_in, k_in, v_in, scale);
  TORCH_CHECK(grad_in.sizes() == q_in.sizes() && out.sizes() == q_in.sizes() && lse.is_contiguous(),
              "packed_attention_backward: grad and out must be like q ", q_in.sizes(), ", got ", grad_in.sizes(),
              " and ", out.sizes());
  const at::Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  const at::Tensor grad = dense_rows(grad_in.to(q.scalar_type()));
  const std::vector<Unit> units = make_units(segments, q.size(0), k.size(0));
  at::Tensor grad_q = at::zeros(q.sizes(), q.options());
  at::Tensor grad_k = at::zeros(k.sizes(), k.options());
  at::Tensor grad_v = at::zeros(v.sizes(), v.options());
  with_lanes(q.scalar_type(), [&](auto io, auto math, auto lanes) {
    using Task = Backward<decltype(io), decltype(math), decltype(lanes)>;
    for_each_task(units, shape.g, [&] { return Task(shape, grad, q, k, v, out, lse, grad_q, grad_k, grad_v); });
  });
  return {grad_q, grad_k, grad_v};
}

TORCH_LIBRARY_FRAGMENT(rmega, m) {
  m.def("packed_attention(Tensor q, Tensor k, Tensor v, Tensor segments, float scale) -> (Tensor, Tensor)");
  m.def("packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor segments, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rmega, CPU, m) {
  m.impl("packed_attention", packed_attention);
  m.impl("packed_attention_backward", packed_attention_backward);
}

}  // namespace
}  // namespace rmega
