// The elementwise half of packed attention, written in vectors of the compiler's.
// packed_attention.cpp includes this file once per instruction set, with LANES (a class),
// LANES_TARGET (a function attribute) and LANES_WIDTH (floats of a vector: 16, 8 or 4) defined:
// vectors are lowered where they are written, so a template over the instruction set would not do.
// The width must be one that the set has: of wider vectors gcc makes comparisons and choices float
// by float.
#ifndef RMEGA_SHUFFLE
#ifdef __clang__
#define RMEGA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RMEGA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
#endif

struct LANES {
#define LANES_INLINE LANES_TARGET __attribute__((always_inline))

  static constexpr int kWidth = LANES_WIDTH;
  typedef float vf __attribute__((vector_size(4 * LANES_WIDTH)));
  typedef int32_t vi __attribute__((vector_size(4 * LANES_WIDTH)));
  typedef uint32_t vu __attribute__((vector_size(4 * LANES_WIDTH)));
  typedef uint16_t vh __attribute__((vector_size(2 * LANES_WIDTH)));
  typedef float v4f __attribute__((vector_size(16)));
  typedef float vf_mem __attribute__((vector_size(4 * LANES_WIDTH), aligned(4), may_alias));
  typedef uint32_t vu_mem __attribute__((vector_size(4 * LANES_WIDTH), aligned(2), may_alias));
  typedef uint16_t vh_mem __attribute__((vector_size(2 * LANES_WIDTH), aligned(2), may_alias));

  LANES_INLINE static vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
  LANES_INLINE static void store(float* p, vf x) { *reinterpret_cast<vf_mem*>(p) = x; }
  LANES_INLINE static vf splat(float x) { return vf{} + x; }
  template <typename V>
  LANES_INLINE static V max(V a, V b) {
    return a > b ? a : b;
  }
  LANES_INLINE static vi lane_index() {
    vi lane{};
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return lane;
  }

