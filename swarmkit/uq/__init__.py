"""How sure answers are, computed from numbers alone: semantic entropy, kernel language entropy, and probes.

Knows nothing of pandas, of HTTP and of endpoints. ``swarmkit.semantic_entropy`` applies it to a frame of answers.
"""

from .kle import kernel_language_entropy
from .probes import load_probe, predict_semantic_entropy, save_probe, train_probe
from .semantic_entropy import semantic_entropy

__all__ = [
    "kernel_language_entropy",
    "load_probe",
    "predict_semantic_entropy",
    "save_probe",
    "semantic_entropy",
    "train_probe",
]
