"""Curvature-guided initialisation of LoRA adapters (arXiv:2603.29824), and without a pre-phase.

:func:`curvature_init_` sets the adapters of a model from a few batches.  The optimizer does
the same for ``A`` from its first training batch, see
:mod:`cg_optim.initialisation.first_step`.
"""

from cg_optim.initialisation.curvature_init import curvature_init_
from cg_optim.initialisation.report import InitReport, LayerReport

__all__ = ["InitReport", "LayerReport", "curvature_init_"]
