"""Sketch kernels: the Triton kernels and their torch references; nothing above torch and triton."""
