"""Fidelity: do scores predict what retraining does?"""
