"""FSDP2 of converted models: two processes on the CPU agree with one, alone and under context parallelism."""

import pytest
from two_rank_cases import FSDP, check_case


@pytest.mark.parametrize("case", FSDP)
def test_two_ranks(case, request):
    check_case(case, request)
