"""Anomaly scores from the whole logit vector: one network pass an input, calibrated on held-out normal data.

A score sees log p_t(x) at every level t at once (identity 1); higher is more anomalous. Raw log p, level 0 alone, is
known to rank simple inputs above the normal ones; the other scores look at what it throws away.
"""

from torchcdm.apps.anomaly.detector import AnomalyDetector, normal_data
from torchcdm.apps.anomaly.maps import AnomalyMap
from torchcdm.apps.anomaly.scores import SCORES, level_profile

__all__ = ["SCORES", "AnomalyDetector", "AnomalyMap", "level_profile", "normal_data"]
