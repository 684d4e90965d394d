"""Vectors of an artifact put into tables of a model."""

import copy
import importlib
import subprocess
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gpu_init
from gpu_init import cli
from gpu_init.errors import InputError

torch = pytest.importorskip("torch")
loader = importlib.import_module("gpu_init.torch")
Table, init_, init_model_ = loader.Table, loader.init_, loader.init_model_

USERS, ITEMS, WIDTH, RAW = 37, 23, 6, 9


@dataclass
class Vectors:
    """What `artifact.ModalityArrays` has, read-only like a memory map."""

    users: np.ndarray
    labels: np.ndarray
    items: np.ndarray | None = None
    items_mask: np.ndarray | None = None

    def __post_init__(self):
        for array in vars(self).values():
            if array is not None:
                array.flags.writeable = False


def vectors(seed, width=WIDTH, items=True, dtype=np.float32):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, USERS).astype(np.int32)
    labels[[3, 20 + seed]] = -1
    mask = np.ones(ITEMS, bool)
    mask[5 + seed] = False
    made = [(3 + rng.standard_normal((n, width))).astype(dtype) for n in (USERS, ITEMS)]
    return Vectors(made[0], labels, made[1] if items else None, mask if items else None)


@pytest.fixture
def image():
    return vectors(0)


@pytest.fixture
def artifact(image):
    return {"image": image, "audio": vectors(1), "wide": vectors(2, RAW, items=False)}


