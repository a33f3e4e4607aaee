"""rmega: reward models trained the Megatron way, exact in every layout."""

__version__ = "0.1.0"

import warnings

# Megatron-Core warns for each of its modules what is not installed; a run says in one line what is
# active instead.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
