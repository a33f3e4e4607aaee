// Schemas of the operators in the namespace rmega, their kernels per device, and their derivatives.
// In C++ because a derivative registered from Python costs ten times what the smaller of these
// operators take; rmega/ops/ adds the fake (shape-only) kernels.
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "rmega_ops.h"

namespace rmega {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Two = std::tuple<Tensor, Tensor>;

// The operator of that name, through the dispatcher; looked up once per call site.
#define RMEGA_OP(name, ...)                                                                      \
  ([]() -> auto& {                                                                               \
    static auto op =                                                                             \
        c10::Dispatcher::singleton().findSchemaOrThrow("rmega::" name, "").typed<__VA_ARGS__>(); \
    return op;                                                                                   \
  }())

Tensor pairwise_loss_backward(const Tensor& grad, const Tensor& upstream, at::ScalarType dtype) {
  return grad.mul(upstream).to(dtype);
}

// A node of its own instead of a Function, whose bookkeeping takes longer than gathering a few
// rows.
struct GatherLastTokenNode : torch::autograd::Node {
  torch::autograd::SavedVariable last;
  c10::SymInt t;

  std::string name() const override { return "GatherLastTokenBackward"; }

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) {
      return {Tensor()};
    }
    return {
        RMEGA_OP("gather_last_token_backward", Tensor(const Tensor&, const Tensor&, c10::SymInt))
            .call(grads[0], last.unpack(), t)};
  }

  void release_variables() override { last.reset_data(); }
};

// How this torch points to nodes: std::shared_ptr up to 2.12, c10::intrusive_ptr after it.
using NodePointer = std::decay_t<decltype(torch::autograd::Edge::function)>;

template <typename T>
auto make_node() {
  if constexpr (std::is_same_v<NodePointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<T>();
  } else {
    return c10::make_intrusive<T>();
  }
}

Tensor gather_last_token_autograd(const Tensor& hidden, const Tensor& last) {
  TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(hidden),
                              "gather_last_token has no forward-mode derivative");
  decltype(make_node<GatherLastTokenNode>()) node;
  if (torch::autograd::compute_requires_grad(hidden)) {
    node = make_node<GatherLastTokenNode>();
    node->set_next_edges(torch::autograd::collect_next_edges(hidden));
    node->last = torch::autograd::SavedVariable(last, false);
    node->t = hidden.sym_size(0);
  }
  Tensor out;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    out = RMEGA_OP("gather_last_token", Tensor(const Tensor&, const Tensor&)).call(hidden, last);
  }
  if (node) {
    torch::autograd::set_history(out, node);
  }
  return out;
}

struct GatherLastTokenBackward : Function<GatherLastTokenBackward> {
  static Tensor forward(AutogradContext* ctx, const Tensor& grad, const Tensor& last,
                        const c10::SymInt& t) {
    ctx->save_for_backward({last});
    at::AutoDispatchBelowADInplaceOrView below;
    return RMEGA_OP("gather_last_token_backward", Tensor(const Tensor&, const Tensor&, c10::SymInt))
        .call(grad, last, t);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& op = RMEGA_OP("gather_last_token", Tensor(const Tensor&, const Tensor&));
    return {op.call(grads[0], ctx->get_saved_variables()[0]), Tensor(), Tensor()};
  }
};

struct PairwiseLoss : Function<PairwiseLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& rewards, const Tensor& chosen,
                               const Tensor& rejected, const Tensor& margin, const Tensor& weight,
                               std::string loss, std::string penalty, double penalty_weight,
                               double label_smoothing, bool barrier_clamp) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [total, stats, grad] =
        RMEGA_OP("pairwise_loss",
                 Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                       c10::string_view, c10::string_view, double, double, bool))
            .call(rewards, chosen, rejected, margin, weight, loss, penalty, penalty_weight,
                  label_smoothing, barrier_clamp);
    ctx->mark_non_differentiable({stats, grad});
    ctx->save_for_backward({grad});
    ctx->saved_data["dtype"] = static_cast<int64_t>(rewards.scalar_type());
    return {total, stats, grad};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& op =
        RMEGA_OP("pairwise_loss_backward", Tensor(const Tensor&, const Tensor&, at::ScalarType));
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    variable_list result(10);
    result[0] = op.call(ctx->get_saved_variables()[0], grads[0], dtype);
    return result;
  }
};

