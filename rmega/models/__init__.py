"""Backbones: for each family, what differs between it and the others, which is geometry and weight
names only."""

from rmega.models import internlm2, llama

BACKBONES = {"internlm2": internlm2, "llama": llama}
