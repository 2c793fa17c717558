"""Verdicts: yes, no or not enough data, each with its number and its rule."""

from typing import Any

YES, NO, UNKNOWN = "yes", "no", "not enough data"
MIN_QUESTIONS = 6  # with fewer, a two-sided sign-flip test cannot reach p < 0.05
ALPHA = 0.05


def decide_verdicts(
    evidence: dict[str, Any],
    contrasts: dict[str, dict[str, Any]],
    *,
    defects: list[str],
    nll_rise: float,
    trait: str,
    shift: dict[str, float] | None,
    lead: tuple[float, float] | None,
) -> dict[str, dict[str, Any]]:
    """Decide all verdicts from the evidence at the selected block and the contrasts on the test questions.

    `trait` is the first scorer, `nll_rise` the increase in nats per token under steering. `shift` is the fine-tune's
    mean shift over the steered blocks (None without an adapter), `lead` the interval of its cosine minus the control
    fine-tune's cosine (None without a control).
    """
    has_enough = evidence["n"] >= MIN_QUESTIONS
    persona, random = contrasts["persona-neutral"][trait], contrasts["steered-random"][trait]
    decided = {
        "follows": _make_verdict(
            persona["ci95"][0] > 0,
            persona["n"] >= MIN_QUESTIONS,
            persona["diff"],
            f"{trait} is higher under the persona's prompt than the neutral one (interval of the difference above 0)",
        ),
        "separable": _make_verdict(
            evidence["auroc_ci_low"] > 0.5
            and evidence["perm_p_all_layers"] < ALPHA
            and evidence["cohen_d"] > evidence["random_d_p95"],
            has_enough,
            evidence["auroc"],
            f"held-out AUROC: interval above 0.5; Cohen's d {evidence['cohen_d']:.2f} above that of 95 % of "
            f"random directions ({evidence['random_d_p95']:.2f}); p over all blocks "
            f"{evidence['perm_p_all_layers']:.3f} < {ALPHA}",
        ),
        "specific": _make_verdict(
            evidence["lead_ci_low"] > 0 and evidence["transfer_ci_low"] > 0.5,
            has_enough,
            evidence["lead_over_placebo"],
            f"AUROC is above that of the placebo, a polite paraphrase ({evidence['placebo_auroc']:.2f}; interval of "
            f"the difference above 0), and AUROC of the persona's text after a neutral prompt is above chance "
            f"({evidence['transfer_auroc']:.2f}; interval above 0.5)",
        ),
        "causal": _make_verdict(
            random["ci95"][0] > 0 and random["p"] < ALPHA,
            random["n"] >= MIN_QUESTIONS,
            random["diff"],
            f"{trait} on the test questions is higher with the vector than with random vectors of the same length "
            f"(interval above 0, p {random['p']:.3f} < {ALPHA})",
        ),
        "coherent": _make_verdict(
            not defects,
            persona["n"] >= MIN_QUESTIONS,
            nll_rise,
            "steered answers on the test questions stay within the limits of likelihood, repetition and length"
            + (f"; {', '.join(defects)}" if defects else ""),
        ),
    }
    if shift is None:
        decided["tuned_moves_along_vector"] = {
            "verdict": UNKNOWN,
            "number": None,
            "rule": "no fine-tune was given; pass one with --adapter-source",
        }
    else:
        rule = (
            f"mean cosine of the fine-tune's shift with the base model's vector over the steered blocks: interval "
            f"above 95 % of random directions ({shift['random_p95']:.2f}) and above the placebo vector "
            f"({shift['placebo']:.2f})"
        )
        is_yes = shift["cos_low"] > max(shift["random_p95"], shift["placebo"])
        if lead:
            rule += (
                f", and above that of the control fine-tune (interval of the difference {lead[0]:.2f} to {lead[1]:.2f})"
            )
            is_yes = is_yes and lead[0] > 0
        decided["tuned_moves_along_vector"] = _make_verdict(is_yes, has_enough, shift["cos"], rule)
    return decided


def _make_verdict(is_yes: bool, has_enough: bool, number: float, rule: str) -> dict[str, Any]:
    return {"verdict": (YES if is_yes else NO) if has_enough else UNKNOWN, "number": number, "rule": rule}
