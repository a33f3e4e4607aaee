// The fused elementwise kernels, in vectors of kLanes floats. Included once per instruction set,
// inside a namespace of its own, by elementwise_<isa>.cpp, which has included every header before
// it changed the target.

#if RMEGA_LANES == 16
constexpr int kLanes = 16;
#elif RMEGA_LANES == 8
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

#define RMEGA_INLINE static inline __attribute__((always_inline))

RMEGA_INLINE Vec splat(float x) { return Vec{} + x; }

RMEGA_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

RMEGA_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }

RMEGA_INLINE Vec load(const bf16* p) {
#if RMEGA_LANES == 16
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(wide, 16));
#elif RMEGA_LANES == 8
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(wide, 16));
#else
  HalfVec half;
  __builtin_memcpy(&half, p, sizeof(half));
  return reinterpret_cast<Vec>(__builtin_convertvector(half, UintVec) << 16);
#endif
}

// The nearest bfloat16, ties to even, in the upper half of each lane; the lower half is arbitrary.
// A NaN stays one: the NaNs that come here are those of arithmetic or of bfloat16 inputs, whose low
// bits are zero, so nothing overflows.
RMEGA_INLINE UintVec round_bits(Vec x) {
  const UintVec u = reinterpret_cast<UintVec>(x);
  return u + 0x7fffu + ((u >> 16) & 1u);
}

RMEGA_INLINE void store(bf16* p, Vec x) {
  const UintVec u = round_bits(x) >> 16;
#if RMEGA_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(u)));
#elif RMEGA_LANES == 8
  const __m256i packed =
      _mm256_packus_epi32(reinterpret_cast<__m256i>(u), reinterpret_cast<__m256i>(u));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  const HalfVec half = __builtin_convertvector(u, HalfVec);
  __builtin_memcpy(p, &half, sizeof(half));
#endif
}

RMEGA_INLINE Vec round_to(const float*, Vec x) { return x; }
RMEGA_INLINE Vec round_to(const bf16*, Vec x) {
  return reinterpret_cast<Vec>(round_bits(x) & 0xffff0000u);
}

// The first n < kLanes elements, zeros behind them; and the same for a store.
template <typename T>
RMEGA_INLINE Vec load_some(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  __builtin_memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <typename T>
RMEGA_INLINE void store_some(T* p, Vec x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  __builtin_memcpy(p, buffer, n * sizeof(T));
}

template <bool whole, typename T>
RMEGA_INLINE Vec load_up_to(const T* p, int64_t n) {
  return whole ? load(p) : load_some(p, n);
}

template <bool whole, typename T>
RMEGA_INLINE void store_up_to(T* p, Vec x, int64_t n) {
  whole ? store(p, x) : store_some(p, x, n);
}

RMEGA_INLINE float sum_lanes(Vec x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) {
    sum += x[i];
  }
  return sum;
}

// The smaller or greater of x and a bound; NaN stays NaN.
RMEGA_INLINE Vec at_most(Vec x, float bound) {
#if RMEGA_LANES == 16
  return reinterpret_cast<Vec>(_mm512_min_ps(_mm512_set1_ps(bound), reinterpret_cast<__m512>(x)));
#else
  return x > splat(bound) ? splat(bound) : x;
#endif
}

RMEGA_INLINE Vec at_least(Vec x, float bound) {
#if RMEGA_LANES == 16
  return reinterpret_cast<Vec>(_mm512_max_ps(_mm512_set1_ps(bound), reinterpret_cast<__m512>(x)));
#else
  return x < splat(bound) ? splat(bound) : x;
#endif
}

// 1 / x for 1 <= x < 2^126. A division of 16 lanes takes longer than all the rest of a sigmoid; 14
// bits and one Newton step are good to 1 ulp.
RMEGA_INLINE Vec reciprocal(Vec x) {
#if RMEGA_LANES == 16
  const Vec r = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return r + r * (splat(1.0f) - x * r);
#else
  return splat(1.0f) / x;
#endif
}