// Gather and scatter are each other's derivative: `forwards` chooses.
using GatherPrefixSchema = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                  const Tensor&, c10::SymInt, const std::optional<Tensor>&);

Tensor gather_or_scatter(bool forwards, const Tensor& x, const variable_list& columns,
                         const c10::SymInt& rows) {
  const auto index = columns[4].defined() ? std::optional<Tensor>(columns[4]) : std::nullopt;
  return forwards ? RMEGA_OP("gather_prefix_kv", GatherPrefixSchema)
                        .call(x, columns[0], columns[1], columns[2], columns[3], rows, index)
                  : RMEGA_OP("gather_prefix_kv_backward", GatherPrefixSchema)
                        .call(x, columns[0], columns[1], columns[2], columns[3], rows, index);
}

struct GatherPrefix : Function<GatherPrefix> {
  static Tensor forward(AutogradContext* ctx, bool forwards, const Tensor& x,
                        const Tensor& prefix_start, const Tensor& prefix_len,
                        const Tensor& own_start, const Tensor& own_len, const c10::SymInt& rows,
                        const std::optional<Tensor>& index) {
    const variable_list columns = {prefix_start, prefix_len, own_start, own_len,
                                   index.value_or(Tensor())};
    ctx->save_for_backward(columns);
    ctx->saved_data["forwards"] = forwards;
    ctx->saved_data["rows"] = x.sym_size(0);
    at::AutoDispatchBelowADInplaceOrView below;
    return gather_or_scatter(forwards, x, columns, rows);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(8);
    result[1] = gather_or_scatter(!ctx->saved_data["forwards"].toBool(), grads[0],
                                  ctx->get_saved_variables(), ctx->saved_data["rows"].toSymInt());
    return result;
  }
};

struct QkvRope : Function<QkvRope> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos,
                               const Tensor& sin, const Tensor& index, int64_t heads,
                               int64_t groups) {
    ctx->save_for_backward({cos, sin, index});
    at::AutoDispatchBelowADInplaceOrView below;
    auto [query, key, value] =
        RMEGA_OP("qkv_rope", Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                   int64_t, int64_t))
            .call(x, cos, sin, index, heads, groups);
    return {query, key, value};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto& op = RMEGA_OP("qkv_rope_backward", Tensor(const Tensor&, const Tensor&, const Tensor&,
                                                    const Tensor&, const Tensor&, const Tensor&));
    variable_list result(6);
    result[0] = op.call(grads[0], grads[1], grads[2], saved[0], saved[1], saved[2]);
    return result;
  }
};

struct QkvNormRope : Function<QkvNormRope> {
  using Schema = Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                       const Tensor&, int64_t, int64_t, double);
  using Backward = Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         const Tensor&, const Tensor&, const Tensor&, const Tensor&, double);
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& q_weight,
                               const Tensor& k_weight, const Tensor& cos, const Tensor& sin,
                               const Tensor& index, int64_t heads, int64_t groups, double eps) {
    ctx->save_for_backward({x, q_weight, k_weight, cos, sin, index});
    ctx->saved_data["eps"] = eps;
    at::AutoDispatchBelowADInplaceOrView below;
    auto [query, key, value] =
        RMEGA_OP("qkv_norm_rope", Schema)
            .call(x, q_weight, k_weight, cos, sin, index, heads, groups, eps);
    return {query, key, value};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [dx, dq_weight, dk_weight] =
        RMEGA_OP("qkv_norm_rope_backward", Backward)
            .call(grads[0], grads[1], grads[2], saved[0], saved[1], saved[2], saved[3], saved[4],
                  saved[5], ctx->saved_data["eps"].toDouble());
    variable_list result(9);
    result[0] = dx, result[1] = dq_weight, result[2] = dk_weight;
    return result;
  }
};

struct RmsNorm : Function<RmsNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, inv] =
        RMEGA_OP("rms_norm", Two(const Tensor&, const Tensor&, double)).call(x, weight, eps);
    ctx->mark_non_differentiable({inv});
    ctx->save_for_backward({x, weight, inv});
    return {y, inv};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [dx, dweight] = RMEGA_OP("rms_norm_backward",
                                  Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&))
                             .call(grads[0], saved[0], saved[1], saved[2]);
    return {dx, dweight, Tensor()};
  }
};

