"""QRPO (Matrenok et al. 2025): regression of log pi/pi_ref on Phi(C_hat) / beta - log Z, offline.

Departures from the paper: Z is the mean of e^R over the prompt's own K samples, ties included; and
the loss is divided by beta^2, so that one learning rate fits every transform.
"""

from dataclasses import replace

from torch import Tensor

from minictrl.batch import Batch
from minictrl.calibration import leave_one_out_calibration
from minictrl.methods.base import Method as Base
from minictrl.methods.base import Offline, checked
from minictrl.reference import Reference
from minictrl.transforms import log_partition


class Method(Offline):
    calibrated = True

    def rows(self, reference: Reference, beta: float) -> Batch:
        R = reference_R(self, reference.r_ref, beta)
        log_Z = log_partition(R).expand_as(R).float().flatten()
        return replace(reference.rows(), R=R.float().flatten(), log_Z=log_Z)

    def loss(self, logprobs: Tensor, values: None, batch: Batch) -> tuple[Tensor, dict]:
        sums = logprobs.sum(-1), batch.ref_logprobs.sum(-1)
        return qrpo_loss(*sums, batch.R, batch.log_Z), {}


def reference_R(method: Base, r_ref: Tensor, beta: float) -> Tensor:
    """(P, K) R of the reference samples, each calibrated against the prompt's other K - 1."""
    C_hat = leave_one_out_calibration(r_ref)
    return method.Phi.in_nats(method.Phi(C_hat.double()), beta, r_ref)


def qrpo_loss(logprobs: Tensor, ref_logprobs: Tensor, R: Tensor, log_Z: float | Tensor) -> Tensor:
    """(R - log Z - log pi/pi_ref)^2, mean over y ~ pi_ref: the tilt pi_ref e^R / Z by regression.

    All (B,), log-probabilities summed over the response's tokens; R = Phi(C_hat) / beta, log_Z that
    of the response's prompt. Offline: nothing is drawn from pi. Raises ValueError on shapes.
    """
    logprobs, ref_logprobs, R = checked(logprobs=logprobs, ref_logprobs=ref_logprobs, R=R)
    if isinstance(log_Z, Tensor) and log_Z.numel() > 1:
        checked(R=R, log_Z=log_Z)
    return (R - log_Z - (logprobs - ref_logprobs)).square().mean()