class GCN(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.preference = torch.nn.init.xavier_normal_(torch.rand(USERS, WIDTH, requires_grad=True))
        self.MLP = torch.nn.Sequential(torch.nn.Linear(RAW, WIDTH), torch.nn.Dropout(0.5))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.user_embedding = torch.nn.Embedding(USERS, WIDTH)
        self.item_embedding = torch.nn.Embedding(ITEMS + 1, WIDTH, padding_idx=0)
        self.v_gcn = GCN()
        self.both = torch.nn.Parameter(torch.randn(USERS + ITEMS, WIDTH))
        self.wide_table = torch.nn.Parameter(torch.randn(USERS, 2 * WIDTH))
        self.tables = torch.nn.ParameterDict({"user": torch.nn.Parameter(torch.randn(USERS, WIDTH))})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(loader, "BLOCK_BYTES", 5 * 4 * WIDTH)


def numpy(tensor):
    return tensor.detach().double().numpy()


def mean_norm(rows):
    return np.linalg.norm(np.asarray(rows, np.float64), axis=1).mean()


# One table.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("source", [np.float16, np.float32])
def test_rows_are_copied_and_cast(dtype, source):
    table = torch.nn.Parameter(torch.zeros(USERS, WIDTH, dtype=dtype))
    one = vectors(0, dtype=source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns on memory that it may not write to
        given = init_(table, one)
    assert given.data_ptr() == table.data_ptr()
    assert table.dtype == dtype
    assert torch.equal(table.detach(), torch.tensor(one.users).to(torch.float32).to(dtype))


def test_requires_grad_random_state_and_modes_stay(image, artifact, model):
    frozen = torch.nn.Parameter(torch.zeros(USERS, WIDTH), requires_grad=False)
    init_(frozen, image)
    assert not frozen.requires_grad
    model.v_gcn.MLP[1].eval()
    torch.manual_seed(3)
    expected = torch.rand(4)
    np_state = np.random.get_state()[1].copy()
    torch.manual_seed(3)
    init_model_(model, artifact, {"v_gcn.preference": Table("wide", via="v_gcn.MLP", gain="match", centre=True)})
    assert torch.equal(torch.rand(4), expected)
    assert np.array_equal(np.random.get_state()[1], np_state)
    assert model.v_gcn.preference.requires_grad
    assert model.v_gcn.preference.is_leaf
    assert model.v_gcn.preference.grad_fn is None
    assert (model.v_gcn.MLP.training, model.v_gcn.MLP[1].training) == (True, False)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_extra_rows_stay_and_are_told_of_unless_stated(image):
    table = torch.full((USERS + 2, WIDTH), 7.0)
    with pytest.warns(UserWarning, match=r"39 rows, the artifact 37.*offset=1 if row 0 is padding"):
        init_(table, image)
    assert np.array_equal(table[:USERS], image.users)
    assert (table[USERS:] == 7).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = torch.full((USERS + 2, WIDTH), 7.0)
        init_(table, image, offset=1)
    assert np.array_equal(table[1 : USERS + 1], image.users)
    assert (table[[0, -1]] == 7).all()


def test_a_padding_row_stays_zero(image):
    first = torch.nn.Embedding(USERS + 3, WIDTH, padding_idx=0)
    last = torch.nn.Embedding(USERS + 1, WIDTH, padding_idx=USERS)
    amid = torch.nn.Embedding(USERS + 1, WIDTH, padding_idx=4)
    init_(first, image)
    init_(last, image)
    assert np.array_equal(first.weight.detach()[1 : USERS + 1], image.users)
    assert np.array_equal(last.weight.detach()[:USERS], image.users)
    assert not first.weight[0].any()
    assert not last.weight[USERS].any()
    with pytest.raises(InputError, match="row 4 is padding, amid the rows"):
        init_(amid, image)
    with pytest.raises(InputError, match="row 4 is padding and would be filled"):
        init_(amid, image, offset=0)
    rows = np.insert(np.arange(USERS), 4, -1)
    init_(amid, image, rows=rows)
    assert np.array_equal(amid.weight.detach()[rows >= 0], image.users)
    assert not amid.weight[4].any()


def test_rows_map_the_librarys_own_ids(image):
    rng = np.random.default_rng(0)
    table = torch.randn(50, WIDTH)
    before = table.clone()
    rows = rng.permutation(USERS)[:20]
    rows[[2, 9]] = -1
    init_(table, image, rows=rows, offset=3)
    for i, row in enumerate(rows):
        assert torch.equal(table[3 + i], before[3 + i] if row < 0 else torch.tensor(image.users[row]))
    assert torch.equal(table[:3], before[:3])
    assert torch.equal(table[23:], before[23:])
    with pytest.raises(InputError, match="names row 37; the artifact has 37"):
        init_(table, image, rows=[0, USERS])
    with pytest.raises(InputError, match="row numbers"):
        init_(table, image, rows=[0.5])


def test_a_view_that_is_not_contiguous_is_filled(image):
    table = torch.zeros(WIDTH, USERS).t()
    init_(table, image)
    assert np.array_equal(table, image.users)


@pytest.mark.parametrize("cold", ["fill", "keep"])
@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("gain", [None, "match", 0.5])
def test_the_result_is_the_formula(image, cold, mode, centre, gain):
    torch.manual_seed(1)
    table = torch.randn(USERS, WIDTH, dtype=torch.float64)
    before = numpy(table).copy()
    warm = image.labels >= 0
    x = image.users.astype(np.float64) - (image.users[warm].mean(axis=0, dtype=np.float64) if centre else 0)
    if gain is not None:
        x *= (1.0 if gain == "match" else gain) * mean_norm(before[warm]) / mean_norm(x[warm])
    expected = x + before if mode == "add" else x
    if cold == "keep":
        expected[~warm] = before[~warm]
    init_(table, image, cold=cold, mode=mode, centre=centre, gain=gain)
    np.testing.assert_allclose(numpy(table), expected, rtol=1e-5, atol=1e-5)


def test_items_without_the_modality_are_cold(image):
    table = torch.zeros(ITEMS, WIDTH)
    init_(table, image, of="items", cold="keep")
    assert np.array_equal(table.numpy()[image.items_mask], image.items[image.items_mask])
    assert not table[~torch.tensor(image.items_mask)].any()
    with pytest.raises(InputError, match="no projected items; make the artifact with dim"):
        init_(table, vectors(0, items=False), of="items")


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((USERS - 1, WIDTH), r"\(36, 6\) has no room for the artifact's 37 rows of width 6"),
        ((USERS, WIDTH + 1), "the vectors are 6 wide, the table 7; make the artifact with dim 7"),
        ((USERS, WIDTH - 1), "the vectors are 6 wide, the table 5; make the artifact with dim 5"),
        ((USERS,), "two dimensions"),
    ],
)
def test_shapes_that_do_not_fit_are_named(image, shape, said):
    table = torch.ones(shape)
    with pytest.raises(InputError, match=said):
        init_(table, image)
    assert (table == 1).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "multiply"}, "mode: found 'multiply'; wanted is replace or add"),
        ({"gain": 0}, "gain: found 0"),
        ({"gain": True}, "gain: found True"),
        ({"gain": float("nan")}, "gain: found nan"),
        ({"cold": "drop"}, "cold"),
        ({"offset": -1}, "offset: found -1"),
        ({"of": "groups"}, "users or items"),
        ({"columns": "odd"}, "columns"),
        ({"via": 3}, "not a path"),
        ({"via": "MLP"}, "not a path"),
    ],
)
def test_wrong_options_are_named(image, options, said):
    if options == {"via": 3}:
        options = {"via": [3]}
    with pytest.raises(InputError, match=said):
        init_(torch.ones(USERS, WIDTH), image, **options)


