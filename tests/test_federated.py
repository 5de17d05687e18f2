"""Federated bilevel optimization against closed forms and centralized runs, and what its shortcuts get wrong."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import BilevelError, BilevelProblem, FiniteSum, Status, minimize
from bilevel.algorithms import SOBA
from bilevel.federated import (
    AggITD,
    Clients,
    ClientsOnRanks,
    FederatedSOBA,
    FedNest,
    Participation,
    Server,
    dirichlet_split,
    federate,
    local_steps,
    stacked,
)
from bilevel.federated.method import At

M, P, Q = 6, 3, 4
_gen = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_gen, dtype=torch.float64)


# g_m = y'H_m y / 2 - y'(B_m x + c_m), f_m = |y - d_m|^2 / 2 + e_m'x + |x|^2 / 2: clients that are unlike each other
_roots = _normal(M, Q, Q)
H = torch.eye(Q, dtype=torch.float64) / 2 + _roots @ _roots.mT / Q
DATA = (H / H.mean(0).norm(2), 0.3 * _normal(M, Q, P), _normal(M, Q), _normal(M, Q), _normal(M, P))
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 4.0], dtype=torch.float64)
X, Y = _normal(P), _normal(Q)


def f(x: Tensor, y: Tensor, data: Any) -> Tensor:
    found: Tensor = (y - data[3]).square().sum() / 2 + data[4] @ x + x.square().sum() / 2
    return found


def g(x: Tensor, y: Tensor, data: Any) -> Tensor:
    found: Tensor = y @ data[0] @ y / 2 - y @ (data[1] @ x + data[2])
    return found


PROBLEM = BilevelProblem(f, g)


def clients(weights: Tensor | None = WEIGHTS) -> Clients:
    return Clients(PROBLEM, X, Y, DATA, weights)


def _mean(each: Tensor, weights: Tensor = WEIGHTS) -> Tensor:
    found: Tensor = torch.tensordot(weights / weights.sum(), each, 1)
    return found


def _solution(x: Tensor) -> Tensor:
    h, b, c = map(_mean, DATA[:3])
    found: Tensor = torch.linalg.solve(h, b @ x + c)
    return found


def _hypergradient(x: Tensor) -> Tensor:
    h, b, _, d, e = map(_mean, DATA)
    found: Tensor = e + x + b.mT @ torch.linalg.solve(h, _solution(x) - d)
    return found


def _server(**participation: Any) -> Server:
    return Server(clients(), (P, Q), Participation(**participation))


def _at(x: Tensor = X, y: Tensor = Y) -> At:
    return At(x, y, torch.zeros_like(y), torch.zeros_like(x))


def _error(h: Tensor) -> float:
    return float((h - _hypergradient(X)).norm() / _hypergradient(X).norm())


def test_a_federated_run_of_soba_is_the_centralized_one() -> None:
    def mean(function: Any, x: Tensor, y: Tensor) -> Tensor:
        return _mean(torch.stack([function(x, y, [part[k] for part in DATA]) for k in range(M)]))

    central = BilevelProblem(lambda x, y: mean(f, x, y), lambda x, y: mean(g, x, y))
    soba = SOBA(0.3, 0.02, schedule=lambda step: 1.0)
    alone = minimize(central, X, Y, algorithm=soba, max_steps=50)
    found = federate(clients(), X, Y, method=FederatedSOBA(0.3, 0.02), steps=50)
    assert torch.allclose(torch.as_tensor(found.x), torch.as_tensor(alone.x), rtol=0, atol=1e-10)
    assert torch.allclose(torch.as_tensor(found.y), torch.as_tensor(alone.y), rtol=0, atol=1e-10)
    each_way = 8 * M * (2 * Q + P) * 50
    assert (found.traffic.rounds, found.traffic.down, found.traffic.up) == (50, each_way, each_way)


@pytest.mark.parametrize(
    ("method", "rounds"),
    [
        (AggITD(0.8, 0.1, rounds=150), 151),
        (FedNest(0.8, 0.1, inner_rounds=150, terms=150), 302),
        (FedNest(0.8, 0.1, inner_rounds=60, terms=150, local_steps=3), 2 * 60 + 152),
    ],
)
def test_aggregated_hypergradients_are_the_centralized_one(method: Any, rounds: int) -> None:
    server = _server()
    assert _error(method.step(server, _at(), 0).h) <= 1e-10
    assert server.traffic.rounds == rounds


def test_derandomized_aggitd_is_the_mean_over_its_draws_in_as_many_rounds() -> None:
    N, server = 12, _server()
    drawn = [AggITD(0.7, 0.1, rounds=N, derandomized=False, draw=k).step(_server(), _at(), 0).h for k in range(N)]
    h = AggITD(0.7, 0.1, rounds=N).step(server, _at(), 0).h
    assert float((torch.stack(drawn).mean(0) - h).abs().max()) <= 1e-11
    assert server.traffic.rounds == N + 1
    aid = _server()
    FedNest(0.7, 0.1, inner_rounds=N, terms=N).step(aid, _at(), 0)
    assert aid.traffic.rounds == 2 * N + 2
    # h in closed form: grad_x f - a G sum_k (I - a H)^(N - 1 - k) grad_y f(y_k)
    mean, b, c, d, e = map(_mean, DATA)
    y, total = Y, torch.zeros_like(Y)
    step = torch.eye(Q, dtype=torch.float64) - 0.7 * mean
    for k in range(N):
        total += torch.linalg.matrix_power(step, N - 1 - k) @ (y - d)
        y = y - 0.7 * (mean @ y - b @ X - c)
    assert torch.allclose(h, e + X + 0.7 * b.mT @ total, rtol=0, atol=1e-12)


def test_corrected_local_steps_keep_the_solution_and_plain_ones_leave_it() -> None:
    y = _solution(X)
    size = float(y.norm())
    kept = local_steps(_server(), X, y, step=0.3, steps=5)
    assert float((kept - y).norm()) <= 1e-12 * size
    left = y
    for _ in range(60):
        left = local_steps(_server(), X, left, step=0.3, steps=5, corrected=False)
    assert float((left - y).norm()) >= 0.01 * size
    away = Y
    for _ in range(100):
        away = local_steps(_server(), X, away, step=0.3, steps=3)
    assert float((away - y).norm()) <= 1e-9 * size


def test_corrected_local_steps_keep_the_linear_iterate_too_and_gain_on_it() -> None:
    """Where y = y* and v = v*, both stay; from another v, local steps of each client alone are steps towards it."""
    h, _, _, d, _ = map(_mean, DATA)
    y = _solution(X)
    at = _at(y=y)._replace(v=torch.linalg.solve(h, y - d))
    kept = FederatedSOBA(0.3, 0.1, local_steps=4).step(_server(), at, 0)
    assert float((kept.y - at.y).abs().max()) <= 1e-12
    assert float((kept.v - at.v).abs().max()) <= 1e-12
    away = _at(y=y)
    errors = []
    for steps in (1, 4):
        found, server = away, _server()
        for _ in range(10):
            found = FederatedSOBA(0.3, 1e-12, local_steps=steps).step(server, found, 0)
        errors.append(float((found.v - at.v).norm()))
    assert errors[1] < 0.2 * errors[0]
    p, q = len(away.x), len(away.y)
    assert server.traffic.up == 10 * 8 * M * (4 * q + p)
    assert server.traffic.down == 10 * 8 * M * (4 * q + p)


def test_soba_with_local_steps_ends_where_it_does_without() -> None:
    found = federate(clients(), X, Y, method=FederatedSOBA(0.6, 0.1, local_steps=2), steps=300)
    assert float(_hypergradient(torch.as_tensor(found.x)).norm()) <= 1e-9
    assert found.traffic.rounds == 600


def test_means_of_local_hypergradients_of_local_series_and_of_local_inverses_are_something_else() -> None:
    w, y = WEIGHTS / WEIGHTS.sum(), _solution(X)
    matrices, b, c, d, e = DATA
    fy = _mean(y - d)
    own = torch.linalg.solve(matrices, torch.einsum("mqp,p->mq", b, X) + c)
    each = e + X + torch.einsum("mqp,mq->mp", b, torch.linalg.solve(matrices, own - d))
    assert _error(torch.einsum("m,mp->p", w, each)) >= 0.2  # every client by itself

    def series(h: Tensor, right: Tensor, terms: int = 400) -> Tensor:
        v = torch.zeros_like(right)
        for _ in range(terms):
            v = v - 0.2 * ((h @ v.unsqueeze(-1)).squeeze(-1) - right)
        return v

    def lost(v: Tensor) -> float:
        """The relative error of the implicit term G v."""
        right = torch.linalg.solve(_mean(matrices), fy)
        return float((_mean(b).mT @ (v - right)).norm() / (_mean(b).mT @ right).norm())

    assert lost(torch.einsum("m,mq->q", w, series(matrices, fy.expand(M, -1)))) >= 0.1  # averaged once, at the end
    assert lost(torch.einsum("m,mq->q", w, torch.linalg.solve(matrices, fy.expand(M, -1)))) >= 0.1
    assert lost(series(_mean(matrices), fy)) <= 1e-10  # averaged after every product


def test_alike_clients_make_local_inverses_exact() -> None:
    alike = tuple(part[:1].expand(M, *part.shape[1:]) for part in DATA)
    server = Server(Clients(PROBLEM, X, Y, alike), (P, Q))
    one = Server(Clients(PROBLEM, X, Y, tuple(part[:1] for part in DATA)), (P, Q))
    method = FedNest(0.3, 0.1, inner_rounds=3, terms=3, local_steps=4)
    assert torch.allclose(method.step(server, _at(), 0).h, method.step(one, _at(), 0).h, rtol=0, atol=1e-13)


def test_the_mean_over_those_who_answer_is_unbiased_and_dropouts_and_stragglers_cost_what_they_send() -> None:
    total, count = torch.zeros(Q, dtype=torch.float64), 1000
    for seed in range(count):
        server = _server(share=0.5, dropout=0.2, late=0.1, seed=seed)
        total += server.ask(lambda who, x: (DATA[2][who],), X)[0] / count
    spread = float(DATA[2].norm()) / count**0.5
    assert float((total - _mean(DATA[2])).norm()) <= 4 * spread
    dropped = late = 0
    for seed in range(300):
        server = _server(dropout=0.3, seed=seed)
        server.ask(lambda who, x: (DATA[2][who],), X)
        dropped += server.traffic.up
        server = _server(late=0.3, seed=seed)
        server.ask(lambda who, x: (DATA[2][who],), X)
        late += server.traffic.up
    assert late == 300 * M * Q * 8 and 0.6 * late <= dropped <= 0.8 * late


def test_nothing_but_vectors_leaves_a_client() -> None:
    server = _server()
    with pytest.raises(ValueError, match="nothing else leaves a client"):
        server.ask(lambda who, x: (DATA[0][who],), X)  # Hessians
    with pytest.raises(ValueError, match="nothing else leaves a client"):
        server.ask(lambda who, x: (DATA[2][who].reshape(-1),), X)
    server.ask(lambda who, x: (DATA[2][who], DATA[4][who]), X)


def test_wrong_arguments_and_failures_are_told() -> None:
    with pytest.raises(ValueError, match="share a leading axis of clients"):
        Clients(PROBLEM, X, Y, (DATA[0], DATA[1][:2]))
    with pytest.raises(ValueError, match="must be 6 numbers"):
        Clients(PROBLEM, X, Y, DATA, torch.ones(5))
    with pytest.raises(ValueError, match="without tasks"):
        Clients(BilevelProblem(f, g, tasks=True), X, Y, DATA)
    with pytest.raises(ValueError, match="share <= 1"):
        Participation(share=0.0)
    with pytest.raises(ValueError, match="below rounds=3"):
        AggITD(0.1, 0.1, rounds=3, draw=3)
    with pytest.raises(BilevelError) as caught:
        federate(clients(), X, Y, method=FederatedSOBA(1e3, 1e3), steps=300)
    assert caught.value.status is Status.nonfinite and caught.value.partial.traffic.rounds > 1
    stopped = federate(clients(), X, Y, method=FederatedSOBA(0.1, 0.1), steps=9, callback=lambda r, x, y: r.step == 3)
    assert stopped.status is Status.stopped and len(stopped.history) == 4


def test_dirichlet_splits_are_partitions_whose_classes_are_fewer_the_lower_the_concentration() -> None:
    labels = torch.arange(400) % 5
    kinds = []
    for concentration in (0.05, 100.0):
        parts = dirichlet_split(labels, clients=10, concentration=concentration, seed=1)
        assert sorted(torch.cat(parts).tolist()) == list(range(400)) and min(map(len, parts)) >= 1
        kinds.append(sum(len(set(labels[part].tolist())) for part in parts) / 10)
    assert kinds[0] < 3 and kinds[1] == 5
    values, weights = stacked([torch.arange(400.0)], dirichlet_split(labels, 10, 0.3))
    assert torch.allclose(weights.sum(1), torch.ones(10)) and values.shape == weights.shape
    assert len(dirichlet_split(torch.zeros(7).long(), 7, 0.01)) == 7


def test_a_thousand_clients_are_one_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(1000, 5, 3, generator=generator, dtype=torch.float64)
    b = torch.randn(1000, 5, generator=generator, dtype=torch.float64)
    problem = BilevelProblem(
        lambda x, y, d: (d[0] @ y - d[1]).square().mean() / 2,
        lambda x, y, d: (d[0] @ y - d[1]).square().mean() / 2 + (x.exp() * y.square()).sum() / 2,
    )
    x0 = torch.zeros(3, dtype=torch.float64)
    some = Clients(problem, x0, x0, (A, b))
    found = federate(some, x0, x0, method=FederatedSOBA(0.3, 0.1), steps=20)
    data = FiniteSum((A.reshape(-1, 3), b.reshape(-1)), 5000, order="full")
    soba = SOBA(0.3, 0.1, schedule=lambda step: 1.0)
    alone = minimize(problem, x0, x0, algorithm=soba, data=data, max_steps=20)
    assert torch.allclose(torch.as_tensor(found.x), torch.as_tensor(alone.x), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_federated_soba_needs_at_most_half_the_rounds_and_bytes_of_the_others_on_breast_cancer() -> None:
    """All tuned on one grid: `pytest -m slow tests/test_federated.py`, or `python benchmarks/federated.py`."""
    path = Path(__file__).parent.parent / "benchmarks" / "federated.py"
    if not path.exists():
        pytest.skip("an installed package comes without its benchmarks")
    found = runpy.run_path(str(path))["table"]("breast cancer")
    ours = found.pop("federated SOBA")
    assert ours.by_rounds is not None
    for name, top in found.items():
        assert 2 * ours.rounds <= top.rounds and 2 * ours.bytes <= top.bytes, (name, ours, top)


def _on_ranks(group: Any, rank: int) -> dict[str, Any]:
    from bilevel.ranks import Ranks

    rows = slice(0, 2) if rank == 0 else slice(2, M)
    weights = WEIGHTS[rows]
    own = Clients(PROBLEM, X, Y, tuple(part[rows] for part in DATA), weights)
    found = {}
    for name, method in ON_RANKS.items():
        ranks = Ranks(group)
        run = federate(
            ClientsOnRanks(own, ranks, float(weights.sum())), X, Y, method=method, steps=4, participation=SOME
        )
        found[name] = run.x, run.y, run.traffic, ranks.messages, ranks.floats
    return found


SOME = Participation(share=0.67, dropout=0.1, seed=3)
ON_RANKS: dict[str, Any] = {
    "soba": FederatedSOBA(0.3, 0.1),
    "soba, local steps": FederatedSOBA(0.3, 0.1, local_steps=3),
    "aggitd": AggITD(0.3, 0.1, rounds=4),
    "fednest": FedNest(0.3, 0.1, inner_rounds=2, terms=3, local_steps=2),
}


def test_clients_of_two_processes_are_those_of_one_and_a_round_is_one_message_of_sums() -> None:
    pytest.importorskip("torch.distributed")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    from rank_processes import on_ranks

    first, second = on_ranks(2, _on_ranks)
    for found in (first, second):
        if isinstance(found, Exception):
            raise found
    for name, method in ON_RANKS.items():
        alone = federate(clients(), X, Y, method=method, steps=4, participation=SOME)
        x, y, traffic, messages, _ = first[name]
        assert torch.allclose(x, alone.x, rtol=0, atol=1e-12) and torch.allclose(y, alone.y, rtol=0, atol=1e-12), name
        assert torch.equal(x, second[name][0]) and torch.equal(y, second[name][1]), name
        assert traffic == alone.traffic and messages == 1 + traffic.rounds, name
    assert first["soba"][4] == 4 * (2 * Q + P)


def test_a_thousand_clients_go_side_by_side_in_one_process() -> None:
    count = 1000
    data = tuple(part[torch.arange(count) % M] for part in DATA)
    many = Clients(PROBLEM, X, Y, data, WEIGHTS[torch.arange(count) % M])
    method = FederatedSOBA(0.3, 0.1)
    tenth = Participation(share=0.1, seed=1)
    found = federate(many, X, Y, method=method, steps=3, participation=tenth)
    assert found.traffic.down == 3 * 100 * (2 * Q + P) * 8
    weights = many.weights
    whole = federate(many, X, Y, method=method, steps=3)
    by_hand = torch.stack([weights[k::M].sum() for k in range(M)])
    few = federate(clients(by_hand), X, Y, method=method, steps=3)
    assert torch.allclose(whole.x, few.x, rtol=0, atol=1e-12) and torch.allclose(whole.y, few.y, rtol=0, atol=1e-12)
