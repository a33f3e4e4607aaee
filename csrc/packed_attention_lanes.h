// The elementwise half of packed attention, written in 16-float vectors that the compiler lowers to what a CPU has.
// packed_attention.cpp includes this file once per instruction set, with LANES (a class) and LANES_TARGET (a function
// attribute) defined: vectors are lowered where they are written, so a template over the instruction set would not do.
#ifndef RMEGA_SHUFFLE
#ifdef __clang__
#define RMEGA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RMEGA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, v16i{__VA_ARGS__})
#endif
#endif

struct LANES {

#define LANES_INLINE LANES_TARGET __attribute__((always_inline))

typedef float v16f __attribute__((vector_size(64)));
typedef float v8f __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));
typedef float v16f_mem __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t v16u_mem __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t v16h_mem __attribute__((vector_size(32), aligned(2), may_alias));

LANES_INLINE static v16f load(const float* p) { return *reinterpret_cast<const v16f_mem*>(p); }
LANES_INLINE static void store(float* p, v16f x) { *reinterpret_cast<v16f_mem*>(p) = x; }
LANES_INLINE static v16f splat(float x) { return v16f{} + x; }
LANES_INLINE static v16f max(v16f a, v16f b) { return a > b ? a : b; }
LANES_INLINE static v16i lane_index() { return v16i{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

LANES_INLINE static float sum_of(v16f x) {
  v8f half[2];
  __builtin_memcpy(half, &x, sizeof half);
  half[0] += half[1];
  v4f quarter[2];
  __builtin_memcpy(quarter, half, sizeof quarter);
  quarter[0] += quarter[1];
  return (quarter[0][0] + quarter[0][1]) + (quarter[0][2] + quarter[0][3]);
}

LANES_INLINE static float max_of(v16f x) {
  v8f half[2];
  __builtin_memcpy(half, &x, sizeof half);
  half[0] = half[0] > half[1] ? half[0] : half[1];
  v4f y[2];
  __builtin_memcpy(y, half, sizeof y);
  y[0] = y[0] > y[1] ? y[0] : y[1];
  const float a = y[0][0] > y[0][1] ? y[0][0] : y[0][1], b = y[0][2] > y[0][3] ? y[0][2] : y[0][3];
  return a > b ? a : b;
}

// 2^x for x <= 0 (a little above is fine), to 2 units in the last place; below 2^-126 it stays at 2^-126.
LANES_INLINE static v16f exp2_of(v16f x) {
  x = max(splat(-126.0f), x);  // in this order NaN stays NaN
  const v16f shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const v16f rounded = x + shift;
  const v16f f = x - (rounded - shift);  // in [-1/2, 1/2]
  v16f y = splat(1.327647178e-3f);       // minimax, relative error 7.5e-8
  y = y * f + 9.675541333e-3f;
  y = y * f + 5.550713274e-2f;
  y = y * f + 2.402211972e-1f;
  y = y * f + 6.931469671e-1f;
  y = y * f + 1.000000072f;
  const v16i exponent = reinterpret_cast<v16i>(rounded) << 23;  // the low bits of `rounded` hold the integer
  return reinterpret_cast<v16f>(reinterpret_cast<v16i>(y) + exponent);
}

// Round to nearest even; the bfloat16 is in the high half of each lane.
LANES_INLINE static v16u round_bf16(v16f x) {
  const v16u u = reinterpret_cast<v16u>(x);
  return u + 0x7fff + ((u >> 16) & 1);
}

LANES_INLINE static void store(uint16_t* p, v16f x) {
  *reinterpret_cast<v16h_mem*>(p) = __builtin_convertvector(round_bf16(x) >> 16, v16h);
}

LANES_TARGET static float exp2_scalar(float x) { return exp2_of(splat(x))[0]; }

// One row of scores s [0, n) becomes weights p = 2^(c s - m) [0, n), zero up to padded (both whole vectors are
// readable and writable); m is the running maximum, l the running sum. Returns what earlier sums shrink by.
template <typename T>
LANES_TARGET static float softmax_row(const float* s, int64_t n, int64_t padded, float c, float* m, float* l, T* p) {
  for (int64_t i = (n + 15) & ~int64_t(15); i < padded; i += 16) store(p + i, v16f{});
  if (n == 0) return 1.0f;
  const int64_t full = n & ~int64_t(15);
  const v16i inside = lane_index() < static_cast<int32_t>(n - full);
  const v16f lowest = splat(-1e30f);
  v16f top = lowest;
  for (int64_t i = 0; i < full; i += 16) top = max(top, load(s + i));
  if (full < n) top = max(top, inside ? load(s + full) : lowest);
  const float before = *m;
  const float high = max_of(top) * c;
  const float after = before > high ? before : high;
  v16f sum{};
  for (int64_t i = 0; i < full; i += 16) {
    const v16f e = exp2_of(load(s + i) * c - after);
    sum += e;
    store(p + i, e);
  }
  if (full < n) {
    const v16f e = inside ? exp2_of(load(s + full) * c - after) : v16f{};
    sum += e;
    store(p + full, e);
  }
  const float shrink = before == after ? 1.0f : exp2_scalar(before - after);
  *m = after;
  *l = *l * shrink + sum_of(sum);
  return shrink;
}

LANES_TARGET static void scale_row(float* x, int64_t n, float factor) {
  for (int64_t i = 0; i < n; i += 16) store(x + i, load(x + i) * factor);
}

LANES_TARGET static float dot(const float* a, const float* b, int64_t n) {
  v16f sum{};
  for (int64_t i = 0; i < n; i += 16) sum += load(a + i) * load(b + i);
  return sum_of(sum);
}

LANES_TARGET static float dot(const uint16_t* a, const uint16_t* b, int64_t n) {
  v16f sum{};
  for (int64_t i = 0; i < n; i += 32) {
    const v16u x = *reinterpret_cast<const v16u_mem*>(a + i), y = *reinterpret_cast<const v16u_mem*>(b + i);
    sum += reinterpret_cast<v16f>(x << 16) * reinterpret_cast<v16f>(y << 16);
    sum += reinterpret_cast<v16f>(x & 0xffff0000u) * reinterpret_cast<v16f>(y & 0xffff0000u);
  }
  return sum_of(sum);
}

// Scores and gradients of weights, both transposed [rows = keys][ld], become weights and gradients of scores.
// Column j is a query: c s - lse[j] is the exponent, delta[j] = sum_k p dp; it sees rows below limit[j] (rows under
// `open` are seen by all). bfloat16: gs_pairs interleaves two rows, as a B operand wants it. rows is even, columns a
// multiple of 16.
template <typename T>
LANES_TARGET static void weights_and_gradients(const float* s, const float* dp, int64_t ld, int64_t rows, int64_t open,
                                               int64_t columns, float c, const float* lse, const float* delta,
                                               const int32_t* limit, T* p, T* gs, uint32_t* gs_pairs) {
  for (int64_t j = 0; j < columns; j += 16) {
    const v16f shift = load(lse + j), mean = load(delta + j);
    const v16i last = reinterpret_cast<v16i>(v16u(*reinterpret_cast<const v16u_mem*>(limit + j)));
    for (int64_t i = 0; i < rows; i += 2) {
      const int64_t at = i * ld + j;
      v16f p0 = exp2_of(load(s + at) * c - shift), p1 = exp2_of(load(s + at + ld) * c - shift);
      if (i + 1 >= open) {
        p0 = last > static_cast<int32_t>(i) ? p0 : v16f{};
        p1 = last > static_cast<int32_t>(i + 1) ? p1 : v16f{};
      }
      const v16f g0 = p0 * (load(dp + at) - mean), g1 = p1 * (load(dp + at + ld) - mean);
      store(p + at, p0);
      store(p + at + ld, p1);
      if constexpr (sizeof(T) == 2) {
        const v16u low = round_bf16(g0) >> 16, high = round_bf16(g1);
        *reinterpret_cast<v16h_mem*>(gs + at) = __builtin_convertvector(low, v16h);
        *reinterpret_cast<v16h_mem*>(gs + at + ld) = __builtin_convertvector(high >> 16, v16h);
        *reinterpret_cast<v16u_mem*>(gs_pairs + at / 2 + j / 2) = low | (high & 0xffff0000u);
      } else {
        store(gs + at, g0);
        store(gs + at + ld, g1);
      }
    }
  }
}

// out [columns][ld_out] = in [rows][ld_in] transposed; rows and columns are multiples of 16.
LANES_TARGET static void transpose(const uint32_t* in, int64_t ld_in, int64_t rows, int64_t columns, uint32_t* out,
                                   int64_t ld_out) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t q = 0; q < columns; q += 16) {
      v16u x[16], y[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = *reinterpret_cast<const v16u_mem*>(in + (r + i) * ld_in + q);
      // Four rounds of interleaving rows i and i + 8 transpose a 16 x 16 block.
#pragma GCC unroll 4
      for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          y[2 * i] = RMEGA_SHUFFLE(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
          y[2 * i + 1] = RMEGA_SHUFFLE(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) x[i] = y[i];
      }
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) *reinterpret_cast<v16u_mem*>(out + (q + i) * ld_out + r) = x[i];
    }
  }
}

