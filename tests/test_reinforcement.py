"""Policies that adapt: derivatives against the enumeration of all episodes, both objectives, offline data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilevel import ITD, BilevelProblem, hypergradient
from bilevel.few_shot import evaluate, train
from bilevel.few_shot.learner import Learner
from bilevel.inner_problems import Iteration
from bilevel.reinforcement import (
    AbstractBaseline,
    AbstractEnvironment,
    AbstractSurrogate,
    Advantages,
    BanditTasks,
    CategoricalPolicy,
    DiCE,
    GaussianBandit,
    GaussianPolicy,
    LinearBaseline,
    LowVarianceCurvature,
    Navigation,
    PointMass,
    ScoreFunction,
    Tabular,
    Trajectories,
    Zero,
    maml_policy,
    rollout,
)
from bilevel.solvers import OwnSteps

HORIZON, DISCOUNT, STEP = 3, 0.9, 0.7


@dataclass(frozen=True)
class OfTime(AbstractBaseline):
    """A baseline that knows the observation and the time, and no action."""

    def values(self, trajectories: Trajectories, discount: float) -> Tensor:
        t = torch.arange(trajectories.rewards.shape[1], dtype=torch.float64)
        return 0.3 - 0.5 * t + 2.0 * trajectories.observations[..., 0]


def mdp() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    P = torch.rand(2, 2, 2, generator=generator, dtype=torch.float64)
    r = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    return {"start": torch.tensor([0.3, 0.7]).double(), "P": P / P.sum(-1, keepdim=True), "r": r}


def softmax_policy(inputs: int, actions: int) -> CategoricalPolicy:
    module = nn.Linear(inputs, actions, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-0.9, 0.7, inputs * actions).double().reshape(actions, inputs))
    return CategoricalPolicy(module)


POLICY, TASK = softmax_policy(2, 2), mdp()


def every_episode(behavior: Tensor) -> tuple[Trajectories, Tensor]:
    """All episodes `(n, horizon)` of the chain, and the probability of their states given their actions `(n,)`."""
    rows: list[tuple[list[int], list[int], float]] = []
    for choice in itertools.product(range(2), repeat=2 * HORIZON):
        seen, done = list(choice[:HORIZON]), list(choice[HORIZON:])
        p = float(TASK["start"][seen[0]])
        for t in range(HORIZON - 1):
            p *= float(TASK["P"][seen[t], done[t], seen[t + 1]])
        rows.append((seen, done, p))
    states, actions = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
    observations = nn.functional.one_hot(states, 2).double()
    log_probs = POLICY.log_prob({"weight": behavior}, observations, actions).detach()
    made = Trajectories(observations, actions, TASK["r"][states, actions], torch.ones_like(log_probs), log_probs)
    return made, torch.tensor([row[2] for row in rows], dtype=torch.float64)


def expected_return(weight: Tensor) -> Tensor:
    """J: the discounted returns of all episodes, by their probabilities."""
    episodes, chance = every_episode(weight)
    own = POLICY.log_prob({"weight": weight}, episodes.observations, episodes.actions).sum(1).exp()
    discounts = DISCOUNT ** torch.arange(HORIZON).double()
    return (chance * own * (episodes.rewards * discounts).sum(1)).sum()


def expected_surrogate(surrogate: AbstractSurrogate, behavior: Tensor) -> Callable[[Tensor], Tensor]:
    """y -> the mean of a surrogate over episodes of another policy."""
    episodes, chance = every_episode(behavior)
    weights = chance * episodes.log_probs.sum(1).exp()

    def mean(weight: Tensor) -> Tensor:
        def one(*parts: Tensor) -> Tensor:
            return surrogate.value(POLICY, {"weight": weight}, Trajectories(*(part.unsqueeze(0) for part in parts)))

        return (weights * torch.vmap(one)(*episodes)).sum()

    return mean


def derivatives(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, the Hessian, and the third derivative along a direction."""
    leaf = at.detach().clone().requires_grad_()
    direction = torch.linspace(-1, 1, at.numel()).double().reshape(at.shape)
    (gradient,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    rows = [torch.autograd.grad(g, leaf, create_graph=True)[0].flatten() for g in gradient.flatten()]
    hessian = torch.stack(rows)
    curvature = direction.flatten() @ hessian @ direction.flatten()
    (third,) = torch.autograd.grad(curvature, leaf, allow_unused=True)
    return gradient.detach(), hessian.detach(), torch.zeros_like(at) if third is None else third


HERE = POLICY.params["weight"]


@pytest.mark.parametrize("baseline", [Zero(), OfTime()])
@pytest.mark.parametrize("shift", [0.0, 0.4], ids=["on policy", "off policy"])
def test_every_derivative_of_dice_is_unbiased(baseline: AbstractBaseline, shift: float) -> None:
    surrogate = expected_surrogate(DiCE(DISCOUNT, baseline), HERE)
    at = HERE + shift * torch.tensor([[1.0, -1.0], [0.5, 1.0]]).double()
    for found, true in zip(derivatives(surrogate, at), derivatives(expected_return, at), strict=True):
        assert (found - true).abs().max() < 1e-12
    assert abs(float(surrogate(at) - expected_return(at))) < 1e-12


@pytest.mark.parametrize("baseline", [Zero(), OfTime()])
@pytest.mark.parametrize("build", [LowVarianceCurvature, ScoreFunction])
def test_the_first_derivative_of_every_surrogate_is_the_policy_gradient(build: Any, baseline: AbstractBaseline) -> None:
    surrogate = build(Advantages(DISCOUNT, 1.0, baseline))
    assert surrogate.factor == DISCOUNT
    mean = expected_surrogate(surrogate, HERE)
    assert (derivatives(mean, HERE)[0] - derivatives(expected_return, HERE)[0]).abs().max() < 1e-12
    assert abs(float(mean(HERE) - expected_return(HERE))) < 1e-12


@pytest.mark.parametrize("baseline", [Zero(), OfTime()])
def test_dice_has_the_gradient_of_the_score_function_in_every_episode(
    baseline: AbstractBaseline,
) -> None:
    """So that the baseline takes away what it takes away there: its mean is zero whatever its sign."""
    episodes, _ = every_episode(HERE)
    for k in range(0, len(episodes.rewards), 7):
        one = Trajectories(*(part[k : k + 1] for part in episodes))
        leaf = HERE.clone().requires_grad_()
        found = []
        for surrogate in (DiCE(DISCOUNT, baseline), ScoreFunction(Advantages(DISCOUNT, 1.0, baseline))):
            found.append(torch.autograd.grad(surrogate.value(POLICY, {"weight": leaf}, one), leaf)[0])
        assert (found[0] - found[1]).abs().max() < 1e-12


def test_the_second_derivative_of_the_score_function_lacks_the_scores_of_the_episodes() -> None:
    surrogate = ScoreFunction(Advantages(DISCOUNT, 1.0, Zero()))
    found = derivatives(expected_surrogate(surrogate, HERE), HERE)[1]
    true = derivatives(expected_return, HERE)[1]
    episodes, chance = every_episode(HERE)
    missing = torch.zeros_like(true)
    for k in range(len(chance)):
        one = Trajectories(*(part[k : k + 1] for part in episodes))
        leaf = HERE.clone().requires_grad_()
        log = POLICY.log_prob({"weight": leaf}, one.observations, one.actions)
        (score,) = torch.autograd.grad(log.sum(), leaf, retain_graph=True)
        (gradient,) = torch.autograd.grad(surrogate.value(POLICY, {"weight": leaf}, one), leaf)
        weight = chance[k] * episodes.log_probs[k].sum().exp()
        missing += weight * torch.outer(score.flatten(), gradient.flatten())
    assert (found - true).abs().max() > 0.05  # the naive Hessian is biased
    assert (found + missing - true).abs().max() < 1e-12


def test_low_variance_curvature_is_biased_and_is_not_with_one_action() -> None:
    found = derivatives(expected_surrogate(LowVarianceCurvature(Advantages(DISCOUNT, 1.0, Zero())), HERE), HERE)[1]
    assert (found - derivatives(expected_return, HERE)[1]).abs().max() > 0.01
    policy, means = softmax_policy(1, 3), torch.tensor([1.0, -0.5, 0.2]).double()
    weight, one = policy.params["weight"], torch.ones(1, 1, 1).double()

    def exact(weight: Tensor) -> Tensor:
        return ((weight @ torch.ones(1).double()).softmax(0) * means).sum()

    def surrogate(weight: Tensor) -> Tensor:
        total = torch.zeros(()).double()
        for arm in range(3):
            action = torch.tensor([[arm]])
            log = policy.log_prob(policy.params, one, action).detach()
            made = Trajectories(one, action, means[arm].reshape(1, 1), torch.ones_like(log), log)
            curvature = LowVarianceCurvature(Advantages(1.0, 1.0, Zero()))
            total = total + log.exp().squeeze() * curvature.value(policy, {"weight": weight}, made)
        return total

    for mine, true in zip(derivatives(surrogate, weight)[:2], derivatives(exact, weight)[:2], strict=True):
        assert (mine - true).abs().max() < 1e-12


def test_the_meta_gradient_of_expected_returns_is_exact_with_all_episodes() -> None:
    """(I): (I + a d2J(x)) grad J(x + a grad J(x)), through the library's ITD and the surrogates' derivatives."""

    def g(x: Tensor, y: Tensor) -> Tensor:
        return -expected_surrogate(DiCE(DISCOUNT, OfTime()), y.detach())(y)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return -expected_surrogate(ScoreFunction(Advantages(DISCOUNT, 1.0, Zero())), y.detach())(y)

    kind = Iteration(lambda x, y, gradient, k: y - STEP * gradient, 2, objective_function=g)
    problem = BilevelProblem(f, inner=kind, init=lambda x: x)
    found = hypergradient(problem, HERE, HERE, estimator=ITD(OwnSteps()))

    def exact(x: Tensor) -> Tensor:
        y = x
        for _ in range(2):
            y = y + STEP * torch.autograd.grad(expected_return(y), y, create_graph=True)[0]
        return -expected_return(y)

    leaf = HERE.clone().requires_grad_()
    value = exact(leaf)
    (true,) = torch.autograd.grad(value, leaf)
    assert (found.grad - true).abs().max() < 1e-10
    assert abs(found.value - float(value.detach())) < 1e-12


# The learner itself, on a bandit of two arms whose noise runs through all that can happen

MEANS = torch.tensor([1.0, -0.4]).double()
ARMS = softmax_policy(1, 2)


def first_arm(params: dict[str, Tensor]) -> Tensor:
    return params["weight"].squeeze(1).softmax(0)[0]


def cells(*edges: float) -> list[tuple[float, float]]:
    """A normal number in each of the intervals of [0, 1] between edges, and the intervals' lengths."""
    ends = [0.0, *sorted(edges), 1.0]
    middles = [((low + high) / 2, high - low) for low, high in itertools.pairwise(ends) if high > low]
    return [(float(torch.special.ndtri(torch.tensor(middle, dtype=torch.float64))), size) for middle, size in middles]


def mean_estimate(learner: Learner, episodes: int) -> tuple[Tensor, float]:
    """The mean of the hypergradient, and of f, over all noise: one inner step, one outer episode."""
    x = learner.x0
    total, mean = torch.zeros_like(x["weight"]), 0.0
    for drawn in itertools.product(cells(float(first_arm(x))), repeat=episodes):
        weight = math.prod(size for _, size in drawn)
        inner = torch.tensor([number for number, _ in drawn]).double().reshape(1, 1, episodes, 1, 1)
        batch = {
            "means": MEANS.unsqueeze(0),
            "inner_start": torch.zeros(1, 1, episodes, 0).double(),
            "inner_noise": torch.cat([inner, torch.zeros_like(inner)], -1),
            "outer_start": torch.zeros(1, 1, 0).double(),
        }

        def at(number: float, batch: dict[str, Tensor] = batch) -> Any:
            noise = torch.tensor([number, 0.0]).double().reshape(1, 1, 1, 2)
            data = {**batch, "outer_noise": noise}
            return hypergradient(learner.problem, x, learner.y0, estimator=learner.estimator, data=data)

        y = {"weight": at(0.0).y["policy"]["weight"][0]}
        for number, size in cells(float(first_arm(x)), float(first_arm(y))):
            found = at(number)
            total = total + weight * size * found.grad["weight"]
            mean += weight * size * found.value
    return total, mean


def bandit(objective: Any, episodes: int, **settings: Any) -> Learner:
    return maml_policy(
        ARMS,
        GaussianBandit(2, spread=0.0),
        objective=objective,
        step=STEP,
        episodes=episodes,
        outer_episodes=1,
        inner=DiCE(1.0, Zero()) if objective == "expected" else ScoreFunction(Advantages(1.0, 1.0, Zero())),
        outer=ScoreFunction(Advantages(1.0, 1.0, Zero())),
        **settings,
    )


def returned(weight: Tensor) -> Tensor:
    return (weight.squeeze(1).softmax(0) * MEANS).sum()


@pytest.mark.parametrize("episodes", [1, 2])
def test_the_learner_of_sampled_gradients_is_unbiased(episodes: int) -> None:
    """(II): the derivative of sum_D p_x(D) J(x + a g(D; x)), D all draws of the arms."""
    learner = bandit("sampled", episodes)
    found, value = mean_estimate(learner, episodes)

    def exact(x: Tensor) -> Tensor:
        logs, total = x.squeeze(1).log_softmax(0), torch.zeros(()).double()
        for arms in itertools.product(range(2), repeat=episodes):
            surrogate = sum((logs[arm] * MEANS[arm] for arm in arms), torch.zeros(()).double()) / episodes
            y = x + STEP * torch.autograd.grad(surrogate, x, create_graph=True)[0]
            total = total + sum((logs[arm] for arm in arms), torch.zeros(()).double()).exp() * returned(y)
        return total

    leaf = learner.x0["weight"].clone().requires_grad_()
    value_then = exact(leaf)
    (true,) = torch.autograd.grad(value_then, leaf)
    assert (found + true).abs().max() < 1e-10
    assert abs(value + float(value_then.detach())) < 1e-12


def test_the_learner_of_sampled_gradients_is_unbiased_over_two_steps() -> None:
    """(II) with N = 2: D_2 is drawn from y_1(x, D_1), and its score moves with x through y_1 too."""
    learner = bandit("sampled", 1, inner_steps=2)
    x = learner.x0

    def moved(weight: Tensor, arm: int) -> Tensor:
        own = weight.squeeze(1).log_softmax(0)[arm] * MEANS[arm]
        return weight + STEP * torch.autograd.grad(own, weight, create_graph=True)[0]

    def exact(weight: Tensor) -> Tensor:
        total = torch.zeros(()).double()
        for first, second in itertools.product(range(2), repeat=2):
            y = moved(weight, first)
            chance = weight.squeeze(1).softmax(0)[first] * y.squeeze(1).softmax(0)[second]
            total = total + chance * returned(moved(y, second))
        return total

    leaf = x["weight"].clone().requires_grad_()
    (true,) = torch.autograd.grad(exact(leaf), leaf)
    found, edge = torch.zeros_like(true), float(first_arm(x))
    for number, size in cells(edge):
        y = moved(leaf, int(torch.special.ndtr(torch.tensor(number).double()) > edge)).detach().requires_grad_()
        inner_edge = float(first_arm({"weight": y.detach()}))
        for second, inner_size in cells(inner_edge):
            end = moved(y, int(torch.special.ndtr(torch.tensor(second).double()) > inner_edge)).detach()
            for outer, outer_size in cells(edge, float(first_arm({"weight": end}))):
                batch = {
                    "means": MEANS.unsqueeze(0),
                    "inner_start": torch.zeros(1, 2, 1, 0).double(),
                    "inner_noise": torch.tensor([[number, 0.0], [second, 0.0]]).double().reshape(1, 2, 1, 1, 2),
                    "outer_start": torch.zeros(1, 1, 0).double(),
                    "outer_noise": torch.tensor([outer, 0.0]).double().reshape(1, 1, 1, 2),
                }
                one = hypergradient(learner.problem, x, learner.y0, estimator=learner.estimator, data=batch)
                found = found + size * inner_size * outer_size * one.grad["weight"]
    assert (found + true).abs().max() < 1e-10


def test_the_bias_of_expected_returns_from_sampled_gradients_falls_like_one_over_the_episodes() -> None:
    x = ARMS.params["weight"].clone().requires_grad_()
    (true,) = torch.autograd.grad(returned(x + STEP * torch.autograd.grad(returned(x), x, create_graph=True)[0]), x)
    biases = {n: mean_estimate(bandit("expected", n), n)[0] + true for n in (2, 4)}
    assert biases[2].abs().max() > 0.005
    assert (4 * biases[4] - 2 * biases[2]).abs().max() < 0.15 * 2 * biases[2].abs().max()


def test_the_means_of_many_draws_agree_within_five_standard_errors() -> None:
    learner = maml_policy(
        ARMS,
        GaussianBandit(2, spread=0.5),
        objective="sampled",
        step=STEP,
        episodes=2,
        outer_episodes=1,
        inner=ScoreFunction(Advantages(1.0, 1.0, Zero())),
        outer=ScoreFunction(Advantages(1.0, 1.0, Zero())),
    )
    x = learner.x0["weight"]
    grads, inner, products = [], [], []
    for seed in range(40):
        tasks = {"means": MEANS.expand(500, 2)}
        assert learner.prepare is not None
        data = learner.prepare(tasks, seed)
        found = hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=data)
        grads.append(found.grad["weight"].flatten())
        noise = data["inner_noise"].flatten(0, 2)
        episodes = rollout(GaussianBandit(2, 0.5), ARMS, learner.x0, {"means": MEANS}, torch.zeros(1000, 0), noise)
        leaf = x.clone().requires_grad_()
        value = DiCE(1.0, Zero()).value(ARMS, {"weight": leaf}, episodes)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        inner.append(gradient.detach().flatten())
        products.append(torch.autograd.grad(gradient[0].sum(), leaf)[0].flatten())

    def agree(draws: list[Tensor], true: Tensor) -> None:
        rows = torch.stack(draws)
        error = rows.std(0) / len(rows) ** 0.5
        assert ((rows.mean(0) - true.flatten()).abs() < 5 * error).all()

    true_gradient, true_hessian, _ = derivatives(returned, x)
    agree(inner, true_gradient)
    agree(products, true_hessian[0])
    spread = torch.stack(grads).std(0) / len(grads) ** 0.5
    assert (spread < 0.1).all()  # so that agreement says something
    exact = gaussian_rewards(x)
    agree(grads, -exact)


