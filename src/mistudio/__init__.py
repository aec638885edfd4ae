"""mistudio: collect activations, train JumpReLU sparse autoencoders on them, measure, browse and steer.

Importing the package costs nothing: torch and transformers load when a submodule that needs them is imported.
"""

__version__ = "0.1.0"