def test_tables_that_cannot_be_filled_are_named(image):
    for table in (torch.ones(USERS, WIDTH, dtype=torch.int32), torch.empty(USERS, WIDTH, device="meta")):
        with pytest.raises(InputError, match="floating-point"):
            init_(table, image)
    with pytest.raises(InputError, match="row 0 would not be finite in torch.float16"):
        init_(torch.ones(USERS, WIDTH, dtype=torch.float16), image, gain=1e6)
    with pytest.raises(InputError, match="the table's rows are all zero"):
        init_(torch.zeros(USERS, WIDTH), image, gain="match")


def test_optimizers_go_on_with_the_table(image):
    embedding = torch.nn.Embedding(USERS, WIDTH)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    init_(embedding, image)
    embedding(torch.tensor([4])).sum().backward()
    optimizer.step()
    assert np.allclose(numpy(embedding.weight)[4], image.users[4] - 1)
    assert np.array_equal(embedding.weight.detach()[5], image.users[5])


# A model.


def test_paths_sides_and_combinations(artifact, model):
    image, audio = artifact["image"], artifact["audio"]
    other = copy.deepcopy(model)
    given = init_model_(
        model,
        artifact,
        {
            "user_embedding.weight": "image + audio",
            "item_embedding": "items:0.2*image+0.6*audio",
            "v_gcn.preference": "audio",
            "both": [Table("image", mode="add", offset=0), Table("items:audio", offset="users")],
            "wide_table": "image,2*audio",
            "tables.user": "image",
        },
        offset=None,
    )
    assert given is model
    np.testing.assert_allclose(model.user_embedding.weight.detach(), (image.users + audio.users) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        model.item_embedding.weight.detach()[1:], 0.25 * image.items + 0.75 * audio.items, rtol=1e-6
    )
    assert not model.item_embedding.weight[0].any()
    assert np.array_equal(model.v_gcn.preference.detach(), audio.users)
    np.testing.assert_allclose(numpy(model.both)[:USERS], numpy(other.both)[:USERS] + image.users, rtol=1e-6)
    assert np.array_equal(model.both.detach()[USERS:], audio.items)
    assert np.array_equal(model.wide_table.detach(), np.hstack([image.users, 2 * audio.users]))
    assert np.array_equal(model.tables["user"].detach(), image.users)


@pytest.mark.parametrize("columns", ["first", "last"])
def test_some_columns(artifact, model, columns):
    before = model.wide_table.detach().clone()
    init_model_(model, artifact, {"wide_table": "image"}, columns=columns, gain="match")
    filled, other = (slice(WIDTH), slice(WIDTH, None)) if columns == "first" else (slice(WIDTH, None), slice(WIDTH))
    assert torch.equal(model.wide_table.detach()[:, other], before[:, other])
    warm = artifact["image"].labels >= 0
    now, was = (mean_norm(table[warm][:, filled]) for table in (model.wide_table.detach(), before))
    assert now == pytest.approx(was, rel=1e-5)


def test_via_the_models_own_transform(artifact, model):
    wide = artifact["wide"]
    with torch.no_grad():
        expected = model.v_gcn.MLP[0](torch.tensor(wide.users))
    init_model_(model, artifact, {"v_gcn.preference": "wide"}, via="v_gcn.MLP")
    torch.testing.assert_close(model.v_gcn.preference.detach(), expected)
    steps = ["v_gcn.MLP.0", torch.tanh]
    init_model_(model, artifact, {"user_embedding": "wide"}, via=steps)
    torch.testing.assert_close(model.user_embedding.weight.detach(), torch.tanh(expected))
    model.double()
    init_model_(model, artifact, {"user_embedding": "wide"}, via="v_gcn.MLP.0")
    torch.testing.assert_close(model.user_embedding.weight.detach().float(), expected)
    with pytest.raises(InputError, match=r"Linear does not take vectors of width 6.*made without dim"):
        init_model_(model, artifact, {"user_embedding": "image"}, via="v_gcn.MLP.0")


