"""FSDP2 and FSDP1 of converted models: two processes on the CPU agree with one, also under context parallelism."""

import pytest
from two_rank_cases import FSDP, FSDP1, check_case, marked


@pytest.mark.parametrize("case", [*marked(FSDP, "FSDP2"), *marked(FSDP1, "FSDP1")])
def test_two_ranks(case, request):
    check_case(case, request)
