#include <torch/extension.h>

#include "rmega_ops.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
#ifdef RMEGA_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("gather_last_token", &rmega::gather_last_token);
  m.def("gather_last_token_backward", &rmega::gather_last_token_backward);
  m.def("pairwise_loss", &rmega::pairwise_loss);
  m.def("gather_prefix_kv", &rmega::gather_prefix_kv);
  m.def("gather_prefix_kv_backward", &rmega::gather_prefix_kv_backward);
  m.def("rms_norm", &rmega::rms_norm);
  m.def("rms_norm_backward", &rmega::rms_norm_backward);
  m.def("swiglu", &rmega::swiglu);
  m.def("swiglu_backward", &rmega::swiglu_backward);
  m.def("rope", &rmega::rope);
  m.def("elementwise_isa", &rmega::elementwise_isa);
  m.def("set_elementwise_isa", &rmega::set_elementwise_isa);
}
