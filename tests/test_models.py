"""Models of symbols: tied projections, writing by greedy, beam and sampling, encoder-decoders, projections of words, Kneser-Ney."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
from rnnfast import Adam, Dropout, Embedding, Graph, losses, training
from rnnfast.models import (
    AdaptiveSoftmax,
    Columns,
    EncoderDecoder,
    KneserNey,
    Projections,
    TiedLinear,
    beam,
    delayed,
    greedy,
    language_model,
    many_to_one,
    mlp,
    nearest,
    negative_sampling_loss,
    ngrams,
    one_to_many,
    recurrent_stack,
    sample,
    stepper,
    window_batches,
)


def check_parameters(model, divergence, at: int = 12) -> None:
    """Some of the parameters' gradients against central differences, in float32: within 1 % of the largest."""
    model.zero_gradients()
    divergence(True)
    rng = np.random.default_rng(0)
    for name, gradient in model.gradients().items():
        flat, values = gradient.reshape(-1), model.parameters()[name].reshape(-1)
        for i in rng.integers(flat.size, size=at):
            kept, step = values[i], np.float32(1e-2)
            values[i] = kept + step
            up = divergence(False)
            values[i] = kept - step
            down = divergence(False)
            values[i] = kept
            assert flat[i] == pytest.approx((up - down) / (2 * step), abs=0.01 * float(np.abs(flat).max()) + 1e-4), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_language_model_has_the_gradient_of_its_loss(tied: bool, cell: str) -> None:
    model = language_model(7, 4, 6, cell=cell, tied=tied, seed=0)
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(7, size=(2, 5, 3))

    def divergence(backward: bool) -> float:
        y, _ = model(tokens)
        loss, dy = losses.softmax_cross_entropy(20 * y, targets)
        if backward:
            model.backward(20 * dy)
        else:
            for leaf in (model, *model.leaves()):
                leaf._tapes.clear()
        return loss

    check_parameters(model, divergence)


def test_a_tied_table_is_trained_from_both_ends_and_survives_a_copy() -> None:
    model = language_model(9, 5, 5, seed=0)
    assert isinstance(model["logits"], TiedLinear) and "down" not in model.parameters()
    twin = copy.deepcopy(model)
    tokens = np.arange(9)[:, None]
    for one in (model, twin):
        y, _ = one(tokens[:3])
        one.backward(np.ones_like(y))
        Adam(one, 0.1).step()
    assert (model.gradients()["projection.weight"][5:] != 0).all()  # of words that were not read
    np.testing.assert_array_equal(model(tokens)[0], twin(tokens)[0])
    assert twin["logits"].embedding is twin["projection"]
    with pytest.raises(ValueError, match="sparse"):
        TiedLinear(Embedding(4, 2, sparse=True))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (TiedLinear(Embedding(4, 2, seed=0)), np.ones((3, 1, 2), np.float32)),
        (Projections(4, 2, seed=0), {"words": np.array([[1, 2]]), "candidates": np.array([[3, 0, 1]])}),
        (Columns(), np.ones((1, 2, 3, 4), np.float32)),
    ],
    ids=["TiedLinear", "Projections", "Columns"],
)
def test_a_wrong_dy_costs_nothing(model, x) -> None:
    y = model(x)
    for wrong in (y[..., :-1], y[None], *([] if isinstance(model, Columns) else [y.astype(np.float64)])):  # Columns only move what comes
        with pytest.raises((TypeError, ValueError), match="dy must"):
            model.backward(wrong)
    model.backward(y)


def test_a_tied_layer_takes_an_empty_batch() -> None:
    layer = TiedLinear(Embedding(4, 2, seed=0))
    y = layer(np.zeros((0, 3, 2), np.float32))
    assert y.shape == (0, 3, 4) and layer.backward(y).shape == (0, 3, 2)


