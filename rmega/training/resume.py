"""Compare the configuration of a run with the checkpoint that it resumes from.

What the command line says takes effect, and each difference from the checkpoint's run is logged;
flags that decide which comparisons a step sees, or what a checkpoint's tensors mean, are bound: a
difference is an error.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

from rmega.config import LoraArgs, TrainingConfig
from rmega.precision import dtype_name

_ADAPTERS = "its adapters are those of the checkpoint"
_ORDER = "the order of the data depends on it"
BOUND = {
    "lora_rank": _ADAPTERS,
    "lora_alpha": _ADAPTERS,
    "lora_target": _ADAPTERS,
    "lora_rslora": _ADAPTERS,
    "head_init": "a head is initialized at the start of a run only",
    "initial_loss_scale": "its current loss scale is part of the checkpoint",
    "global_batch_size": _ORDER,
    "seed": _ORDER,
    "use_distributed_optimizer": "the two optimizers store different state",
}
"""Flags that must be as in the checkpoint's run, and why."""
CONTENT = {
    "data_path",  # preflight.check_same_data: weights and checksums, in order
    "precision",  # precision_to_use
}
"""Flags that are compared by what they stand for."""
EFFECT = {
    "hf_model",  # its geometry is bound (preflight.check_same_model)
    *("prune_last_layer", "transformer_impl", "fp8_format", "fp8_recipe"),
    *("valid_data_path", "share_prefix", "max_tokens_per_microbatch", "lora_dropout"),
    *("loss", "penalty", "penalty_weight", "label_smoothing", "use_margin", "scale_by_rating"),
    *("length_penalty", "batch_centering", "barrier_clamp"),
    *("train_steps", "train_epochs", "matmul_precision", "deterministic", "eval_interval"),
    *("lr", "head_lr", "min_lr", "lr_warmup_fraction", "lr_decay_style", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "max_skipped_steps"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("virtual_pipeline_model_parallel_size", "sequence_parallel", "context_parallel_size"),
    *("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
    *("data_parallel_size", "pad_attention_heads", "overlap_grad_reduce", "overlap_param_gather"),
    *("recompute", "save_interval", "async_save", "keep_last", "save_best"),
    "num_verification_comparisons",
}
"""Flags that take effect from the resume on, and are logged where they differ."""
HARMLESS = {
    *("log_interval", "eval_probes", "tensorboard", "wandb_project"),
    *("distributed_timeout_minutes", "dry_run", "device_memory_gb"),
    *("save", "load", "exit_duration_min"),
}
"""Flags that say where a process writes or when it ends: not listed."""


def changes(info: dict[str, Any], config: TrainingConfig) -> dict[str, list[Any]]:
    """Flag -> [value of the checkpoint's run, value now] of what takes effect from here on. Raises
    ValueError on a flag that is bound. ``info``: rmega.json; what an earlier version did not have
    is not compared."""
    now = json.loads(json.dumps(config.as_dict()))
    found: dict[str, list[Any]] = {}
    for group, values in now.items():
        saved = info["config"].get(group, {})
        if group == "lora":  # a run of a version without it trained all weights
            saved = saved or dataclasses.asdict(LoraArgs())
        for field, value in values.items():
            if field not in saved or saved[field] == value:
                continue
            if field == "initial_loss_scale" and precision_of(info) != "fp16":
                continue  # no such state, and nothing that it would change
            flag = "--" + field.replace("_", "-")
            if field in BOUND:
                raise ValueError(
                    f"{flag} {value}: the checkpoint's run has {saved[field]}, and {BOUND[field]}"
                )
            if field in EFFECT:
                found[flag] = [saved[field], value]
    saved, named = precision_of(info), config.train.precision
    if named not in ("auto", saved):
        found["--precision"] = [saved, named]
    return found


def precision_of(info: dict[str, Any]) -> str:
    """fp32, bf16 or fp16: what a checkpoint's weights were trained in."""
    return dtype_name(getattr(torch, info["dtype"]))


def precision_to_use(info: dict[str, Any], precision: str) -> str:
    """``auto`` keeps the checkpoint's, on whatever processor a job is started again."""
    return precision_of(info) if precision == "auto" and info else precision


def describe(found: dict[str, list[Any]]) -> str:
    """The line for the log."""

    def text(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    parts = [f"{flag} {text(now)} (was {text(saved)})" for flag, (saved, now) in found.items()]
    return f"differs from the checkpoint's run and takes effect: {', '.join(parts)}"