def gaussian_rewards(x: Tensor) -> Tensor:
    """(II) for two episodes with normal rewards, by a grid of their mean: rewards enter y linearly."""
    leaf = x.clone().requires_grad_()
    logs, total = leaf.squeeze(1).log_softmax(0), torch.zeros(()).double()
    nodes = torch.linspace(-6, 6, 61).double()
    chances = (-nodes.square() / 2).exp()
    chances = chances / chances.sum()
    for first, second in itertools.product(range(2), repeat=2):
        p = (logs[first] + logs[second]).exp()
        rewards = [(MEANS[first] + 0.5 * nodes)[:, None, None], (MEANS[second] + 0.5 * nodes)[None, :, None]]
        scores = [torch.autograd.grad(logs[arm], leaf, create_graph=True)[0].squeeze(1) for arm in (first, second)]
        y = leaf.squeeze(1) + STEP * (rewards[0] * scores[0] + rewards[1] * scores[1]) / 2
        total = total + p * (chances[:, None] * chances * (y.softmax(-1) * MEANS).sum(-1)).sum()
    (found,) = torch.autograd.grad(total, leaf)
    return found


@pytest.mark.parametrize(
    ("objective", "inner"),
    [("expected", ScoreFunction()), ("sampled", DiCE()), ("sampled", LowVarianceCurvature())],
)
def test_a_surrogate_of_the_other_objective_is_refused(objective: Any, inner: AbstractSurrogate) -> None:
    with pytest.raises(ValueError, match=rf"inner=\.\.\..*{objective}.*curvature"):
        maml_policy(ARMS, GaussianBandit(2), objective=objective, inner=inner)


