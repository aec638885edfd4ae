"""Evaluation: what an SAE keeps of a model's activations, and what its features do."""

from mistudio.evaluate.plots import plot_activation_frequency
from mistudio.evaluate.report import EvalReport, FeatureStats
from mistudio.evaluate.run import evaluate

__all__ = ["EvalReport", "FeatureStats", "evaluate", "plot_activation_frequency"]
