"""Linear probes on frozen embeddings: logistic regression at any size, CLIP's and CyCLIP's protocols, few shots."""

from modstruct.evaluation.classification.adamw_probe import SgdConfig
from modstruct.evaluation.classification.few_shot import FewShotConfig
from modstruct.evaluation.classification.logistic_regression import FitConfig, fit_logistic_regression
from modstruct.evaluation.classification.measure import LinearProbeConfig, measure_few_shot, measure_linear_probe

__all__ = [
    "FewShotConfig",
    "FitConfig",
    "LinearProbeConfig",
    "SgdConfig",
    "fit_logistic_regression",
    "measure_few_shot",
    "measure_linear_probe",
]
