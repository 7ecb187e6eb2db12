"""Measures of fidelity against answers that are known, by counting pairs, and on a softmax regression on digits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import gradsift as gs
from gradsift.bindings.eval.cases.digits import digits_case
from gradsift.engine.fidelity.auc import auc
from gradsift.engine.fidelity.baselines import bm25
from gradsift.engine.fidelity.cache import Outcomes
from gradsift.engine.fidelity.lds import lds, reliability, subsets
from gradsift.engine.fidelity.qld import qld, removals
from gradsift.engine.fidelity.recall import agreement, class_recall
from gradsift.engine.fidelity.result import Evaluation, Row
from gradsift.engine.scorers.scores import stream_scores
from gradsift.kernels.errors import DataError, ShapeError

N, Q = 150, 30
DECAY = 1e-2


def linear(m: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slopes (q, n), subsets, and losses that are exactly minus the sums of the slopes."""
    slopes = np.random.default_rng(seed).normal(size=(7, 60))
    chosen = subsets(60, m, seed=seed)
    return slopes, chosen, -(chosen @ slopes.T)


def test_true_slopes_of_a_linear_model_have_an_lds_of_one() -> None:
    slopes, chosen, losses = linear()
    found = lds(slopes, chosen, losses)
    assert found.mean == pytest.approx(1.0) and found.interval.low > 0.999
    assert lds(-slopes, chosen, losses).mean == pytest.approx(-1.0)  # positive = lowers the loss


def test_random_scores_and_permuted_subsets_have_an_lds_of_nothing() -> None:
    slopes, chosen, losses = linear(200)
    noise = np.random.default_rng(1).normal(size=slopes.shape)
    bound = 4 / np.sqrt(200 * len(slopes))  # four standard errors
    assert abs(lds(noise, chosen, losses).mean) < bound
    shuffled = np.random.default_rng(2).permutation(len(chosen))
    assert abs(lds(slopes, chosen[shuffled], losses).mean) < bound


def test_lds_is_scipys_spearman_of_every_query_ties_included() -> None:
    slopes, chosen, losses = linear()
    rough = np.round(slopes)  # sums with many ties
    expected = [stats.spearmanr(chosen @ s, -loss).statistic for s, loss in zip(rough, losses.T, strict=True)]
    np.testing.assert_allclose(lds(rough, chosen, losses).per_query, expected, atol=1e-12)


def test_a_constant_query_is_counted_and_left_out_of_the_mean() -> None:
    slopes, chosen, losses = linear()
    slopes[2] = 0
    found = lds(slopes, chosen, losses)
    assert found.undefined == 1 and np.isnan(found.per_query[2]) and found.mean == pytest.approx(1.0)


def test_the_interval_covers_what_more_subsets_show() -> None:
    slopes, chosen, losses = linear(300)
    noisy = losses + np.random.default_rng(3).normal(size=losses.shape) * losses.std()
    truth = lds(slopes, chosen, noisy).mean
    inside = 0
    for start in range(0, 300, 30):
        part = slice(start, start + 30)
        low, high = lds(slopes, chosen[part], noisy[part]).interval
        inside += low <= truth <= high
    assert inside >= 8  # of 10 at 95 %


def test_subsets_have_their_size_and_include_every_example_as_often() -> None:
    chosen = subsets(41, 400, alpha=0.3)
    assert set(chosen.sum(axis=1)) == {12}  # floor(12.3)
    assert np.abs(chosen.mean(axis=0) - 12 / 41).max() < 5 * np.sqrt(0.3 * 0.7 / 400)
    with pytest.raises(ShapeError, match="none empty"):
        subsets(3, 10, alpha=0.2)


def test_reliability_is_the_correlation_with_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(1000, 3))
    losses = truth + rng.normal(size=(2, 1000, 3))  # two seeds as loud as what they measure
    measured = lds(-truth.T, np.eye(1000, dtype=bool), losses.mean(axis=0)).mean
    assert reliability(losses) == pytest.approx(measured, abs=0.05)
    assert np.isnan(reliability(losses[:1]))


def test_auc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 6, 80).astype(float), rng.random(80) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    found = auc(scores, positive)
    assert found.value == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found.interval.low < found.value < found.interval.high
    assert auc(np.ones(80), positive).value == 0.5
    with pytest.raises(ShapeError, match="both kinds"):
        auc(scores, np.ones(80, dtype=bool))