def test_a_baseline_does_not_see_the_episode_that_it_is_for() -> None:
    made, _ = every_episode(HERE)
    some = Trajectories(*(part[:6] for part in made))
    changed = some._replace(rewards=some.rewards.clone())
    changed.rewards[0] += 10.0
    before, after = (LinearBaseline().values(each, DISCOUNT) for each in (some, changed))
    assert torch.equal(before[0::2], after[0::2]) and not torch.allclose(before[1::2], after[1::2])
    assert not LinearBaseline().values(Trajectories(*(part[:1] for part in made)), DISCOUNT).any()


def test_a_linear_baseline_finds_a_linear_value() -> None:
    t = torch.arange(20).double()
    observations = torch.randn(8, 20, 1, generator=torch.Generator().manual_seed(0)).double()
    value = 1.0 - 0.3 * t + 2.0 * observations[..., 0]
    rewards = torch.cat([value[:, :-1] - value[:, 1:], value[:, -1:]], 1)
    ones = torch.ones_like(rewards)
    found = LinearBaseline(1e-12).values(Trajectories(observations, ones, rewards, ones, ones), 1.0)
    assert (found - value).abs().max() < 1e-6


def test_advantages_are_the_sum_of_discounted_differences() -> None:
    made, _ = every_episode(HERE)
    V = OfTime().values(made, DISCOUNT)
    following = torch.cat([V[:, 1:], torch.zeros_like(V[:, :1])], 1)
    d = made.rewards + DISCOUNT * following - V
    true = torch.zeros_like(d)
    for t in range(HORIZON):
        for k in range(t, HORIZON):
            true[:, t] += DISCOUNT**t * (0.5 * DISCOUNT) ** (k - t) * d[:, k]
    assert (Advantages(DISCOUNT, 0.5, OfTime()).of(made) - true).abs().max() < 1e-12