@pytest.mark.parametrize("cutoffs", [[3], [2, 5], [4, 8]], ids=["one cluster", "two", "a cluster of one"])
def test_an_adaptive_softmax_is_torchs(cutoffs: list[int]) -> None:
    torch = pytest.importorskip("torch")
    V, E = 9, 4
    layer = AdaptiveSoftmax(Embedding(V, E, dtype="float64", seed=0), cutoffs)
    layer.flat[:] = np.random.default_rng(1).standard_normal(layer.flat.size)
    layer.parameters()["bias"][cutoffs[0] :] = 0  # torch's clusters have none
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(E, V, cutoffs, div_value=1.0, head_bias=True, dtype=torch.float64)
    table, own, ends = layer.embedding.parameters()["weight"], layer.parameters(), [*cutoffs, V]
    with torch.no_grad():
        theirs.head.weight[:] = torch.tensor(np.concatenate((table[: cutoffs[0]], own["cluster.weight"])))
        theirs.head.bias[:] = torch.tensor(np.concatenate((own["bias"][: cutoffs[0]], own["cluster.bias"])))
        for tail, low, high in zip(theirs.tail, ends, ends[1:], strict=False):
            tail[0].weight[:] = torch.eye(E)
            tail[1].weight[:] = torch.tensor(table[low:high])
    rng = np.random.default_rng(2)
    x, target = rng.standard_normal((6, 5, E)), rng.integers(V, size=(6, 5))
    x_t = torch.tensor(x.reshape(-1, E), requires_grad=True)
    expected = theirs(x_t, torch.tensor(target.reshape(-1))).loss
    expected.backward()
    value, dx = layer.loss(layer(x), target)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(layer.backward(dx).reshape(-1, E), x_t.grad, atol=1e-14)
    head, clusters = theirs.head.weight.grad.numpy(), [tail[1].weight.grad.numpy() for tail in theirs.tail]
    np.testing.assert_allclose(layer.embedding.gradients()["weight"], np.concatenate((head[: cutoffs[0]], *clusters)), atol=1e-14)
    np.testing.assert_allclose(layer.gradients()["cluster.weight"], head[cutoffs[0] :], atol=1e-14)
    np.testing.assert_allclose(layer.gradients()["bias"][: cutoffs[0]], theirs.head.bias.grad[: cutoffs[0]], atol=1e-14)
    np.testing.assert_allclose(layer.gradients()["cluster.bias"], theirs.head.bias.grad[cutoffs[0] :], atol=1e-14)
    log_p = layer.eval()(x)
    np.testing.assert_allclose(log_p.reshape(-1, V), theirs.log_prob(x_t).detach(), atol=1e-13)
    assert layer.loss(log_p, target)[0] == pytest.approx(value, rel=1e-12)


def test_an_adaptive_softmax_has_the_gradient_of_its_loss() -> None:
    model = language_model(9, 4, 6, cutoffs=[3, 6], seed=0)
    for leaf in model.leaves():
        leaf.flat *= 3
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(9, size=(2, 5, 3))

    def divergence(backward: bool) -> float:
        kept = model["logits"].flat_gradient.copy(), model["projection"].flat_gradient.copy()
        loss, dy = model["logits"].loss(model(tokens)[0], targets)
        if backward:
            model.backward(dy)
        else:
            model["logits"].flat_gradient[:], model["projection"].flat_gradient[:] = kept
            for leaf in (model, *model.leaves()):
                leaf._tapes.clear()
        return loss

    check_parameters(model, divergence)


@pytest.mark.parametrize("cutoffs", [[], [0, 3], [3, 3], [9]])
def test_cutoffs_must_rise(cutoffs: list[int]) -> None:
    with pytest.raises(ValueError, match="rise"):
        AdaptiveSoftmax(Embedding(9, 4), cutoffs)


def test_dropout_stands_around_the_recurrent_layers() -> None:
    model = language_model(9, 4, 6, 2, dropout=0.5, seed=0)
    assert sum(isinstance(leaf, Dropout) for leaf in model.leaves()) == 2 and model["rnn"].dropout == 0.5
    tokens = np.zeros((3, 1), np.int64)
    assert (model(tokens)[0] != model(tokens)[0]).any()
    model.eval()
    np.testing.assert_array_equal(model(tokens)[0], model(tokens)[0])


# ---- writing


def chain(V: int, seed: int):
    """A step of a Markov chain, and its log p(next | now)."""
    p = np.random.default_rng(seed).dirichlet(np.full(V, 0.4), size=V)
    log_p = np.log(p)
    return (lambda symbols, state: (log_p[symbols], state)), log_p


def test_a_wide_beam_finds_the_likeliest_sequence() -> None:
    for seed in range(5):
        step, log_p = chain(4, seed)
        every = {}
        for n in range(4):
            for row in itertools.product(range(1, 4), repeat=n):
                path = (0, *row, 0)
                every[row] = sum(log_p[a, b] for a, b in itertools.pairwise(path))
        found = beam(step, None, 0, 0, 3, width=200)
        assert tuple(found[0][0]) == max(every, key=every.__getitem__)
        for row, score in found:
            assert score == pytest.approx(every[tuple(row)], rel=1e-12)