struct AddRmsNorm : Function<AddRmsNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual,
                               const Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [total, y, inv] =
        RMEGA_OP("add_rms_norm", Three(const Tensor&, const Tensor&, const Tensor&, double))
            .call(x, residual, weight, eps);
    ctx->mark_non_differentiable({inv});
    ctx->save_for_backward({total, weight, inv});
    return {total, y, inv};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    auto [dx, dweight] =
        RMEGA_OP("add_rms_norm_backward",
                 Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&))
            .call(grads[0], grads[1], saved[0], saved[1], saved[2]);
    return {dx, dx, dweight, Tensor()};
  }
};

struct SwiGlu : Function<SwiGlu> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    ctx->save_for_backward({x});
    at::AutoDispatchBelowADInplaceOrView below;
    return RMEGA_OP("swiglu", Tensor(const Tensor&)).call(x);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    auto& op = RMEGA_OP("swiglu_backward", Tensor(const Tensor&, const Tensor&));
    return {op.call(grads[0], ctx->get_saved_variables()[0])};
  }
};

// The derivative of a rotation is the rotation backwards.
struct Rope : Function<Rope> {
  using Schema = Tensor(const Tensor&, const Tensor&, const Tensor&, bool);
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& cos, const Tensor& sin,
                        bool backwards) {
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["backwards"] = backwards;
    at::AutoDispatchBelowADInplaceOrView below;
    return RMEGA_OP("rope", Schema).call(x, cos, sin, backwards);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto tables = ctx->get_saved_variables();
    const bool backwards = ctx->saved_data["backwards"].toBool();
    return {RMEGA_OP("rope", Schema).call(grads[0], tables[0], tables[1], !backwards), Tensor(),
            Tensor(), Tensor()};
  }
};

Three pairwise_loss_autograd(const Tensor& rewards, const Tensor& chosen, const Tensor& rejected,
                             const Tensor& margin, const Tensor& weight, c10::string_view loss,
                             c10::string_view penalty, double penalty_weight,
                             double label_smoothing, bool barrier_clamp) {
  const auto out =
      PairwiseLoss::apply(rewards, chosen, rejected, margin, weight, std::string(loss),
                          std::string(penalty), penalty_weight, label_smoothing, barrier_clamp);
  return {out[0], out[1], out[2]};
}

Two rms_norm_autograd(const Tensor& x, const Tensor& weight, double eps) {
  const auto out = RmsNorm::apply(x, weight, eps);
  return {out[0], out[1]};
}

Three add_rms_norm_autograd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                            double eps) {
  const auto out = AddRmsNorm::apply(x, residual, weight, eps);
  return {out[0], out[1], out[2]};
}

Three qkv_rope_autograd(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& index,
                        int64_t heads, int64_t groups) {
  const auto out = QkvRope::apply(x, cos, sin, index, heads, groups);
  return {out[0], out[1], out[2]};
}

Three qkv_norm_rope_autograd(const Tensor& x, const Tensor& q_weight, const Tensor& k_weight,
                             const Tensor& cos, const Tensor& sin, const Tensor& index,
                             int64_t heads, int64_t groups, double eps) {
  const auto out =
      QkvNormRope::apply(x, q_weight, k_weight, cos, sin, index, heads, groups, eps);
  return {out[0], out[1], out[2]};
}

