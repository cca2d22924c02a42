"""What lies between a model's matrix products, for one kind of processor: C for a CPU, Triton for CUDA.

Nothing here is required. Where no kernel can be had, the model's plain forward pass computes the same, slower; the
tests hold each kernel to it.
"""
