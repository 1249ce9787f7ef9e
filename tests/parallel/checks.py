"""What two ranks check together, in the order in which they do: see `ranks`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from burnish.checks import Checks
from burnish.prepare import Preparer
from burnish.tuning import Tuner
from tests.parallel.check_by_hand import divided_by_hand, what_does_not_fit_is_refused
from tests.parallel.check_collectives import (
    collectives_and_their_gradients,
    no_collective_is_left_out,
    summed_added_and_normalized,
)
from tests.parallel.check_decisions import a_check_that_fails_on_one_rank, clocks_that_differ
from tests.parallel.check_loading import loaded_slice_by_slice
from tests.parallel.check_models import (
    bert_by_the_names_of_its_layers,
    divided,
    gradients_of_optimized,
    optimized,
    sequences_divided,
)
from tests.parallel.check_schedules import (
    a_missing_sync_is_named,
    divided_step_by_step,
    dropout_of_divided_features,
    refused_before_anything_changes,
    scheduled_llama,
    stages_of_a_pipeline,
    tied_weights_stay_tied,
    wrong_on_one_rank,
)
from tests.parallel.ranks import Check


def without_clocks(check: Check, rank: int, folder: Path) -> None:
    """As the fixture `untimed` has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tuner, "FIRST_BUDGET_US", 0.0)
        patch.setattr(Tuner, "NEW_SIZE_BUDGET_US", 0.0)
        patch.setattr(Checks, "times", lambda self, *given: {"original": 2.0, "optimized": 1.0})
        patch.setattr(Preparer, "_measure_transposed", lambda self, weight: True)
        check(rank, folder)


CHECKS: dict[str, Check] = {
    name: partial(without_clocks, check)
    for name, check in {
        "collectives_and_their_gradients": collectives_and_their_gradients,
        "summed_added_and_normalized": summed_added_and_normalized,
        "no_collective_is_left_out": no_collective_is_left_out,
        "divided_llama": partial(divided, "llama"),
        "divided_llama_tied": partial(divided, "llama_tied"),
        "divided_gpt2": partial(divided, "gpt2"),
        "divided_by_hand": divided_by_hand,
        "what_does_not_fit_is_refused": what_does_not_fit_is_refused,
        "loaded_slice_by_slice": loaded_slice_by_slice,
        "divided_step_by_step": divided_step_by_step,
        "a_missing_sync_is_named": a_missing_sync_is_named,
        "dropout_of_divided_features": dropout_of_divided_features,
        "wrong_on_one_rank": wrong_on_one_rank,
        "refused_before_anything_changes": refused_before_anything_changes,
        "tied_weights_stay_tied": tied_weights_stay_tied,
        "scheduled_llama": scheduled_llama,
        "stages_of_a_pipeline": stages_of_a_pipeline,
        "optimized_llama": partial(optimized, "llama"),
        "optimized_gpt2": partial(optimized, "gpt2"),
    }.items()
}
SLOW_CHECKS: dict[str, Check] = {
    "clocks_that_differ": clocks_that_differ,
    **{
        name: partial(without_clocks, check)
        for name, check in {
            "gradients_of_optimized": gradients_of_optimized,
            "sequences_divided": sequences_divided,
            "divided_phi3": partial(divided, "phi3"),
            "divided_gemma2": partial(divided, "gemma2"),
            "bert_by_the_names_of_its_layers": bert_by_the_names_of_its_layers,
            "a_check_that_fails_on_one_rank": a_check_that_fails_on_one_rank,
        }.items()
    },
}
