"""Optimizer state in checkpoints, where Megatron-Core's own handling falls short.

Each function says which behavior of Megatron-Core (0.16 to 0.19) it works around.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

COPIES = "fp32_from_fp16_params"
"""Megatron-Core's name for the fp32 copies of half-precision weights."""


def sharding_metadata() -> dict[str, Any]:
    """How the optimizer's state is cut for the file: whole parameters, which any layout can read
    again (the default sharding type raises "flattened_range is not supported")."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def sharded_state(optimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """The sharded state of the optimizer of a model whose sharded state is ``model_state``."""
    sharded = model_state["model"] if "model" in model_state else model_state
    with _every_parameter_known(optimizer), _own_settings(optimizer):
        state = optimizer.sharded_state_dict(
            sharded, is_loading=is_loading, metadata=sharding_metadata()
        )
    if COPIES in state:
        # An empty list, such as that of the fp32 head's group, would not come back from the file.
        state[COPIES] = [group for group in state[COPIES] if group]
    return state


def load_state(optimizer, state: dict[str, Any]) -> None:
    """Give the optimizer a state that was read into ``sharded_state(..., is_loading=True)``."""
    if COPIES in state:  # the empty lists that ``sharded_state`` left out are put back
        groups = iter(state[COPIES])
        (part,) = optimizer.chained_optimizers
        state = {
            **state,
            COPIES: [next(groups) if group else [] for group in part.fp32_from_float16_groups],
        }
    for part in optimizer.chained_optimizers:
        # Megatron-Core matches parameter groups by their multipliers, and the head's group has the
        # same ones as another. Their order is that of the parameters, which is the same in every
        # run of a model.
        part._filter_and_reorder_param_groups = lambda current, loaded: loaded
    with _own_settings(optimizer):
        optimizer.load_state_dict(state)
    for part in optimizer.chained_optimizers:
        # Megatron-Core gives all parameters one tensor as their step, which torch's Adam would
        # then increment once for each of them.
        for entry in part.optimizer.state.values():
            if isinstance(entry.get("step"), torch.Tensor):
                entry["step"] = entry["step"].clone()


@contextlib.contextmanager
def _own_settings(optimizer) -> Iterator[None]:
    """Parameter groups keep this run's settings.

    A checkpoint's groups also carry max_lr, min_lr, betas, eps and more, and the scheduler prefers
    what is in a group. And the distributed optimizer gives groups of the same multipliers, such as
    the head's and another, one set of settings wherever it loads a state, even its own.
    """
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "step")}
        for part in optimizer.chained_optimizers
        for group in part.param_groups
    ]  # "step" is FusedAdam's state
    yield
    loaded = [group for part in optimizer.chained_optimizers for group in part.param_groups]
    for group, settings in zip(loaded, groups, strict=True):
        group.update(settings)


@contextlib.contextmanager
def _every_parameter_known(optimizer) -> Iterator[None]:
    """Megatron-Core's undistributed optimizer for half precision numbers half-precision parameters
    only, and then finds no tensor of the model for the state of the fp32 head. Here it sees all,
    in the order of their numbers.
    """
    parts = [
        part
        for part in optimizer.chained_optimizers
        if isinstance(part, Float16OptimizerWithFloat16Params)
    ]
    original = [part.float16_groups for part in parts]
    for part in parts:
        mains, halves = (
            itertools.chain.from_iterable(x)
            for x in (part.fp32_from_float16_groups, part.float16_groups)
        )
        models = {id(main): half for main, half in zip(mains, halves, strict=True)}
        part.float16_groups = [
            [models.get(id(p), p) for p in group["params"]] for group in part.optimizer.param_groups
        ]
    try:
        yield
    finally:
        for part, groups in zip(parts, original, strict=True):
            part.float16_groups = groups


def allocate_state(optimizer) -> None:
    """Give Adam the state that it creates itself only in its first step: zeros, as it would.

    torch's also wants a step counter; FusedAdam of Transformer Engine and apex counts in its
    groups, and Megatron-Core knows how to fill it.
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(inner, torch.optim.Adam):
            for group in inner.param_groups:
                for p in group["params"]:
                    if not inner.state[p]:
                        inner.state[p].update(
                            step=torch.zeros((), device=p.device if group["fused"] else "cpu"),
                            exp_avg=torch.zeros_like(p),
                            exp_avg_sq=torch.zeros_like(p),
                        )
        elif inner is not None:
            part.init_state_fn(inner, part.config)  # leaves state alone that is there


def prepare_loading(optimizer) -> None:
    """Make the distributed optimizer read torch's Adam as it reads those of apex and Transformer
    Engine.

    It allocates no state for torch's, and then copies every entry of that state from the
    checkpoint, though it has taken the entry "step" out before.
    """
    allocate_state(optimizer)
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.Adam) and hasattr(
            part, "_set_main_param_and_optimizer_states"
        ):
            part._set_main_param_and_optimizer_states = partial(_set_state_but_step, part)


def _set_state_but_step(part, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    group, place = part.model_param_group_index_map[model_param]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
    type(part)._set_main_param_and_optimizer_states(
        part, model_param, {"step": state["step"].clone(), **tensors}
    )
