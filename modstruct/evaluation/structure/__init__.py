"""What the latent space looks like: figures of a whole source, exact or by sampling with a confidence interval."""

from modstruct.evaluation.structure.measure import structure_metrics
from modstruct.evaluation.structure.sampling import SamplingConfig
from modstruct.evaluation.structure.set_structure import measure_set_structure

__all__ = ["SamplingConfig", "measure_set_structure", "structure_metrics"]
