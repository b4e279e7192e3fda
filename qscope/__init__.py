"""qscope: sparse-autoencoder kernels and workflows for language models.

Names are resolved on first use, so that `import qscope` costs milliseconds and touches no network.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qscope._version import __version__

if TYPE_CHECKING:
    from qscope import ops as ops
    from qscope.model import capture as capture
    from qscope.post_training.penalty import FeaturePenalty as FeaturePenalty
    from qscope.sae import SAE as SAE
    from qscope.steering import SteeringSpec as SteeringSpec
    from qscope.steering import steer as steer
    from qscope.store import FeatureStore as FeatureStore

_HOME = {
    "SAE": "qscope.sae",
    "FeaturePenalty": "qscope.post_training.penalty",
    "FeatureStore": "qscope.store",
    "SteeringSpec": "qscope.steering",
    "capture": "qscope.model",
    "steer": "qscope.steering",
}

__all__ = ["SAE", "FeaturePenalty", "FeatureStore", "SteeringSpec", "__version__", "capture", "ops", "steer"]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("qscope.ops")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'qscope' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