// e^x, to about 1 ulp; x is held to +-86. NaN stays NaN.
RMEGA_INLINE Vec exp_of(Vec x) {
  x = at_least(at_most(x, 86.0f), -86.0f);
  const Vec shift =
      splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec shifted = x * splat(1.44269504f) + shift;
  const Vec n = shifted - shift;
  Vec r = x - n * splat(0.693359375f);  // ln 2 in two parts, the first exact in few bits
  r = r - n * splat(-2.12194440e-4f);
  Vec y = splat(1.9875691500e-4f);  // Cephes expf: e^r on [-ln2/2, ln2/2]
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * (r * r) + r + splat(1.0f);
  // y is in [0.7, 1.5): adding n to its exponent bits cannot leave the range.
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(y) +
                               (reinterpret_cast<IntVec>(shifted) << 23));
}

RMEGA_INLINE Vec sigmoid(Vec x) { return reciprocal(splat(1.0f) + exp_of(-x)); }

// ---- rms_norm
// -------------------------------------------------------------------------------------------------

template <typename T>
static void norm_forward(const T* x, const T* weight, T* y, float* inv, int64_t rows, int64_t h,
                         float eps) {
  const int64_t whole = h / kLanes * kLanes, rest = h - whole;
  for (int64_t row = 0; row < rows; ++row, x += h, y += h) {
    Vec sum0 = {}, sum1 = {}, sum2 = {}, sum3 = {};
    int64_t j = 0;
    for (; j + 4 * kLanes <= whole; j += 4 * kLanes) {
      const Vec x0 = load(x + j), x1 = load(x + j + kLanes);
      const Vec x2 = load(x + j + 2 * kLanes), x3 = load(x + j + 3 * kLanes);
      sum0 += x0 * x0;
      sum1 += x1 * x1;
      sum2 += x2 * x2;
      sum3 += x3 * x3;
    }
    for (; j < whole; j += kLanes) {
      const Vec x0 = load(x + j);
      sum0 += x0 * x0;
    }
    if (rest > 0) {
      const Vec x0 = load_some(x + whole, rest);
      sum1 += x0 * x0;
    }
    const float scale =
        1.0f / __builtin_sqrtf(sum_lanes((sum0 + sum1) + (sum2 + sum3)) / float(h) + eps);
    inv[row] = scale;
    for (j = 0; j < whole; j += kLanes) {
      store(y + j, load(weight + j) * round_to(x, load(x + j) * scale));
    }
    if (rest > 0) {
      store_some(y + j, load_some(weight + j, rest) * round_to(x, load_some(x + j, rest) * scale),
                 rest);
    }
  }
}

// dx = inv (w dy - x inv^2 mean(w dy x)), dweight = sum over rows of dy round(x inv)
template <typename T>
static void norm_backward(const T* dy, const T* x, const T* weight, const float* inv, T* dx,
                          float* dweight, int64_t rows, int64_t h) {
  const int64_t whole = h / kLanes * kLanes, rest = h - whole;
  for (int64_t row = 0; row < rows; ++row, x += h, dy += h, dx += h) {
    const float scale = inv[row];
    Vec sum0 = {}, sum1 = {};
    int64_t j = 0;
    for (; j + 2 * kLanes <= whole; j += 2 * kLanes) {
      const Vec x0 = load(x + j), x1 = load(x + j + kLanes);
      const Vec g0 = load(dy + j), g1 = load(dy + j + kLanes);
      store(dweight + j, load(dweight + j) + g0 * round_to(x, x0 * scale));
      store(dweight + j + kLanes, load(dweight + j + kLanes) + g1 * round_to(x, x1 * scale));
      sum0 += load(weight + j) * g0 * x0;
      sum1 += load(weight + j + kLanes) * g1 * x1;
    }
    for (; j < whole; j += kLanes) {
      const Vec x0 = load(x + j), g0 = load(dy + j);
      store(dweight + j, load(dweight + j) + g0 * round_to(x, x0 * scale));
      sum0 += load(weight + j) * g0 * x0;
    }
    if (rest > 0) {
      const Vec x0 = load_some(x + j, rest), g0 = load_some(dy + j, rest);
      store_some(dweight + j, load_some(dweight + j, rest) + g0 * round_to(x, x0 * scale), rest);
      sum1 += load_some(weight + j, rest) * g0 * x0;
    }
    const float shrink = sum_lanes(sum0 + sum1) / float(h) * scale * scale * scale;
    for (j = 0; j < whole; j += kLanes) {
      store(dx + j, load(weight + j) * load(dy + j) * scale - load(x + j) * shrink);
    }
    if (rest > 0) {
      store_some(dx + j,
                 load_some(weight + j, rest) * load_some(dy + j, rest) * scale -
                     load_some(x + j, rest) * shrink,
                 rest);
    }
  }
}