TORCH_LIBRARY_FRAGMENT(rmega, m) {
  m.def("gather_last_token(Tensor hidden, Tensor last) -> Tensor");
  m.def("gather_last_token_backward(Tensor grad, Tensor last, SymInt t) -> Tensor");
  m.def(
      "pairwise_loss(Tensor rewards, Tensor chosen, Tensor rejected, Tensor margin, "
      "Tensor weight, str loss, str penalty, float penalty_weight, float label_smoothing, "
      "bool barrier_clamp) -> (Tensor, Tensor, Tensor)");
  m.def("pairwise_loss_backward(Tensor grad, Tensor upstream, ScalarType dtype) -> Tensor");
  m.def(
      "prefix_index(Tensor prefix_start, Tensor prefix_len, Tensor own_start, Tensor own_len, "
      "int t) -> Tensor");
  m.def(
      "gather_prefix_kv(Tensor x, Tensor prefix_start, Tensor prefix_len, Tensor own_start, "
      "Tensor own_len, SymInt total, Tensor? index=None) -> Tensor");
  m.def(
      "gather_prefix_kv_backward(Tensor grad, Tensor prefix_start, Tensor prefix_len, "
      "Tensor own_start, Tensor own_len, SymInt t, Tensor? index=None) -> Tensor");
  m.def(
      "qkv_rope(Tensor x, Tensor cos, Tensor sin, Tensor index, int heads, int groups) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "qkv_rope_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor cos, "
      "Tensor sin, Tensor index) -> Tensor");
  m.def(
      "qkv_norm_rope(Tensor x, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
      "Tensor index, int heads, int groups, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "qkv_norm_rope_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor x, "
      "Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor index, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "add_rms_norm_backward(Tensor grad_total, Tensor grad, Tensor total, Tensor weight, "
      "Tensor inv) -> (Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inv) -> (Tensor, Tensor)");
  m.def("swiglu(Tensor x) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool backwards) -> Tensor");
}

void every_device(torch::Library& m) {
  m.impl("gather_last_token", gather_last_token);
  m.impl("gather_last_token_backward", gather_last_token_backward);
  m.impl("pairwise_loss", pairwise_loss);
  m.impl("pairwise_loss_backward", pairwise_loss_backward);
  m.impl("prefix_index", prefix_index);
  m.impl("gather_prefix_kv", gather_prefix_kv);
  m.impl("gather_prefix_kv_backward", gather_prefix_kv_backward);
  m.impl("qkv_rope", qkv_rope);
  m.impl("qkv_rope_backward", qkv_rope_backward);
  m.impl("qkv_norm_rope", qkv_norm_rope);
  m.impl("qkv_norm_rope_backward", qkv_norm_rope_backward);
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("add_rms_norm_backward", add_rms_norm_backward);
  m.impl("swiglu", swiglu);
  m.impl("swiglu_backward", swiglu_backward);
  m.impl("rope", rope);
}

TORCH_LIBRARY_IMPL(rmega, CPU, m) { every_device(m); }

#ifdef RMEGA_WITH_CUDA
TORCH_LIBRARY_IMPL(rmega, CUDA, m) { every_device(m); }
#endif

TORCH_LIBRARY_IMPL(rmega, Autograd, m) {
  m.impl("gather_last_token", gather_last_token_autograd);
  m.impl("gather_last_token_backward", [](const Tensor& grad, const Tensor& last, c10::SymInt t) {
    return GatherLastTokenBackward::apply(grad, last, t);
  });
  m.impl("pairwise_loss", pairwise_loss_autograd);
  m.impl("gather_prefix_kv", [](const Tensor& x, const Tensor& prefix_start,
                                const Tensor& prefix_len, const Tensor& own_start,
                                const Tensor& own_len, c10::SymInt total,
                                const std::optional<Tensor>& index) {
    return GatherPrefix::apply(true, x, prefix_start, prefix_len, own_start, own_len, total, index);
  });
  m.impl("gather_prefix_kv_backward", [](const Tensor& grad, const Tensor& prefix_start,
                                         const Tensor& prefix_len, const Tensor& own_start,
                                         const Tensor& own_len, c10::SymInt t,
                                         const std::optional<Tensor>& index) {
    return GatherPrefix::apply(false, grad, prefix_start, prefix_len, own_start, own_len, t, index);
  });
  m.impl("qkv_rope", qkv_rope_autograd);
  m.impl("qkv_norm_rope", qkv_norm_rope_autograd);
  m.impl("rms_norm", rms_norm_autograd);
  m.impl("add_rms_norm", add_rms_norm_autograd);
  m.impl("swiglu", [](const Tensor& x) { return SwiGlu::apply(x); });
  m.impl("rope", [](const Tensor& x, const Tensor& cos, const Tensor& sin, bool backwards) {
    return Rope::apply(x, cos, sin, backwards);
  });
  // Once differentiable: a second derivative raises instead of being wrong.
  for (const char* name : {"pairwise_loss_backward", "qkv_rope_backward", "qkv_norm_rope_backward",
                           "rms_norm_backward", "add_rms_norm_backward", "swiglu_backward"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace
}  // namespace rmega