def test_recall_and_class_recall_by_hand() -> None:
    exact = np.array([[5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5]])
    found = np.array([[5.0, 0, 4, 3, 1, 1], [0.0, 1, 2, 3, 4, 5]])
    kept = agreement(found, exact, k=2, shortlist=3)
    assert kept.recall.value == pytest.approx((0.5 + 1) / 2) and kept.recall.chance == pytest.approx(2 / 6)
    assert kept.listed.value == pytest.approx((0.5 + 1) / 2)
    labels, asked = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 1])
    share = class_recall(exact, labels, asked, k=2)
    assert share.value == 1.0 and share.chance == pytest.approx((2 / 6 + 4 / 6) / 2)
    assert class_recall(np.zeros((2, 6)), labels, asked, k=2).value == 0.5  # ties: the first rows


def test_qld_knows_what_every_example_is_worth() -> None:
    """A model that is the set of its examples: each is worth a known amount to each query."""
    worth = np.abs(np.random.default_rng(0).normal(size=(5, 50)))

    def train(rows: Sequence[int], seed: int) -> np.ndarray:
        return 100.0 + seed - worth[:, list(rows)].sum(axis=1)

    runs = removals(worth, share=0.05, seeds=2)
    assert len(runs) == 10 and {len(rows) for rows, _ in runs} == {48}
    whole = np.stack([train(range(50), seed) for seed in range(2)])
    without = np.stack([train(*run) for run in runs]).reshape(5, 2, 5)
    found = qld(whole, without)
    np.testing.assert_allclose(found.per_query, np.sort(worth, axis=1)[:, -2:].sum(axis=1))
    worst = removals(-worth, share=0.05, seeds=2)
    assert qld(whole, np.stack([train(*run) for run in worst]).reshape(5, 2, 5)).mean < found.mean
    with pytest.raises(ShapeError, match="0 of 50"):
        removals(worth, share=0.01, seeds=1)


def test_outcomes_are_kept_and_another_key_does_not_see_them(tmp_path: Path) -> None:
    calls: list[tuple[Any, int]] = []

    def compute(rows: Sequence[int], seed: int) -> np.ndarray:
        calls.append((tuple(rows), seed))
        return np.array([sum(rows) + seed, 1.0])

    runs = [((0, 1), 0), ((1, 2), 0), ((0, 1), 1), ((0, 1), 0)]
    first = Outcomes(tmp_path, "a", compute).get(runs)
    np.testing.assert_array_equal(first[:, 0], [1, 3, 2, 1])
    assert len(calls) == 3  # the fourth is the first
    np.testing.assert_array_equal(Outcomes(tmp_path, "a", compute).get(runs), first)
    assert len(calls) == 3
    assert len(Outcomes(tmp_path, "b", compute).missing(runs)) == 3
    with pytest.raises(DataError, match="finite loss per query"):
        Outcomes(tmp_path, "c", lambda rows, seed: np.array([np.nan])).get(runs)


def test_processes_with_the_same_number_take_runs_in_orders_of_their_own(tmp_path: Path) -> None:
    orders: list[list[int]] = [[], []]
    for place, taken in enumerate(orders):

        def compute(rows: Sequence[int], seed: int, taken: list[int] = taken) -> np.ndarray:
            taken.append(rows[0])
            return np.ones(1)

        Outcomes(tmp_path / str(place), "a", compute).get([((i,), 0) for i in range(50)])
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_another_process_lends_a_hand_with_what_is_wanted(tmp_path: Path) -> None:
    runs = [((0, i), 0) for i in range(1, 6)]
    asking = Outcomes(tmp_path, "a", lambda rows, seed: np.array([-1.0]))
    lending = Outcomes(tmp_path, "a", lambda rows, seed: np.array([float(rows[1])]))
    asking.want(runs)
    lending.lend(lambda: bool(lending.missing(runs)))
    np.testing.assert_array_equal(asking.get(runs)[:, 0], [1, 2, 3, 4, 5])  # nothing was left to compute


KILLED = """
import sys, time
from pathlib import Path
import numpy as np
from gradsift.engine.fidelity.cache import Outcomes

def slow(rows, seed):
    Path(sys.argv[2]).open("a").write(f"{rows[0]}\\n")
    time.sleep(0.05)
    return np.array([float(rows[0])])

runs = [((i,), 0) for i in range(40)]
got = Outcomes(Path(sys.argv[1]), "k", slow).get(runs)
assert got[:, 0].tolist() == [float(i) for i in range(40)]
"""