// ---- swiglu
// -------------------------------------------------------------------------------------------------

template <bool whole, typename T>
RMEGA_INLINE void glu_forward_at(const T* gate, const T* up, T* y, int64_t n) {
  const Vec g = load_up_to<whole>(gate, n);
  store_up_to<whole>(y, g * sigmoid(g) * load_up_to<whole>(up, n), n);
}

template <typename T>
static void glu_forward(const T* x, T* y, int64_t rows, int64_t f) {
  const int64_t whole = f / kLanes * kLanes;
  for (int64_t row = 0; row < rows; ++row, x += 2 * f, y += f) {
    for (int64_t j = 0; j < whole; j += kLanes) {
      glu_forward_at<true>(x + j, x + f + j, y + j, kLanes);
    }
    if (whole < f) {
      glu_forward_at<false>(x + whole, x + f + whole, y + whole, f - whole);
    }
  }
}

// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g)
template <bool whole, typename T>
RMEGA_INLINE void glu_backward_at(const T* dy, const T* gate, const T* up, T* dgate, T* dup,
                                  int64_t n) {
  const Vec g = load_up_to<whole>(gate, n), grad = load_up_to<whole>(dy, n), s = sigmoid(g);
  store_up_to<whole>(
      dgate, grad * load_up_to<whole>(up, n) * s * (splat(1.0f) + g * (splat(1.0f) - s)), n);
  store_up_to<whole>(dup, grad * (g * s), n);
}

template <typename T>
static void glu_backward(const T* dy, const T* x, T* dx, int64_t rows, int64_t f) {
  const int64_t whole = f / kLanes * kLanes;
  for (int64_t row = 0; row < rows; ++row, x += 2 * f, dx += 2 * f, dy += f) {
    for (int64_t j = 0; j < whole; j += kLanes) {
      glu_backward_at<true>(dy + j, x + j, x + f + j, dx + j, dx + f + j, kLanes);
    }
    if (whole < f) {
      glu_backward_at<false>(dy + whole, x + whole, x + f + whole, dx + whole, dx + f + whole,
                             f - whole);
    }
  }
}

// ---- rope
// -------------------------------------------------------------------------------------------------

template <bool whole, typename T, typename C>
RMEGA_INLINE void rotate_at(const T* x, const C* cos, const C* sin, T* y, int64_t half, float sign,
                            int64_t n) {
  const Vec c = load_up_to<whole>(cos, n), s = load_up_to<whole>(sin, n) * sign;
  const Vec x1 = load_up_to<whole>(x, n), x2 = load_up_to<whole>(x + half, n);
  store_up_to<whole>(y, x1 * c - x2 * s, n);
  store_up_to<whole>(y + half, x2 * c + x1 * s, n);
}

