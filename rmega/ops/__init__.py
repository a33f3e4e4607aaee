"""The operators: each in plain torch and natively (``rmega._C``), and the choice between them.

Imports torch and ``rmega._C`` only, and works without ``_C`` (then every operator is its
reference).

Letters: t tokens, h hidden, n responses, m pairs, s segments, g key groups, a heads, d head size, f
MLP size.
"""

# ruff: noqa: F401  (imported for the callers, who write ops.NAME)

from rmega.ops.elementwise import (
    add_rms_norm,
    add_rms_norm_ref,
    fuses_add_rms_norm,
    rms_norm,
    rms_norm_ref,
    rope,
    rope_ref,
    swiglu,
    swiglu_ref,
)
from rmega.ops.gather import (
    gather_last_token,
    gather_last_token_ref,
    gather_prefix_kv,
    gather_prefix_kv_ref,
    prefix_index,
    prefix_index_ref,
)
from rmega.ops.gemm import (
    active_matmul,
    best_matmul,
    has_native_linear,
    linear,
    linear_grad_input,
    linear_grad_weight,
)
from rmega.ops.implementation import (
    IMPLEMENTATIONS,
    active_elementwise,
    active_implementation,
    set_implementation,
)
from rmega.ops.loss import LOSSES, PENALTIES, SCORE_RANGE, STATS, pairwise_loss, pairwise_loss_ref
from rmega.ops.qkv import (
    fuses_qkv,
    fuses_qkv_norm,
    qkv_norm_rope,
    qkv_norm_rope_ref,
    qkv_rope,
    qkv_rope_ref,
)
