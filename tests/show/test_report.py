"""The report: what it is drawn from, worked by hand; whole, closed to markup, and, in a browser, without an error."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import gpu_init
from gpu_init.artifact import read
from gpu_init.backend.select import select
from gpu_init.cli import main
from gpu_init.method.describe import SAMPLE_COLUMNS, TYPICAL, typical
from gpu_init.method.modality import from_array
from tests.method.test_method import catalogue

pytest.importorskip("plotly")

HOSTILE = "</script><script>console.error('x')</script><img src=http://example.invalid/>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    R, F = catalogue(users=2500)
    scipy.sparse.save_npz(folder / "r.npz", R.tocsr())
    for name, values in F.items():
        np.save(folder / f"{name}.npy", values)
    names = pd.DataFrame({"item_id": range(80), "year": 2000, "title": [f"Film {i}" for i in range(80)]})
    names.loc[3:9, "title"] = HOSTILE
    names.to_csv(folder / "names.csv", index=False)
    features = [f"--features={name}={folder}/{name}.npy" for name in F]
    job = ["run", f"--interactions={folder}/r.npz", *features, f"--out={folder}/out", "--lambda=shrink"]
    assert main([*job, "--clusters=auto", "--scale=items"]) == 0
    return folder


def test_typical_items_by_hand():
    backend = select("cpu")
    F = np.array([[0.0], [1], [np.nan], [4], [9]], np.float32)
    found = typical(backend, from_array(backend, "image", F), np.array([[0.2], [8]], np.float32))
    assert found.shape == (2, TYPICAL)
    assert found[0].tolist() == [0, 1, 3, 4, -1, -1, -1, -1]
    assert found[1].tolist()[:4] == [4, 3, 1, 0]


def test_the_sample_is_of_the_vectors(made):
    one = gpu_init.load(made / "out")["text"]
    sample = dict(zip(SAMPLE_COLUMNS, one.sample.T, strict=True))
    assert len(one.sample) == 2000
    warm = np.flatnonzero(one.labels >= 0)
    rows = np.sort(np.random.default_rng(0).choice(len(warm), 2000, replace=False))
    X = one.users[warm[rows]].astype(np.float64)
    np.testing.assert_allclose(sample["norm"], np.linalg.norm(X, axis=1), rtol=1e-5)
    F = np.load(made / "text.npy").astype(np.float64)
    R = scipy.sparse.load_npz(made / "r.npz").toarray()[warm[rows]]
    unit = F / np.linalg.norm(F, axis=1)[:, None]
    own = ((R / R.sum(axis=1)[:, None]) @ unit * X).sum(axis=1) / np.linalg.norm(X, axis=1)
    np.testing.assert_allclose(sample["cosine_own"], own, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sample["count"], R.sum(axis=1) ** 2 / (R**2).sum(axis=1), rtol=1e-5)
    tau = gpu_init.load(made / "out").manifest["modalities"]["text"]["lambda"]["tau"]
    np.testing.assert_allclose(sample["lambda"], sample["count"] / (sample["count"] + tau), rtol=1e-5)
    centred = F - F.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    spread = np.linalg.norm(centred @ directions[:2].T)
    assert np.linalg.norm(one.sample_items[:, :2]) == pytest.approx(spread, rel=0.02)  # two directions, nearly
    np.testing.assert_allclose(one.sample_items[:, 2], np.linalg.norm(F, axis=1), rtol=1e-5)


def test_the_page_is_whole_and_closed_to_markup(made, capsys):
    assert main(["report", str(made / "out"), f"--item-names={made}/names.csv"]) == 0
    place = capsys.readouterr().out.strip()
    assert place == str(made / "out" / "report.html")
    page = (made / "out" / "report.html").read_text(encoding="utf-8")
    for words in ("clusters", "how many clusters", "the semantic gap", "own items", "norms", "lambda", "typical items"):
        assert f"text: {words}" in page
    assert "Time and memory" in page
    assert "Film 1" in page
    assert HOSTILE not in page
    own = re.sub(r"<script>/\*\*.*?</script>", "", page, count=1, flags=re.DOTALL)  # all but plotly's code
    assert len(page) < 9 << 20
    assert not re.findall(r"<[^>]*(?:src|href)=[\"']?https?:", own)
    assert read.verify(made / "out") == []
    assert main(["inspect", str(made / "out"), "--verify"]) == 0


def test_it_can_go_elsewhere_and_needs_no_names(made, tmp_path):
    assert main(["report", str(made / "out"), f"--out={tmp_path}/page.html"]) == 0
    assert "--item-names PATH gives names" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert main(["export", str(made / "out"), "--format=safetensors", f"--out={tmp_path}/x.safetensors"]) == 0


def test_an_artifact_is_replaced_together_with_its_report(made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    assert main(["report", str(tmp_path / "out")]) == 0
    job = ["run", f"--interactions={made}/r.npz", f"--features=text={made}/text.npy", f"--out={tmp_path}/out"]
    assert main([*job, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--item-names=nowhere.csv"], "nowhere.csv"),
        (["--out=no/such/folder/x.html"], "no/such/folder"),
    ],
)
def test_wrong_input(made, capsys, flags, words):
    assert main(["report", str(made / "out"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_without_plotly_the_remedy_is_said(made, capsys, monkeypatch):
    monkeypatch.setattr("gpu_init.show.charts.available", lambda: False)
    assert main(["report", str(made / "out")]) == 2
    assert "gpu-init[report]" in capsys.readouterr().err


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_it_without_an_error_or_a_request(made, tmp_path):
    assert main(["report", str(made / "out"), f"--item-names={made}/names.csv", f"--out={tmp_path}/page.html"]) == 0
    phone = "<iframe src=page.html style='width:390px;height:4000px;border:0'></iframe>"
    (tmp_path / "phone.html").write_text(phone)
    base = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    base += ["--virtual-time-budget=20000", "--allow-file-access-from-files", "--enable-logging=stderr", "--v=0"]

    def browse(page, *flags):
        command = [*base, *flags, f"file://{tmp_path}/{page}"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
        assert "CONSOLE" not in done.stderr
        return done.stdout

    for page in ("page.html", "phone.html"):
        browse(page, "--window-size=1200,4000", f"--screenshot={tmp_path}/{page}.png", f"--log-net-log={tmp_path}/net")
        assert (tmp_path / f"{page}.png").stat().st_size > 50_000
        assert "example.invalid" not in (tmp_path / "net").read_text(errors="replace")
    assert browse("page.html", "--dump-dom").count("main-svg") >= 13
