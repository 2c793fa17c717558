"""The statistics, against scipy and scikit-learn, and against what chance must give."""

import numpy
import pytest
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from phoque.probes import stats


@pytest.fixture
def random_generator():
    return numpy.random.default_rng(5)


def test_auroc_is_that_of_scikit_learn_ties_included(random_generator):
    high, low = random_generator.integers(0, 6, (9, 4)) + 1.0, random_generator.integers(0, 6, (7, 4)) * 1.0
    for layer in range(4):
        labels = [1] * 9 + [0] * 7
        wanted = roc_auc_score(labels, [*high[:, layer], *low[:, layer]])
        assert stats.auroc(high, low)[layer] == pytest.approx(wanted)


def test_spearman_is_that_of_scipy_ties_included(random_generator):
    a, b = random_generator.integers(0, 5, 40), random_generator.integers(0, 5, 40)
    assert stats.spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    assert numpy.isnan(stats.spearman(numpy.ones(4), numpy.arange(4)))


def test_sign_flips_give_scipys_exact_p(random_generator):
    gaps = random_generator.normal(0.4, 1, (9, 1))
    wanted = scipy_stats.permutation_test(
        (gaps[:, 0],), lambda x, axis: numpy.mean(x, axis=axis), permutation_type="samples", n_resamples=numpy.inf
    )
    p, everywhere = stats.sign_flip_test(gaps)
    assert p[0] == pytest.approx(wanted.pvalue) and everywhere[0] == pytest.approx(p[0])


def test_under_chance_p_is_small_as_seldom_as_it_should_be(random_generator):
    found = [stats.sign_flip_test(random_generator.normal(size=(10, 8))) for _ in range(200)]
    alone = numpy.array([p for p, _ in found])
    best = numpy.array([everywhere.min() for _, everywhere in found])
    assert 0.02 < (alone < 0.05).mean() < 0.08
    assert (best < 0.05).mean() < 0.1 < (alone.min(1) < 0.05).mean()  # the best of eight layers is not one layer


def test_columns_are_tested_as_if_alone_and_their_largest_together(random_generator):
    gaps = random_generator.normal(0.3, 1, (30, 300))
    p, largest = stats.sign_flip_test(gaps, seed=2, flips=999)
    for column in (0, 127, 128, 299):
        assert stats.sign_flip_test(gaps[:, [column]], seed=2, flips=999)[0][0] == pytest.approx(p[column])
    assert (largest >= p - 1e-12).all() and largest.mean() > 2 * p.mean() and p.min() >= 1 / 1000


def test_flips_give_the_p_of_the_t_statistic_itself(random_generator):
    """The test ranks |mean| / root mean square; the statistic is the mean divided by its standard error."""
    gaps = random_generator.normal(0.1, 1, (30, 300)) * random_generator.uniform(1e-6, 1e6, 300)
    gaps[:, 0] = 0.0
    gaps[:, 1] = 2.0  # no spread
    means = stats.draw_signs(30, 5, 1999) @ gaps / 30
    squares = (gaps**2).mean(0)
    t, observed = (
        numpy.abs(mean) / numpy.sqrt(numpy.maximum(squares - mean**2, 1e-12 * squares + 1e-30))
        for mean in (means, gaps.mean(0))
    )
    p, largest = stats.sign_flip_test(gaps, seed=5, flips=1999)
    assert p == pytest.approx(((t >= observed * (1 - 1e-9)).sum(0) + 1) / 2000)
    assert largest == pytest.approx(((t.max(1)[:, None] >= observed * (1 - 1e-9)).sum(0) + 1) / 2000)


@pytest.mark.parametrize("n", [8, 20])
def test_differences_that_cancel_are_counted_exactly(random_generator, n):
    """Sums of whole numbers tell which flips are as large; divided, they differ by rounding."""
    gaps = random_generator.integers(-3, 4, (n, 200))
    gaps[:, 0] = numpy.resize([1, -1], n)  # cancel to 0
    sums = stats.draw_signs(n, 3, 1999) @ gaps
    exact = 2**n <= 1999
    as_large = (numpy.abs(sums) >= numpy.abs(gaps.sum(0))).sum(0)
    p, _ = stats.sign_flip_test(gaps, seed=3, flips=1999)
    assert p == pytest.approx((as_large + (not exact)) / (len(sums) + (not exact)), abs=1e-12) and p[0] == 1


def test_columns_of_rounding_do_not_count_among_the_largest(random_generator):
    gaps = random_generator.normal(0.5, 1, (20, 50))
    noise = random_generator.normal(0, 1e-17, (20, 3000))
    alone, beside = (stats.sign_flip_test(columns)[1][:50] for columns in (gaps, numpy.hstack([gaps, noise])))
    assert beside == pytest.approx(alone, abs=1e-3)


def test_q_is_scipys_false_discovery_control(random_generator):
    p = numpy.concatenate([random_generator.uniform(0, 1, 50), random_generator.uniform(0, 0.001, 5), [0.2, 0.2]])
    assert stats.benjamini_hochberg(p) == pytest.approx(scipy_stats.false_discovery_control(p))


def test_column_intervals_are_those_of_each_column(random_generator):
    values = random_generator.normal(1, 1, (20, 200))
    low, high = stats.column_intervals(values, seed=3)
    for column in (0, 150, 199):
        assert (low[column], high[column]) == pytest.approx(stats.mean_interval(values[:, column], seed=3))


def test_many_questions_are_flipped_at_random(random_generator):
    p, _ = stats.sign_flip_test(random_generator.normal(1.5, 1, (30, 1)))
    assert 0 < p[0] < 0.01


