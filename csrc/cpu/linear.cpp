// The three GEMMs of a linear layer in bfloat16 on a CPU with AMX: y = x w^T, dx = dy w, and dw
// += dy^T x into fp32.
//
// ATen's GEMMs make a new kernel for every number of rows (a pack has another one each step),
// reach half of what the tiles can do, and round a weight gradient to bfloat16 before it is added.
// Here operands are laid out in tiles, in blocks that stay in the second-level cache.
//
// Letters: t rows, k and n the layer's inputs and outputs; m, w the smaller and the larger of n and
// k.
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "../rmega_ops.h"

#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define RMEGA_AMX 1  // a compiler that knows the tiles
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define AMX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-bf16")))
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of gcc 12's own headers, and the next
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace rmega {
namespace linear {
namespace {

#ifdef RMEGA_AMX

constexpr int64_t kStrip = 32;    // rows or columns of two tiles side by side
constexpr int64_t kTile = 512;    // 16-bit elements of a tile: 16 rows of 64 bytes
constexpr int64_t kBlock = 1024;  // fp32 sums of a strip of rows times a strip of columns
// Measured on Sapphire Rapids (48 KB first-level, 2 MB second-level cache). A strip of kTerms terms
// stays in the first, with it go kCached elements of a right operand and the sums of a few hundred
// rows in the second.
constexpr int64_t kTerms = 320;
constexpr int64_t kCached = 1 << 18;
constexpr int64_t kDeep = 2048;  // terms of a right operand that stay there together
constexpr int64_t kTall = 1024;  // rows of sums that stay there

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// n cut evenly into pieces of at most `most`, their number a multiple of `multiple`: a piece, in
// whole strips.
int64_t even(int64_t n, int64_t most, int64_t multiple = 1) {
  const int64_t pieces = round_up((n + most - 1) / most, multiple);
  return std::max(kStrip, round_up((n + pieces - 1) / pieces, kStrip));
}

at::Tensor bytes(int64_t n) { return at::empty({n}, at::kByte); }

template <typename T>
T* in(at::Tensor& memory) {
  return reinterpret_cast<T*>(memory.mutable_data_ptr<uint8_t>());
}

// ---- tiles
// -------------------------------------------------------------------------------------------------
// An operand is laid out in strips of 32 rows (left) or columns (right); a strip is, for each 32
// terms, two tiles of 16 rows or columns, each a kilobyte of its own. A left tile holds 16 rows of
// 32 terms, a right one 16 pairs of terms of 16 columns.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tile registers of this thread, for as long as this lives.
struct Tiles {
  AMX Tiles() {
    const TileConfig config;
    asm volatile("ldtilecfg %0" ::"m"(config));  // gcc's own takes only its first bytes to be read
  }
  AMX ~Tiles() { _tile_release(); }
};

// sums [32][32] (+)= left strip times right strip, over 32 * steps terms. Meanwhile `lines` cache
// lines a step are fetched from `ahead`, where the next left strip is: it comes from
// memory, the right ones are in cache.
AMX inline void multiply(const uint16_t* left, const uint16_t* right, int64_t steps, float* sums,
                         bool add, const char* ahead, int64_t lines) {
  constexpr int64_t row = 4 * kStrip;
  asm volatile("" ::: "memory");  // gcc does not know that loading a tile reads memory
  if (add) {
    _tile_loadd(0, sums, row);
    _tile_loadd(1, sums + 16, row);
    _tile_loadd(2, sums + kBlock / 2, row);
    _tile_loadd(3, sums + kBlock / 2 + 16, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; ++i, left += 2 * kTile, right += 2 * kTile) {
    _tile_loadd(4, left, 64);
    _tile_loadd(6, right, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kTile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, left + kTile, 64);
    for (int64_t j = 0; j < lines; ++j, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, row);
  _tile_stored(1, sums + 16, row);
  _tile_stored(2, sums + kBlock / 2, row);
  _tile_stored(3, sums + kBlock / 2 + 16, row);
}

// x[i] (16 rows of 16 words) becomes its transpose.
AVX512 inline void transpose16(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // x[4 a + j], lane b: column 4 b + j of rows 4 a .. 4 a + 3
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i p = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88),
                  q = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    const __m512i r = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    const __m512i s = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    y[j] = _mm512_shuffle_i32x4(p, r, 0x88);
    y[8 + j] = _mm512_shuffle_i32x4(p, r, 0xdd);
    y[4 + j] = _mm512_shuffle_i32x4(q, s, 0x88);
    y[12 + j] = _mm512_shuffle_i32x4(q, s, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// Two rows of 16, interleaved.
AVX512 inline __m512i pair(const uint16_t* a, const uint16_t* b) {
  const __m512i low =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i high =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// A strip of `terms` terms (a multiple of 32) from a matrix with rows ld apart. Where its rows are
// the strip's own: left = true for a left operand (row i = in + i * ld; rows from `rows` on are
// zero), false for a right one (column i).
template <bool left>
AVX512 void pack_own(const uint16_t* in, int64_t ld, int64_t rows, int64_t terms, uint16_t* out) {
  for (int64_t d = 0; d < terms; d += 32) {
    for (int64_t half = 0; half < kStrip; half += 16, out += kTile) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        x[i] =
            half + i < rows ? _mm512_loadu_si512(in + (half + i) * ld + d) : _mm512_setzero_si512();
      }
      if (!left) transpose16(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(out + 32 * i, x[i]);
    }
  }
}

// The same where the rows of the matrix are the terms: term j of row or column i = in[j * ld + i].
// Terms from `rows` to `terms` are zero.
template <bool left>
AVX512 void pack_terms(const uint16_t* in, int64_t ld, int64_t rows, int64_t terms, uint16_t* out) {
  alignas(64) static const uint16_t zeros[kStrip] = {};
  for (int64_t d = 0; d < terms; d += 32, out += 2 * kTile) {
    for (int64_t half = 0; half < kStrip; half += 16) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t j = d + 2 * i;
        x[i] = pair(j < rows ? in + j * ld + half : zeros,
                    j + 1 < rows ? in + (j + 1) * ld + half : zeros);
      }
      if (left) transpose16(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(out + kTile / 16 * half + 32 * i, x[i]);
    }
  }
}

// A block of sums rounded to bfloat16 (ties to even; NaN stays NaN), to rows ldy apart.
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))) void store_rounded(
    const float* sums, int64_t rows, uint16_t* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < kStrip; c += 16) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_load_ps(sums + r * kStrip + c));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + r * ldy + c),
                          reinterpret_cast<__m256i>(rounded));
    }
  }
}

