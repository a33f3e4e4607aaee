"""What is replaced in Megatron-Core: the CPU in place of CUDA, fused weight gradients."""