def test_a_killed_run_goes_on_from_what_was_kept(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache", tmp_path / "log"
    command = [sys.executable, "-c", KILLED, str(folder), str(log)]
    process = subprocess.Popen(command)
    while not log.exists() or log.read_text().count("\n") < 8:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list(folder.glob("*.npy")))
    begun = log.read_text().count("\n")
    assert 0 < kept < 40
    subprocess.run(command, check=True)
    assert log.read_text().count("\n") - begun == 40 - kept  # what was kept is not computed again
    assert len(list(folder.glob("*.npy"))) == 40


class Softmax:
    """Softmax regression on scikit-learn's digits: convex, so retraining is exact and the Hessian says everything."""

    kind = "softmax"

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    def sampled(self, model: nn.Module, batch: Mapping[str, Any], seeds: Sequence[int]) -> Tensor:
        logits = model(batch["x"])
        u = torch.from_numpy(gs.losses.counter_uniform(np.array(seeds, dtype=np.uint64), np.zeros(len(seeds), int)))
        drawn = (logits.detach().double().softmax(1).cumsum(1) < u[:, None]).sum(1).clamp(max=9)
        return functional.cross_entropy(logits, drawn, reduction="none")


def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[: N + Q]
    return data.data[order] / 16.0, data.target[order]


X, Y = _digits()


def fit(rows: Sequence[int], seed: int = 0) -> nn.Module:
    """The minimum of the mean loss plus DECAY/2 of the squared weights."""
    x = np.concatenate([X[list(rows)], np.ones((len(rows), 1))], axis=1)
    y = Y[list(rows)]

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ w.reshape(65, 10)
        z -= z.max(axis=1, keepdims=True)
        p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
        value = -np.log(p[np.arange(len(y)), y]).mean() + DECAY / 2 * (w @ w)
        p[np.arange(len(y)), y] -= 1
        return value, (x.T @ p / len(y)).ravel() + DECAY * w

    w = optimize.minimize(loss, np.zeros(650), jac=True, method="L-BFGS-B", options={"gtol": 1e-7}).x.reshape(65, 10)
    model = nn.Sequential(nn.Linear(65, 10, bias=False))
    model[0].weight.data.copy_(torch.from_numpy(w.T).float())
    return model


def _batch(rows: slice) -> list[dict[str, Tensor]]:
    x = np.concatenate([X[rows], np.ones((len(X[rows]), 1))], axis=1)
    return [{"x": torch.from_numpy(x).float(), "labels": torch.from_numpy(Y[rows])}]


def case(**options: Any) -> gs.FidelityCase:
    return gs.FidelityCase(
        name="softmax",
        examples=N,
        retrain=fit,
        batches=_batch(slice(0, N)),
        queries=_batch(slice(N, N + Q)),
        loss=Softmax(),
        modules="*",
        labels=Y[:N],
        query_labels=Y[N:],
        **options,
    )


@cache
def evaluated(folder: str) -> Any:
    names = ["random", "loss", "exact dot", "exact fisher, k 0.3", "exact fisher, k 1", "fisher, k 1, dim 1024"]
    return gs.evaluate(case(), names, folder, count=25, seeds=1, removed=())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return evaluated(str(tmp_path_factory.getbasetemp() / "softmax"))


def test_exact_curvature_predicts_retraining_of_a_convex_model(found: Any) -> None:
    best = max(row.lds.mean for row in found.rows if row.name.startswith("exact fisher"))
    assert best >= 0.95  # measured .98 and more: METHODS' exact Hessian has .98 at 25 subsets
    assert 0.4 < found["exact dot"].lds.mean < 0.75  # .61 on 1000 examples
    assert abs(found["random"].lds.mean) < 0.1


def test_the_advice_says_fisher_and_the_sketch_keeps_most_of_it(found: Any) -> None:
    assert "fisher" in found.advice[0]
    sketched = found["fisher, k 1, dim 1024"]
    assert sketched.lds.mean > found["exact dot"].lds.mean + 0.1
    assert sketched.agreement.recall.value > 0.7
    assert sketched.bytes == 4 * 1024


def test_the_sweep_by_gram_matrices_is_the_fisher_of_the_store(tmp_path: Path) -> None:
    from gradsift.engine.fidelity.bench import EXACT, Bench, Rows

    bench = Bench(case(), tmp_path)
    for k in (0.1, 1.0):
        stored = bench.scores("fisher", Rows(EXACT), k)
        assert np.abs(bench.exact_fisher().scores(k) - stored).max() < 1e-4 * np.abs(stored).max()  # float32 products
    np.testing.assert_allclose(bench.exact_fisher().dot, bench.scores("dot", Rows(EXACT)), rtol=1e-4, atol=1e-6)
    whole = Bench(case(), tmp_path).exact_fisher()
    own = np.diag(_self_scores(whole, bench))
    np.testing.assert_allclose(whole.own(1.0), own, rtol=1e-3)


