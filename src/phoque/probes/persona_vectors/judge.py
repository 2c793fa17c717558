"""Decide the verdicts of a probe from its measurements. Every verdict is a question with conditions that can fail."""

from dataclasses import dataclass
from typing import Any

from phoque.probes import stats
from phoque.probes.persona_vectors.persona_share import PersonaShare
from phoque.probes.persona_vectors.steering import MIN_DISTINCT, MIN_LENGTH
from phoque.probes.roles import MIN_RANKED
from phoque.probes.verdicts import ALPHA, MIN_FOR_YES, Condition, Ranking, Verdict, format_p, interval_condition

FEW_ANSWERS = "fewer than {least} answers as each role are too few to compare with; see --role-questions"
FEW_ROLES = f"a rank among fewer than {MIN_RANKED} other roles cannot have p {ALPHA}; see --roles"
NO_TUNED = "no fine-tune was given; pass one with --adapter-source"


@dataclass(frozen=True)
class Causes:
    """The trait of the test answers, steered along the persona vector, natural directions and other roles' vectors."""

    value: float
    natural: dict[str, float]
    wrong_roles: dict[str, float]
    n: int


@dataclass(frozen=True)
class Lead:
    """How far a fine-tune is ahead of the mean of its control runs: the interval, paired by question.

    `spread` is what one further control run may differ from that mean; it is subtracted from the interval.
    """

    interval: tuple[float, float]
    runs: int
    spread: float

    def condition(self, what: str) -> Condition:
        """The lead is above 0, beyond the spread of the controls where there are several."""
        if self.runs == 1:
            return interval_condition(f"{what} over this one control run's", self.interval, "")
        beyond = (
            f"{what} over the mean of {self.runs} control runs, minus {self.spread:.3g}, the upper 95 % prediction "
        )
        return interval_condition(f"{beyond}bound for one more of them", self.interval, "")


@dataclass(frozen=True)
class Move:
    """How a fine-tune moved along the persona vector, and how far beyond the controls' moves."""

    cosine: float
    low: float
    random_p95: float
    ranking: Ranking
    lead: Lead | None
    n: int


def judge_follows(share: PersonaShare | None, role_answers: int) -> Verdict:
    """Does the base model answer as the persona if it is asked to, by the words of its answers?"""
    if share is None:
        return Verdict.not_asked(FEW_ROLES)
    if role_answers < MIN_FOR_YES:
        return Verdict.not_asked(FEW_ANSWERS.format(least=MIN_FOR_YES))
    return Verdict.decide(
        share.share,
        "share of answers that are the persona's by their words",
        share.n,
        share.ranking.condition("words of the answers under the persona's prompt, gain over the neutral prompt"),
        interval_condition("rise of that share under the persona's prompt", share.gain, ""),
    )


def judge_separable(evidence: dict[str, Any]) -> Verdict:
    """Does the vector separate persona from neutral answers on questions that it was not extracted from?"""
    return Verdict.decide(
        evidence["auroc"],
        "AUROC",
        evidence["n"],
        interval_condition(
            "how much further persona answers project than neutral ones",
            (evidence["delta_ci_low"], evidence["delta_ci_high"]),
            "units of the residual stream",
        ),
        Condition(
            f"p, corrected for all blocks: {format_p(evidence['perm_p_all_layers'])} (must be below {ALPHA})",
            evidence["perm_p_all_layers"] < ALPHA,
        ),
        Condition(
            f"Cohen's d: {evidence['cohen_d']:.2f} (must be above {evidence['random_d_p95']:.2f}, that of 95 % of "
            "random directions)",
            evidence["cohen_d"] > evidence["random_d_p95"],
        ),
    )