def test_a_beam_of_one_is_greedy_where_greedy_stops() -> None:
    step = stepper(language_model(6, 8, 16, seed=3).eval())
    found = greedy(step, None, [1, 2], stop=-1, limit=5)
    assert [len(row) for row in found] == [5, 5]
    count = lambda symbols, state: (9 * np.eye(5)[(symbols + 1) % 5], None)  # noqa: E731
    assert beam(count, None, 0, 4, 10, width=1)[0][0] == greedy(count, None, [0], 4, 10)[0] == [1, 2, 3]


def test_writing_step_by_step_is_reading_the_whole() -> None:
    """The probability that a beam reports is the one that the model gives to the whole sequence at once."""
    model = language_model(6, 8, 16, 2, seed=3).eval()
    model["logits"].load_state_dict({"bias": np.array([0, 1, 0, 2, 0, 1])})
    for row, score in beam(stepper(model), None, 2, 0, 6, width=5):
        whole = [2, *row, 0]
        y, _ = model(np.array(whole[:-1])[:, None])
        want = -len(whole[1:]) * losses.softmax_cross_entropy(y[:, 0], np.array(whole[1:]))[0]
        assert score == pytest.approx(want, rel=1e-5)


def test_samples_follow_the_softmax_and_the_temperature() -> None:
    step, log_p = chain(4, 0)
    drawn = [next(sample(step, [2], 1, temperature=2.0, generator=np.random.default_rng(k))) for k in range(3000)]
    want = np.exp(log_p[2] / 2) / np.exp(log_p[2] / 2).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 3000, want, atol=4 * 0.5 / math.sqrt(3000))
    assert list(sample(step, [2], 3, temperature=0)) == greedy(step, None, [2], -1, 3)[0]
    assert 1 not in list(sample(step, [2], 200, forbidden=[1], generator=np.random.default_rng(0)))


def test_what_cannot_be_written_is_said() -> None:
    step, _ = chain(3, 0)
    with pytest.raises(ValueError, match="prompt"):
        next(sample(step, [], 3))
    with pytest.raises(ValueError, match="temperature"):
        next(sample(step, [0], 3, temperature=-1))
    with pytest.raises(ValueError, match="width"):
        beam(step, None, 0, 0, 3, width=0)
    with pytest.raises(ValueError, match="cell"):
        language_model(3, 4, 5, cell="tanh")


def test_an_encoder_decoder_learns_to_reverse_a_row() -> None:
    rng = np.random.default_rng(0)
    model = EncoderDecoder(6, 7, 16, 48, cell="gru", seed=0)

    def batch(count: int) -> training.Batch:
        source = rng.integers(1, 6, (3, count))
        target = np.concatenate((source[::-1], np.zeros((1, count), np.int64)))
        late = np.concatenate((np.full((1, count), 6), target[:-1]))
        return training.Batch({"source": source, "target": late}, target)

    batches = [batch(64) for _ in range(250)]
    training.fit(model.graph, batches, losses.softmax_cross_entropy, Adam(model.graph, 0.01), epochs=1, progress=False)
    item = batch(50)
    said = model.greedy(item.x["source"], None, start=6, stop=0, limit=8)
    right = [row == item.target[:-1, b].tolist() for b, row in enumerate(said)]
    assert np.mean(right) > 0.9
    found = model.beam(item.x["source"][:, :3], None, start=6, stop=0, limit=8, width=3)
    assert [rows[0][0] for rows in found] == said[:3]


def test_an_encoder_does_not_read_padding() -> None:
    model = EncoderDecoder(6, 7, 4, 8, seed=0)
    source = np.array([[1, 2], [3, 4], [5, 0]])
    padded = model.greedy(source, [3, 2], start=0, stop=1, limit=5)
    assert padded[1] == model.greedy(source[:2, 1:], None, start=0, stop=1, limit=5)[0]


# ---- projections


@pytest.mark.parametrize("width", [1, 4], ids=["skip-gram", "soft bag of words"])
def test_projections_have_the_gradient_of_their_loss(width: int) -> None:
    rng = np.random.default_rng(0)
    model = Projections(8, 5, seed=0)
    model.context.flat[...] = rng.normal(size=40)
    model.table.flat[...] = rng.normal(size=40)
    x = {"words": rng.integers(8, size=(6, width)), "candidates": rng.integers(8, size=(6, 4))}

    def divergence(backward: bool) -> float:
        loss, dy = negative_sampling_loss(model(x))
        if backward:
            model.backward(dy)
        else:
            for leaf in (model, *model.leaves()):
                leaf._tapes.clear()
        return loss

    check_parameters(model, divergence)


