"""Dynamics of the recurrent state: trajectories, Jacobians, cycles, logit lens, probes.

>>> from open_mythos.dynamics import classify, fixed_point, run_trajectory
>>> path = run_trajectory(model, ids, n_loops=128)      # doctest: +SKIP
>>> classify(path).counts()                             # doctest: +SKIP
"""

from open_mythos.dynamics.cycles import KINDS, LongRun, classify
from open_mythos.dynamics.jacobian import StepJacobian
from open_mythos.dynamics.krylov import Spectrum, leading_eigenvalues, leading_singular_values
from open_mythos.dynamics.lens import logit_lens, set_probability
from open_mythos.dynamics.probes import ProbeScore, probe
from open_mythos.dynamics.trajectory import (
    ContractionFit,
    FixedPoint,
    Trajectory,
    fixed_point,
    run_trajectory,
)

__all__ = [
    "KINDS",
    "ContractionFit",
    "FixedPoint",
    "LongRun",
    "ProbeScore",
    "Spectrum",
    "StepJacobian",
    "Trajectory",
    "classify",
    "fixed_point",
    "leading_eigenvalues",
    "leading_singular_values",
    "logit_lens",
    "probe",
    "run_trajectory",
    "set_probability",
]
