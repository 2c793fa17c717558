"""What a comparison found: sentences that need no statistics, and the main numbers with captions."""

from typing import Any

from phoque.probes.sae.judge import MIN_CONTROLS
from phoque.reports.page import conclude_verdicts, format_number, format_percent

SIDES = {"tuned": "updated model", "base": "base", "control": "control"}
VERDICT_QUESTIONS = {
    "beyond_control": "Do more features shift than another run of the control's recipe would shift?",
    "beyond_untrained": "Do more of its features shift than of random directions?",
    "replicated": "Do the shifted features recur in a dictionary of another seed?",
    "causes": "Do the selected features cause the change of the answers, to questions that did not select them?",
    "good_dictionary": "Is the autoencoder good enough to rely on?",
}


def conclude(report: dict[str, Any]) -> list[str]:
    """What the comparison found, in sentences that need no statistics; counts that prove nothing come last."""
    overall, scores = report["overall"], report["scores"]
    sentences = []
    scorer = scores["scorers"][0]
    means = [f"{scores['means'][side][scorer]:.3g} {label}" for side, label in SIDES.items() if side in scores["means"]]
    sentences.append(f"Mean {scorer} of the answers to {report['prompts']['n']} questions: {', '.join(means)}.")
    if "n_specific" not in overall:
        sentences.append("There is no control, so none of the shifts below can be attributed to the persona.")
    elif overall["control_runs"] == 1:
        sentences.append(
            f"{overall['n_specific']:,} of {overall['n_tested']:,} tested features differ from this one control run. "
            "Another run of the same recipe differs too, so this is not yet about the persona."
        )
    else:
        sentences.append(
            f"{overall['n_specific']:,} of {overall['n_tested']:,} tested features differ from "
            f"{overall['control_runs']} control runs by more than one further run of them would."
            + " Features of one run move together, so with two runs this may be one difference between runs."
            * (overall["control_runs"] < MIN_CONTROLS)
        )
    if together := report["causes"]["all"]:
        push = together["push"]
        sentences.append(
            "The updated model does not make its own answers likelier than the base model does, so there is nothing "
            "that steering could restore."
            if together["gap"] <= 0
            else "Steering the base model along the selected features restores "
            f"{push['gap_share']:.0%} of what makes the updated model's answers likely; the mean difference alone "
            f"{together['mean_difference_share']:.0%}, features that did not shift {push['random_share']:.0%}, "
            f"directions that were never trained {together['untrained_share']:.0%}."
        )
    if sentence := _conclude_difference(report["difference"], overall["control_runs"]):
        sentences.append(sentence)
    sentences.append(conclude_verdicts(report["verdicts"], VERDICT_QUESTIONS))
    other = overall["untrained"]
    sentences.append(
        f"{overall['n_reported']:,} of {overall['n_tested']:,} features shifted by more than the rounding of equal "
        "weights, which nearly any fine-tune does: of a dictionary that was never trained, "
        f"{other['n_reported']:,} of {other['n_tested']:,} did."
    )
    if alarms := overall["null_reports"]:
        sentences.append(
            "With the two models swapped by a coin for each question, "
            f"{sum(map(bool, alarms))} of {len(alarms)} repeats report any feature, {max(alarms):,} at most. That is "
            "the rate of false alarms if the differences between equal models are symmetric."
        )
    if others := overall["control_beyond_controls"]:
        sentences.append(
            f"Each control run differs from the other control runs in this way in {min(others):,} to {max(others):,} "
            "features."
        )
    return sentences


def _conclude_difference(difference: dict[str, Any], control_runs: int) -> str:
    """What the difference SAE found, in one sentence; empty if there is none."""
    if "not_asked" in difference or not difference["directions"]:
        return ""
    if difference["n_specific"] is None:
        count = f"{difference['n_reported']} of its {difference['n_directions']} directions are reported"
    else:
        runs = "this one control run" if control_runs == 1 else f"{control_runs} control runs, beyond their spread"
        count = f"{difference['n_specific']} of its {difference['n_directions']} directions differ from {runs}"
        if others := difference["control_beyond_controls"]:
            count += f" (each control run differs from the others in {min(others)} to {max(others)})"
    share = difference["explained"]["tuned"]
    return (
        f"The difference SAE explains {share:.0%} of the sum of squares of the differences between the models, on "
        f"questions that it was not trained on; {count}."
    )


def list_headlines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The main results as (number, caption)."""
    overall, quality = report["overall"], report["sae"]["quality"]
    tiles: list[tuple[str, str]] = []
    if "n_specific" in overall:
        runs = overall["control_runs"]
        what = "this one control run" if runs == 1 else f"{runs} control runs, beyond their spread"
        tiles.append((f"{overall['n_specific']:,}", f"features differ from {what}, of {overall['n_tested']:,} tested"))
    if "n_specific_replicated" in overall:
        tiles.append((f"{overall['n_specific_replicated']:,}", "of them replicate with every other seed"))
    other = overall["untrained"]
    tiles += [
        (f"{overall['n_reported']:,}", f"features shifted at all, {overall['n_up']:,} of them up"),
        (f"{other['n_reported']:,} of {other['n_tested']:,}", "of a dictionary that was never trained shifted"),
    ]
    tiles += [
        (format_number(overall["ratio_to_null"]), "times the mean shift of the nulls (equal weights)"),
        (format_percent(overall["rel_mean_diff_norm"]), "of the residual norm: mean shift"),
        (format_number(overall["mean_token_kl"]), "nats per token: KL(base || updated)"),
        (
            f"{format_percent(overall['ev_base'])} → {format_percent(overall['ev_tuned'])}",
            "variance explained, base → updated",
        ),
        (
            format_percent(quality["ev"]),
            f"variance explained on held-out chats; autoencoder quality: {quality['verdict']}",
        ),
    ]
    return tiles