@pytest.mark.parametrize("kind", ["cbow", "skipgram"])
def test_words_that_stand_in_the_same_places_come_to_lie_together(kind: str) -> None:
    """A text of twins: word 2k and 2k + 1 are drawn at random in the same places of a fixed round."""
    rng = np.random.default_rng(0)
    text = 2 * (np.arange(6000) % 10) + rng.integers(0, 2, 6000)
    model = Projections(20, 12, sparse=True, seed=0)
    batches = lambda epoch: window_batches(text, 20, radius=2, negatives=5, size=128, kind=kind, subsample=1, seed=epoch)  # noqa: E731
    training.fit(model, batches, negative_sampling_loss, Adam(model, 0.02), epochs=4 if kind == "cbow" else 1, progress=False)
    near = np.array(model.nearest(range(20), 1))[:, 0]
    assert np.mean(near == np.arange(20) ^ 1) > 0.9
    assert nearest(np.eye(3) + 0.1, [2], 2) == [[0, 1]]


def test_only_two_kinds_of_windows_are_known() -> None:
    with pytest.raises(ValueError, match="kind"):
        next(window_batches([1, 2], 3, radius=1, negatives=1, size=1, kind="bag"))


def test_columns_are_pictures_read_from_left_to_right() -> None:
    x = np.arange(24.0).reshape(1, 2, 3, 4)
    model = Graph({"columns": (Columns(), "x")})
    y, _ = model(x)
    np.testing.assert_array_equal(y[1, 0], x[0, :, :, 1].reshape(-1))
    np.testing.assert_array_equal(model.backward(y)[0], x)
    with pytest.raises(ValueError, match="B, C, h, w"):
        model(x[0])


# ---- Kneser-Ney


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kneser_ney_is_a_distribution(order: int) -> None:
    text = np.random.default_rng(0).geometric(0.3, 500) % 6
    model = KneserNey(ngrams(text, order), 7)
    contexts = np.array(list(itertools.product(range(7), repeat=order - 1)), np.int64).reshape(7 ** (order - 1), order - 1)
    for context in contexts:
        grams = np.concatenate((np.tile(context, (7, 1)), np.arange(7)[:, None]), axis=1)
        assert np.exp(model.log_probability(grams)).sum() == pytest.approx(1, rel=1e-12)


def test_kneser_ney_by_hand() -> None:
    """Bigrams of 0 1 0 2 0 1 3 behind a 0, with the discounts of their counts of counts."""
    model = KneserNey(ngrams([0, 1, 0, 2, 0, 1, 3], 2), 4)
    n1, n2, n3 = 5, 1, 1  # 0-0, 1-0, 0-2, 2-0, 1-3 once, 0-1 twice; none three times counts as one
    y = n1 / (n1 + 2 * n2)
    d1, d2 = 1 - 2 * y * n2 / n1, max(2 - 3 * y * n3 / n2, 0)
    m1, m2 = 3, 1  # words after 1, 1, 3 and 1 different words: 1, 2 and 3 after one, 0 after three
    m2, m3, m4 = 1, 1, 1
    z = m1 / (m1 + 2 * m2)
    e1, e3 = 1 - 2 * z * m2 / m1, min(3 - 4 * z * m4 / m3, 3)
    unigram = (1 - e1) / 6 + (3 * e1 + e3) / 6 / 4  # of word 1
    want = (2 - d2) / 4 + (2 * d1 + d2) / 4 * unigram
    assert math.exp(model.log_probability([[0, 1]])[0]) == pytest.approx(want, rel=1e-12)


def test_kneser_ney_beats_its_shorter_self_where_order_matters() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(5, 0.3), size=(5, 5))
    text = [0, 0]
    for _ in range(6000):
        text.append(int(rng.choice(5, p=p[text[-2], text[-1]])))
    nll = [-KneserNey(ngrams(text[:5000], n), 5).log_probability(ngrams(text, n)[5000:]).mean() for n in (1, 2, 3)]
    assert nll[0] > nll[1] > nll[2]


def test_too_many_ngrams_are_refused() -> None:
    with pytest.raises(ValueError, match="2\\^62"):
        KneserNey(np.zeros((3, 8), np.int64), 5000)


