"""Steering: what to add to which residual at which tokens (`SteeringSpec`), and the hooks that do it (`steer`)."""

from qscope.steering.attach import Steering as Steering
from qscope.steering.attach import steer as steer
from qscope.steering.spec import Edit as Edit
from qscope.steering.spec import Gate as Gate
from qscope.steering.spec import SAEReference as SAEReference
from qscope.steering.spec import SteeringSpec as SteeringSpec
