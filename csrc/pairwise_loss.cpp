// pairwise_loss: the sum over m pairs, what is reported of it, and the gradient of the sum wrt
// rewards [n], in one pass.
#include <algorithm>

#include "cpu/elementwise.h"
#include "pair_math.h"
#include "rmega_ops.h"

namespace rmega {
namespace {

LossOptions read_options(c10::string_view loss, c10::string_view penalty, double penalty_weight,
                         double label_smoothing, bool barrier_clamp) {
  LossOptions options{Loss::ranking, Penalty::none, penalty_weight, label_smoothing, barrier_clamp};
  if (loss == "plackett_luce") {
    TORCH_CHECK(label_smoothing == 0, "pairwise_loss: plackett_luce has no label smoothing, got ",
                label_smoothing);
    options.loss = Loss::plackett_luce;
  } else {
    TORCH_CHECK(loss == "ranking" || loss == "focal", "pairwise_loss: unknown loss '", loss, "'");
    options.loss = loss == "focal" ? Loss::focal : Loss::ranking;
  }
  if (penalty == "log_barrier") {
    options.penalty = Penalty::log_barrier;
  } else if (penalty == "l2") {
    options.penalty = Penalty::l2;
  } else if (penalty == "center") {
    options.penalty = Penalty::center;
  } else {
    TORCH_CHECK(penalty == "none", "pairwise_loss: unknown penalty '", penalty, "'");
  }
  return options;
}

void check_pair(int64_t i, int64_t c, int64_t r, int64_t n) {
  TORCH_CHECK_INDEX(c >= 0 && c < n && r >= 0 && r < n, "pairwise_loss: pair ", i, " is (", c, ", ",
                    r, ") with n = ", n);
}

// Pairs in their order, so that a reward that is in many pairs has its gradients added in one
// order.
template <typename R>
void run(const R* rewards, const int64_t* chosen, const int64_t* rejected, const float* margin,
         const float* weight, float* loss, float* stats, float* grad, int64_t n, int64_t m,
         const LossOptions& options) {
  const auto terms = elementwise_kernels().pairs;
  PairSums sums;
  PairBlock block;
  for (int64_t first = 0; first < m; first += kPairs) {
    const int64_t count = std::min(kPairs, m - first), padded = (count + 15) / 16 * 16;
    const int64_t *c = chosen + first, *r = rejected + first;
    for (int64_t i = 0; i < count; ++i) {
      check_pair(first + i, c[i], r[i], n);
      block.chosen[i] = static_cast<float>(rewards[c[i]]);
      block.rejected[i] = static_cast<float>(rewards[r[i]]);
    }
    std::copy_n(margin + first, count, block.margin);
    std::copy_n(weight + first, count, block.weight);
    for (float* part : {block.chosen, block.rejected, block.margin, block.weight}) {
      std::fill(part + count, part + padded, 0.0f);
    }
    terms(block, count, options);
    for (int64_t i = 0; i < count; ++i) {
      grad[c[i]] += block.grad_chosen[i];
      grad[r[i]] += block.grad_rejected[i];
    }
    sums.base += block.sum_base;
    sums.penalty += block.sum_penalty;
    sums.wins += block.wins;
    sums.ties += block.ties;
    sums.chosen += block.sum_chosen;
    sums.rejected += block.sum_rejected;
    sums.abs_diff += block.sum_distance;
  }
  sums.write(loss, stats, m);
}

void run(const double* rewards, const int64_t* chosen, const int64_t* rejected,
         const double* margin, const double* weight, double* loss, double* stats, double* grad,
         int64_t n, int64_t m, const LossOptions& options) {
  PairSums sums;
  for (int64_t i = 0; i < m; ++i) {
    const int64_t c = chosen[i], r = rejected[i];
    check_pair(i, c, r, n);
    const PairTerm<double> term =
        pair_term<double>(rewards[c], rewards[r], margin[i], weight[i], options);
    sums.add(term, rewards[c], rewards[r]);
    grad[c] += term.grad_chosen;
    grad[r] += term.grad_rejected;
  }
  sums.write(loss, stats, m);
}

// Plackett-Luce, a choice at a time. A pack has few pairs, so nothing is gained from vectors.
template <typename R, typename T>
void run_choices(const R* rewards, const int64_t* chosen, const int64_t* rejected, const T* margin,
                 const T* weight, T* loss, T* stats, T* grad, int64_t n, int64_t m,
                 const LossOptions& options) {
  const auto reward = [&](int64_t row) { return static_cast<T>(rewards[row]); };
  PairSums sums;
  for (int64_t i = 0; i < m; ++i) {
    check_pair(i, chosen[i], rejected[i], n);
  }
  for (int64_t first = 0; first < m;) {
    const Choice<T> choice = choice_of<T>(first, chosen, rejected, margin, weight, m, reward);
    const int64_t c = chosen[first];
    for (int64_t p = first; p < choice.last; ++p) {
      const int64_t r = rejected[p];
      const auto term =
          choice_term<T>(choice, p, reward(c), reward(r), margin[p], weight[p], options);
      sums.add(term, reward(c), reward(r));
      grad[c] += term.grad_chosen;
      grad[r] += term.grad_rejected;
    }
    first = choice.last;
  }
  sums.write(loss, stats, m);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> pairwise_loss(
    const at::Tensor& rewards, const at::Tensor& chosen, const at::Tensor& rejected,
    const at::Tensor& margin, const at::Tensor& weight, c10::string_view loss,
    c10::string_view penalty, double penalty_weight, double label_smoothing, bool barrier_clamp) {
  const LossOptions options =
      read_options(loss, penalty, penalty_weight, label_smoothing, barrier_clamp);
  TORCH_CHECK(rewards.dim() == 1, "pairwise_loss: rewards must be [n], got ", rewards.sizes());
  for (const auto& [index, name] :
       {std::pair(&chosen, "chosen"), std::pair(&rejected, "rejected")}) {
    TORCH_CHECK(index->dim() == 1 && index->scalar_type() == at::kLong, "pairwise_loss: ", name,
                " must be int64 [m], got ", index->scalar_type(), " ", index->sizes());
  }
  for (const auto& [tensor, name] : {std::pair(&rejected, "rejected"), std::pair(&margin, "margin"),
                                     std::pair(&weight, "weight")}) {
    TORCH_CHECK(tensor->sizes() == chosen.sizes(), "pairwise_loss: ", name, " ", tensor->sizes(),
                " for chosen ", chosen.sizes());
  }
  for (const at::Tensor* tensor : {&chosen, &rejected, &margin, &weight}) {
    TORCH_CHECK(tensor->device() == rewards.device(), "pairwise_loss: rewards on ",
                rewards.device(), ", another input on ", tensor->device());
  }
  const int64_t n = rewards.size(0), m = chosen.size(0);
  const auto compute = rewards.options().dtype(accumulate_type(rewards));
  const at::Tensor scores = rewards.contiguous(), index_c = chosen.contiguous(),
                   index_r = rejected.contiguous();
  const at::Tensor margins = margin.to(compute.dtype()).contiguous(),
                   weights = weight.to(compute.dtype()).contiguous();
  const int64_t* c = index_c.const_data_ptr<int64_t>();
  const int64_t* r = index_r.const_data_ptr<int64_t>();
  at::Tensor total = at::empty({}, compute), stats = at::empty({kNumStats}, compute);
  if (rewards.is_cuda()) {
    at::Tensor grad = at::empty({n}, compute);
    RMEGA_CUDA_CALL(rewards,
                    launch_pairwise_loss(scores.const_data_ptr(), c, r, margins.const_data_ptr(),
                                         weights.const_data_ptr(), total.mutable_data_ptr(),
                                         stats.mutable_data_ptr(), grad.mutable_data_ptr(), n, m,
                                         dtype_of(rewards), options, stream));
    return {total, stats, grad};
  }
  at::Tensor grad = at::zeros({n}, compute);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, rewards.scalar_type(), "pairwise_loss", [&] {
        using T = at::opmath_type<scalar_t>;
        const auto any = [&](auto&& kernel) {
          kernel(scores.const_data_ptr<scalar_t>(), c, r, margins.const_data_ptr<T>(),
                 weights.const_data_ptr<T>(), total.mutable_data_ptr<T>(),
                 stats.mutable_data_ptr<T>(), grad.mutable_data_ptr<T>(), n, m, options);
        };
        if (options.loss == Loss::plackett_luce) {
          any(run_choices<scalar_t, T>);
        } else {
          any([](auto... inputs) { run(inputs...); });
        }
      });
  return {total, stats, grad};
}

}  // namespace rmega