// out [32][ldo] += a block of sums
AVX512 void add_rows(const float* sums, float* out, int64_t ldo) {
  for (int64_t r = 0; r < kStrip; ++r) {
    for (int64_t c = 0; c < kStrip; c += 16) {
      float* to = out + r * ldo + c;
      _mm512_storeu_ps(to,
                       _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(sums + r * kStrip + c)));
    }
  }
}

// out [32][ldo] += a block of sums, transposed
AVX512 void add_transposed(const float* sums, float* out, int64_t ldo) {
  for (int64_t c = 0; c < kStrip; c += 16) {
    for (int64_t r = 0; r < kStrip; r += 16) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(sums + (r + i) * kStrip + c);
      transpose16(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        float* to = out + (c + i) * ldo + r;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_castsi512_ps(x[i])));
      }
    }
  }
}

// ---- GEMMs
// -------------------------------------------------------------------------------------------------

// y [rows, columns] = x [rows, depth] times a right operand, of which pack(column, term, terms, to)
// lays out a strip.
template <typename Pack>
void product(const uint16_t* x, int64_t ldx, int64_t rows, int64_t depth, int64_t columns,
             uint16_t* y, const Pack& pack) {
  const int64_t chunk = even(depth, kTerms), strips = columns / kStrip;
  const auto terms_of = [&](int64_t term) { return std::min(chunk, depth - term); };
  at::Tensor packed = bytes(2 * depth * columns);
  uint16_t* const right = in<uint16_t>(packed);  // [chunks][strips][tiles]
  const auto strip_at = [&](int64_t term, int64_t strip) {
    return right + term * columns + strip * kStrip * terms_of(term);
  };
  at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t term = 0; term < depth; term += chunk) {
      for (int64_t s = begin; s < end; ++s)
        pack(s * kStrip, term, terms_of(term), strip_at(term, s));
    }
  });
  const int64_t deep = std::min(depth, kDeep / chunk * chunk);
  const int64_t group =
      std::max<int64_t>(1, kCached / (deep * kStrip));  // strips of the right operand at once
  const bool once = deep >= depth;                      // else sums wait for the next terms
  const int64_t block = even(rows, once ? kTall : kTall / 2, at::get_num_threads());
  at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    at::Tensor left_memory = bytes(2 * block * depth);
    at::Tensor sums_memory = bytes(4 * kBlock * group * (once ? 1 : block / kStrip));
    uint16_t* const left = in<uint16_t>(left_memory);  // [chunks][strips of rows][tiles]
    float* const sums = in<float>(sums_memory);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, rows - first);
      for (int64_t r = 0; r < count; r += kStrip) {
        for (int64_t term = 0; term < depth; term += chunk) {
          pack_own<true>(x + (first + r) * ldx + term, ldx, count - r, terms_of(term),
                         left + term * block + r * terms_of(term));
        }
      }
      for (int64_t s0 = 0; s0 < strips; s0 += group) {
        const int64_t s1 = std::min(s0 + group, strips);
        for (int64_t from = 0; from < depth; from += deep) {
          const int64_t until = std::min(from + deep, depth);
          for (int64_t r = 0; r < count; r += kStrip) {
            float* const row = sums + (once ? 0 : r / kStrip * group * kBlock);
            for (int64_t term = from; term < until; term += chunk) {
              const int64_t terms = terms_of(term);
              const uint16_t* const strip = left + term * block + r * terms;
              const int64_t lines = (kStrip + s1 - s0 - 1) / (s1 - s0),
                            stride = 64 * lines * (terms / 32);
              const int64_t next =
                  term + chunk;  // the same rows' next terms, or the next rows' first ones
              const char* const ahead = reinterpret_cast<const char*>(
                  next < until ? left + next * block + r * terms_of(next)
                               : left + from * block + (r + kStrip) * terms_of(from));
              for (int64_t s = s0; s < s1; ++s) {
                multiply(strip, strip_at(term, s), terms / 32, row + (s - s0) * kBlock, term > 0,
                         ahead + (s - s0) * stride, lines);
              }
            }
            for (int64_t s = s0; s < s1 && until == depth; ++s) {
              store_rounded(row + (s - s0) * kBlock, std::min(kStrip, count - r),
                            y + (first + r) * columns + s * kStrip, columns);
            }
          }
        }
      }
    }
  });
}

