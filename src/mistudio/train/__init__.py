"""Training: rows in, an SAE out, with records from which an interrupted run goes on bit for bit."""

from mistudio.train.config import TrainConfig
from mistudio.train.loop import Interrupted, train
from mistudio.train.member import Run
from mistudio.train.plots import FrontierPoint, plot_frontier, plot_training
from mistudio.train.start import initial_sae
from mistudio.train.together import BySite, Resumable

__all__ = [
    "BySite",
    "FrontierPoint",
    "Interrupted",
    "Resumable",
    "Run",
    "TrainConfig",
    "initial_sae",
    "plot_frontier",
    "plot_training",
    "train",
]