def _self_scores(fisher: Any, bench: Any) -> np.ndarray:
    from gradsift.engine.fidelity.bench import EXACT, Rows

    store = bench.store(Rows(EXACT))
    return np.concatenate([b for _, b in stream_scores(store, torch.from_numpy(store.features[:]))], axis=1)


def test_two_stages_answer_by_exact_scores_of_what_the_codes_list(tmp_path: Path) -> None:
    from gradsift.engine.fidelity.bench import Bench
    from gradsift.engine.fidelity.candidates import alone, coded, decided, exact_fisher

    bench = Bench(case(), tmp_path)
    codes, truth = coded("fisher", 1024, 64, 1.0), exact_fisher(1.0)
    own, true, mixed = (bench.remembered(one) for one in (codes, truth, decided(codes, truth, 40)))
    assert own is not None and true is not None and mixed is not None
    for q in range(Q):
        listed, order = np.argsort(-own[q], kind="stable"), np.argsort(-mixed[q], kind="stable")
        assert set(order[:40]) == set(listed[:40]) != set(np.argsort(-true[q])[:40])
        np.testing.assert_array_equal(mixed[q][order[:40]], np.sort(true[q][listed[:40]])[::-1])
        np.testing.assert_array_equal(order[40:], listed[40:])
    with pytest.raises(DataError, match="scores examples alone"):
        bench.remembered(decided(alone("self", 1024), truth))

    names = ["fisher, k 1, dim 1024", "fisher, k 1, 128 B + exact"]
    row = gs.evaluate(case(), names, tmp_path, count=2, seeds=1, removed=())[names[1]]
    assert row.lds is None and row.family == "codes"  # sums over halves are no answer of it
    assert row.agreement is not None and row.agreement.recall.value > 0.95


def test_rows_of_few_labels_tell_mislabelled_examples_by_their_own_fisher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradsift.engine.fidelity.bench import Bench
    from gradsift.engine.fidelity.candidates import exact_fisher
    from gradsift.engine.fidelity.methods import standard

    monkeypatch.setattr("gradsift.engine.fidelity.bench._CURVATURE_ROWS", 2 * N)
    bench = Bench(case(), tmp_path)
    assert [one.name for one in standard(bench) if "label" in one.name] == ["exact fisher, k 1, 1 label"]  # 2 are all
    of_one = exact_fisher(1.0, labels=1).suspicion
    assert of_one is not None
    np.testing.assert_array_equal(of_one(bench), bench.exact_fisher().own(1.0, labels=1))
    assert not np.allclose(of_one(bench), bench.exact_fisher().own(1.0))


def test_gradients_that_do_not_fit_leave_their_rows_out_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []

    def counted(rows: Sequence[int], seed: int) -> nn.Module:
        trained.append(rows)
        return fit(rows)

    monkeypatch.setattr("gradsift.engine.fidelity.bench._EXACT_BYTES", 4 * 650 * 2 * N)  # of examples, not of labels
    own = replace(case(), retrain=counted, model=fit(range(N)))
    names = ["exact dot", "exact fisher, k 1, 3 models", "fisher, k 1, dim 1024"]
    found = gs.evaluate(own, names, tmp_path, count=3, seeds=1, removed=())
    assert "exact gradients of" in found.left_out.pop("exact fisher, k 1, 3 models") and not found.left_out
    assert len(trained) == 3
    assert [row.name for row in found.rows] == ["exact dot", "fisher, k 1, dim 1024"]
    assert found["fisher, k 1, dim 1024"].agreement is None


class Undrawn:
    """A loss that cannot draw labels."""

    kind = "softmax"

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return Softmax()(model, batch)


def test_without_labels_no_row_is_called_a_fisher(tmp_path: Path) -> None:
    own = replace(case(), loss=Undrawn())
    found = gs.evaluate(own, ["exact dot", "*fisher*"], tmp_path, count=2, seeds=1, removed=())
    assert [row.name for row in found.rows] == ["exact dot"]
    assert "cannot draw labels" in found.left_out["fisher, k 1, dim 1024"]
    assert "cannot draw labels" in found.left_out["fisher, k 1, 128 B"]


