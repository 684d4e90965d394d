"""What the quality benchmark measures, and what the small model gains on the demo's data."""

import csv
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from tests.support import small_library

torch = pytest.importorskip("torch")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    """The benchmarks' modules, which are no package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: importlib.import_module(name) for name in ("ranking", "small_model", "quality", "graph_sums")}
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_metrics_equal_the_plain_way(modules, rng):
    users, items = 40, 60
    train = (rng.random((users, items)) < rng.random((users, 1)) * 0.2).astype(np.float32)
    train[:, :8] = 0  # cold items
    held_out = ((rng.random((users, items)) < 0.08) & (train == 0)).astype(np.float32)
    scores = np.where(train > 0, -np.inf, rng.standard_normal((users, items)))
    top = np.argsort(-scores, axis=1)[:, :20]
    active = rng.permutation(np.flatnonzero(held_out.sum(axis=1)))
    split = modules["ranking"].Split(*map(csr_matrix, (train, held_out, held_out)))
    found = modules["ranking"].metrics(active, top[active], split, split.test)
    degree = train.sum(axis=1)
    groups = {
        "": degree >= 0,
        "_degree_to_2": degree <= 2,
        "_degree_3_to_5": (degree >= 3) & (degree <= 5),
        "_degree_above_5": degree > 5,
        "_cold_items": degree >= 0,
    }
    for suffix, chosen in groups.items():
        wanted = held_out * (np.arange(items) < 8) if suffix == "_cold_items" else held_out
        for k in (10, 20):
            recalls, gains = [], []
            for user in np.flatnonzero(chosen & (wanted.sum(axis=1) > 0)):
                places = [rank for rank, item in enumerate(top[user, :k]) if wanted[user, item]]
                count = int(wanted[user].sum())
                recalls.append(len(places) / count)
                ideal = sum(1 / np.log2(rank + 2) for rank in range(min(count, k)))
                gains.append(sum(1 / np.log2(rank + 2) for rank in places) / ideal)
            assert found[f"recall_{k}{suffix}"] == pytest.approx(np.mean(recalls))
            assert found[f"ndcg_{k}{suffix}"] == pytest.approx(np.mean(gains))
    assert len(found) == 4 * len(groups)


def test_the_interval_is_students(modules):
    text = modules["quality"].gain_text([0.1, 0.1, 0.1], [0.11, 0.12, 0.13])
    half = 4.302653 * 10 / np.sqrt(3)  # t of 2 degrees of freedom; the differences are 10, 20 and 30 percent
    assert text == f"+20.0% ({20 - half:+.1f} to {20 + half:+.1f})"
    assert modules["quality"].gain_text([0.1], [0.12]) == "+20.0%"


def test_the_best_epoch_is_the_one_that_validation_chose(modules):
    split = modules["ranking"].Split(*(csr_matrix(np.eye(3, 30, k, dtype=np.float32)) for k in (0, 3, 6)))
    recorder = modules["quality"].Recorder(split)
    users = np.arange(3)

    def top(hits, offset):
        """Rankings in which the first users' held-out items stand, and those of others do not."""
        ranked = np.tile(np.arange(10, 30), (3, 1))
        ranked[users < hits, 0] = users[users < hits] + offset
        return ranked

    for valid, test in ((1, 3), (2, 1), (2, 3), (0, 3)):
        recorder("valid", users, top(valid, 3))
        recorder("test", users, top(test, 6))
    assert recorder.best == 1  # the first of two equal ones
    assert recorder.best_test["recall_20"] == pytest.approx(1 / 3)
    assert [round(3 * one["recall_20"]) for one in recorder.valid] == [1, 2, 2, 0]


def test_the_small_model_gains_on_the_demo(modules, tmp_path):
    """Three seeds, each trained until validation says stop: more than two standard errors of the paired difference."""
    pairs = modules["small_model"].compare(range(3), str(tmp_path))
    scores = np.array([[one.test["recall_20"] for one in pair] for pair in pairs])
    assert all(len(one.curve) < 60 for pair in pairs for one in pair)
    gains = scores[:, 1] - scores[:, 0]
    assert gains.mean() > 2 * gains.std(ddof=1) / np.sqrt(len(gains))
    assert scores[:, 0].min() > 0.1  # random tables learn too


class MessagePassing(torch.nn.Module):
    """What the libraries' graph layers use of PyTorch Geometric's class, a row copied for each edge."""

    def __init__(self, aggr, inverse_roots):
        super().__init__()
        self.aggr, self.inverse_roots = aggr, inverse_roots

    def forward(self, x, edge_index):
        return self.propagate(edge_index, size=(len(x), len(x)), x=x)

    def propagate(self, edge_index, size, x):
        target = edge_index[1]
        sums = torch.zeros(size[1], x.shape[1]).index_add(0, target, self.message(x[edge_index[0]], edge_index, size))
        counts = torch.bincount(target, minlength=size[1]).clamp(min=1) if self.aggr == "mean" else torch.ones(size[1])
        return self.update(sums / counts[:, None])

    def message(self, x_j, edge_index, size):
        degree = torch.bincount(edge_index[0], minlength=size[0]).float()
        weight = (degree[edge_index[0]] * degree[edge_index[1]]) ** -0.5 if self.inverse_roots else torch.ones(1)
        return weight.reshape(-1, 1) * x_j

    def update(self, sums):
        return 2 * sums


class Attention(MessagePassing):
    def message(self, x_i, x_j):
        return x_i * x_j


class User_Graph_sample(torch.nn.Module):
    def forward(self, features, user_graph, user_matrix):
        return (user_matrix.unsqueeze(1) @ features[torch.tensor(user_graph)]).squeeze()


