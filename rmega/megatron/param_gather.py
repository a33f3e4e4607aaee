"""Weights that the distributed optimizer gathers while the forward pass runs
(``--overlap-param-gather``).

After an update a replica has only its own share of the new weights. Megatron-Core waits for the
rest in a hook before the forward of the module that holds them, bucket by bucket. Whoever reads
weights elsewhere has to wait too: ``hold_readers`` for modules, ``finish`` between steps.
"""

from __future__ import annotations

from collections.abc import Sequence


def hold_readers(wrapped: Sequence) -> None:
    """Let modules that read weights of the modules inside them (``reads_inner_weights``) wait for
    those before their forward."""
    for chunk in wrapped:
        groups = chunk.param_to_bucket_group  # only of what is trained

        def wait(module, _, groups=groups) -> None:
            for parameter in module.parameters():
                if parameter in groups:
                    groups[parameter].finish_param_sync()

        for module in chunk.modules():
            if getattr(module, "reads_inner_weights", False):
                module.register_forward_pre_hook(wait)


def finish(wrapped: Sequence) -> None:
    """Wait until this replica has all weights. Called by every rank before weights are read other
    than by a forward pass; does nothing where they are not gathered late."""
    for chunk in wrapped:
        if hasattr(chunk, "ddp_config") and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
