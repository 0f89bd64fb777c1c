"""What captions and images know about a label, and what exact alignment costs: section 3 of Jiang et al. 2023."""

from modstruct.evaluation.information.measure import measure_information
from modstruct.evaluation.information.probes import ProbeConfig
from modstruct.evaluation.information.scenes import ExactInformation, exact_information
from modstruct.evaluation.information.theorem import Sides, exact_sides

__all__ = ["ExactInformation", "ProbeConfig", "Sides", "exact_information", "exact_sides", "measure_information"]
