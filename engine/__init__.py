"""Capture, store, retrieval and curvature; knows the kernels, and nothing of the bindings."""