template <typename T, typename C>
static void rotate(const T* x, const C* cos, const C* sin, T* y, int64_t rows, int64_t a, int64_t d,
                   int64_t row_stride, int64_t head_stride, float sign) {
  const int64_t half = d / 2, whole = half / kLanes * kLanes;
  for (int64_t row = 0; row < rows; ++row, x += row_stride, cos += half, sin += half) {
    for (int64_t head = 0; head < a; ++head, y += d) {
      const T* from = x + head * head_stride;
      for (int64_t j = 0; j < whole; j += kLanes) {
        rotate_at<true>(from + j, cos + j, sin + j, y + j, half, sign, kLanes);
      }
      if (whole < half) {
        rotate_at<false>(from + whole, cos + whole, sin + whole, y + whole, half, sign,
                         half - whole);
      }
    }
  }
}

// ---- sums of rows
// -----------------------------------------------------------------------------------------------

template <typename T>
static void sum_rows(const T* const* sources, int64_t count, int64_t offset, T* out, int64_t n) {
  if (count <= 1) {
    count == 0 ? (void)__builtin_memset(out, 0, n * sizeof(T))
               : (void)__builtin_memcpy(out, sources[0] + offset, n * sizeof(T));
    return;
  }
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    Vec sum = load(sources[0] + offset + j);
    for (int64_t k = 1; k < count; ++k) {
      sum += load(sources[k] + offset + j);
    }
    store(out + j, sum);
  }
  if (whole < n) {
    Vec sum = {};
    for (int64_t k = 0; k < count; ++k) {
      sum += load_some(sources[k] + offset + whole, n - whole);
    }
    store_some(out + whole, sum, n - whole);
  }
}

// ---- pairs
// -------------------------------------------------------------------------------------------------

// ln x for normal positive x (Cephes logf), to about 1 ulp. NaN stays NaN.
RMEGA_INLINE Vec log_of(Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x);
  // The exponent that puts the mantissa into [1/sqrt 2, sqrt 2).
  const IntVec exponent = (bits - 0x3f3504f3) >> 23;
  const Vec m = reinterpret_cast<Vec>(bits - (exponent << 23)) - splat(1.0f);
  const Vec n = __builtin_convertvector(exponent, Vec);
  Vec y = splat(7.0376836292e-2f);
  y = y * m - splat(1.1514610310e-1f);
  y = y * m + splat(1.1676998740e-1f);
  y = y * m - splat(1.2420140846e-1f);
  y = y * m + splat(1.4249322787e-1f);
  y = y * m - splat(1.6668057665e-1f);
  y = y * m + splat(2.0000714765e-1f);
  y = y * m - splat(2.4999993993e-1f);
  y = y * m + splat(3.3333331174e-1f);
  const Vec square = m * m;
  y = y * m * square + n * splat(-2.12194440e-4f) - splat(0.5f) * square;
  y = m + y + n * splat(0.693359375f);
  return x == x ? y : x;
}

// ln(1 + e) for 0 <= e <= 1, with the rounding of 1 + e made good.
RMEGA_INLINE Vec log1p_of(Vec e) {
  const Vec u = splat(1.0f) + e;
  return log_of(u) + (e - (u - splat(1.0f))) * reciprocal(u);
}

RMEGA_INLINE Vec absolute(Vec x) {
  return reinterpret_cast<Vec>(reinterpret_cast<UintVec>(x) & 0x7fffffffu);
}

// As log_barrier of pair_math.h.
RMEGA_INLINE Vec barrier_of(Vec s, bool clamped, Vec* slope) {
  const Vec edge = splat(float(5.0 - 1e-3)), a = absolute(s);
  const Vec product = (splat(5.0f) - a) * (splat(5.0f) + a);
  const Vec outside_rise = splat(clamped ? 0.0f : float(2 * 4.999 / (25.0 - 4.999 * 4.999)));
  const Vec outside = splat(4.605270190988424f) + (clamped ? Vec{} : outside_rise * (a - edge));
  const Vec rise = a > edge ? outside_rise : splat(2.0f) * a / product;
  *slope = s < splat(0) ? -rise : rise;
  return a > edge ? outside : -log_of(product);
}

