"""What this machine and environment are, what a target needs of them, and what will not work: for `draftsmith doctor`.

`look` reads the environment into plain facts, `needs` a target's configuration; `examine` judges both and touches
nothing, so that tests can fake any machine.
"""

from draftsmith.doctor.findings import SAMPLE_TOKENS, Finding, examine, native_bfloat16
from draftsmith.doctor.machine import Gpu, Machine, look
from draftsmith.doctor.target import Needs, needs

__all__ = ["SAMPLE_TOKENS", "Finding", "Gpu", "Machine", "Needs", "examine", "look", "native_bfloat16", "needs"]