class Mine:
    """A scorer of one's own: plain products."""

    def prepare(self, store: Any) -> None:
        pass

    def score(self, queries: Any, rows: Any) -> Tensor:
        return queries.values @ rows.values.double().T


def test_a_scorer_of_ones_own_stands_beside_the_others(tmp_path: Path) -> None:
    found = gs.evaluate(case(), ["exact dot", Mine()], tmp_path, count=4, seeds=1, removed=())
    own = found["Mine, dim 4096"]
    assert own.family == "own" and own.bytes == 4 * 4096
    assert own.lds.mean == pytest.approx(found["exact dot"].lds.mean, abs=0.1)


def test_a_case_that_does_not_fit_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="3 texts for 150 examples"):
        gs.evaluate(case(texts=["a", "b", "c"]), cache=tmp_path)
    with pytest.raises(DataError, match="retrain returned a str"):
        gs.evaluate(replace(case(), retrain=lambda rows, seed: "no model"), cache=tmp_path)
    with pytest.raises(ShapeError, match="hold 150 examples but the case says 149"):
        gs.evaluate(replace(case(), examples=149, labels=None), ["dot, dim 1024"], tmp_path, count=2, seeds=1)


def test_numbers_of_outputs_and_queries_are_checked_at_the_first_training(tmp_path: Path) -> None:
    trained: list[Any] = []

    def counted(rows: Sequence[int], seed: int) -> nn.Module:
        trained.append(rows)
        return fit(rows)

    own = replace(case(), retrain=counted, model=fit(range(N)))
    short = replace(own, outputs=lambda model: np.zeros(Q - 1))
    with pytest.raises(DataError, match="per query, and there are 30"):
        gs.evaluate(short, ["random"], tmp_path, count=8, seeds=1, removed=())
    assert len(trained) == 1
    with pytest.raises(ShapeError, match="29 query_labels for 30 queries"):
        gs.evaluate(replace(own, query_labels=Y[N:-1]), ["random"], tmp_path, count=8, seeds=1, removed=())
    assert len(trained) == 1


def test_another_training_or_measure_has_outcomes_of_its_own() -> None:
    def other(rows: Sequence[int], seed: int) -> nn.Module:
        return fit(rows, seed + 1)

    known = case().fingerprint()
    assert case().fingerprint() == known
    assert replace(case(), retrain=other).fingerprint() != known
    assert replace(case(), outputs=lambda model: np.zeros(Q)).fingerprint() != known
    assert replace(case(), key="another base").fingerprint() != known
    assert replace(case(), retrain=partial(fit)).fingerprint() != known  # without a text of its own, and no error


def test_losses_and_norms_are_read_from_whole_gradients_of_the_own_loss(tmp_path: Path) -> None:
    from gradsift.engine.fidelity.bench import Bench, Rows

    bench = Bench(case(measures={"other": Undrawn()}), tmp_path)
    spec = gs.SketchSpec(dim=64)
    for rows in (Rows(spec, curvature=False, measure="other"), Rows(spec, grouped=True, curvature=False)):
        bench.store(rows)
    assert bench.any_store.spec.dim == 1024


def test_words_of_any_script_and_parts_of_names_are_words() -> None:
    scores = bm25(["read_file twice", "große Straße", "слова тоже"], ["file", "große", "слова"])
    assert scores.argmax(axis=1).tolist() == [0, 1, 2] and (scores.max(axis=1) > 0).all()


def test_a_row_without_any_correlation_comes_last_and_is_counted() -> None:
    slopes, chosen, losses = linear()
    none = Row("loss", "baseline", lds=lds(np.ones_like(slopes), chosen, losses))
    some = Row("random", "baseline", lds=lds(-slopes, chosen, losses))
    found = Evaluation("toy", 60, 7, 40, 1, float("nan"), (none, some), {})
    assert [row.name for row in found.ranked] == ["random", "loss"] and found.undefined == {"loss": 7}
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["rows"][0]["lds"] == {"mean": None, "interval": [None, None], "undefined": 7}
    assert "loss: 7 of 7 queries left out" in str(found)


def test_the_picture_shows_every_removal_with_or_without_an_lds(tmp_path: Path) -> None:
    from gradsift.bindings.eval.plot import draw

    slopes, chosen, losses = linear()
    rise = qld(np.zeros((1, 3)), np.ones((3, 1, 3)))
    rows = (
        Row("exact dot", "exact", bytes=4000, lds=lds(slopes, chosen, losses), qld=rise),
        Row("fisher, k 1, 256 B + exact", "codes", bytes=256, qld=rise),
    )
    draw(tmp_path / "a.svg", Evaluation("toy", 60, 7, 40, 1, float("nan"), rows, {}))
    drawn = (tmp_path / "a.svg").read_text()  # each text is a comment beside its outlines
    assert drawn.count("<!-- exact dot -->") >= 2  # among the LDS and the removals
    assert drawn.count("<!-- fisher, k 1, 256 B + exact -->") == 1


