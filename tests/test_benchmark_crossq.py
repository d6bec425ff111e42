"""`benchmarks/crossq.py`: the equations of its environment, an update, what is trained again, table and picture."""

import math

import pytest
import torch


@pytest.fixture
def crossq(benchmark_script):
    return benchmark_script("crossq")


@pytest.fixture
def tiny(crossq, monkeypatch):
    monkeypatch.setattr(crossq, "LENGTHS", crossq.Lengths(16, bs=4, width=8, points=2, first=8, episode=5))
    return crossq


def pendulum(state, action):
    """A rod of length and mass 1 with moment of inertia 1/3, by torques."""
    (angle, speed), torque = state, 2 * action
    off = math.atan2(math.sin(angle), math.cos(angle))
    reward = -(off**2 + 0.1 * speed**2 + 0.001 * torque**2)
    speed = min(max(speed + 0.05 * (torque + 0.5 * 10 * math.sin(angle)) / (1 / 3), -8), 8)
    return [angle + 0.05 * speed, speed], reward


def test_the_pendulum_follows_its_equations(crossq):
    world = crossq.Pendulum
    state = world.start(3).double()
    expected = [s.tolist() for s in state]
    for step in range(60):
        action = torch.full((3, 1), 1.0 if step < 25 else -0.7).double()
        state, reward = world.step(state, action)
        moved = [pendulum(s, action[0, 0].item()) for s in expected]
        expected = [s for s, _ in moved]
        torch.testing.assert_close(state, torch.tensor(expected).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(reward, torch.tensor([r for _, r in moved]).double(), rtol=0, atol=1e-6)
    assert world.observe(state).shape == (3, world.observations)


def batch(n=6):
    return torch.randn(n, 3), torch.rand(n, 1), torch.randn(n), torch.randn(n, 3)


@pytest.mark.parametrize("norm", ["default", "batchrenorm", "layernorm", "none", "sac"])
def test_an_update_changes_policy_critics_and_temperature(crossq, norm):
    agent = crossq.Agent(3, 8, norm, 1e-3, 10)
    nets = agent.actor, *agent.critics
    before = [[p.clone() for p in net.parameters()] for net in nets]
    agent.update(*batch())
    for net, old in zip(nets, before):
        assert all((p != o).any() for p, o in zip(net.parameters(), old) if p.dim() > 1)
    assert agent.log_alpha != 0
    policy = [p.clone() for p in agent.actor.parameters()]
    agent.update(*batch())
    assert all(map(torch.equal, policy, agent.actor.parameters())) == (norm != "sac")  # CrossQ's delay


def test_the_critics_see_both_batches_at_once_and_the_policys_update_leaves_their_statistics(crossq):
    agent = crossq.Agent(3, 8, "batchnorm", 1e-3, 10)
    seen = []
    agent.critics[0].register_forward_hook(lambda net, x, y: seen.append((len(x[0]), net.training)))
    agent.update(*batch(6))
    assert seen == [(12, True), (6, False)]


def test_log_probabilities_are_those_of_a_squashed_normal(crossq):
    agent = crossq.Agent(3, 8, "none", 1e-3, 10)
    obs = torch.randn(5, 3)
    action, log_p = agent.sample(obs)
    mean, log_std = agent.policy(obs)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform()
    )
    torch.testing.assert_close(log_p, squashed.log_prob(action), rtol=1e-4, atol=1e-4)


def test_norms_start_from_the_same_weights(crossq):
    torch.manual_seed(0)
    first = crossq.Agent(3, 8, "none", 1e-3, 10).critics[1][-1].weight
    torch.manual_seed(0)
    assert torch.equal(first, crossq.Agent(3, 8, "default", 1e-3, 10).critics[1][-1].weight)


def test_a_grid_goes_on_where_it_ended(tiny, tmp_path, monkeypatch):
    path, log, train = tmp_path / "out.csv", [], tiny.train
    settings = {"norms": ["none", "sac"], "rates": [1e-3, 3e-3], "seeds": [0, 1], "jobs": 1, "log": log.append}

    def interrupted(run):
        if run.seed == 1:
            raise KeyboardInterrupt
        return train(run)

    monkeypatch.setattr(tiny, "train", interrupted)
    assert not tiny.run(path, **settings)
    assert len(tiny.rows_of(path)) == 4 * 2 and len(log) == 4
    monkeypatch.setattr(tiny, "train", train)
    assert tiny.run(path, **settings)
    rows = tiny.rows_of(path)
    assert len(rows) == 6 * 2 and len(log) == 6
    assert tuple(rows[0]) == tiny.COLUMNS and {row["step"] for row in rows} == {"8", "16"}
    monkeypatch.setattr(tiny, "train", None)
    assert tiny.run(path, **settings)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # the last row of a run is lost
    assert tiny.rows_of(path) == rows[:-2]
    monkeypatch.setattr(tiny, "train", train)
    assert tiny.run(path, **settings) and len(log) == 7
    assert [row["return"] for row in tiny.rows_of(path)] == [row["return"] for row in rows]


def made_up(norm, lr, seed, returns):
    return [
        {"task": "pendulum", "norm": norm, "lr": f"{lr:g}", "seed": str(seed), "step": str(8 * i), "return": str(r)}
        for i, r in enumerate(returns, 1)
    ]


def test_table_and_picture_show_the_best_rate_and_every_seed(tiny):
    rows = made_up("default", 1e-3, 0, [-1200, -200]) + made_up("default", 3e-3, 0, [-250, -150])
    rows += made_up("default", 3e-3, 1, [-900, -170]) + made_up("sac", 1e-3, 0, [-1200, "nan"])
    rows += made_up("none", 3e-3, 0, [-1300, -1100]) + made_up("none", 3e-3, 1, [-1300, -290])
    text = tiny.table(rows)
    assert "| RunningBatchNorm | 0.003 | **-160 ± 14** | 12 | 2 |" in text
    assert "| no norm | 0.003 | -695 ± 573 | 16 (1 of 2 seeds) | 2 |" in text
    assert "| SAC, target networks | 0.001 | -1200 | never | 1 |" in text
    (ax,) = tiny.figure(rows).axes
    means = [line.get_ydata() for line in ax.lines]
    assert any(list(m) == [-575, -160] for m in means) and len(means) == 4  # one of them marks the goal
    bold = [line.get_color() for line in ax.lines if line.get_linewidth() > 2]
    assert bold == [tiny.COLORS[0]]
    assert "SAC, target networks" in [t.get_text() for t in ax.texts]