  // Halves folded onto one another until four floats are left.
  LANES_INLINE static float sum_of(vf x) {
    v4f quarter[kWidth / 4];
    __builtin_memcpy(quarter, &x, sizeof quarter);
    for (int n = kWidth / 8; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) quarter[i] += quarter[i + n];
    }
    return (quarter[0][0] + quarter[0][1]) + (quarter[0][2] + quarter[0][3]);
  }

  LANES_INLINE static float max_of(vf x) {
    v4f y[kWidth / 4];
    __builtin_memcpy(y, &x, sizeof y);
    for (int n = kWidth / 8; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) y[i] = max(y[i], y[i + n]);
    }
    const float a = y[0][0] > y[0][1] ? y[0][0] : y[0][1],
                b = y[0][2] > y[0][3] ? y[0][2] : y[0][3];
    return a > b ? a : b;
  }

  // 2^x for x <= 0 (a little above is fine), to 2 units in the last place; below 2^-126 it stays at
  // 2^-126.
  LANES_INLINE static vf exp2_of(vf x) {
    x = max(splat(-126.0f), x);           // in this order NaN stays NaN
    const vf shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf rounded = x + shift;
    const vf f = x - (rounded - shift);  // in [-1/2, 1/2]
    vf y = splat(1.327647178e-3f);       // minimax, relative error 7.5e-8
    y = y * f + 9.675541333e-3f;
    y = y * f + 5.550713274e-2f;
    y = y * f + 2.402211972e-1f;
    y = y * f + 6.931469671e-1f;
    y = y * f + 1.000000072f;
    const vi exponent = reinterpret_cast<vi>(rounded)
                        << 23;  // the low bits of `rounded` hold the integer
    return reinterpret_cast<vf>(reinterpret_cast<vi>(y) + exponent);
  }

  // Round to nearest even; the bfloat16 is in the high half of each lane.
  LANES_INLINE static vu round_bf16(vf x) {
    const vu u = reinterpret_cast<vu>(x);
    return u + 0x7fff + ((u >> 16) & 1);
  }

  LANES_INLINE static void store(uint16_t* p, vf x) {
    *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector(round_bf16(x) >> 16, vh);
  }

  LANES_TARGET static float exp2_scalar(float x) { return exp2_of(splat(x))[0]; }

  // One row of scores s [0, n) becomes weights p = 2^(c s - m) [0, n), zero up to padded (both
  // whole vectors are readable and writable); m is the running maximum, l the running sum. Returns
  // what earlier sums shrink by.
  template <typename T>
  LANES_TARGET static float softmax_row(const float* s, int64_t n, int64_t padded, float c,
                                        float* m, float* l, T* p) {
    for (int64_t i = (n + kWidth - 1) & ~int64_t(kWidth - 1); i < padded; i += kWidth)
      store(p + i, vf{});
    if (n == 0) return 1.0f;
    const int64_t full = n & ~int64_t(kWidth - 1);
    const vi inside = lane_index() < static_cast<int32_t>(n - full);
    const vf lowest = splat(-1e30f);
    vf top = lowest;
    for (int64_t i = 0; i < full; i += kWidth) top = max(top, load(s + i));
    if (full < n) top = max(top, inside ? load(s + full) : lowest);
    const float before = *m;
    const float high = max_of(top) * c;
    const float after = before > high ? before : high;
    vf sum{};
    for (int64_t i = 0; i < full; i += kWidth) {
      const vf e = exp2_of(load(s + i) * c - after);
      sum += e;
      store(p + i, e);
    }
    if (full < n) {
      const vf e = inside ? exp2_of(load(s + full) * c - after) : vf{};
      sum += e;
      store(p + full, e);
    }
    const float shrink = before == after ? 1.0f : exp2_scalar(before - after);
    *m = after;
    *l = *l * shrink + sum_of(sum);
    return shrink;
  }

  LANES_TARGET static void scale_row(float* x, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i += kWidth) store(x + i, load(x + i) * factor);
  }

  LANES_TARGET static float dot(const float* a, const float* b, int64_t n) {
    vf sum{};
    for (int64_t i = 0; i < n; i += kWidth) sum += load(a + i) * load(b + i);
    return sum_of(sum);
  }

  LANES_TARGET static float dot(const uint16_t* a, const uint16_t* b, int64_t n) {
    vf sum{};
    for (int64_t i = 0; i < n; i += 2 * kWidth) {
      const vu x = *reinterpret_cast<const vu_mem*>(a + i),
               y = *reinterpret_cast<const vu_mem*>(b + i);
      sum += reinterpret_cast<vf>(x << 16) * reinterpret_cast<vf>(y << 16);
      sum += reinterpret_cast<vf>(x & 0xffff0000u) * reinterpret_cast<vf>(y & 0xffff0000u);
    }
    return sum_of(sum);
  }

  // Scores and gradients of weights, both transposed [rows = keys][ld], become weights and
  // gradients of scores. Column j is a query: c s - lse[j] is the exponent, delta[j] = sum_k p dp;
  // it sees rows below limit[j] (rows under `open` are seen by all). bfloat16: gs_pairs interleaves
  // two rows, as a B operand wants it. rows is even, columns a multiple of 16.
  template <typename T>
  LANES_TARGET static void weights_and_gradients(const float* s, const float* dp, int64_t ld,
                                                 int64_t rows, int64_t open, int64_t columns,
                                                 float c, const float* lse, const float* delta,
                                                 const int32_t* limit, T* p, T* gs,
                                                 uint32_t* gs_pairs) {
    for (int64_t i = 0; i < rows; i += 2) {
      const bool all = i + 1 < open;
      for (int64_t j = 0; j < columns; j += kWidth) {
        const int64_t at = i * ld + j;
        const vf shift = load(lse + j), mean = load(delta + j);
        vf p0 = exp2_of(load(s + at) * c - shift), p1 = exp2_of(load(s + at + ld) * c - shift);
        if (!all) {
          const vi last = reinterpret_cast<vi>(vu(*reinterpret_cast<const vu_mem*>(limit + j)));
          p0 = last > static_cast<int32_t>(i) ? p0 : vf{};
          p1 = last > static_cast<int32_t>(i + 1) ? p1 : vf{};
        }
        const vf g0 = p0 * (load(dp + at) - mean), g1 = p1 * (load(dp + at + ld) - mean);
        store(p + at, p0);
        store(p + at + ld, p1);
        if constexpr (sizeof(T) == 2) {
          const vu low = round_bf16(g0) >> 16, high = round_bf16(g1);
          *reinterpret_cast<vh_mem*>(gs + at) = __builtin_convertvector(low, vh);
          *reinterpret_cast<vh_mem*>(gs + at + ld) = __builtin_convertvector(high >> 16, vh);
          *reinterpret_cast<vu_mem*>(gs_pairs + at / 2 + j / 2) = low | (high & 0xffff0000u);
        } else {
          store(gs + at, g0);
          store(gs + at + ld, g1);
        }
      }
    }
  }

  // out [columns][ld_out] = in [rows][ld_in] transposed; rows and columns are multiples of 16.
  LANES_TARGET static void transpose(const uint32_t* in, int64_t ld_in, int64_t rows,
                                     int64_t columns, uint32_t* out, int64_t ld_out) {
    for (int64_t r = 0; r < rows; r += kWidth) {
      for (int64_t q = 0; q < columns; q += kWidth) {
        vu x[kWidth], y[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          x[i] = *reinterpret_cast<const vu_mem*>(in + (r + i) * ld_in + q);
        // Interleaving rows i and i + width / 2, log2(width) times, transposes a square block.
#pragma GCC unroll 4
        for (int round = 1; round < kWidth; round *= 2) {
#pragma GCC unroll 8
          for (int i = 0; i < kWidth / 2; ++i) {
            const vu a = x[i], b = x[i + kWidth / 2];
#if LANES_WIDTH == 16
            y[2 * i] = RMEGA_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] =
                RMEGA_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif LANES_WIDTH == 8
            y[2 * i] = RMEGA_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            y[2 * i + 1] = RMEGA_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
            y[2 * i] = RMEGA_SHUFFLE(a, b, 0, 4, 1, 5);
            y[2 * i + 1] = RMEGA_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
          }
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) x[i] = y[i];
        }
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          *reinterpret_cast<vu_mem*>(out + (q + i) * ld_out + r) = x[i];
      }
    }
  }

  // Rows 2i and 2i + 1 of in [rows][n] interleaved: out [rows / 2][n][2]. n is a multiple of 16,
  // rows even.
  LANES_TARGET static void interleave(const uint16_t* in, int64_t rows, int64_t n, uint32_t* out) {
    for (int64_t i = 0; i < rows / 2; ++i) {
      for (int64_t j = 0; j < n; j += kWidth) {
        const vu low =
            __builtin_convertvector(*reinterpret_cast<const vh_mem*>(in + 2 * i * n + j), vu);
        const vu high =
            __builtin_convertvector(*reinterpret_cast<const vh_mem*>(in + (2 * i + 1) * n + j), vu);
        *reinterpret_cast<vu_mem*>(out + i * n + j) = low | (high << 16);
      }
    }
  }

  // The reverse for pairs [rows / 2][n][2] -> [rows][n], rows ld apart.
  LANES_TARGET static void separate(const uint32_t* in, int64_t rows, int64_t n, int64_t ld,
                                    uint16_t* out) {
    for (int64_t i = 0; i < rows / 2; ++i) {
      for (int64_t j = 0; j < n; j += kWidth) {
        const vu pair = *reinterpret_cast<const vu_mem*>(in + i * ld + j);
        *reinterpret_cast<vh_mem*>(out + 2 * i * ld + j) =
            __builtin_convertvector(pair & 0xffff, vh);
        *reinterpret_cast<vh_mem*>(out + (2 * i + 1) * ld + j) =
            __builtin_convertvector(pair >> 16, vh);
      }
    }
  }

  template <typename T>
  LANES_TARGET static void store_row(const float* x, int64_t n, float factor, T* out) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(out + i, load(x + i) * factor);
    if (i < n) {
      T rest[kWidth];
      store(rest, load(x + i) * factor);
      for (int64_t j = i; j < n; ++j) out[j] = rest[j - i];
    }
  }

#undef LANES_INLINE
};