def test_few_halves_give_no_verdict_and_a_baseline_is_not_compressed() -> None:
    slopes, chosen, losses = linear()
    noisy = slopes + np.random.default_rng(1).normal(size=slopes.shape)
    rows = (
        Row("BM25", "baseline", lds=lds(noisy, chosen, losses)),
        Row("exact dot", "exact", lds=lds(slopes, chosen, losses)),
    )
    told = Evaluation("toy", 60, 7, 40, 1, float("nan"), rows, {}).advice
    assert told[0].startswith("Use BM25") and any(sentence.endswith("more than it.") for sentence in told)
    few = Evaluation("toy", 60, 7, 7, 1, float("nan"), rows, {}).advice
    assert few == ["7 random subsets are too few to tell methods apart: take at least 8, better 60."]


def test_the_verdict_is_a_baseline_where_that_is_as_good(tmp_path: Path) -> None:
    """Scores that say it all, noisy ones, and random ones."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(8, 40))
    chosen = subsets(40, 60)
    losses = -(chosen @ truth.T)

    def row(name: str, family: str, scores: np.ndarray, size: int | None) -> Row:
        return Row(name, family, bytes=size, lds=lds(scores, chosen, losses))

    noisy = truth + 2 * rng.normal(size=truth.shape)
    rows = (row("BM25", "baseline", truth, None), row("fisher, dim 64", "sketch", noisy, 256))
    told = Evaluation("toy", 40, 8, 60, 1, float("nan"), rows, {}).advice
    assert told[0].startswith("Use BM25") and any("not worth their cost" in sentence for sentence in told)
    few = subsets(40, 8)

    def briefly(scores: np.ndarray, name: str, size: int | None) -> Row:
        return Row(name, "baseline" if size is None else "sketch", None, size, lds(scores, few, -(few @ truth.T)))

    other = np.random.default_rng(1)
    words, gradients = (truth + noise * other.normal(size=truth.shape) for noise in (1.5, 0.5))
    unsure = (briefly(words, "BM25", None), briefly(gradients, "fisher", 256))
    told = Evaluation("toy", 40, 8, 8, 1, float("nan"), unsure, {}).advice
    assert told[0].startswith("These trainings cannot tell BM25") and "more subsets or seeds" in told[0]
    nothing = (row("BM25", "baseline", rng.normal(size=truth.shape), None),)
    assert "Nothing here predicts" in Evaluation("toy", 40, 8, 60, 1, float("nan"), nothing, {}).advice[0]
    equal = (row("fisher, 128 B", "codes", truth, 128), row("fisher, dim 64", "sketch", truth, 256))
    assert Evaluation("toy", 40, 8, 60, 1, float("nan"), equal, {}).advice[0].startswith("Use fisher, 128 B")


def test_every_kind_of_store_is_evaluated(tmp_path: Path) -> None:
    """Checkpoints, Adam, groups, codes, a correction and scores without queries, on a LoRA that was really trained."""
    digits = digits_case(60, 12)
    names = [
        *("dot, checkpoints, dim 1024", "less, checkpoints, dim 1024", "datainf, dim 1024", "trak, dim 1024"),
        *("fisher, k 1, 128 B", "exact ekfac, k 1", "exact fisher, k 1, by number", "self", "self_fisher"),
    ]
    found = gs.evaluate(
        digits, names, tmp_path, count=3, seeds=1, removed=("fisher, k 1, 128 B",), remove_queries=2, remove=0.05
    )
    assert found.left_out == {} and {row.name for row in found.rows} == set(names)
    assert found["less, checkpoints, dim 1024"].bytes == 4 * 1024 * 4
    stored = next(tmp_path.rglob("*.fisher.128"))
    assert found["fisher, k 1, 128 B"].bytes == gs.CompactStore.open(stored).bytes < 128  # 60 rows have few axes
    assert found["fisher, k 1, 128 B"].agreement.listed.value > 0.9  # all 60 are in a list of 100
    assert found["fisher, k 1, 128 B"].qld.per_query.shape == (2,)
    assert found["self"].lds is None and found["self"].auc.value > 0.6  # gradients of wrong labels are long
