"""rmega: reward models trained the Megatron way, exact in every layout."""

__version__ = "0.1.0"
