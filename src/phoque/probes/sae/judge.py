"""Decide the verdicts of a comparison at one block: what its features say beyond a control, a seed and chance."""

from typing import Any

from phoque.probes import stats
from phoque.probes.sae.run_spread import LEVEL
from phoque.probes.verdicts import Condition, Verdict

MIN_CONTROLS = 3  # leaving one out must leave a spread


def judge_block(
    overall: dict[str, Any], together: dict[str, Any] | None, quality: dict[str, Any], prompts: int
) -> dict[str, Verdict]:
    """The verdicts by name; `together` is the intervention on all selected features, over `prompts` other questions."""
    return {
        "beyond_control": _judge_beyond_control(overall),
        "beyond_untrained": _judge_beyond_untrained(overall),
        "replicated": _judge_replicated(overall),
        "causes": _judge_causes(together, prompts),
        "good_dictionary": Verdict.decide(
            quality["ev"],
            "of the variance of held-out chats explained",
            overall["n_questions"],
            Condition(
                ": ".join([f"the autoencoder's quality is {quality['verdict']}", *quality["reasons"]]),
                quality["verdict"] == "good",
            ),
        ),
    }


def _judge_beyond_control(overall: dict[str, Any]) -> Verdict:
    """Do more features differ from the controls than each control run has beyond the others?

    Features of one run shift together, so a test that counts them as independent would say yes too easily; the runs
    themselves are compared, and there are too few of them for a p-value.
    """
    if overall["control_runs"] < MIN_CONTROLS:
        runs = overall["control_runs"]
        return Verdict.not_asked(
            f"{runs} control run{'' if runs == 1 else 's'} where {MIN_CONTROLS} are needed to know their spread; "
            f"phoque train --with-control --control-seeds {MIN_CONTROLS}"
        )
    specific, tested, most = overall["n_specific"], overall["n_tested"], max(overall["control_beyond_controls"])
    return Verdict.decide(
        specific / max(tested, 1),
        "of the tested features",
        overall["n_questions"],
        Condition(
            f"features beyond the spread of the control runs: {specific} of {tested} (must be more than {most}, the "
            "most that one of the control runs has beyond the others)",
            specific > most,
        ),
        Condition(
            f"that share: {specific / max(tested, 1):.1%} (must be above {LEVEL:.0%}, which chance gives)",
            specific > LEVEL * tested,
        ),
    )


def _judge_beyond_untrained(overall: dict[str, Any]) -> Verdict:
    """Does a larger share of features differ than of a dictionary that was never trained?

    That one has independent random directions, so its share varies as that of a sample does.
    """
    key = "n_specific" if "n_specific" in overall else "n_reported"
    other = overall["untrained"]
    share = overall[key] / max(overall["n_tested"], 1)
    bound = stats.bound_share(overall[key], overall["n_tested"], other[key], other["n_tested"])
    what = "that differ from the control" if key == "n_specific" else "that shift"
    return Verdict.decide(
        share,
        "of the tested features",
        overall["n_questions"],
        Condition(
            f"features {what}: {overall[key]:,} of {overall['n_tested']:,} (must be above {bound:.1%}; of an untrained "
            f"dictionary {other[key]:,} of {other['n_tested']:,}, p 0.05)",
            share > bound,
        ),
    )


def _judge_replicated(overall: dict[str, Any]) -> Verdict:
    """Do shifted features recur in a dictionary of another seed more than features that did not shift?

    Active features are both shifted and found again more often, so each is compared with one that is about as active.
    """
    if overall.get("replicated_share") is None:
        return Verdict.not_asked("one dictionary, or no shifted feature; --seeds 2 trains another")
    matched, reported = overall["n_matched"], overall["n_reported"]
    alike, alike_matched = overall["n_alike"], overall["n_alike_matched"]
    if not alike:
        return Verdict.not_asked("every tested feature shifted, so there are none to compare with")
    bound = stats.bound_share(matched, reported, alike_matched, alike)
    return Verdict.decide(
        overall["replicated_share"],
        "of the shifted features",
        overall["n_questions"],
        Condition(
            f"shifted features with a partner of their own in every other dictionary: {matched:,} of {reported:,} "
            f"(must be above {bound:.1%}; of features about as active that did not shift "
            f"{alike_matched:,} of {alike:,}, p 0.05)",
            matched / reported > bound,
        ),
        Condition(
            f"of these {matched} partners, {overall['n_replicated']} shift alike (must be at least half)",
            overall["n_replicated"] >= 0.5 * max(matched, 1),
        ),
    )


def _judge_causes(together: dict[str, Any] | None, prompts: int) -> Verdict:
    """Do the features cause the change of the answers, on questions that did not select them?"""
    if together is None:
        return Verdict.not_asked("no feature was selected, or too few did not shift to compare with")
    push = together["push"]
    if together["gap"] <= 0:
        return Verdict.not_asked(
            "on these questions the updated model does not make its own answers likelier than the base model does (by "
            f"{together['gap']:.2f} nats per token), so there is no gap to restore"
        )
    conditions = [
        Condition(
            f"steering the base model along them restores {push['gap_share']:.0%} of the gap in likelihood; groups of "
            f"the features nearest in activity that did not shift (mean activation {together['random_strength']:.3g}, "
            f"of the selected ones {together['strength']:.3g}) restore {push['random_share']:.0%} "
            f"(p {push['p']:.2g}), at most {push['random_max_share']:.0%}",
            push["holds"],
        ),
        Condition(
            f"directions of a dictionary that was never trained restore less: {together['untrained_share']:.0%}",
            push["gap_share"] > together["untrained_share"],
        ),
    ]
    if ablate := together["ablate"]:
        conditions.append(
            Condition(
                f"resetting them in the updated model removes {ablate['gap_share']:.0%} of the gap; matched groups "
                f"{ablate['random_share']:.0%} (p {ablate['p']:.2g})",
                ablate["holds"],
            )
        )
    return Verdict.decide(push["gap_share"], "of the gap in likelihood restored", prompts, *conditions)