def test_episodes_follow_their_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, HORIZON, 2, generator=generator).double()
    start = torch.randn(20_000, 1, generator=generator).double()
    drawn = rollout(Tabular(HORIZON), POLICY, POLICY.params, TASK, start, noise)
    seen = drawn.observations.argmax(-1)
    index = (seen * 2 + drawn.actions) @ torch.tensor([16, 4, 1])
    found = torch.bincount(index, minlength=64).double() / 20_000
    episodes, chance = every_episode(HERE)
    own = (episodes.observations.argmax(-1) * 2 + episodes.actions) @ torch.tensor([16, 4, 1])
    true = torch.zeros(64).double()
    true[own] = chance * episodes.log_probs.sum(1).exp()
    assert ((found - true).abs() < 5 * (true * (1 - true) / 20_000).sqrt() + 1e-12).all()


def test_an_episode_that_has_ended_earns_nothing_and_has_no_score() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = GaussianPolicy(nn.Linear(2, 2).double(), 2, log_std=-1.0)
    task = {"goal": torch.tensor([0.05, 0.0]).double()}
    noise = torch.randn(50, 30, 2, generator=torch.Generator().manual_seed(1)).double()
    drawn = rollout(Navigation(30, reached=0.06), policy, policy.params, task, torch.zeros(50, 0), noise)
    ended = drawn.alive == 0
    assert ended.any() and (drawn.alive.diff(dim=1) <= 0).all() and drawn.alive[:, 0].all()
    assert not drawn.rewards[ended].any() and not drawn.log_probs[ended].any()
    leaf = {name: p.clone().requires_grad_() for name, p in policy.params.items()}
    value = DiCE(0.9, Zero()).value(policy, leaf, drawn)
    cut = Trajectories(
        drawn.observations,
        torch.where(ended.unsqueeze(-1), 7.0, drawn.actions),
        drawn.rewards,
        drawn.alive,
        drawn.log_probs,
    )
    other = DiCE(0.9, Zero()).value(policy, leaf, cut)
    for mine, theirs in zip(
        torch.autograd.grad(value, [*leaf.values()]), torch.autograd.grad(other, [*leaf.values()]), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_point_mass_follows_newton() -> None:
    mass = PointMass("goal", horizon=2, dt=0.5, friction=0.2, cost=0.1)
    task, push = {"goal": torch.tensor([1.0, 0.0]).double()}, torch.tensor([[2.0, -0.5]]).double()
    state, reward, on = mass.step(task, torch.tensor([[0.1, 0.2, 1.0, -1.0]]).double(), push, torch.zeros(1, 0))
    assert torch.allclose(state, torch.tensor([[0.75, -0.325, 1.3, -1.05]]).double())
    assert abs(float(reward) + math.hypot(0.25, 0.325) + 0.1 * 1.25) < 1e-12 and on == 1


@pytest.mark.parametrize("policy", [POLICY, GaussianPolicy(nn.Linear(2, 2).double(), 2, log_std=-0.5)])
def test_the_divergence_is_the_mean_of_the_ratio_of_logarithms(policy: Any) -> None:
    old = policy.params
    new = {name: p + 0.1 * torch.sin(torch.arange(p.numel()).double()).reshape(p.shape) for name, p in old.items()}
    o = torch.tensor([[0.5, -1.0]]).double().expand(40_000, 2)
    noise = torch.randn(40_000, policy.noise, generator=torch.Generator().manual_seed(0)).double()
    actions = policy.sample(old, o, noise)
    ratios = policy.log_prob(old, o, actions) - policy.log_prob(new, o, actions)
    error = float(ratios.std()) / 200
    assert abs(float(ratios.mean() - policy.divergence(old, new, o[:1]))) < 5 * error
    assert float(policy.divergence(old, old, o[:1])) == 0.0


def test_training_makes_adaptation_better_and_resumes_to_the_same_bits(tmp_path: Any) -> None:
    from bilevel.few_shot import Saving
    from bilevel.solvers import Adam

    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = CategoricalPolicy(nn.Linear(1, 4))
    learner = maml_policy(policy, GaussianBandit(4, 0.3), step=1.0, learn_steps=True, episodes=20)
    tasks = BanditTasks(4)
    whole = train(learner, tasks, max_steps=30, batch=30, outer=Adam(0.1), out=tmp_path / "a")
    first = train(learner, tasks, max_steps=10, batch=30, outer=Adam(0.1), out=tmp_path / "b")
    again = train(learner, tasks, max_steps=30, batch=30, outer=Adam(0.1), out=Saving(tmp_path / "b", resume=True))
    assert first.x["params"]["weight"].shape == (4, 1)
    assert torch.equal(whole.x["params"]["weight"], again.x["params"]["weight"])
    before, after = (evaluate(learner, x, tasks, episodes=200).score for x in (learner.x0, whole.x))
    assert after.mean - after.interval > before.mean + before.interval


def test_more_steps_than_there_is_noise_for_are_refused() -> None:
    learner = bandit("expected", 2)
    with pytest.raises(ValueError, match="evaluation_steps"):
        evaluate(learner, learner.x0, BanditTasks(2), episodes=2, steps=2)
    longer = bandit("expected", 2, evaluation_steps=2)
    assert evaluate(longer, longer.x0, BanditTasks(2), episodes=5, curve=(0, 1)).metric == "return"


def test_the_first_order_learner_leaves_out_the_hessian() -> None:
    learner = maml_policy(ARMS, GaussianBandit(2), step=STEP, episodes=5, first_order=True)
    whole = maml_policy(ARMS, GaussianBandit(2), step=STEP, episodes=5)
    assert learner.prepare is not None
    data = learner.prepare({"means": MEANS.expand(3, 2)}, 0)
    short = hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=data)
    full = hypergradient(whole.problem, whole.x0, whole.y0, estimator=whole.estimator, data=data)
    assert torch.equal(short.y["policy"]["weight"], full.y["policy"]["weight"])
    y = short.y["policy"]["weight"]
    total = torch.zeros(2, 1).double()
    for k in range(3):
        leaf = y[k].clone().requires_grad_()
        task = {"means": MEANS}
        after = rollout(GaussianBandit(2), ARMS, {"weight": y[k]}, task, data["outer_start"][k], data["outer_noise"][k])
        total -= torch.autograd.grad(ScoreFunction().value(ARMS, {"weight": leaf}, after), leaf)[0] / 3
    assert (short.grad["weight"] - total).abs().max() < 1e-12
    assert (full.grad["weight"] - total).abs().max() > 1e-3