def test_sums_over_graphs_are_those_of_the_models(modules, rng):
    """Values and gradients, for two graphs in turn, as edges or neighbours are drawn anew."""
    nodes, width, neighbours = 30, 5, 4
    layers = {f"{aggr}_{roots}": MessagePassing(aggr, roots) for aggr in ("add", "mean") for roots in (True, False)}
    model = torch.nn.ModuleDict({**layers, "user_graph": User_Graph_sample(), "other": Attention("add", False)})

    def results():
        for graph in cases:
            for name in (*layers, "user_graph"):
                x = torch.nn.Parameter(torch.tensor(values))
                given = (graph["edges"],) if name in layers else (graph["neighbours"], graph["weights"])
                out = model[name](x, *given)
                out.square().sum().backward()
                yield out.detach(), x.grad

    values = rng.standard_normal((nodes, width)).astype(np.float32)
    drawn = []
    for _ in range(2):
        pairs = np.unique(rng.integers(0, nodes - 2, (40, 2)), axis=0)  # two nodes have no edge
        edges = torch.tensor(np.concatenate([pairs, pairs[:, ::-1]]).T.copy())
        weights = torch.softmax(torch.tensor(rng.standard_normal((nodes - 6, neighbours)).astype(np.float32)), dim=1)
        near = rng.integers(0, nodes - 6, (nodes - 6, neighbours)).tolist()
        drawn.append({"edges": edges, "neighbours": near, "weights": weights})
    cases = [drawn[0], {**drawn[0], "edges": drawn[0]["edges"].clone()}, drawn[1]]
    wanted = list(results())
    assert modules["graph_sums"].replace_sums(model) == [*layers, "user_graph"]
    for (value, gradient), (found, slope) in zip(wanted, results(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slope, gradient, rtol=1e-4, atol=1e-4)


def test_a_control_gives_rows_to_others_of_their_kind(modules):
    model = torch.nn.ModuleDict({"ids": torch.nn.Embedding(7, 2), "users": torch.nn.Embedding(4, 2)})
    before = {name: table.weight.detach().clone() for name, table in model.items()}
    modules["quality"].permute_rows(model, ["ids.weight"], 4, seed=1)
    torch.testing.assert_close(model["users"].weight, before["users"])
    ids = model["ids"].weight.detach()
    assert not torch.equal(ids, before["ids"])
    for part in (slice(4), slice(4, 7)):
        assert sorted(ids[part].tolist()) == sorted(before["ids"][part].tolist())
    modules["quality"].permute_rows(model, ["users.weight"], 4, seed=1)
    assert sorted(model["users"].weight.tolist()) == sorted(before["users"].tolist())


@pytest.fixture
def toy(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = {(user, item): label for user in range(50) for label in (2, 1, 0, 0, 0) for item in [rng.integers(40)]}
    lines = [f"{user}\t{item}\t{label}" for (user, item), label in rows.items()]
    (folder / "toy.inter").write_text("userID\titemID\tx_label\n0\t39\t0\n" + "\n".join(lines) + "\n")
    for name in ("image", "text"):
        np.save(folder / f"{name}_feat.npy", rng.standard_normal((40, 12)).astype(np.float32))
    return folder


def test_a_library_is_driven_by_the_same_code(toy, tmp_path):
    library = small_library.write(tmp_path / "Small")
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "quality.py"), f"--library={library}", "--quick"]
    command += ["--models=FREEDOM", "--dataset=toy", f"--data={toy}", f"--results={tmp_path}/results"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "results" / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(one["library"], one["model"], one["arm"], one["epochs"]) for one in rows] == [
        ("Small", "FREEDOM", arm, "2") for arm in ("random", "preset")
    ]
    assert rows[0]["curve"] != rows[1]["curve"]


def test_quality_appends_a_row_a_run_and_runs_none_twice(toy, tmp_path):
    folder = toy
    less = "gain = 0.5\nclusters = 3\n"
    recipes = f'[less]\n{less}[permuted]\npermuted = true\n{less}[users-only.tables]\nuser = "v"\n'
    (tmp_path / "tries.toml").write_text(recipes)
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "quality.py"), "--dataset=toy", f"--data={folder}"]
    command += [f"--results={tmp_path}/results", "--config", "dim=8", "--epochs=2"]

    def run(*more):
        done = subprocess.run([*command, *more], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with (tmp_path / "results" / "quality.csv").open(newline="") as file:
            return done.stdout, list(csv.DictReader(file))

    _, first = run("--seeds", "1")
    assert [(one["seed"], one["arm"]) for one in first] == [("1", "random"), ("1", "preset")]
    said, second = run(
        "--seeds", "1", "2", "--recipes", f"{tmp_path}/tries.toml", "--arms", "random", "preset", "less", "permuted"
    )
    assert second[:2] == first
    assert [(one["seed"], one["arm"]) for one in second[2:]] == [
        ("1", "less"),
        ("1", "permuted"),
        ("2", "random"),
        ("2", "preset"),
        ("2", "less"),
        ("2", "permuted"),
    ]
    for one in second:
        curve = [float(score) for score in one["curve"].split()]
        assert len(curve) == int(one["epochs"]) == 2
        assert float(one["valid_recall_20"]) == pytest.approx(max(curve), abs=1e-4)
        assert int(one["best_epoch"]) == int(np.argmax(curve)) + 1
        assert 0 <= float(one["test_recall_20"]) <= 1
    less, moved = second[-2:]
    assert '"gain": 0.5' in less["recipe"]
    assert '"permuted": true' in moved["recipe"]
    assert less["curve"] != moved["curve"]
    assert said.count("LightGCN") >= 8
    assert (tmp_path / "results" / "quality.png").exists() == (importlib.util.find_spec("matplotlib") is not None)
    table, third = run("--table", "valid")
    assert third == second
    assert "valid, mean over seeds" in table
