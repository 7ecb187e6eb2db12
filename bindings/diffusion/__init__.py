"""Diffusers: pipelines with their LoRA, images with their prompts, and answers as pictures."""