# What does not fit


def learner_of(policy: Any, environment: Any, **settings: Any) -> Learner:
    return maml_policy(policy, environment, step=0.1, episodes=3, **settings)


def gaussian(outputs: int, actions: int) -> GaussianPolicy:
    return GaussianPolicy(nn.Linear(2, outputs).double(), actions)


class Coded(AbstractEnvironment):
    """A bandit whose task is the number of its good arm."""

    horizon, start_noise, step_noise = 1, 0, 1
    shape: tuple[int, ...] = ()

    def start(self, task: Any, noise: Tensor) -> Tensor:
        return noise.new_ones(*noise.shape[:-1], 1)

    def step(self, task: Any, state: Tensor, action: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        reward = ((action == task["good"]).to(noise.dtype) + 0.1 * noise[..., 0]).reshape(-1, *self.shape)
        return state, reward, torch.zeros_like(reward)


class Columns(Coded):
    shape = (1,)


def test_noise_is_of_the_policys_numbers_whatever_those_of_a_task() -> None:
    learner = learner_of(softmax_policy(1, 3), Coded())
    assert learner.prepare is not None
    data = learner.prepare({"good": torch.tensor([0, 2])}, 0)
    assert data["inner_noise"].dtype == torch.float64 and data["inner_noise"].unique().numel() > 8
    found = hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=data)
    assert found.status.ok and float(found.grad["weight"].abs().max()) > 0


