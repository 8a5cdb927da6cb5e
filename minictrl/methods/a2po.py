"""A*-PO (Brantley et al. 2025, arXiv 2505.20686): QRPO's regression, on responses of the policy.

V*(x) = beta log E_{pi_ref}[e^{Phi(C_hat) / beta}] comes from the K reference samples; the policy's
own responses are then regressed on the optimal advantage: beta log pi/pi_ref on Phi(C_hat) - V*.
Divided by beta, V* is log Z, and on responses just drawn the gradient is twice that of the
objective, with log Z for a baseline.

Departures: one beta, where the paper has one for V* and a smaller one for the regression; and the
loss is divided by beta^2, as in `qrpo.py`.
"""

from dataclasses import replace

from minictrl.batch import Batch
from minictrl.methods.base import Online
from minictrl.methods.qrpo import Method as Qrpo
from minictrl.methods.qrpo import reference_R
from minictrl.reference import Reference
from minictrl.transforms import log_partition


class Method(Online):
    uses_baseline = False
    compares_reference = calibrated = True
    loss = Qrpo.loss

    def with_loss_inputs(self, batch: Batch, reference: Reference, beta: float) -> Batch:
        log_Z = log_partition(reference_R(self, reference.r_ref, beta))  # (P, 1)
        return replace(batch, log_Z=log_Z.expand(-1, self.config.G).flatten().to(batch.R))
