"""The whole job on a device: what `test_backend` does on stand-ins, and what only a device can show."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pandas")
pytest.importorskip("scipy")

import gpu_init
from gpu_init.backend import cuda, doctor
from gpu_init.backend.select import select
from gpu_init.errors import ResourceError
from tests.support import cuda_jobs as jobs

TIKTOK = Path(__file__).resolve().parents[3] / "shared" / "data" / "tiktok"


@pytest.fixture(autouse=True)
def libraries():
    missing = doctor.missing_for_cuda()
    if missing:
        pytest.skip(f"{missing.what}. {missing.fix}")


@pytest.mark.parametrize("settings", jobs.ARRAYS, ids=str)
def test_arrays_agree(monkeypatch, settings):
    jobs.check_arrays(monkeypatch, **settings)


@pytest.mark.parametrize(("dtype", "flags"), jobs.JOBS)
def test_a_job_agrees(monkeypatch, tmp_path, dtype, flags):
    jobs.check_job(monkeypatch, tmp_path, *flags, dtype=dtype)


@pytest.mark.skipif(not TIKTOK.is_dir(), reason="the TikTok data set is not beside the checkout")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("flags", [(), ("--dim=64", "--whiten", "--scale=items")])
def test_the_tiktok_job_agrees(monkeypatch, tmp_path, dtype, flags):
    jobs.check_tiktok(monkeypatch, tmp_path, TIKTOK, *flags, dtype=dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", jobs.USERS)
@pytest.mark.parametrize("ending", jobs.WRITERS)
@pytest.mark.parametrize("parts", [False, True])
def test_files_are_read_alike(monkeypatch, tmp_path, ending, kind, weighted, parts):
    if parts:
        monkeypatch.setattr(cuda, "DEVICE_TEXT_BYTES", 300)
        monkeypatch.setattr(cuda, "DEVICE_ROWS", 16)
    jobs.check_reader(tmp_path, ending, kind, weighted)


@pytest.mark.parametrize("condition", jobs.CONDITIONS)
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_rows_are_chosen_alike(tmp_path, ending, condition):
    jobs.check_where(tmp_path, ending, condition)


@pytest.mark.parametrize("kind", jobs.WRONG)
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_files_are_refused_alike(tmp_path, ending, kind):
    jobs.check_refused(tmp_path, ending, kind)


def test_an_npz_is_read_alike(tmp_path):
    jobs.check_npz(tmp_path)


def test_given_users_are_read_alike(tmp_path):
    jobs.check_given_users(tmp_path)


def test_both_kmeans_find_clusters_as_good(monkeypatch):
    jobs.check_inertia(monkeypatch)


def test_the_library_clusters_the_means_where_they_fit(tmp_path):
    jobs.write_job(tmp_path)
    made = jobs.run(tmp_path / "out", tmp_path, "--backend=cuda", "--clusters=3")
    for name in made:
        facts = made.manifest["modalities"][name]["kmeans"]
        assert (facts["form"], facts["library"]) == ("dense", True)


def test_the_factored_form_gives_the_same_bytes(monkeypatch, tmp_path):
    jobs.check_same_bytes(monkeypatch, tmp_path)


def test_arrays_of_the_device_are_taken_and_given(monkeypatch):
    import cupy
    import cupyx.scipy.sparse

    jobs.same_start(monkeypatch)
    matrix, features = jobs.problem()
    expected = gpu_init.initialize(matrix, {"text": features}, backend="cuda")["text"].users
    assert isinstance(expected, cupy.ndarray)
    on_device = cupyx.scipy.sparse.csr_matrix(matrix), {"text": cupy.asarray(features)}
    jobs.assert_close(gpu_init.initialize(*on_device, backend="cuda")["text"].users, expected, "float32")


def test_arrays_come_to_the_host_in_c_order():
    import cupy

    device = select("cuda")
    array = cupy.asfortranarray(cupy.arange(12.0).reshape(3, 4))
    assert device.to_host(array).flags.c_contiguous
    assert device.asarray(array).flags.c_contiguous


def test_blocks_arrive_whole_and_in_order():
    """Large enough for a copy to be under way while the next block is computed."""
    import cupy

    device, written = select("cuda"), []
    rows, width = 1 << 16, 256
    with device.outbox(rows, width, "float32", lambda block: written.append(block.copy())) as outbox:
        for number in range(9):
            space = outbox.space(rows)
            space[...] = cupy.sqrt(cupy.full((rows, width), float(number * number)))
            outbox.send(space)
    assert [(block.min(), block.max()) for block in written] == [(number, number) for number in range(9)]


def test_memory_that_runs_out_is_known_and_the_device_lives_on():
    import cupy

    device = select("cuda")
    with pytest.raises(MemoryError) as caught:
        cupy.empty(1 << 48, cupy.uint8)
    assert device.out_of_memory(caught.value)
    with pytest.raises(ResourceError, match="not enough memory"), device.explained():
        cupy.empty(1 << 48, cupy.uint8)
    assert int(cupy.arange(10).sum()) == 45


def test_all_memory_comes_from_one_pool():
    import cupy
    import rmm.mr

    device = select("cuda")
    assert rmm.mr.get_current_device_resource() is device._memory
    before = device._memory.allocation_counts.current_bytes
    held = cupy.empty(1 << 20, cupy.uint8)
    column = device.tables.Series(held)
    assert device._memory.allocation_counts.current_bytes >= before + held.nbytes
    assert len(column) == 1 << 20
    assert device.peak_memory()["peak_device_memory_bytes"] >= before + held.nbytes


def test_doctor_says_it_is_ready(capsys):
    assert jobs.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "compute capability" in said
    assert "ready, on device 0" in said


def test_300_million_interactions_in_bounded_memory(tmp_path):
    """80 bytes per interaction while R is made, or the means twice and what K-means keeps, on top of R."""
    import cudf
    import cupy

    users, items, width, files, rows = 10_000_000, 200_000, 64, 20, 15_000_000
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 44e9 or shutil.disk_usage(tmp_path).free < 20e9:
        pytest.skip(f"44 GB on the device and 20 GB on the disk are needed, {free / 1e9:.0f} GB on the device are free")
    watched = 10
    taken = [[] for _ in range(watched)]
    (tmp_path / "clicks").mkdir()
    for number in range(files):
        random = cupy.random.RandomState(number)
        frame = cudf.DataFrame(
            {
                "user_id": random.randint(0, users, rows, dtype=cupy.int32).astype(cupy.int64),
                "item_id": random.randint(0, items, rows, dtype=cupy.int32).astype(cupy.int64),
            }
        )
        frame.to_parquet(str(tmp_path / "clicks" / f"{number:02}.parquet"), row_group_size_rows=1 << 20)
        some = frame[frame["user_id"] < watched]
        for user, item in zip(some["user_id"].to_numpy(), some["item_id"].to_numpy(), strict=True):
            taken[user].append(item)
        del frame, some
    features = np.random.default_rng(0).standard_normal((items, width), dtype=np.float32)
    np.save(tmp_path / "text.npy", features)
    place = [f"--interactions={tmp_path / 'clicks'}", f"--features=text={tmp_path / 'text.npy'}"]
    assert jobs.main(["run", *place, f"--out={tmp_path / 'out'}", "--backend=cuda"]) == 0
    made = gpu_init.load(str(tmp_path / "out"))
    assert made.manifest["interactions"]["read"] == files * rows
    assert made["text"].users.shape == (users, width)
    for user in range(watched):
        if not taken[user]:
            continue
        own, centroid = features[taken[user]].astype(np.float64), made["text"].centroids[made["text"].labels[user]]
        jobs.assert_close(made["text"].users[user], 0.9 * own.mean(axis=0) + 0.1 * centroid, "float32")
    peak = made.manifest["timings"]["peak_device_memory_bytes"]
    assert peak <= 80 * files * rows + 16 * users * width + (1 << 30)
