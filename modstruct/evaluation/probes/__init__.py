"""Linear probes on frozen embeddings: logistic regression at any size, CLIP's and CyCLIP's protocols, few shots."""

from modstruct.evaluation.probes.few_shot import FewShotConfig
from modstruct.evaluation.probes.logistic_regression import FitConfig, fit_logistic_regression
from modstruct.evaluation.probes.measure import LinearProbeConfig, measure_few_shot, measure_linear_probe
from modstruct.evaluation.probes.sgd_probe import SgdConfig

__all__ = [
    "FewShotConfig",
    "FitConfig",
    "LinearProbeConfig",
    "SgdConfig",
    "fit_logistic_regression",
    "measure_few_shot",
    "measure_linear_probe",
]
