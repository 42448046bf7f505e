"""Whether a submission can ever run here: everything that does not depend on what else runs."""

from dataclasses import dataclass, field

from mell_gpu_worker.core.capabilities import Capabilities
from mell_shared.messages.base import PROTOCOL_VERSION
from mell_shared.messages.scheduler import WorkerSpec
from mell_shared.messages.worker import Submit, SubmitRefused

PROTOCOLS = range(max(1, PROTOCOL_VERSION - 1), PROTOCOL_VERSION + 1)
"""Versions understood: this release's and the one before."""


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """What a submission is judged by."""

    spec: WorkerSpec
    vocab_size: int
    can: Capabilities = field(default_factory=Capabilities)

    def refusal(self, submit: Submit, grammar_fault: str | None) -> SubmitRefused | None:
        """Return why no worker like this one should ever run `submit`, or None."""
        if submit.protocol not in PROTOCOLS:
            known = f"{PROTOCOLS[0]} to {PROTOCOLS[-1]}"
            return SubmitRefused(reason="protocol", message=f"protocol {submit.protocol} is not spoken here ({known})")
        if submit.model != self.spec.model:
            text = f"this worker serves {self.spec.model!r}, not {submit.model!r}"
            return SubmitRefused(reason="wrong_model", message=text)
        fault = self._fault(submit) or self.can.fault(submit.sampling, len(submit.output_ids)) or grammar_fault
        if fault:
            return SubmitRefused(reason="bad_request", message=fault)
        limit = self.spec.max_total_tokens
        if len(submit.prompt_ids) >= limit:
            text = f"a prompt of {len(submit.prompt_ids)} tokens leaves no room for output: at most {limit} in all"
            return SubmitRefused(reason="too_large", message=text)
        return None

    def _fault(self, submit: Submit) -> str | None:
        if not submit.prompt_ids:
            return "the prompt has no tokens"
        columns = {
            "prompt token": submit.prompt_ids,
            "output token": submit.output_ids,
            "logit_bias token": submit.sampling.logit_bias,
        }
        for name, ids in columns.items():
            if ids and max(ids) >= self.vocab_size:
                return f"{name} {max(ids)} is not in the vocabulary of {self.vocab_size} tokens"
        return None
