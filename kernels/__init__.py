"""Triton kernels, one file per structure; imports torch and triton only."""
