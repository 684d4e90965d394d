"""`CudaBackend` on stand-ins: the whole job through its lines, and each of its decisions."""

from __future__ import annotations

import io
import itertools
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import gpu_init
from gpu_init import cli
from gpu_init.backend import cuda as backend_cuda
from gpu_init.backend import doctor
from gpu_init.backend import select as backend_select
from gpu_init.backend.batches import row_groups, text_parts
from gpu_init.backend.cpu import CpuBackend
from gpu_init.backend.interface import in_blocks
from gpu_init.backend.select import select
from gpu_init.cluster import worker
from gpu_init.errors import InputError, ResourceError
from gpu_init.kernels import cuda
from gpu_init.method import blend as method_blend
from gpu_init.method import points
from gpu_init.method.norms import NORM_ROWS
from tests.support import cuda_jobs as jobs
from tests.support import shim, stand_ins

TIKTOK = Path(__file__).resolve().parents[3] / "shared" / "data" / "tiktok"
NAMES = [name for names in cuda.instances().values() for name in names if "Half," not in name and "Bfloat" not in name]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return shim.Shim(shim.build(tmp_path_factory.mktemp("shim"), NAMES), NAMES)


@pytest.fixture
def cupy(monkeypatch, programs):
    return stand_ins.install(monkeypatch, programs)


# The same as on the CPU; tests/gpu runs the same checks on a device.


@pytest.mark.parametrize("settings", jobs.ARRAYS, ids=str)
def test_arrays_agree(cupy, monkeypatch, settings):
    jobs.check_arrays(monkeypatch, **settings)


@pytest.mark.parametrize(
    ("dtype", "flags"), [*(pytest.param(*job, marks=pytest.mark.slow) for job in jobs.JOBS[:-1]), jobs.JOBS[-1]]
)
def test_a_job_agrees(cupy, monkeypatch, tmp_path, dtype, flags):
    jobs.check_job(monkeypatch, tmp_path, *flags, dtype=dtype)


@pytest.mark.skipif(not TIKTOK.is_dir(), reason="the TikTok data set is not beside the checkout")
@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--dim=64", "--whiten", "--scale=items")])
def test_the_tiktok_job_agrees(cupy, monkeypatch, tmp_path, flags):
    jobs.check_tiktok(monkeypatch, tmp_path, TIKTOK, *flags, dtype="float16" if flags else "float32")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", jobs.USERS)
@pytest.mark.parametrize("ending", jobs.WRITERS)
def test_files_are_read_alike(cupy, monkeypatch, tmp_path, ending, kind, weighted):
    monkeypatch.setattr(backend_cuda, "DEVICE_TEXT_BYTES", 300)
    monkeypatch.setattr(backend_cuda, "DEVICE_ROWS", 16)
    jobs.check_reader(tmp_path, ending, kind, weighted)


@pytest.mark.parametrize("condition", jobs.CONDITIONS)
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_rows_are_chosen_alike(cupy, tmp_path, ending, condition):
    jobs.check_where(tmp_path, ending, condition)


@pytest.mark.parametrize("kind", jobs.WRONG)
@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_files_are_refused_alike(cupy, tmp_path, ending, kind):
    jobs.check_refused(tmp_path, ending, kind)


def test_an_npz_is_read_alike(cupy, tmp_path):
    jobs.check_npz(tmp_path)


def test_given_users_are_read_alike(cupy, tmp_path):
    jobs.check_given_users(tmp_path)


def test_both_kmeans_find_clusters_as_good(cupy, monkeypatch):
    monkeypatch.setattr(points, "SAMPLE_ROWS", 2048)
    jobs.check_inertia(monkeypatch)
    assert len(stand_ins.KMeans.fitted) == 1


def test_the_factored_form_gives_the_same_bytes(cupy, monkeypatch, tmp_path):
    monkeypatch.setattr(points, "SAMPLE_ROWS", 512)
    jobs.check_same_bytes(monkeypatch, tmp_path, users=2000)