// total [w, m] (transposed) or [m, w] += large [t, w] ^T small [t, m] or its transpose.
void weight_gradient(const uint16_t* small, int64_t lds, int64_t m, const uint16_t* large,
                     int64_t ldl, int64_t w, int64_t t, bool transposed, float* total) {
  const int64_t chunk = even(t, kTerms), chunks = (t + chunk - 1) / chunk;
  const auto rows_of = [&](int64_t row) { return std::min(chunk, t - row); };
  const auto terms_of = [&](int64_t row) { return round_up(rows_of(row), 32); };
  at::Tensor packed = bytes(2 * m * round_up(t, 32));
  uint16_t* const left = in<uint16_t>(packed);  // [chunks][strips][tiles]
  const int64_t strips = m / kStrip;
  at::parallel_for(0, chunks * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / strips * chunk, at = i % strips * kStrip;
      pack_terms<true>(small + row * lds + at, lds, rows_of(row), terms_of(row),
                       left + m * row + at * terms_of(row));
    }
  });
  const int64_t deep = std::min(chunks, kDeep / 2 / chunk) * chunk;
  const int64_t tall = even(m, kTall), down = (m + tall - 1) / tall;
  const int64_t wide =
      even(w, std::max(kStrip, kCached / deep), down > 1 ? 1 : at::get_num_threads());
  const int64_t across = (w + wide - 1) / wide;
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    const Tiles tiles;
    at::Tensor right_memory = bytes(2 * deep * wide), sums_memory = bytes(4 * tall * wide);
    uint16_t* const right = in<uint16_t>(right_memory);
    float* const sums = in<float>(sums_memory);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t w0 = tile / down * wide, width = std::min(wide, w - w0);
      const int64_t m0 = tile % down * tall, height = std::min(tall, m - m0);
      for (int64_t from = 0; from < t; from += deep) {
        const int64_t until = std::min(from + deep, t);
        for (int64_t row = from; row < until; row += chunk) {
          for (int64_t c = 0; c < width; c += kStrip) {
            pack_terms<false>(large + row * ldl + w0 + c, ldl, rows_of(row), terms_of(row),
                              right + (row - from) * width + c * terms_of(row));
          }
        }
        for (int64_t r = 0; r < height; r += kStrip) {
          for (int64_t row = from; row < until; row += chunk) {
            const int64_t terms = terms_of(row);
            const uint16_t* const strip = left + m * row + (m0 + r) * terms;
            const int64_t lines = (kStrip + width / kStrip - 1) / (width / kStrip),
                          next = row + chunk;
            const char* const ahead = reinterpret_cast<const char*>(
                next < until ? left + m * next + (m0 + r) * terms_of(next)
                             : left + m * from + (m0 + r + kStrip) * terms_of(from));
            for (int64_t c = 0; c < width; c += kStrip) {
              multiply(strip, right + (row - from) * width + c * terms, terms / 32,
                       sums + r * wide + c * kStrip, row > 0,
                       ahead + c / kStrip * 64 * lines * (terms / 32), lines);
            }
          }
        }
      }
      for (int64_t r = 0; r < height; r += kStrip) {
        for (int64_t c = 0; c < width; c += kStrip) {
          const float* const block = sums + r * wide + c * kStrip;
          if (transposed) {
            add_transposed(block, total + (w0 + c) * m + m0 + r, m);
          } else {
            add_rows(block, total + (m0 + r) * w + w0 + c, w);
          }
        }
      }
    }
  });
}