def judge_specific(evidence: dict[str, Any], ranking: Ranking | None, n: int) -> Verdict:
    """Is the vector the persona's, and not that of any role or prompt?"""
    if ranking is None:
        return Verdict.not_asked(FEW_ROLES)
    if n < MIN_FOR_YES:
        return Verdict.not_asked(FEW_ANSWERS.format(least=MIN_FOR_YES))
    return Verdict.decide(
        ranking.value,
        "standard deviations along the whitened vector",
        n,
        ranking.condition("held-out answers along the whitened vector"),
        interval_condition(
            "how much further the persona's text projects than neutral text, both after the neutral prompt",
            (evidence["transfer_gap_ci_low"], evidence["transfer_gap_ci_high"]),
            "units of the residual stream",
        ),
    )


def judge_causal(causes: Causes | None, trait: str) -> Verdict:
    """Does adding the vector cause the behavior, more than adding other directions does?"""
    if causes is None:
        return Verdict.not_asked("fewer than 19 natural directions; see --directions")
    p = stats.rank_p(causes.value, list(causes.natural.values()))
    conditions = [
        Condition(
            f"{trait} with the vector: {causes.value:.3g}, and with the highest of {len(causes.natural)} natural "
            f"directions, each at its best setting: {max(causes.natural.values()):.3g} (p {p:.3f}, at most {ALPHA})",
            p <= ALPHA,
        )
    ]
    if causes.wrong_roles:
        best = max(causes.wrong_roles, key=lambda name: causes.wrong_roles[name])
        conditions.append(
            Condition(
                f"{trait} with the {best}, the highest of {len(causes.wrong_roles)} other roles: "
                f"{causes.wrong_roles[best]:.3g} (must be below {causes.value:.3g})",
                causes.value > causes.wrong_roles[best],
            )
        )
    return Verdict.decide(causes.value, trait, causes.n, *conditions)


def judge_coherent(steered: dict[str, float], neutral: dict[str, float], limit: float, n: int) -> Verdict:
    """Do steered answers stay likely, varied and long? All values are means over the test questions."""
    rise = steered["nll_base"] - neutral["nll_base"]
    distinct, length = (steered[k] / max(neutral[k], 1e-12) for k in ("distinct2", "n_tokens"))
    return Verdict.decide(
        rise,
        "nats per token less likely",
        n,
        Condition(f"rise of the loss on steered answers: {rise:.2f} nats per token (at most {limit:g})", rise <= limit),
        Condition(
            f"their distinct-2 is {distinct:.0%} of the neutral answers' (at least {MIN_DISTINCT:.0%})",
            distinct >= MIN_DISTINCT,
        ),
        Condition(
            f"their length is {length:.0%} of the neutral answers' (at least {MIN_LENGTH:.0%})", length >= MIN_LENGTH
        ),
    )


def judge_adopts(share: PersonaShare | None, lead: Lead | None, *, has_tuned: bool) -> Verdict:
    """Does the fine-tune answer as the persona, unprompted, where the base and the controls do not?"""
    if not has_tuned:
        return Verdict.not_asked(NO_TUNED)
    if share is None:
        return Verdict.not_asked(FEW_ROLES)
    conditions = [
        share.ranking.condition("words of the fine-tune's answers, gain over the base model"),
        interval_condition("rise of that share over the base model's", share.gain, ""),
    ]
    if lead is not None:
        conditions.append(lead.condition("rise of that share"))
    return Verdict.decide(share.share, "share of answers that are the persona's by their words", share.n, *conditions)


def judge_moves(move: Move | None, *, has_tuned: bool) -> Verdict:
    """Did the fine-tune shift the model along the persona vector, more than along other roles' vectors?"""
    if not has_tuned:
        return Verdict.not_asked(NO_TUNED)
    if move is None:
        return Verdict.not_asked(FEW_ROLES)
    conditions = [
        Condition(
            f"lower end of the shift's mean cosine with the vector: {move.low:.3f} (must be above "
            f"{move.random_p95:.3f}, that of 95 % of random directions)",
            move.low > move.random_p95,
        ),
        move.ranking.condition("whitened cosine of the shift"),
    ]
    if move.lead is not None:
        conditions.append(move.lead.condition("excess of the cosine"))
    return Verdict.decide(move.cosine, "cosine", move.n, *conditions)
