"""Training: rows in, an SAE out, with records from which an interrupted run goes on bit for bit."""

from mistudio.train.config import TrainConfig
from mistudio.train.loop import Interrupted, Resumable, Run, initial_sae, train
from mistudio.train.plots import plot_training

__all__ = ["Interrupted", "Resumable", "Run", "TrainConfig", "initial_sae", "plot_training", "train"]
