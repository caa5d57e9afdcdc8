"""Dynamics of the recurrent state: trajectories, Jacobians, cycles, logit lens, probes.

>>> from open_mythos.dynamics import classify, fixed_point, run_trajectory
>>> path = run_trajectory(model, ids, n_loops=128)      # doctest: +SKIP
>>> classify(path).counts()                             # doctest: +SKIP
"""

from open_mythos.lazy import lazy_names

_MODULES = {
    "open_mythos.dynamics.cycles": ("KINDS", "LongRun", "classify"),
    "open_mythos.dynamics.jacobian": ("StepJacobian",),
    "open_mythos.dynamics.krylov": ("Spectrum", "leading_eigenvalues", "leading_singular_values"),
    "open_mythos.dynamics.lens": ("logit_lens", "set_probability"),
    "open_mythos.dynamics.probes": ("ProbeScore", "probe"),
    "open_mythos.dynamics.trajectory": (
        "ContractionFit", "FixedPoint", "Trajectory", "fixed_point", "run_trajectory",
    ),
}  # fmt: skip

__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
