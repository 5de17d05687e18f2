"""Policies that adapt, as they are trained: trust regions, fixed data, environments that are no functions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import cli, hypergradient, minimize
from bilevel._flat import FlatProblem
from bilevel._tree import ravel
from bilevel.experiments.catalogue import experiments
from bilevel.few_shot import OuterLoop, evaluate, train
from bilevel.few_shot.training import Evaluating, Training
from bilevel.reinforcement import (
    Advantages,
    BanditTasks,
    CategoricalPolicy,
    DiCE,
    GaussianBandit,
    GaussianPolicy,
    GoalTasks,
    ImportanceWeighted,
    Interaction,
    LowVarianceCurvature,
    MetaPolicy,
    Navigation,
    OfflinePolicy,
    OfflineTasks,
    ScoreFunction,
    Trajectories,
    TrustRegion,
    Zero,
    collect,
    rollout,
    vector_episodes,
)
from bilevel.reinforcement.trust_region import _Seen
from bilevel.solvers import Adam
from bilevel.tasks import batches


def module(inputs: int, outputs: int) -> nn.Linear:
    made = nn.Linear(inputs, outputs, bias=False).double()
    with torch.no_grad():
        made.weight.copy_(torch.linspace(-0.5, 0.4, inputs * outputs).double().reshape(outputs, inputs))
    return made


def walker(log_std: float = -1.5) -> GaussianPolicy:
    return GaussianPolicy(module(2, 2), 2, log_std)


def meta(inner_steps: int = 1, **settings: Any) -> MetaPolicy:
    advantages = Advantages(0.9, 1.0, Zero())
    return MetaPolicy(
        walker(),
        Navigation(4),
        step=0.01,
        inner_steps=inner_steps,
        episodes=3,
        inner=DiCE(0.9, Zero()),
        outer=ScoreFunction(advantages),
        **settings,
    )


def seen_by(policy: MetaPolicy) -> tuple[_Seen, FlatProblem, Tensor]:
    learner = policy.learner()
    assert learner.prepare is not None
    data = learner.prepare({"goal": torch.tensor([[0.3, -0.2], [-0.4, 0.1]]).double()}, 0)
    x, structure = ravel(learner.x0, "x")
    problem = FlatProblem(learner.problem, structure, ravel(learner.y0, "y")[1], data)
    return _Seen.by(policy, learner.x0, data), problem, x.detach()


@pytest.mark.parametrize(("inner_steps", "learn_steps"), [(1, False), (2, True)])
def test_products_with_the_fisher_matrix_are_second_derivatives_of_the_divergence(
    inner_steps: int, learn_steps: bool
) -> None:
    seen, problem, x = seen_by(meta(inner_steps, learn_steps=learn_steps))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(seen.divergence(problem.x.unravel(leaf)), leaf, create_graph=True)
    assert float(slope.detach().norm()) < 1e-12
    hessian = torch.stack([torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in slope])
    product = seen.fisher(problem, x)
    found = torch.stack([product(e) for e in torch.eye(len(x)).double()])
    assert (found - hessian).abs().max() < 1e-10 * hessian.abs().max()
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-10


@pytest.mark.parametrize("first_order", [False, True])
def test_the_loss_of_the_line_search_is_f_with_its_slope(first_order: bool) -> None:
    policy = meta(2, first_order=first_order)
    seen, problem, x = seen_by(policy)
    leaf = x.clone().requires_grad_()
    value = seen.loss(problem.x.unravel(leaf))
    (slope,) = torch.autograd.grad(value, leaf)
    learner = policy.learner()
    found = hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=problem.data)
    assert (slope - ravel(found.grad, "grad")[0]).abs().max() < 1e-10 * slope.abs().max()
    assert abs(float(value.detach()) - found.value) < 1e-12
    estimator = TrustRegion(policy).estimator
    other = hypergradient(learner.problem, learner.x0, learner.y0, estimator=estimator, data=problem.data)
    assert torch.equal(ravel(other.grad, "grad")[0], ravel(found.grad, "grad")[0])


def test_a_step_of_the_trust_region_goes_no_further_than_delta() -> None:
    policy = meta()
    learner, delta = policy.learner(), 1e-3
    assert learner.prepare is not None
    data = learner.prepare({"goal": torch.tensor([[0.3, -0.2], [-0.4, 0.1]]).double()}, 0)
    region = TrustRegion(policy, delta=delta, damping=0.0)
    solution = minimize(learner.problem, learner.x0, learner.y0, algorithm=region, data=data, max_steps=1)
    seen = _Seen.by(policy, learner.x0, data)
    apart = float(seen.divergence(solution.x).detach())
    assert 0.2 * delta < apart <= delta
    assert float(seen.loss(solution.x).detach()) < float(seen.loss(learner.x0).detach())


def test_a_trust_region_of_sampled_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        TrustRegion(MetaPolicy(walker(), Navigation(4), objective="sampled"))


def test_an_estimator_beside_an_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match="estimator"):
        OuterLoop(algorithm=TrustRegion(meta()), estimator="itd")


def test_a_trust_region_learns_bandits_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    from bilevel.few_shot import Saving

    policy = MetaPolicy(CategoricalPolicy(module(1, 3)), GaussianBandit(3, 0.2), step=2.0)
    learner, tasks = policy.learner(), BanditTasks(3)
    loop = OuterLoop(algorithm=TrustRegion(policy, delta=0.05))
    whole = train(learner, tasks, max_steps=6, batch=20, outer=loop, out=tmp_path / "a")
    train(learner, tasks, max_steps=3, batch=20, outer=loop, out=tmp_path / "b")
    again = train(learner, tasks, max_steps=6, batch=20, outer=loop, out=Saving(tmp_path / "b", resume=True))
    assert torch.equal(whole.x["weight"], again.x["weight"])
    assert not torch.equal(whole.x["weight"], learner.x0["weight"])


# Fixed data

TASKS = {"goal": torch.tensor([[0.3, -0.2], [-0.4, 0.1], [0.2, 0.4]]).double()}


def data_of(policy: GaussianPolicy, episodes: int = 6) -> OfflineTasks:
    return collect(Navigation(4), policy, policy.params, TASKS, episodes=episodes, seed=1)


def whole(data: OfflineTasks) -> dict[str, Tensor]:
    return dict(data.data)


def part(data: OfflineTasks, k: int, name: str = "support") -> Trajectories:
    return Trajectories(*(data.data[f"{name}_{field}"][k] for field in Trajectories._fields))


@pytest.mark.parametrize("cumulative", [True, False])
def test_weights_where_the_data_come_from_are_one(cumulative: bool) -> None:
    policy = walker()
    data = data_of(policy)
    surrogate = ImportanceWeighted(0.9, 5.0, Zero(), cumulative=cumulative)
    other = DiCE(0.9, Zero()) if cumulative else LowVarianceCurvature(Advantages(0.9, 1.0, Zero()))
    leaf = {name: p.clone().requires_grad_() for name, p in policy.params.items()}
    values = [each.value(policy, leaf, part(data, 0)) for each in (surrogate, other)]
    grads = [torch.autograd.grad(value, [*leaf.values()]) for value in values]
    assert abs(float((values[0] - values[1]).detach())) < 1e-12
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads, strict=True))
    found = OfflinePolicy(policy, surrogate=surrogate, step=1e-12).coverage(policy.params, whole(data))
    assert (found.before - 1).abs().max() < 1e-9 and (found.after - 1).abs().max() < 1e-6
    assert not found.clipped.any() and "100.0% of 6 episodes" in str(found)


def test_importance_weights_estimate_another_policy_without_bias() -> None:
    """The mean over many episodes is the return of the other policy, within five standard errors; clipped it is not."""
    policy = walker(-0.7)
    other = {name: p + (0.2 if name == "weight" else 0.0) for name, p in policy.params.items()}
    task = {"goal": TASKS["goal"][:1]}
    data = part(collect(Navigation(3, speed=1.0), policy, policy.params, task, episodes=20_000, seed=2), 0)
    true = part(collect(Navigation(3, speed=1.0), policy, other, task, episodes=20_000, seed=3), 0)
    surrogate = ImportanceWeighted(1.0, math.inf, Zero())
    weights = surrogate.weights(policy, other, data)
    each = (weights * data.rewards).sum(1)
    error = float((each.var() / 20_000 + true.returns().var() / 20_000).sqrt())
    assert abs(float(each.mean() - true.returns().mean())) < 5 * error
    assert abs(float(data.returns().mean() - true.returns().mean())) > 8 * error  # it says something
    value = surrogate.value(policy, other, data)
    assert abs(float(value - each.mean())) < 1e-12
    clipped = ImportanceWeighted(1.0, 1.0, Zero()).value(policy, other, data)
    assert abs(float(clipped - each.mean())) > 1e-3


def test_the_offline_hypergradient_is_that_of_differences() -> None:
    policy = walker()
    data = whole(data_of(policy))
    offline = OfflinePolicy(policy, step=0.01, inner_steps=2, regularization=0.3, learn_steps=True)
    learner = offline.learner()
    exact = hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=data)
    x, structure = ravel(learner.x0, "x")
    from bilevel.few_shot.adapt import adapt

    def value(x: Tensor) -> float:
        tree = structure.unravel(x)
        y = adapt(learner, tree, data).y
        rows = [
            offline.f(tree, {name: p[k] for name, p in y.items()}, {name: v[k] for name, v in data.items()})
            for k in range(3)
        ]
        return float(torch.stack(rows).mean())

    step = 1e-6
    differences = torch.stack(
        [torch.tensor((value(x + step * e) - value(x - step * e)) / (2 * step)) for e in torch.eye(len(x)).double()]
    )
    found = ravel(exact.grad, "grad")[0]
    assert (found - differences).abs().max() < 1e-5 * found.abs().max()


def test_leaving_the_data_costs_the_mean_of_the_logarithms_of_ratios() -> None:
    policy = walker()
    tasks = whole(data_of(policy))
    task = {name: value[0] for name, value in tasks.items()}
    other = {name: p + 0.2 for name, p in policy.params.items()}
    free, dear = (OfflinePolicy(policy, regularization=c).f({}, other, task) for c in (0.0, 0.5))
    data = part(data_of(policy), 0, "query")
    ratios = (data.log_probs - policy.log_prob(other, data.observations, data.actions)) * data.alive
    assert abs(float(dear - free - 0.5 * ratios.sum() / data.alive.sum())) < 1e-12
    assert float(dear) > float(free)


def test_data_that_say_nothing_of_a_policy_are_refused() -> None:
    policy = walker()
    data = data_of(policy)
    far = {name: p + (3.0 if name == "weight" else -2.0) for name, p in policy.params.items()}
    offline = OfflinePolicy(policy, step=1e-3)
    with pytest.raises(ValueError, match=r"coverage.*any weight in task 0 \(3 of 3"):
        offline.coverage(far, whole(data))
    learner = offline.learner()
    found = hypergradient(learner.problem, far, learner.y0, estimator=learner.estimator, data=whole(data), throw=False)
    assert found.status.name == "nonfinite"
    near = hypergradient(learner.problem, policy.params, learner.y0, estimator=learner.estimator, data=whole(data))
    assert near.status.ok


def test_actions_that_could_not_be_taken_and_missing_data_are_refused() -> None:
    policy = walker()
    data = whole(data_of(policy))
    learner = OfflinePolicy(policy).learner()
    assert learner.prepare is not None
    impossible = data["query_log_probs"].clone()
    impossible[0, 0, 0] = -math.inf
    with pytest.raises(ValueError, match=r"query_log_probs.*finite"):
        learner.prepare({**data, "query_log_probs": impossible}, 0)
    with pytest.raises(ValueError, match="support_rewards"):
        learner.prepare({name: value for name, value in data.items() if name != "support_rewards"}, 0)
    assert learner.prepare(data, 0) is data


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("rewards", lambda value: value[:, :, :2], "must begin with the axes"),
        ("rewards", lambda value: value * math.nan, "must be finite"),
        ("alive", torch.zeros_like, "must be 1 from the first step"),
        ("alive", lambda value: 0.5 * value, "must be 1 from the first step"),
        ("alive", lambda value: value * torch.tensor([1.0, 0.0, 1.0, 1.0]).double(), "must be 1 from the first step"),
    ],
)
def test_episodes_that_are_none_are_refused(part: str, change: Any, words: str) -> None:
    policy = walker()
    data, learner = whole(data_of(policy)), OfflinePolicy(policy).learner()
    assert learner.prepare is not None
    with pytest.raises(ValueError, match=words):
        learner.prepare({**data, f"support_{part}": change(data[f"support_{part}"])}, 0)


def test_fixed_tasks_are_different_ones_as_far_as_there_are_so_many() -> None:
    source = OfflineTasks({"goal": torch.arange(10.0).reshape(5, 2)})
    assert sorted(source.sample(5, 3)["goal"][:, 0].tolist()) == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert len(source.sample(12, 3)["goal"]) == 12
    with pytest.raises(ValueError, match="leading axis"):
        OfflineTasks({"a": torch.zeros(2), "b": torch.zeros(3)})


# Environments that are no functions


def test_interaction_is_training_on_the_same_episodes() -> None:
    """Episodes that a function collects give the step that their hypergradient gives."""
    policy, bandit = CategoricalPolicy(module(1, 3)), GaussianBandit(3, 0.2)

    seeds: list[int] = []

    def pulled(task: dict[str, Tensor], params: dict[str, Tensor], seed: int) -> Trajectories:
        seeds.append(seed)
        noise = torch.randn(8, 1, 2, generator=torch.Generator().manual_seed(seed)).double()
        return rollout(bandit, policy, params, task, torch.zeros(8, 0), noise)

    offline = OfflinePolicy(policy, step=1.0, regularization=0.0, surrogate=ImportanceWeighted(1.0))
    learner, source = offline.learner(), batches(BanditTasks(3), 4, seed=0)
    algorithm = Interaction(offline, pulled, Adam(0.1), seed=5)

    def data(step: int) -> dict[str, Tensor]:
        return {name: value.double() for name, value in source(step).items()}

    solution = minimize(learner.problem, learner.x0, learner.y0, algorithm=algorithm, data=data, max_steps=3)
    assert len(seeds) >= 24 and len(set(seeds)) == len(seeds)  # no two collections of a run see the same noise
    x = learner.x0
    memory = Adam(0.1).init(x["weight"].flatten())
    for step in range(3):
        episodes = algorithm.episodes(x, data(step), step)
        found = hypergradient(learner.problem, x, learner.y0, estimator=learner.estimator, data=episodes)
        assert abs(found.value - solution.history[step].value) < 1e-12
        moved, memory = Adam(0.1).step(found.grad["weight"].flatten(), x["weight"].flatten(), memory)
        x = {"weight": moved.reshape(3, 1)}
    assert (x["weight"] - solution.x["weight"]).abs().max() < 1e-12


def test_vector_environments_end_at_their_end_and_are_functions_of_the_seed() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    environment = gymnasium.make_vec("CartPole-v1", num_envs=5, vectorization_mode="sync")
    policy = CategoricalPolicy(module(4, 2))
    first, second = (vector_episodes(environment, policy, policy.params, horizon=60, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    lengths = first.alive.sum(1)
    assert lengths.min() < 60 and torch.equal(first.returns(), lengths)  # a reward of one for each step
    assert (first.log_probs[first.alive == 0] == 0).all()
    pendulum = gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync")
    swing = GaussianPolicy(module(3, 1), 1)
    drawn = vector_episodes(pendulum, swing, swing.params, horizon=5, seed=0)
    assert drawn.actions.shape == (2, 5, 1) and drawn.rewards.isfinite().all()
    with pytest.raises(TypeError, match="VectorEnv"):
        vector_episodes(object(), policy, policy.params, horizon=5)
    for wrong, there, words in (
        (CategoricalPolicy(module(4, 3)), environment, "one of 2 integers"),
        (GaussianPolicy(module(4, 2), 2), environment, "one of 2 integers"),
        (GaussianPolicy(module(3, 2), 2), pendulum, "a vector of 1 numbers"),
        (CategoricalPolicy(module(3, 2)), pendulum, "a vector of 1 numbers"),
    ):
        with pytest.raises((ValueError, IndexError), match=words):
            vector_episodes(there, wrong, wrong.params, horizon=50)
    cards = gymnasium.make_vec("Blackjack-v1", num_envs=3, vectorization_mode="sync")
    three = CategoricalPolicy(module(3, 2))
    with pytest.raises(TypeError, match="observations in a `Box` or a `Discrete`"):
        vector_episodes(cards, three, three.params, horizon=5)


# Experiments


@pytest.mark.parametrize("name", ["maml-bandits", "maml-navigation", "offline-navigation"])
def test_an_experiment_runs_and_leaves_its_picture_and_returns(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {
        "maml-bandits": ["batch=3", "episodes=4"],
        "maml-navigation": ["batch=2", "episodes=4", "horizon=4", "hidden=4"],
        "offline-navigation": ["batch=2", "episodes=4", "horizon=3", "hidden=4", "training_tasks=6"],
    }[name]
    words = [word for setting in small for word in ("--set", setting)]
    assert cli.main(["run", name, "--steps", "2", "--out", str(tmp_path / "run"), "--quiet", *words]) == 0
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert told["status"] == "successful" and told["test"]["metric"] == "return"
    assert (tmp_path / "run" / "plot.png").stat().st_size > 1000
    assert ("paths" in told) == ("navigation" in name)
    assert ("effective share after" in told["numbers"]) == name.startswith("offline")


def straight_to_the_goal() -> float:
    """The mean return of a policy that knows it."""
    environment, goal = Navigation(50), GoalTasks().sample(4000, seed=0)["goal"]
    state, total, alive = torch.zeros_like(goal), torch.zeros(len(goal)), torch.ones(len(goal))
    for _ in range(environment.horizon):
        state, reward, goes_on = environment.step({"goal": goal}, state, goal - state, torch.zeros(len(goal), 0))
        total, alive = total + reward * alive, alive * goes_on
    return float(total.mean())


def test_a_policy_that_knows_the_goal_earns_what_the_page_says() -> None:
    assert straight_to_the_goal() == pytest.approx(-0.13, abs=0.01)


@pytest.mark.slow
def test_navigation_finds_goals_after_one_step_and_joint_training_does_not() -> None:
    """Better after a step by half of the gap to a policy that knows the goal, and than joint training."""
    found = {}
    for steps in (1, 0):
        experiment = experiments()["maml-navigation"].build(inner_steps=steps)
        experiment = replace(experiment, evaluation=Evaluating(100, 25))
        trained = experiment.train(0)
        found[steps] = experiment.evaluate(trained.x, 0)
    knows, one = straight_to_the_goal(), found[1]
    assert one.score.mean - one.before.mean > (knows - one.before.mean) / 2
    assert one.score.mean - one.score.interval > found[0].score.mean + found[0].score.interval


def test_defaults_of_the_experiments_are_what_the_page_says() -> None:
    built = experiments()["maml-navigation"].build()
    assert isinstance(built.settings, Training) and built.settings.max_steps == 25 and built.settings.batch == 20
    assert evaluate(built.learner, built.learner.x0, GoalTasks(), episodes=2).metric == "return"
