"""Steering: text written with features of an SAE added to the model's activations, beside text written without."""

from mistudio.steer.compare import Comparison, compare
from mistudio.steer.methods import Features, Steering, random_controls, steering_edit, steering_vector

__all__ = [
    "Comparison",
    "Features",
    "Steering",
    "compare",
    "random_controls",
    "steering_edit",
    "steering_vector",
]