def check_model(model: Graph, x, target, loss) -> None:
    """A model's gradients under a loss, from float32's differences."""
    for leaf in model.leaves():
        leaf.flat *= 2

    def divergence(backward: bool) -> float:
        value, dy = loss(model(x)[0], target)
        if backward:
            model.backward(dy)
        else:
            for leaf in (model, *model.leaves()):
                leaf._tapes.clear()
        return value

    check_parameters(model, divergence)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_stack_with_mlp_layers_between_has_the_gradient_of_its_loss(cell: str) -> None:
    model = recurrent_stack(3, [4, 5], 2, cell=cell, between=[6, 4], activation="tanh", seed=0)
    assert [name for name in model.parameters() if name.endswith("weight")] == ["dense0_0.weight", "dense0_1.weight", "y.weight"]
    x, target = np.random.default_rng(0).standard_normal((2, 5, 3, 3)).astype(np.float32)
    check_model(model, x, target[..., :2], losses.mean_squared_error)


def test_both_directions_read_the_future_and_one_does_not() -> None:
    x = np.random.default_rng(0).standard_normal((6, 2, 3)).astype(np.float32)
    other = x.copy()
    other[-1] += 1
    for both in (True, False):
        model = recurrent_stack(3, [4, 4], 2, bidirectional=both, between=[5], seed=0).eval()
        assert np.array_equal(model(x)[0][0], model(other)[0][0]) is not both


def test_an_mlp_over_time_is_the_same_at_every_step() -> None:
    model = mlp([3, 5, 4, 2], "tanh", dropout=0.5, seed=0).eval()
    x = np.random.default_rng(0).standard_normal((6, 2, 3)).astype(np.float32)
    order = [3, 1, 5, 0, 2, 4]
    np.testing.assert_array_equal(model(x[order])[0], model(x)[0][order])
    p = model.parameters()
    h = np.tanh(x @ p["dense0.weight"].T + p["dense0.bias"])
    h = np.tanh(h @ p["dense1.weight"].T + p["dense1.bias"])
    np.testing.assert_allclose(model(x)[0], h @ p["y.weight"].T + p["y.bias"], atol=1e-6)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_a_vector_starts_a_sequence(cell: str) -> None:
    model = one_to_many(5, 7, 3, 4, cell=cell, seed=0)
    rng = np.random.default_rng(0)
    x = {"vector": rng.standard_normal((1, 2, 5)).astype(np.float32), "tokens": rng.integers(7, size=(4, 2))}
    check_model(model, x, rng.integers(7, size=(4, 2)), losses.softmax_cross_entropy)
    model.eval()
    parts = Graph({name: (model[name], source) for name, source in {"words": "tokens", "rnn": "words", "logits": "rnn"}.items()})
    step, state = stepper(parts), {"rnn": model["first"](x["vector"])}
    for t, tokens in enumerate(x["tokens"]):
        logits, state = step(tokens, state)
        np.testing.assert_array_equal(logits, model(x)[0][t])


def test_heads_look_at_the_steps_they_say() -> None:
    rng = np.random.default_rng(0)
    y, lengths = rng.standard_normal((5, 3, 4)), np.array([5, 1, 3])
    last = many_to_one(losses.softmax_cross_entropy)
    labels = np.array([0, 3, 1])
    assert last(y, (labels, lengths))[0] == pytest.approx(losses.softmax_cross_entropy(y[lengths - 1, range(3)], labels)[0])
    assert losses.check_gradient(lambda a: last(a, (labels, lengths)), y) < 1e-8
    np.testing.assert_array_equal(last(y, labels)[1], last(y, (labels, np.array([5, 5, 5])))[1])
    late, wanted = delayed(losses.mean_squared_error, 2), rng.standard_normal((3, 3, 4))
    assert late(y, wanted)[0] == losses.mean_squared_error(y[2:], wanted)[0]
    assert losses.check_gradient(lambda a: late(a, wanted), y) < 1e-8
    with pytest.raises(ValueError, match="length 0"):
        last(y, (labels, np.array([5, 0, 3])))


def test_what_makes_no_model_is_said() -> None:
    with pytest.raises(ValueError, match="at least what goes in"):
        mlp([3])
    with pytest.raises(ValueError, match="at least one layer"):
        recurrent_stack(3, [], 2)
    with pytest.raises(ValueError, match="lstm, gru, rnn"):
        recurrent_stack(3, [4], 2, cell="elman")
    with pytest.raises(ValueError, match="gru or rnn"):
        one_to_many(3, 4, 5, 6, cell="lstm")
    with pytest.raises(ValueError, match="at least 0"):
        delayed(losses.mean_squared_error, -1)
    with pytest.raises(ValueError, match="tied"):
        language_model(9, 4, 6, tied=False, cutoffs=[3])