def test_a_cluster_of_devices_makes_the_same(cupy, monkeypatch, tmp_path):
    """Two workers in this process, as the stand-ins are in no other."""
    distributed = pytest.importorskip("distributed")
    started = []

    def local(**options):
        started.append(options)
        return distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, **options)

    monkeypatch.setitem(sys.modules, "dask_cuda", types.SimpleNamespace(LocalCUDACluster=local))
    worker.backend_of.cache_clear()
    jobs.write_job(tmp_path, users=1500)
    one = jobs.run(tmp_path / "one", tmp_path, "--backend=cpu", "--clusters=3")
    many = jobs.run(tmp_path / "many", tmp_path, "--backend=cuda", "--clusters=3", "--scheduler=local")
    worker.backend_of.cache_clear()
    assert len(started) == 1
    assert many.manifest["backend"]["name"] == "cuda"
    for name in one:
        np.testing.assert_array_equal(many[name].labels, one[name].labels)
        np.testing.assert_allclose(many[name].users, one[name].users, atol=1e-5)


def test_a_cluster_of_devices_says_what_it_needs(cupy, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    pytest.importorskip("distributed")
    given = [f"--interactions={tmp_path}/clicks.parquet", f"--features=text={tmp_path}/text.npy"]
    jobs.write_job(tmp_path, users=50)
    assert cli.main(["run", *given, f"--out={tmp_path / 'many'}", "--backend=cuda", "--scheduler=local"]) == 2
    assert "pip install 'gpu-init[dask-cuda]'" in capsys.readouterr().err
    assert not (tmp_path / "many").exists()


# K-means and its memory.


def test_the_library_clusters_the_means_where_they_fit(cupy, capsys, tmp_path):
    jobs.write_job(tmp_path, users=1500)
    made = jobs.run(tmp_path / "out", tmp_path, "--backend=cuda", "--clusters=3")
    assert sorted(width for _, width in stand_ins.KMeans.fitted) == [8, 24]
    for name in made:
        facts = made.manifest["modalities"][name]["kmeans"]
        assert (facts["form"], facts["library"]) == ("dense", True)
    assert not [line for line in jobs.messages(capsys.readouterr().err) if "K-means" in line]


def test_where_they_do_not_fit_one_line_says_so(monkeypatch, programs, capsys, tmp_path):
    stand_ins.install(monkeypatch, programs, stand_ins.Cupy(free=1 << 17))
    monkeypatch.setattr(points, "SAMPLE_ROWS", 512)
    jobs.write_job(tmp_path, users=1500)
    made = jobs.run(tmp_path / "out", tmp_path, "--backend=cuda", "--clusters=3")
    assert not stand_ins.KMeans.fitted
    facts = {name: made.manifest["modalities"][name]["kmeans"] for name in made}
    assert {one["library"] for one in facts.values()} == {False}
    said = [line for line in jobs.messages(capsys.readouterr().err) if "K-means" in line]
    assert len(said) == 2
    assert all("GB that are free on the device: gpu-init's own K-means runs" in line for line in said)


def test_room_is_asked_for_twice_the_matrix(cupy, monkeypatch):
    monkeypatch.setattr(backend_cuda, "LIBRARY_FASTER", 1 << 40)
    said = []
    device = select("cuda", said.append)
    users = int(0.9 * stand_ins.GPU_BYTES) // (2 * 4 * 100 + backend_cuda.LIBRARY_ROW_BYTES)
    for wanted in ("auto", "cuml"):
        assert device.takes_matrix(users, 100, 8, wanted)
    assert not device.takes_matrix(users + 1, 100, 8, "auto")
    assert len(said) == 1
    assert "GB that are free on the device: gpu-init's own K-means runs" in said[0]
    with pytest.raises(ResourceError, match="GB that are free on the device; leave kmeans out, or take own"):
        device.takes_matrix(users + 1, 100, 8, "cuml")
    device._memory.allocation_counts.current_bytes = 1 << 33
    assert not device.takes_matrix(users * 6 // 10, 100, 8, "auto")
    assert device.takes_matrix(users * 4 // 10, 100, 8, "auto")


def test_shapes_that_crash_the_library_are_kept_from_it(cupy, monkeypatch):
    monkeypatch.setattr(backend_cuda, "LIBRARY_FASTER", 1 << 40)
    device = select("cuda")
    assert device.takes_matrix(2**20, 2**10, 8, "auto")
    for shape in ((2**21, 2**10, 8), (2**20, 8, 2**11)):
        assert not device.takes_matrix(*shape, "auto")
        with pytest.raises(ResourceError, match="crashes at such sizes"):
            device.takes_matrix(*shape, "cuml")


def test_the_library_runs_where_it_is_faster_or_asked_for(cupy):
    said = []
    device = select("cuda", said.append)
    assert device.takes_matrix(backend_cuda.LIBRARY_FASTER // 64, 64, 8, "auto")
    assert not device.takes_matrix(backend_cuda.LIBRARY_FASTER // 64 + 1, 64, 8, "auto")
    assert device.takes_matrix(backend_cuda.LIBRARY_FASTER // 64 + 1, 64, 8, "cuml")
    assert not device.takes_matrix(10, 64, 8, "own")
    assert not said


def test_a_device_has_kernels_of_its_own(cupy, monkeypatch):
    device = select("cuda")
    for wanted in (None, "numpy", "numba"):
        monkeypatch.setenv("GPU_INIT_KERNELS", wanted) if wanted else monkeypatch.delenv("GPU_INIT_KERNELS", False)
        for seconds in (0, 1e9):
            assert backend_select.for_work(device, seconds) is device
    device.prepare(True, True, True)
    assert device.kernels.name == "cuda"


@pytest.mark.parametrize("flag", ["own", "cuml"])
def test_a_job_says_whose_kmeans_ran(cupy, tmp_path, flag):
    jobs.write_job(tmp_path, users=300)
    made = jobs.run(tmp_path / "out", tmp_path, "--backend=cuda", "--clusters=3", f"--kmeans={flag}")
    assert made.manifest["settings"]["kmeans"] == flag
    assert {made.manifest["modalities"][name]["kmeans"]["library"] for name in made} == {flag == "cuml"}
    assert len(stand_ins.KMeans.fitted) == (2 if flag == "cuml" else 0)


def test_the_library_needs_a_device(capsys, tmp_path):
    assert not CpuBackend("test").takes_matrix(10, 10, 2, "own")
    with pytest.raises(InputError, match="kmeans cuml needs the CUDA backend"):
        CpuBackend("test").takes_matrix(10, 10, 2, "cuml")
    jobs.write_job(tmp_path, users=50)
    given = [f"--interactions={tmp_path}/clicks.parquet", f"--features=text={tmp_path}/text.npy", "--kmeans=cuml"]
    assert cli.main(["run", *given, f"--out={tmp_path}/out", "--backend=cpu", "--clusters=2"]) == 2
    assert "kmeans cuml needs the CUDA backend" in capsys.readouterr().err
    matrix, features = jobs.problem()
    with pytest.raises(InputError, match="kmeans cuml needs the CUDA backend"):
        gpu_init.initialize(matrix, {"text": features}, clusters=2, backend="cpu", kmeans="cuml")


# Memory.


def test_one_pool_for_all_libraries(cupy):
    device = select("cuda")
    assert type(device._memory.upstream) is stand_ins.CudaAsyncMemoryResource
    assert sys.modules["rmm.mr"].get_current_device_resource() is device._memory
    assert cupy.allocators == [sys.modules["rmm.allocators.cupy"].rmm_cupy_allocator]
    assert select("cuda")._memory is device._memory
    assert device.peak_memory() == {"peak_device_memory_bytes": 123}


def test_a_pool_that_is_there_stays(cupy):
    theirs = stand_ins.Resource()
    sys.modules["rmm.mr"].set_current_device_resource(theirs)
    assert select("cuda")._memory.upstream is theirs


@given(count=st.integers(0, 60), rows=st.integers(1, 8), failures=st.sets(st.integers(0, 30)))
def test_blocks_cover_every_row_once_whatever_runs_out(count, rows, failures):
    """The n-th call fails, for some n, unless it asks for the least."""
    calls, said = [], []
    device = CpuBackend("test", say=said.append)

    def make(part):
        calls.append(part)
        if len(calls) - 1 in failures and part.stop - part.start > 4:
            raise MemoryError("no room")
        return np.arange(part.start, part.stop)

    made = list(in_blocks(device, count, 4 * rows, 4, make))
    np.testing.assert_array_equal(np.concatenate([[], *(block for _, block in made)]), np.arange(count))
    assert all(part.start % 4 == 0 for part, _ in made)
    assert len(said) == len(calls) - len(made)


def test_the_least_block_that_does_not_fit_ends_it():
    def make(part):
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        list(in_blocks(CpuBackend("test"), 10, 4, 4, make))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_job_goes_on_with_half_the_rows(cupy, monkeypatch, capsys, tmp_path, dtype):
    jobs.write_job(tmp_path, users=3000)
    flags = ("--backend=cuda", "--clusters=3", "--users=9500", f"--dtype={dtype}")
    whole = jobs.run(tmp_path / "whole", tmp_path, *flags)
    capsys.readouterr()
    blend = method_blend.blend

    def fails(device, interactions, plan, part, *out):
        if part.stop - part.start > NORM_ROWS:
            raise RuntimeError("CUDA error: cudaErrorMemoryAllocation out of memory")
        return blend(device, interactions, plan, part, *out)

    monkeypatch.setattr(method_blend, "blend", fails)
    halved = jobs.run(tmp_path / "halved", tmp_path, *flags)
    for name in whole:
        np.testing.assert_array_equal(halved[name].users, whole[name].users)
        norms = [one.manifest["modalities"][name]["norms"] for one in (halved, whole)]
        assert norms[0] == norms[1]
    said = [line for line in jobs.messages(capsys.readouterr().err) if "memory ran out" in line]
    assert said
    assert all("rows at a time" in line for line in said)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("std::bad_alloc: out_of_memory"), "not enough memory: std::bad_alloc"),
        (stand_ins.RuntimeFailure("cudaErrorMemoryAllocation: out of memory"), "not enough memory: cudaErrorMem"),
        (stand_ins.RuntimeFailure("cudaErrorIllegalAddress: illegal"), "or a library for it, failed: cudaErrorIll"),
        (RuntimeError("CUDA error at: x.cu:3: unspecified launch failure"), "failed: CUDA error at"),
    ],
)
def test_failures_of_the_device_end_with_3(cupy, monkeypatch, capsys, tmp_path, error, said):
    jobs.write_job(tmp_path, users=500)

    def fails(*_):
        raise error

    monkeypatch.setattr(method_blend, "blend", fails)
    with pytest.raises(ResourceError, match=said) as caught, select("cuda").explained():
        fails()
    assert len(str(caught.value).splitlines()) == 2
    place = [f"--interactions={tmp_path}/clicks.parquet", f"--features=text={tmp_path}/text.npy"]
    assert jobs.main(["run", *place, f"--out={tmp_path}/out", "--backend=cuda"]) == 3
    assert said in capsys.readouterr().err
    matrix, features = jobs.problem()
    with pytest.raises(ResourceError, match=said):
        gpu_init.initialize(matrix, {"text": features}, backend="cuda")


def test_other_failures_stay_what_they_are(cupy):
    for error in (RuntimeError("dictionary changed size"), KeyError("cuda"), InputError("CUDA")):
        with pytest.raises(type(error)), select("cuda").explained():
            raise error


# Blocks on their way out.


def test_blocks_arrive_whole_and_in_order(cupy):
    """Each is read once the writer may no longer ask for more time: when the next one comes, or at the end."""
    device = select("cuda")
    held, written = [], []

    def write(block):
        written.extend(one.copy() for one in held)
        held[:] = [block]

    with device.outbox(5, 3, "float32", write) as outbox:
        for number in range(7):
            space = outbox.space(5 - number % 2)
            space[...] = number
            outbox.send(space[number % 3 :])
    written.extend(one.copy() for one in held)
    assert [set(block.ravel()) for block in written] == [{number} for number in range(7)]
    assert [len(block) for block in written] == [5 - number % 2 - number % 3 for number in range(7)]


def test_nothing_is_handed_over_after_an_error(cupy):
    written = []

    def fails():
        with select("cuda").outbox(5, 3, "float32", written.append) as outbox:
            outbox.send(outbox.space(5))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not written


# Reading in parts.


@given(st.lists(st.integers(0, 9)), st.integers(0, 20))
def test_row_groups_come_in_order_and_within_the_limit(rows, most):
    groups = list(row_groups(rows, most))
    assert [one for group in groups for one in group] == list(range(len(rows)))
    assert all(len(group) == 1 or sum(rows[one] for one in group) <= most for group in groups)
    pairs = itertools.pairwise(groups)
    assert all(sum(rows[one] for one in [*before, after[0]]) > most for before, after in pairs)


LINE = st.one_of(st.text("ab,é", max_size=6), st.just('"a\nb",c'), st.just('"x""y\n",d'), st.just(""))


@given(lines=st.lists(LINE), size=st.integers(8, 40), ended=st.booleans(), windows=st.booleans())
def test_text_is_cut_between_lines(lines, size, ended, windows):
    newline = "\r\n" if windows else "\n"
    text = f"head,er{newline}" + newline.join(lines) + newline * ended
    parts = list(text_parts(io.BytesIO(text.encode()), max(size, 9)))
    assert all(part.startswith(b"head,er\n") for part in parts)
    body = b"".join(part.removeprefix(b"head,er\n") for part in parts)
    whole = text.replace("\r\n", "\n").encode().removeprefix(b"head,er\n")
    assert body == whole
    longest = max((len(line.encode()) + 2 for line in lines), default=0)
    if longest < size:
        assert all(part.count(b'"') % 2 == 0 for part in parts)
        assert all(len(part) <= 3 * size + 9 for part in parts)


def test_an_open_quotation_mark_does_not_hold_the_rest_of_the_file():
    lines = [b"5 inch", b'5" nail', *[b"row %d" % number for number in range(500)]]
    parts = list(text_parts(io.BytesIO(b"name\n" + b"\n".join(lines)), 64))
    assert b"".join(part.removeprefix(b"name\n") for part in parts) == b"\n".join(lines)
    assert max(map(len, parts)) < 4 * 64


def test_a_byte_order_mark_is_no_part_of_a_name():
    assert list(text_parts(io.BytesIO(b"\xef\xbb\xbfa,b\n1,2"), 64)) == [b"a,b\n1,2"]


@pytest.mark.parametrize("name", ["clicks.parquet", "clicks.csv.gz"])
def test_a_broken_file_is_named(cupy, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x1f\x8bPAR1 and nothing else")
    with pytest.raises(InputError, match=name):
        list(select("cuda").batches(str(path), None if name.endswith("parquet") else ",", ["user_id"]))


@pytest.mark.parametrize("kind", ["text", "a dictionary", "long text"])
def test_parquet_text_that_is_not_utf8_is_refused(tmp_path, kind):
    """Pyarrow reads it, and only what uses it later would fail."""
    path, text = tmp_path / "clicks.parquet", "alpha" * (100 if kind == "long text" else 1)
    users = pa.array([text, "beta"] * 5)
    table = pa.table({"item_id": range(10), "user_id": users.dictionary_encode() if kind == "a dictionary" else users})
    pq.write_table(table, path, compression="NONE", use_dictionary=kind != "text", write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"alpha", b"al\xffha"))
    assert len(pq.read_table(path)) == 10
    with pytest.raises(InputError, match="clicks.parquet, column user_id: Invalid UTF8 .*; write the file again"):
        list(CpuBackend("test").batches(str(path), None, ["user_id", "item_id"]))
    assert len(next(CpuBackend("test").batches(str(path), None, ["item_id"]))) == 10


# What is missing, and the fix.


def missing(monkeypatch, **found):
    """What `missing_for_cuda` says of a machine."""
    found = {"driver": (12, 9), "cupy": ["cupy-cuda12x"], "importable": True, **found}
    monkeypatch.setattr(doctor, "_driver_version", lambda: found["driver"])
    monkeypatch.setattr(doctor, "distributions", lambda name: found["cupy"] if name == "cupy" else [])
    monkeypatch.setattr(doctor, "_importable", lambda name: found["importable"] is True or name in found["importable"])
    return doctor.missing_for_cuda()


def test_nothing_is_missing(cupy, monkeypatch):
    assert missing(monkeypatch) is None
    assert select("auto").name == "cuda"


@pytest.mark.parametrize(
    ("machine", "what", "fix"),
    [
        ({"driver": None}, "no NVIDIA driver", "--backend cpu"),
        ({"driver": (11, 8)}, "serves CUDA 11.8", "newer driver"),
        ({"importable": ["cupy"]}, "cudf, cuml cannot be imported", "pip install 'gpu-init[cuda12]'"),
        ({"importable": [], "driver": (13, 0)}, "cupy, cudf, cuml", "pip install 'gpu-init[cuda13]'"),
        (
            {"cupy": ["cupy-cuda12x", "cupy-cuda13x"]},
            "cupy-cuda12x and cupy-cuda13x are installed side by side",
            "pip uninstall --yes cupy-cuda12x cupy-cuda13x && pip install 'gpu-init[cuda12]'",
        ),
    ],
)
def test_what_is_missing_comes_with_the_fix(cupy, monkeypatch, capsys, tmp_path, machine, what, fix):
    found = missing(monkeypatch, **machine)
    assert what in found.what
    assert fix in found.fix
    jobs.write_job(tmp_path, users=100)
    place = [f"--interactions={tmp_path}/clicks.parquet", f"--features=text={tmp_path}/text.npy"]
    assert jobs.main(["run", *place, f"--out={tmp_path}/out", "--backend=cuda"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2
    assert what in said
    assert fix in said
    assert backend_select.select("auto").why == found.what


@pytest.mark.parametrize(
    ("device", "what", "fix"),
    [
        ({"devices": 0}, "the driver reports no device", "nvidia-smi"),
        ({"capability": (6, 1)}, "compute capability 6.1", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_devices_that_will_not_do(monkeypatch, programs, device, what, fix):
    stand_ins.install(monkeypatch, programs, stand_ins.Cupy(**device))
    found = missing(monkeypatch)
    assert what in found.what
    assert fix in found.fix


def test_a_driver_and_a_compiler_that_will_not_do(cupy, monkeypatch):
    def fails(*_):
        raise stand_ins.RuntimeFailure("cudaErrorInsufficientDriver: too old")

    monkeypatch.setattr(cupy.cuda, "nvrtc", types.SimpleNamespace(getVersion=fails))
    found = missing(monkeypatch)
    assert "NVRTC" in found.what
    assert "pip install 'gpu-init[cuda12]'" in found.fix
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fails)
    found = missing(monkeypatch)
    assert "cudaErrorInsufficientDriver" in found.what
    assert "pip install 'gpu-init[cuda12]'" in found.fix


def test_doctor_lists_devices_with_their_memory(cupy, capsys):
    assert jobs.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "a device, compute capability 9.0, 17.2 of 17.2 GB free" in said
    assert "ready, on device 0" in said
    for name in ("cupy", "cudf", "cuml", "rmm", "CUDA driver"):
        assert f"\n{name} " in said


def test_doctor_finds_two_packages_of_cupy(cupy, monkeypatch, capsys):
    missing(monkeypatch, cupy=["cupy-cuda12x", "cupy-cuda13x"])
    assert jobs.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "keep one: pip uninstall cupy-cuda12x or cupy-cuda13x" in said
    assert "CUDA backend  no: cupy-cuda12x and cupy-cuda13x" in said


def test_the_cpu_job_imports_no_library_for_a_device(tmp_path):
    jobs.write_job(tmp_path, users=100)
    arguments = ["run", f"--interactions={tmp_path}/clicks.parquet", f"--features=text={tmp_path}/text.npy"]
    arguments += [f"--out={tmp_path}/out", "--backend=cpu"]
    code = (
        f"import sys\nfrom gpu_init.cli import main\nassert main({arguments!r}) == 0\n"
        "print(sorted({'cupy', 'cudf', 'cuml', 'rmm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
