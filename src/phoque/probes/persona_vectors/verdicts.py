"""Yes, no, or not enough data: each verdict with its number and the rule that it was judged by."""

from typing import Any

YES, NO, UNKNOWN = "yes", "no", "not enough data"
LEAST_QUESTIONS = 6  # below, no permutation of signs can reach p < 0.05 in a two-sided test
ALPHA = 0.05


def verdicts(
    at: dict[str, Any],
    contrasts: dict[str, dict[str, Any]],
    flaws: list[str],
    nll_drop: float,
    trait: str,
    moved: dict[str, float] | None,
    lead: tuple[float, float] | None,
) -> dict[str, dict[str, Any]]:
    """What can be said. `at` is the evidence at the chosen block, `trait` the scorer that counts.

    `moved` is the fine-tune's move over the steered blocks (None without an adapter), `lead` the interval of its
    cosine's lead over the control fine-tune's.
    """
    enough = at["n"] >= LEAST_QUESTIONS
    persona, random = contrasts["persona-neutral"][trait], contrasts["steered-random"][trait]
    found = {
        "follows": _verdict(
            persona["ci95"][0] > 0,
            persona["n"] >= LEAST_QUESTIONS,
            persona["diff"],
            f"the persona's prompt raises {trait} over the neutral one (interval of the difference above 0)",
        ),
        "separable": _verdict(
            at["auroc_ci_low"] > 0.5 and at["perm_p_all_layers"] < ALPHA and at["cohen_d"] > at["random_d_p95"],
            enough,
            at["auroc"],
            f"held-out AUROC: interval above 0.5; Cohen's d {at['cohen_d']:.2f}, above 95 % of random directions "
            f"({at['random_d_p95']:.2f}); p over all blocks {at['perm_p_all_layers']:.3f} < {ALPHA}",
        ),
        "specific": _verdict(
            at["lead_ci_low"] > 0 and at["transfer_ci_low"] > 0.5,
            enough,
            at["lead_over_placebo"],
            f"AUROC is above that of the same method with a polite paraphrase ({at['placebo_auroc']:.2f}; interval of "
            f"the lead above 0), and the persona's text alone is told apart after a neutral prompt "
            f"({at['transfer_auroc']:.2f}; interval above 0.5)",
        ),
        "causal": _verdict(
            random["ci95"][0] > 0 and random["p"] < ALPHA,
            random["n"] >= LEAST_QUESTIONS,
            random["diff"],
            f"{trait} with the vector is above that with random vectors of its length on the test questions "
            f"(interval above 0, p {random['p']:.3f} < {ALPHA})",
        ),
        "coherent": _verdict(
            not flaws,
            persona["n"] >= LEAST_QUESTIONS,
            nll_drop,
            "steered answers on the test questions stay within the limits of likelihood, repetition and length"
            + (f"; {', '.join(flaws)}" if flaws else ""),
        ),
    }
    if moved is None:
        found["tuned_moves_along_vector"] = {
            "verdict": UNKNOWN,
            "number": None,
            "rule": "no fine-tune was given: --adapter-source",
        }
    else:
        rule = (
            f"cosine of the fine-tune's move with the base model's vector, over the steered blocks: interval above 95 "
            f"% of random directions "
            f"({moved['random_p95']:.2f}) and above the polite paraphrase's vector ({moved['placebo']:.2f})"
        )
        fine = moved["cos_low"] > max(moved["random_p95"], moved["placebo"])
        if lead:
            rule += f", and above that of the control fine-tune (the lead is {lead[0]:.2f} to {lead[1]:.2f})"
            fine = fine and lead[0] > 0
        found["tuned_moves_along_vector"] = _verdict(fine, enough, moved["cos"], rule)
    return found


def _verdict(fine: bool, enough: bool, number: float, rule: str) -> dict[str, Any]:
    return {"verdict": (YES if fine else NO) if enough else UNKNOWN, "number": number, "rule": rule}
