"""Presets, and their vectors in tables such as those of the libraries' models."""

import importlib

import numpy as np
import pytest

from gpu_init.artifact.read import ModalityArrays
from gpu_init.errors import InputError

torch = pytest.importorskip("torch")
mmrec = importlib.import_module("gpu_init.mmrec")

USERS, ITEMS, WIDTH = 60, 45, 20


def modalities(**widths):
    rng = np.random.default_rng(1)

    def one(width):
        labels = np.zeros(USERS, np.int32)
        labels[-1] = -1
        mask = np.ones(ITEMS, bool)
        users, items = (rng.standard_normal((n, width)).astype(np.float32) for n in (USERS, ITEMS))
        return ModalityArrays(users, users[:2], labels, items, mask)

    return {name: one(width) for name, width in widths.items()}


def model_named(name, **tables):
    """A model of that class name, its tables at dotted paths."""
    model = type(name, (torch.nn.Module,), {})()
    torch.manual_seed(0)
    for path, value in tables.items():
        *parents, last = path.split("__")
        here = model
        for parent in parents:
            if not hasattr(here, parent):
                setattr(here, parent, torch.nn.Module())
            here = getattr(here, parent)
        setattr(here, last, value)
    return model


def as_the_library_has_it(name):
    """Tables as both libraries build them, embedding size 8."""

    def table(rows, width):
        return torch.randn(rows, width, requires_grad=True)

    if name == "MMGCN":
        tables = {"v_gcn__preference": table(USERS, 16), "t_gcn__preference": table(USERS, WIDTH)}
        return model_named(
            name, v_gcn__MLP=torch.nn.Linear(WIDTH, 16), id_embedding=table(USERS + ITEMS, 8), n_users=USERS, **tables
        )
    if name == "DRAGON":
        return model_named(name, **{f"{role}_gcn__preference": table(USERS, 64) for role in "vt"})
    if name == "VBPR":
        return model_named(
            name, u_embedding=torch.nn.Parameter(torch.randn(USERS, 16)), item_linear=torch.nn.Linear(2 * WIDTH, 8)
        )
    return model_named(name, user_embedding=torch.nn.Embedding(USERS, 8))


@pytest.mark.parametrize("name", mmrec.PRESETS)
def test_every_preset_fits_its_model_and_keeps_to_its_norm(name):
    model = as_the_library_has_it(name)
    settings = mmrec.job_settings(mmrec.PRESETS[name], 8)
    width = settings.get("dim", WIDTH)
    assert width in (8, WIDTH, 64)
    paths = {path: path.removesuffix(".weight") for path in mmrec.PRESETS[name].tables}

    def tables():
        found = {path: model.get_submodule(short.rpartition(".")[0]) for path, short in paths.items()}
        values = {path: getattr(one, paths[path].rpartition(".")[2]) for path, one in found.items()}
        return {path: getattr(one, "weight", one).detach().clone() for path, one in values.items()}

    before = tables()
    filled = mmrec.attach(model, modalities(image=width, audio=width))
    after = tables()
    assert set(filled) == set(before)
    for path, specs in filled.items():
        for spec in specs:
            warm = slice(USERS, None) if "items:" in spec.modalities else slice(USERS - 1)
            half = slice(8, None) if spec.columns == "last" else slice(None)
            written = after[path] - before[path] if spec.mode == "add" else after[path]
            own = before[path][warm, half].norm(dim=1).mean()
            wanted = own * (1 if spec.gain == "match" else spec.gain)
            torch.testing.assert_close(written[warm, half].norm(dim=1).mean(), wanted, rtol=1e-4, atol=0)
            mean = written[warm, half].mean(dim=0)
            torch.testing.assert_close(mean, torch.zeros(len(mean)), rtol=0, atol=1e-5 * float(wanted))
            if spec.columns == "last":
                assert not written[:, :8].any()
        assert torch.equal(after[path][USERS - 1], before[path][USERS - 1])  # the cold user keeps the random row


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["image", "text"], {"v": "image", "t": "text"}),
        (["audio", "image"], {"v": "image", "t": "audio"}),
        (["audio", "text", "image"], {"v": "image", "t": "text"}),
        (["Visual", "txt"], {"v": "Visual", "t": "txt"}),
        (["a", "b"], {"v": "a", "t": "b"}),
        (["text"], {"t": "text"}),
        (["sound"], {"v": "sound"}),
        (["image"], {"v": "image"}),
    ],
)
def test_roles(names, roles):
    assert mmrec.roles_of(names) == roles


