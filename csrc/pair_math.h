// One pair's loss, penalty and gradient: the same arithmetic on CPU and GPU. Formulas:
// rmega/ops/loss.py, pairwise_loss. T is float or double, the type that everything is computed in.
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
  T base, penalty;  // both times the pair's weight, penalty also times penalty_weight
  T grad_chosen, grad_rejected;
};

// B(s) = -ln(5 - s) - ln(5 + s) for |s| <= edge; beyond, its tangent at the edge or (clamped) its
// value there.
template <typename T>
RMEGA_HOST_DEVICE T log_barrier(T s, bool clamped, T* slope) {
  const T edge = T(5.0 - 1e-3);
  const T a = s < T(0) ? -s : s;
  T value, rise;
  if (a > edge) {
    rise = clamped ? T(0) : T(2 * 4.999 / (25.0 - 4.999 * 4.999));
    value = T(4.605270190988424) + rise * (a - edge);  // -ln(0.001) - ln(9.999)
  } else {                                             // NaN comes here and stays NaN
    rise = T(2) * a / ((T(5) - a) * (T(5) + a));
    value = -std::log(T(5) - a) - std::log(T(5) + a);
  }
  *slope = s < T(0) ? -rise : rise;
  return value;
}

// The term of a pair whose base loss and its derivative by chosen - rejected are known: both times
// `weight`, the penalty times `penalty_weight`.
template <typename T>
RMEGA_HOST_DEVICE PairTerm<T> with_penalty(T chosen, T rejected, T base, T slope, T weight,
                                           T penalty_weight, const LossOptions& options) {
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
  return {weight * base, penalty_weight * penalty, weight * slope + penalty_weight * slope_c,
          penalty_weight * slope_r - weight * slope};
}

template <typename T>
RMEGA_HOST_DEVICE PairTerm<T> pair_term(T chosen, T rejected, T margin, T weight,
                                        const LossOptions& options) {
  const T x = chosen - rejected - margin;
  const T a = x < T(0) ? -x : x;
  const T e = std::exp(-a);
  const T q = x < T(0) ? T(1) / (T(1) + e) : e / (T(1) + e);  // sigmoid(-x)
  const T smoothing = T(options.label_smoothing);
  T base = (x < T(0) ? a : T(0)) + std::log1p(e) + smoothing * x;
  T slope = smoothing - q;
  if (options.loss == Loss::focal && x > T(0)) {
    const T factor =
        T(4) * q * q;  // (1 - 2 (sigmoid(x) - 1/2))^2, its derivative -8 sigmoid(x) sigmoid(-x)^2
    slope = factor * (slope - T(2) * (T(1) - q) * base);
    base = factor * base;
  }
  return with_penalty(chosen, rejected, base, slope, weight, weight * T(options.penalty_weight),
                      options);
}

// Plackett-Luce: the pairs first .. last, which share `chosen`, are one choice among chosen and all
// its rejected ones. Its loss is log(1 + sum of exp(-x)) over them, computed as `shift` + log(1 +
// `others`) from the largest -x (or 0).
template <typename T>
struct Choice {
  int64_t first, last;
  T shift, others, weight;  // weight: mean over the pairs
};

// The choice that pair i of m belongs to. reward(row) reads a reward.
template <typename T, typename Reward>
RMEGA_HOST_DEVICE Choice<T> choice_of(int64_t i, const int64_t* chosen, const int64_t* rejected,
                                      const T* margin, const T* weight, int64_t m, Reward reward) {
  Choice<T> choice{i, i + 1, T(0), T(0), T(0)};
  while (choice.first > 0 && chosen[choice.first - 1] == chosen[i]) {
    --choice.first;
  }
  while (choice.last < m && chosen[choice.last] == chosen[i]) {
    ++choice.last;
  }
  const T c = reward(chosen[i]);
  int64_t top = -1;  // the pair with the largest -x; -1: the chosen one itself, whose -x is 0
  for (int64_t p = choice.first; p < choice.last; ++p) {
    const T y = reward(rejected[p]) + margin[p] - c;
    choice.weight += weight[p];
    if (y > choice.shift || y != y) {  // NaN comes here and stays NaN
      choice.shift = y;
      top = p;
    }
  }
  choice.weight /= T(choice.last - choice.first);
  choice.others = top < 0 ? T(0) : std::exp(-choice.shift);
  for (int64_t p = choice.first; p < choice.last; ++p) {
    if (p != top) {
      choice.others += std::exp(reward(rejected[p]) + margin[p] - c - choice.shift);
    }
  }
  return choice;
}

// Pair p of its choice. The loss of the choice counts with its first pair, its penalty is the mean
// over its pairs.
template <typename T>
RMEGA_HOST_DEVICE PairTerm<T> choice_term(const Choice<T>& choice, int64_t p, T chosen, T rejected,
                                          T margin, T weight, const LossOptions& options) {
  const T base = p == choice.first ? choice.shift + std::log1p(choice.others) : T(0);
  const T slope = -std::exp(rejected + margin - chosen - choice.shift) /
                  (T(1) + choice.others);  // -P(rejected wins)
  const T penalty_weight = weight * T(options.penalty_weight) / T(choice.last - choice.first);
  return with_penalty(chosen, rejected, base, slope, choice.weight, penalty_weight, options);
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