def test_bootstrap_intervals_cover_the_mean(random_generator):
    inside = 0
    for n in range(100):
        low, high = stats.mean_interval(random_generator.normal(2, 1, 20), seed=n)
        inside += low < 2 < high
    assert 85 <= inside <= 99


def test_halves_agree_where_there_is_a_direction_and_not_where_there_is_none(random_generator):
    direction = random_generator.normal(size=32)
    differences = numpy.stack(
        [random_generator.normal(size=(12, 32)), random_generator.normal(size=(12, 32)) + 3 * direction], axis=1
    )
    none, some = stats.split_half_cosine(differences)
    assert some > 0.9 and abs(none) < 0.4


def test_natural_directions_lie_where_the_rows_do(random_generator):
    rows = random_generator.normal(size=(10, 1, 40)) * numpy.array([5.0] * 3 + [0.01] * 37)
    made = stats.draw_natural_directions(rows, 50)
    assert (made[:, 0, :3] ** 2).sum(1).min() > 0.99


def test_no_p_value_of_float32_is_below_its_floor():
    """All signs equal is the most extreme of the 2**n patterns, together with its opposite: p is exactly 2 / 2**n."""
    values = numpy.random.default_rng(0).gamma(2.0, 1.0, (8, 400)).astype(numpy.float32) + 0.01
    p, corrected = stats.sign_flip_test(values)
    assert (p == 2 / 2**8).all() and (corrected >= 2 / 2**8).all()


@pytest.mark.parametrize(("draw", "most"), [("normal", 0.04), ("skewed", 0.06)])
def test_an_interval_of_two_dozen_questions_is_above_the_truth_as_seldom_as_it_should_be(random_generator, draw, most):
    """Of 1,000 samples of 24. The percentile interval of left-skewed values is above the truth in 8 %."""
    values = random_generator.normal(size=(24, 1000))
    if draw == "skewed":
        values = 1 - random_generator.exponential(size=(24, 1000))
    low, high = stats.column_intervals(values)
    assert (low > 0).mean() < most and (high < 0).mean() < most
    assert ((low < 0) & (high > 0)).mean() > 0.92


def test_a_bca_interval_is_scipys(random_generator):
    values = random_generator.exponential(size=30)
    wanted = scipy_stats.bootstrap((values,), numpy.std, method="BCa", n_resamples=5000, random_state=1)
    low, high = stats.bca_interval(lambda w: numpy.sqrt(w @ values**2 - (w @ values) ** 2), 30)
    assert low == pytest.approx(wanted.confidence_interval.low, rel=0.05)
    assert high == pytest.approx(wanted.confidence_interval.high, rel=0.05)


def test_the_first_of_forty_has_a_p_of_a_fortieth():
    assert stats.rank_p(5.0, numpy.arange(39) / 10) == 1 / 40
    assert stats.rank_p(5.0, numpy.full(39, 5.0)) == 1


def test_holm_is_that_of_the_definition():
    assert stats.holm(numpy.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])


def test_a_further_run_is_beyond_the_spread_once_in_twenty(random_generator):
    for count in (2, 3, 6):
        runs = random_generator.normal(3.0, 0.7, (4000, count + 1))
        spreads = numpy.array([stats.predict_spread(row[:-1]) for row in runs])
        rate = (runs[:, -1] - runs[:, :-1].mean(1) > spreads).mean()
        assert rate == pytest.approx(0.05, abs=0.015)
    assert stats.predict_spread(numpy.array([1.0])) == 0.0


def test_the_cosine_of_a_weighted_mean_is_that_of_the_resampled_rows(random_generator):
    values = random_generator.standard_normal((20, 5, 7)) + 0.3
    unit = stats.normalize(random_generator.standard_normal((5, 7)))
    rows = stats.draw_resamples(20, 2)[:50]
    weights = numpy.stack([numpy.bincount(row, minlength=20) for row in rows]) / 20
    wanted = [stats.cosine(values[row].mean(0), unit) for row in rows]
    numpy.testing.assert_allclose(stats.MeanCosine(values, unit)(weights), wanted, atol=1e-12)


@pytest.mark.parametrize("values", [[0.97, *[0.0312] * 23], [*[1.0] * 12, *[0.0] * 12]])
def test_resamples_with_the_mean_of_the_sample_are_ties(values):
    """Texts without a known word have the same probability. scipy resamples the rows themselves."""
    array = numpy.array(values)
    rows = stats.draw_resamples(len(array), 0)
    weights = numpy.stack([numpy.bincount(row, minlength=len(array)) for row in rows]) / len(array)
    assert not (weights @ array == array[rows].mean(1)).all()  # so that ties must be found
    wanted = scipy_stats.bootstrap((array,), numpy.mean, method="BCa", n_resamples=20_000, random_state=1)
    low, high = stats.bca_interval(lambda weights: weights @ array, len(array))
    assert low == pytest.approx(wanted.confidence_interval.low, abs=0.03)
    assert high == pytest.approx(wanted.confidence_interval.high, abs=0.03)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_the_interval_of_a_share_holds_it_and_has_a_width_at_the_ends(share):
    drawn = numpy.random.default_rng(0).random((2000, 24)) < share
    intervals = [stats.share_interval(row.astype(float)) for row in drawn]
    assert numpy.mean([low - 1e-9 <= share <= high + 1e-9 for low, high in intervals]) > 0.9
    assert all(0 <= low < high <= 1 for low, high in intervals)
    assert stats.share_interval(numpy.zeros(24))[1] == pytest.approx(0.138, abs=0.001)
