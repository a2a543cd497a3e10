"""The plan's choice of kernels in this process: refused in one line where it cannot be honoured, else in force."""

from __future__ import annotations

from planner.costmodel.kernel_choice import PACKAGES, problems
from planner.kernels import dispatch, exchange, gla, loss, lstm, norm, pointwise, quantize, ring, slstm
from planner.plan import Plan
from planner.runtime.errors import RuntimePlanError

assert exchange and gla and loss and lstm and norm and pointwise and quantize and ring and slstm  # they declare ops


def adopt(plan: Plan, device_type: str) -> None:
    """Let the implementations that `plan` chose run from now on. On a CPU nothing is chosen: torch's forms run.

    RuntimePlanError names an op or implementation that there is not, or the package that is not installed.
    """
    kernels = plan.inputs.engine.kernels
    if device_type != "cuda" or not kernels:
        return
    wrong = problems(kernels)
    if wrong:
        raise RuntimePlanError(f"this plan's {wrong[0]}: search again")
    for how, package in PACKAGES.items():
        ops = sorted(op for op, chosen in kernels.items() if chosen == how)
        if ops and not dispatch.installed(how):
            named = ", ".join(ops[:3]) + ", ..." * (len(ops) > 3)
            raise RuntimePlanError(
                f"this plan runs {named} on {how!r}, whose package is not installed here: pip install {package}, or "
                "plan with other --kernels"
            )
    dispatch.choose(kernels)