// Rows 2i and 2i + 1 of in [rows][n] interleaved: out [rows / 2][n][2]. n is a multiple of 16, rows even.
LANES_TARGET static void interleave(const uint16_t* in, int64_t rows, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < rows / 2; ++i) {
    for (int64_t j = 0; j < n; j += 16) {
      const v16u low = __builtin_convertvector(*reinterpret_cast<const v16h_mem*>(in + 2 * i * n + j), v16u);
      const v16u high = __builtin_convertvector(*reinterpret_cast<const v16h_mem*>(in + (2 * i + 1) * n + j), v16u);
      *reinterpret_cast<v16u_mem*>(out + i * n + j) = low | (high << 16);
    }
  }
}

// The reverse for pairs [rows / 2][n][2] -> [rows][n], rows ld apart.
LANES_TARGET static void separate(const uint32_t* in, int64_t rows, int64_t n, int64_t ld, uint16_t* out) {
  for (int64_t i = 0; i < rows / 2; ++i) {
    for (int64_t j = 0; j < n; j += 16) {
      const v16u pair = *reinterpret_cast<const v16u_mem*>(in + i * ld + j);
      *reinterpret_cast<v16h_mem*>(out + 2 * i * ld + j) = __builtin_convertvector(pair & 0xffff, v16h);
      *reinterpret_cast<v16h_mem*>(out + (2 * i + 1) * ld + j) = __builtin_convertvector(pair >> 16, v16h);
    }
  }
}

template <typename T>
LANES_TARGET static void store_row(const float* x, int64_t n, float factor, T* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(out + i, load(x + i) * factor);
  if (i < n) {
    T rest[16];
    store(rest, load(x + i) * factor);
    for (int64_t j = i; j < n; ++j) out[j] = rest[j - i];
  }
}

#undef LANES_INLINE
};