const uint16_t* data(const at::Tensor& x) {
  return static_cast<const uint16_t*>(x.const_data_ptr());
}

// Whether the CPU has tiles, and Linux lets this process use them.
bool has_tiles() {
  static const bool has = [] {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           __builtin_cpu_supports("avx512bf16") && syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return has && elementwise_isa() == "avx512";
}

#else
bool has_tiles() { return false; }
#endif

// Rows of a matrix whose last dimension is contiguous; leading dimensions are flattened.
at::Tensor rows_of(const at::Tensor& x) {
  const at::Tensor flat = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}

bool fits(const at::Tensor& x, int64_t n, int64_t k) {
  return has_tiles() && x.scalar_type() == at::kBFloat16 && n % 32 == 0 && k % 32 == 0 &&
         x.numel() > 0;
}

void check(const at::Tensor& x, const at::Tensor& w, int64_t inner, const char* op) {
  TORCH_CHECK(
      x.dim() >= 1 && w.dim() == 2 && x.size(-1) == inner && x.scalar_type() == w.scalar_type(), op,
      ": ", x.scalar_type(), " ", x.sizes(), " does not go with weight ", w.scalar_type(), " ",
      w.sizes());
}

at::Tensor like(const at::Tensor& x, int64_t columns) {
  auto sizes = x.sizes().vec();
  sizes.back() = columns;
  return at::empty(sizes, x.options());
}

}  // namespace

