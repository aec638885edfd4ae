"""The architectures that are trained, each in its own file, and what they share."""

from mistudio.train.config import TrainConfig
from mistudio.train.objectives.base import Objective, Trainable
from mistudio.train.objectives.batchtopk import BatchTopK
from mistudio.train.objectives.jumprelu import JumpReLU
from mistudio.train.objectives.relu_l1 import ReLU
from mistudio.train.objectives.topk import TopK

OBJECTIVES: dict[str, Objective] = {
    "jumprelu": JumpReLU(),
    "relu": ReLU(),
    "topk": TopK(),
    "batchtopk": BatchTopK(),
}


def objective_of(cfg: TrainConfig) -> Objective:
    """The configuration's architecture."""
    return OBJECTIVES[cfg.architecture]


__all__ = ["OBJECTIVES", "Objective", "Trainable", "objective_of"]