def test_warm_in_one_of_two_modalities_is_warm(artifact, model):
    before = model.user_embedding.weight.detach().clone()
    init_model_(model, artifact, {"user_embedding": "image+audio"}, cold="keep")
    changed = (model.user_embedding.weight.detach() != before).any(dim=1)
    assert np.flatnonzero(~changed).tolist() == [3]  # 20 and 21 are cold in one of them only


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"user_embeding.weight": "image"}, r"Model.user_embeding.weight is not there.*user_embedding.weight"),
        ({"v_gcn.preferences": "image"}, r"v_gcn.preference[^s]"),
        ({"v_gcn": "image"}, r"Model.v_gcn is GCN; wanted is a table"),
        ({"user_embedding": "text"}, "the artifact has no modality text; it has image, audio, wide"),
        ({"user_embedding": "image+wide"}, "widths 6, 9 have no mean"),
        ({"user_embedding": "image+audio,wide"}, "wanted is a name, names with"),
        ({"user_embedding": "people:image"}, "wanted is a name"),
        ({"user_embedding": "0*image+audio"}, "a weight of 0"),
        ({"both": [Table("items:image", offset=USERS + 1)]}, r"\(60, 6\) has no room.*23 rows.*from row 38 on"),
    ],
)
def test_errors_name_what_is_wrong_and_nothing_is_written(artifact, model, tables, said):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=said):
        init_model_(model, artifact, {"tables.user": "image", **tables})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_results_of_initialize_and_torch_arrays_are_taken(rng):
    from scipy.sparse import random_array

    R = random_array((USERS, ITEMS), density=0.3, rng=rng, dtype=np.float32).tocsr()
    result = gpu_init.initialize(R, {"image": rng.standard_normal((ITEMS, RAW)).astype(np.float32)}, clusters=3)
    table = torch.zeros(USERS, RAW)
    init_(table, result["image"])
    assert np.array_equal(table, result["image"].users)
    as_torch = Vectors.__new__(Vectors)
    as_torch.users, as_torch.labels = torch.tensor(result["image"].users), torch.tensor(result["image"].labels)
    as_torch.items = as_torch.items_mask = None
    again = torch.zeros(USERS, RAW)
    init_(again, as_torch, rows=np.arange(USERS))
    assert torch.equal(table, again)


# An artifact on disk.


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact")
    rng = np.random.default_rng(1)
    ids = rng.permutation(5000)[:300]
    pq.write_table(
        pa.table({"user_id": rng.choice(ids, 1500), "item_id": rng.integers(0, 50, 1500)}), folder / "clicks.parquet"
    )
    np.save(folder / "image.npy", rng.standard_normal((50, 16)).astype(np.float32))
    flags = [f"--interactions={folder}/clicks.parquet", f"--features=image={folder}/image.npy", "--dim=8"]
    assert cli.main(["run", *flags, f"--out={folder}/out"]) == 0
    return gpu_init.load(folder / "out")


def test_a_mapped_artifact_is_read_block_by_block(on_disk, monkeypatch):
    most = 0

    def spy(array, rows, real=loader._tensor):
        nonlocal most
        made = real(array, rows)
        most = max(most, made.numel() * made.element_size())
        return made

    monkeypatch.setattr(loader, "_tensor", spy)
    monkeypatch.setattr(loader, "BLOCK_BYTES", 1024)
    table = torch.zeros(len(on_disk.user_ids), 8)
    init_(table, on_disk["image"])
    assert np.array_equal(table, on_disk["image"].users)
    assert 0 < most <= 1024


def test_rows_of_finds_raw_ids(on_disk):
    ids = on_disk.user_ids.to_numpy()
    tokens = ["[PAD]", *map(str, ids[::-1]), "99999"]  # as RecBole keeps them
    rows = loader.rows_of(on_disk, tokens)
    assert rows.tolist() == [-1, *range(len(ids) - 1, -1, -1), -1]
    table = torch.nn.Embedding(len(tokens), 8, padding_idx=0)
    init_(table, on_disk["image"], rows=rows)
    assert np.array_equal(table.weight.detach()[1:-1], on_disk["image"].users[::-1])
    assert not table.weight[0].any()
    assert loader.rows_of(on_disk, [3, 50, -1], of="items").tolist() == [3, -1, -1]
    with pytest.raises(InputError, match="none of the 1 ids"):
        loader.rows_of(on_disk, ["nobody"])


def test_rows_of_text_ids(tmp_path):
    pq.write_table(pa.table({"user_id": ["b", "a", "007"], "item_id": [0, 1, 1]}), tmp_path / "clicks.parquet")
    np.save(tmp_path / "image.npy", np.eye(2, 4, dtype=np.float32))
    flags = [f"--interactions={tmp_path}/clicks.parquet", f"--features=image={tmp_path}/image.npy", "--clusters=2"]
    assert cli.main(["run", *flags, f"--out={tmp_path}/out"]) == 0
    assert loader.rows_of(gpu_init.load(tmp_path / "out"), ["a", "7", "007", "b"]).tolist() == [1, -1, 0, 2]


@pytest.mark.parametrize("module", ["torch", "mmrec"])
def test_without_torch_it_says_so(module):
    code = f"import sys; sys.modules['torch'] = None; import gpu_init.{module}"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: torch is not installed, and gpu_init.torch needs it: pip install" in done.stderr