at::Tensor forward(const at::Tensor& x, const at::Tensor& weight) {
  check(x, weight, weight.size(1), "linear");
  const int64_t n = weight.size(0), k = weight.size(1);
#ifdef RMEGA_AMX
  if (fits(x, n, k)) {
    const at::Tensor a = rows_of(x), w = rows_of(weight);
    at::Tensor y = like(x, n);
    product(data(a), a.stride(0), a.size(0), k, n, static_cast<uint16_t*>(y.mutable_data_ptr()),
            [&](int64_t column, int64_t term, int64_t terms, uint16_t* to) {
              pack_own<false>(data(w) + column * w.stride(0) + term, w.stride(0), kStrip, terms,
                              to);
            });
    return y;
  }
#endif
  return at::matmul(x, weight.t());
}

at::Tensor grad_input(const at::Tensor& grad, const at::Tensor& weight) {
  check(grad, weight, weight.size(0), "linear_grad_input");
  const int64_t n = weight.size(0), k = weight.size(1);
#ifdef RMEGA_AMX
  if (fits(grad, n, k)) {
    const at::Tensor a = rows_of(grad), w = rows_of(weight);
    at::Tensor y = like(grad, k);
    product(data(a), a.stride(0), a.size(0), n, k, static_cast<uint16_t*>(y.mutable_data_ptr()),
            [&](int64_t column, int64_t term, int64_t terms, uint16_t* to) {
              pack_terms<false>(data(w) + term * w.stride(0) + column, w.stride(0), terms, terms,
                                to);
            });
    return y;
  }
#endif
  return at::matmul(grad, weight);
}

void grad_weight(const at::Tensor& grad, const at::Tensor& x, at::Tensor total) {
  TORCH_CHECK(total.dim() == 2 && grad.size(-1) == total.size(0) && x.size(-1) == total.size(1) &&
                  grad.numel() / std::max<int64_t>(total.size(0), 1) ==
                      x.numel() / std::max<int64_t>(total.size(1), 1) &&
                  grad.scalar_type() == x.scalar_type(),
              "linear_grad_weight: ", grad.scalar_type(), " ", grad.sizes(), " and ",
              x.scalar_type(), " ", x.sizes(), " do not go with total ", total.sizes());
  const at::Tensor g = rows_of(grad), a = rows_of(x);
#ifdef RMEGA_AMX
  const int64_t n = g.size(1), k = a.size(1), t = g.size(0);
  if (fits(grad, n, k) && total.scalar_type() == at::kFloat && total.is_contiguous()) {
    float* const sum = static_cast<float*>(total.mutable_data_ptr());
    // The smaller operand is the one to transpose; sums of the other way round are turned when they
    // are added.
    if (k <= n) {
      weight_gradient(data(a), a.stride(0), k, data(g), g.stride(0), n, t, true, sum);
    } else {
      weight_gradient(data(g), g.stride(0), n, data(a), a.stride(0), k, t, false, sum);
    }
    return;
  }
#endif
  if (total.scalar_type() == grad.scalar_type()) {
    total.addmm_(g.t(), a);
  } else {
    total.add_(at::mm(g.t(), a));
  }
}

TORCH_LIBRARY_FRAGMENT(rmega, m) {
  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_grad_input(Tensor grad, Tensor weight) -> Tensor");
  m.def("linear_grad_weight(Tensor grad, Tensor x, Tensor(a!) total) -> ()");
}

TORCH_LIBRARY_IMPL(rmega, CPU, m) {
  m.impl("linear", forward);
  m.impl("linear_grad_input", grad_input);
  m.impl("linear_grad_weight", grad_weight);
}

}  // namespace linear

bool linear_has_tiles() { return linear::has_tiles(); }

}  // namespace rmega
