"""What the latent space looks like: figures of a whole source, exact or by sampling with a confidence interval."""

from modstruct.evaluation.latent.measure import structure_figures
from modstruct.evaluation.latent.sampling import SamplingConfig

__all__ = ["SamplingConfig", "structure_figures"]