def test_one_modality_fills_what_it_can():
    tables = {"v_gcn.preference": {"modalities": "v", "via": "v_gcn.MLP"}, "t_gcn.preference": "t"}
    preset = mmrec.adjusted(mmrec.PRESETS["MMGCN"], {"tables": tables, "width": "raw"})
    filled = mmrec.attach(as_the_library_has_it("MMGCN"), modalities(image=WIDTH), preset)
    assert list(filled) == ["v_gcn.preference"]
    filled = mmrec.attach(as_the_library_has_it("FREEDOM"), modalities(text=8))
    assert filled["user_embedding.weight"][0].modalities == "text"
    filled = mmrec.attach(
        as_the_library_has_it("FREEDOM"), modalities(image=8, text=8, audio=8), roles={"v": "image", "t": "audio"}
    )
    assert filled["user_embedding.weight"][0].modalities == "image+audio"
    with pytest.raises(InputError, match="none of sound"):
        mmrec.attach(as_the_library_has_it("FREEDOM"), modalities(sound=8), roles={})


def test_presets_are_changed_by_name():
    preset = mmrec.adjusted(
        mmrec.PRESETS["FREEDOM"],
        {
            "tables": {"user_embedding.weight": "v,t", "both": ["v", {"modalities": "items:v", "offset": "users"}]},
            "gain": 0.5,
            "lambda": 0.3,
            "clusters": 32,
            "width": 16,
        },
    )
    assert [one.gain for vectors in preset.tables.values() for one in vectors] == [0.5] * 3
    assert preset.tables["both"][1].offset == "users"
    assert mmrec.job_settings(preset, 64) == {
        "lambda": 0.3,
        "clusters": 32,
        "cluster_on": "interactions",
        "whiten": True,
        "dim": 16,
    }
    beside = mmrec.adjusted(mmrec.PRESETS["FREEDOM"], {"tables": {"user_embedding.weight": "v,t"}})
    assert mmrec.job_settings(beside, 64)["dim"] == 32
    raw = mmrec.adjusted(mmrec.PRESETS["FREEDOM"], {"width": "raw"})
    assert mmrec.job_settings(raw, 64) == {"lambda": 0.5, "clusters": 8, "cluster_on": "interactions"}
    assert mmrec.adjusted(mmrec.PRESETS["VBPR"], {}) == mmrec.PRESETS["VBPR"]
    for changes, said in [
        ({"gian": 1}, "unknown key gian; the keys are"),
        ({"width": 0}, "width: found 0"),
        ({"gain": -1}, "gain: found -1"),
        ({"tables": {"x": {"of": "v"}}}, "wanted are modalities"),
    ]:
        with pytest.raises(InputError, match=said):
            mmrec.adjusted(mmrec.PRESETS["FREEDOM"], changes)
    mixed = mmrec.adjusted(mmrec.PRESETS["FREEDOM"], {"tables": {"x": "v,t", "y": "v"}})
    with pytest.raises(InputError, match="not shared out evenly"):
        mmrec.job_settings(mixed, 64)
    with pytest.raises(InputError, match="no preset for SASRec; there are FREEDOM"):
        mmrec.preset_of("SASRec")


def test_narrow_vectors_fill_the_first_columns():
    preset = mmrec.adjusted(mmrec.PRESETS["DRAGON"], {"columns": "first"})
    model = as_the_library_has_it("DRAGON")
    before = model.v_gcn.preference.detach().clone()
    mmrec.attach(model, modalities(image=WIDTH, audio=WIDTH), preset)
    assert torch.equal(model.v_gcn.preference[:, WIDTH:], before[:, WIDTH:])
    assert (model.v_gcn.preference != before)[: USERS - 1, :WIDTH].all()
    with pytest.raises(InputError, match="the vectors are 20 wide, the table 64"):
        mmrec.attach(model, modalities(image=WIDTH, audio=WIDTH))
