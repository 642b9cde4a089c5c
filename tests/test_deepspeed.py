"""DeepSpeed's ZeRO, stages 1 to 3, on two processes of the CPU; skipped where DeepSpeed is not installed."""

import pytest
import two_rank_cases


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.wrapper(f"DeepSpeed ZeRO-{case.partition(', ')[0][-1]}"))
        for case in two_rank_cases.ZERO
    ],
)
def test_zero(case):
    pytest.importorskip("deepspeed")
    for rank, outcome in enumerate(two_rank_cases.outcomes_of(tuple(two_rank_cases.ZERO))):
        assert outcome[case] is None, f"rank {rank}: {outcome[case]}"
