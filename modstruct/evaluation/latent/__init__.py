"""What the latent space looks like: figures of a whole source, exact or by sampling with a confidence interval."""

from modstruct.evaluation.latent.measure import structure_figures
from modstruct.evaluation.latent.sampling import SamplingConfig
from modstruct.evaluation.latent.set_structure import measure_set_structure

__all__ = ["SamplingConfig", "measure_set_structure", "structure_figures"]
