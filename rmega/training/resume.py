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

BOUND, EFFECT, CONTENT, HARMLESS = "bound", "takes effect", "compared by content", "harmless"

CLASSES = {
    "model": {
        "hf_model": EFFECT,  # its geometry is bound (preflight.check_same_model)
        "head_init": BOUND,
        "prune_last_layer": EFFECT,
        "transformer_impl": EFFECT,
        "fp8_format": EFFECT,
        "fp8_recipe": EFFECT,
    },
    "data": {
        "data_path": CONTENT,  # preflight.check_same_data: weights and checksums, in order
        "valid_data_path": EFFECT,
        "share_prefix": EFFECT,
        "max_tokens_per_microbatch": EFFECT,
    },
    "lora": {
        **dict.fromkeys(("lora_rank", "lora_alpha", "lora_target", "lora_rslora"), BOUND),
        "lora_dropout": EFFECT,
    },
    "loss": dict.fromkeys(
        (
            "loss",
            "penalty",
            "penalty_weight",
            "label_smoothing",
            "use_margin",
            "scale_by_rating",
            "length_penalty",
            "batch_centering",
            "barrier_clamp",
        ),
        EFFECT,
    ),
    "train": {
        "train_steps": EFFECT,
        "train_epochs": EFFECT,
        "global_batch_size": BOUND,
        "seed": BOUND,
        "precision": CONTENT,  # precision_to_use
        "matmul_precision": EFFECT,
        "deterministic": EFFECT,
        "log_interval": HARMLESS,
        "eval_interval": EFFECT,
        "eval_probes": HARMLESS,
        "tensorboard": HARMLESS,
        "wandb_project": HARMLESS,
    },
    "optimizer": dict.fromkeys(
        (
            "lr",
            "head_lr",
            "min_lr",
            "lr_warmup_fraction",
            "lr_decay_style",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_eps",
            "clip_grad",
            "max_skipped_steps",
        ),
        EFFECT,
    )
    | {"initial_loss_scale": BOUND},
    "parallel": {
        "tensor_model_parallel_size": EFFECT,
        "pipeline_model_parallel_size": EFFECT,
        "virtual_pipeline_model_parallel_size": EFFECT,
        "sequence_parallel": EFFECT,
        "context_parallel_size": EFFECT,
        "data_parallel_size": EFFECT,
        "num_layers_in_first_pipeline_stage": EFFECT,
        "num_layers_in_last_pipeline_stage": EFFECT,
        "pad_attention_heads": EFFECT,
        "use_distributed_optimizer": BOUND,
        "overlap_grad_reduce": EFFECT,
        "overlap_param_gather": EFFECT,
        "recompute": EFFECT,
        "distributed_timeout_minutes": HARMLESS,
        "dry_run": HARMLESS,
        "device_memory_gb": HARMLESS,
    },
    "checkpoint": {
        "save": HARMLESS,
        "load": HARMLESS,
        "save_interval": EFFECT,
        "async_save": EFFECT,
        "keep_last": EFFECT,
        "save_best": EFFECT,
        "exit_duration_min": HARMLESS,
        "num_verification_comparisons": EFFECT,
    },
}
"""What a flag that differs from the checkpoint's run does. HARMLESS ones say where a process
writes or when it ends, and are not listed."""

_WHY_BOUND = {
    **dict.fromkeys(
        ("lora_rank", "lora_alpha", "lora_target", "lora_rslora"),
        "its adapters are those of the checkpoint",
    ),
    "head_init": "a head is initialized at the start of a run only",
    "initial_loss_scale": "its current loss scale is part of the checkpoint",
    "global_batch_size": "the order of the data depends on it",
    "seed": "the order of the data depends on it",
    "use_distributed_optimizer": "the two optimizers store different state",
}


def changes(info: dict[str, Any], config: TrainingConfig) -> dict[str, list[Any]]:
    """Flag -> [value of the checkpoint's run, value now] of what takes effect from here on. Raises
    ValueError on a flag that is bound. ``info``: rmega.json; what an earlier version did not have
    is not compared."""
    now = json.loads(json.dumps(config.as_dict()))
    found: dict[str, list[Any]] = {}
    for group, fields in CLASSES.items():
        saved = info["config"].get(group, {})
        if group == "lora":  # a run of a version without it trained all weights
            saved = saved or dataclasses.asdict(LoraArgs())
        for field, kind in fields.items():
            if field not in saved or saved[field] == now[group][field]:
                continue
            if field == "initial_loss_scale" and precision_of(info) != "fp16":
                continue  # no such state, and nothing that it would change
            flag, value = "--" + field.replace("_", "-"), now[group][field]
            if kind == BOUND:
                raise ValueError(
                    f"{flag} {value}: the checkpoint's run has {saved[field]}, and"
                    f" {_WHY_BOUND[field]}"
                )
            if kind == EFFECT:
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
