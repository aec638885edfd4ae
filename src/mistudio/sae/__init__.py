"""JumpReLU sparse autoencoders: the mathematics, the weights, and the files that hold them."""

from mistudio.sae.jumprelu import jumprelu, step
from mistudio.sae.model import JumpReLUSAE, SAEConfig, initial_weights

__all__ = ["JumpReLUSAE", "SAEConfig", "initial_weights", "jumprelu", "step"]