// In double and in 16 parts, whatever the lanes: every instruction set gives the same sum.
RMEGA_INLINE double sum_of(const float* x, int64_t n) {
  double part[16] = {};
  for (int64_t i = 0; i < n; i += 16) {
    for (int64_t j = 0; j < 16; ++j) {
      part[j] += static_cast<double>(x[i + j]);
    }
  }
  for (int64_t width = 8; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) {
      part[j] += part[j + width];
    }
  }
  return part[0];
}

RMEGA_INLINE double lanes_of(Vec x) {
  double sum = 0;
  for (int64_t j = 0; j < kLanes; ++j) {
    sum += static_cast<double>(x[j]);
  }
  return sum;
}

static void pair_terms(PairBlock& block, int64_t m, const LossOptions& options) {
  const Vec zero = {}, one = splat(1.0f), smoothing = splat(float(options.label_smoothing));
  const Vec penalty_weight = splat(float(options.penalty_weight));
  const int64_t padded = (m + 15) / 16 * 16;
  Vec wins = {}, ties = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vec c = load(block.chosen + i), r = load(block.rejected + i),
              weight = load(block.weight + i), d = c - r;
    const Vec x = d - load(block.margin + i), a = absolute(x);
    wins += d > zero ? one : zero;
    ties += d == zero ? one : zero;
    store(block.distance + i, absolute(d));
    const Vec e = exp_of(-a), part = reciprocal(one + e);
    const Vec q = x < zero ? part : e * part;  // sigmoid(-x)
    Vec base = (x < zero ? a : zero) + log1p_of(e) + smoothing * x;
    Vec slope = smoothing - q;
    if (options.loss == Loss::focal) {
      const Vec factor = splat(4.0f) * q * q;
      slope = x > zero ? factor * (slope - splat(2.0f) * (one - q) * base) : slope;
      base = x > zero ? factor * base : base;
    }
    Vec penalty = {}, slope_c = {}, slope_r = {};
    if (options.penalty == Penalty::log_barrier) {
      penalty = barrier_of(c, options.barrier_clamp, &slope_c);
      penalty += barrier_of(r, options.barrier_clamp, &slope_r);
    } else if (options.penalty == Penalty::l2) {
      penalty = c * c + r * r;
      slope_c = c + c;
      slope_r = r + r;
    } else if (options.penalty == Penalty::center) {
      penalty = (c + r) * (c + r);
      slope_c = slope_r = splat(2.0f) * (c + r);
    }
    store(block.base + i, weight * base);
    store(block.penalty + i, weight * penalty_weight * penalty);
    store(block.grad_chosen + i, weight * (slope + penalty_weight * slope_c));
    store(block.grad_rejected + i, weight * (penalty_weight * slope_r - slope));
  }
  block.sum_base = sum_of(block.base, padded);
  block.sum_penalty = sum_of(block.penalty, padded);
  block.sum_chosen = sum_of(block.chosen, padded);
  block.sum_rejected = sum_of(block.rejected, padded);
  block.sum_distance = sum_of(block.distance, padded);
  block.wins = lanes_of(wins);
  block.ties = lanes_of(ties) - static_cast<double>(padded - m);
}

#define RMEGA_ELEMENTWISE_TABLE                 \
  {{norm_forward<float>, norm_backward<float>}, \
   {norm_forward<bf16>, norm_backward<bf16>},   \
   {glu_forward<float>, glu_backward<float>},   \
   {glu_forward<bf16>, glu_backward<bf16>},     \
   {rotate<float, float>},                      \
   {rotate<bf16, bf16>},                        \
   {rotate<bf16, float>},                       \
   {sum_rows<float>},                           \
   {sum_rows<bf16>},                            \
   pair_terms}