GOALS, MISFITS = (
    {"goal": torch.zeros(2, 2).double()},
    {
        "one mean for two actions": (gaussian(1, 2), Navigation(3), "means of 2 numbers"),
        "one action in the plane": (gaussian(1, 1), Navigation(3), "a vector of 2 numbers"),
        "integers in the plane": (softmax_policy(2, 2), Navigation(3), "a vector of 2 numbers"),
        "a mass of three dimensions": (gaussian(2, 2), PointMass(dimensions=3, horizon=3), "'goal' of 3 numbers"),
        "a bandit without means": (softmax_policy(1, 2), GaussianBandit(2), "'means' of 2 numbers"),
        "a table without a start": (softmax_policy(2, 2), Tabular(2), "'start'"),
        "rewards in a column": (softmax_policy(1, 2), Columns(), r"must return rewards `\(\*b,\)`"),
    },
)


@pytest.mark.parametrize("name", MISFITS)
def test_policies_and_tasks_of_other_environments_are_refused_and_not_broadcast(name: str) -> None:
    policy, environment, words = MISFITS[name]
    learner = learner_of(policy, environment)
    assert learner.prepare is not None
    tasks = {"good": torch.tensor([0, 1])} if isinstance(environment, Coded) else GOALS
    data = learner.prepare(tasks, 0)
    with pytest.raises(ValueError, match=words):
        hypergradient(learner.problem, learner.x0, learner.y0, estimator=learner.estimator, data=data)


def test_a_real_action_is_no_arm() -> None:
    with pytest.raises(ValueError, match="one integer"):
        GaussianBandit(2).step({"means": torch.zeros(2)}, torch.ones(3, 1), torch.zeros(3, 1), torch.zeros(3, 1))
