// One pair's loss, penalty and gradient: the same arithmetic on CPU and GPU. Formulas: rmega/ops.py, pairwise_loss.
// T is float or double, the type that everything is computed in.
#pragma once

#include <cmath>
#include <cstdint>

#include "launchers.h"

#ifdef __CUDACC__
#define RMEGA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RMEGA_HOST_DEVICE inline
#endif

namespace rmega {

template <typename T>
struct PairTerm {
  T base, penalty;            // both times the pair's weight, penalty also times penalty_weight
  T grad_chosen, grad_rejected;
};

// B(s) = -ln(5 - s) - ln(5 + s) for |s| <= edge; beyond, its tangent at the edge or (clamped) its value there.
template <typename T>
RMEGA_HOST_DEVICE T log_barrier(T s, bool clamped, T* slope) {
  const T edge = T(5.0 - 1e-3);
  const T a = s < T(0) ? -s : s;
  T value, rise;
  if (a > edge) {
    rise = clamped ? T(0) : T(2 * 4.999 / (25.0 - 4.999 * 4.999));
    value = T(4.605270190988424) + rise * (a - edge);  // -ln(0.001) - ln(9.999)
  } else {  // NaN comes here and stays NaN
    rise = T(2) * a / ((T(5) - a) * (T(5) + a));
    value = -std::log(T(5) - a) - std::log(T(5) + a);
  }
  *slope = s < T(0) ? -rise : rise;
  return value;
}

template <typename T>
RMEGA_HOST_DEVICE PairTerm<T> pair_term(T chosen, T rejected, T margin, T weight, const LossOptions& options) {
  const T x = chosen - rejected - margin;
  const T a = x < T(0) ? -x : x;
  const T e = std::exp(-a);
  const T q = x < T(0) ? T(1) / (T(1) + e) : e / (T(1) + e);  // sigmoid(-x)
  const T smoothing = T(options.label_smoothing);
  T base = (x < T(0) ? a : T(0)) + std::log1p(e) + smoothing * x;
  T slope = smoothing - q;
  if (options.loss == Loss::focal && x > T(0)) {
    const T factor = T(4) * q * q;  // (1 - 2 (sigmoid(x) - 1/2))^2, its derivative -8 sigmoid(x) sigmoid(-x)^2
    slope = factor * (slope - T(2) * (T(1) - q) * base);
    base = factor * base;
  }
  T penalty = T(0), slope_c = T(0), slope_r = T(0);
  if (options.penalty == Penalty::log_barrier) {
    penalty = log_barrier(chosen, options.barrier_clamp, &slope_c);
    penalty += log_barrier(rejected, options.barrier_clamp, &slope_r);
  } else if (options.penalty == Penalty::l2) {
    penalty = chosen * chosen + rejected * rejected;
    slope_c = T(2) * chosen;
    slope_r = T(2) * rejected;
  } else if (options.penalty == Penalty::center) {
    const T sum = chosen + rejected;
    penalty = sum * sum;
    slope_c = slope_r = T(2) * sum;
  }
  const T penalty_weight = T(options.penalty_weight);
  return {weight * base, weight * penalty_weight * penalty, weight * (slope + penalty_weight * slope_c),
          weight * (penalty_weight * slope_r - slope)};
}

// Running sums behind the reported numbers, in double whatever T is.
struct PairSums {
  double base = 0, penalty = 0, wins = 0, ties = 0, chosen = 0, rejected = 0, abs_diff = 0;

  template <typename T>
  RMEGA_HOST_DEVICE void add(const PairTerm<T>& term, T c, T r) {
    const T d = c - r;
    base += double(term.base);
    penalty += double(term.penalty);
    wins += d > T(0) ? 1.0 : 0.0;
    ties += d == T(0) ? 1.0 : 0.0;
    chosen += double(c);
    rejected += double(r);
    abs_diff += double(d < T(0) ? -d : d);
  }

  template <typename T>
  RMEGA_HOST_DEVICE void write(T* loss, T* stats, int64_t m) const {
    loss[0] = T(base + penalty);
    stats[0] = T(m);
    stats[1] = T(base);
    stats[2] = T(penalty);
    stats[3] = T(wins + 0.5 * ties);
    stats[4] = T(ties);
    stats[5] = T(chosen);
    stats[6] = T(rejected);
    stats[7] = T(abs_diff);
  }
};

}  // namespace rmega
